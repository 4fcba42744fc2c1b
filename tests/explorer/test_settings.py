"""Between the controls and a `SweepConfig`, both ways. Widgets are plain objects here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import (
    CHAT_PROMPT,
    DESCRIPTION_PROMPT,
    Explorer,
    LanguageModel,
    SweepConfig,
    TargetPrompt,
    plan_sweep,
)
from superscopes_tl.explorer.settings import alphas_text, parse_alphas
from superscopes_tl.vectors import PlaceholderState, RandomDirection
from tests.explorer.conftest import WAIT, finished
from tests.support.scorers import by_length

BAND = "Red Hot Chili Peppers"


def test_controls_and_config_agree(explorer: Explorer) -> None:
    """What is set in Python shows in the controls, and the other way round."""
    mapping = RandomDirection(3)
    explorer.config = SweepConfig(
        layers=(1, 2), kinds="mlp_out", alphas=(2, -0.5), positions=1, target_layer="same",
        target_prompt=TargetPrompt("_ means", "_"), score_on="text", scorer=by_length,
        mapping=mapping,
    )  # fmt: skip
    view = explorer.view
    assert view.layers.value == (1, 2)
    assert [kind for kind, box in view.kinds.items() if box.value] == ["mlp_out"]
    assert view.alphas.value == "2, -0.5"
    assert (view.tokens.value, view.target.value, view.unit.value) == (1, "same", "vector")
    assert (view.target_text.value, view.placeholder.value) == ("_ means", "_")
    assert explorer.config.mapping == mapping
    view.target.value = "fixed"
    view.fixed.value = 2
    view.score_on.value = "description"
    view.alpha_preset.value = "fine"
    view.target_preset.value = "identity"
    config = explorer.config
    assert (config.target_layer, config.score_on, len(config.alphas)) == (2, "description", 13)  # type: ignore[arg-type]
    assert "hello" in config.target_prompt.text  # type: ignore[union-attr]
    explorer.config = replace(config, target_layer="embed")
    assert (view.target.value, explorer.config.target_layer) == ("embed", "embed")


@pytest.mark.parametrize(
    ("argument", "setting"),
    [
        ("layers", {"layers": (0, 1, 3)}),
        ("positions", {"positions": slice(None)}),
        ("target_layer", {"target_layer": (0, 1)}),
        ("kinds", {"kinds": "resid"}),
        ("score_on", {"score_on": "words"}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("scorer", {"scorer": 5}),
        ("target_prompt.placeholder", {"target_prompt": TargetPrompt("a  x b", " x")}),
        ("target_model", {"target_model": "no/such-model", "vectors": PlaceholderState()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_the_controls_cannot_show_is_refused(
    explorer: Explorer, argument: str, setting: Any
) -> None:
    """It raises, before any other model is loaded, and changes nothing."""
    before = explorer.config
    others = {"layers": (1, 2), "kinds": "mlp_out", "alphas": 7, "positions": 0, **setting}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}:"):
        explorer.config = SweepConfig(**others)
    with pytest.raises(TypeError, match="^config:"):
        explorer.config = others  # type: ignore[assignment]
    assert explorer.config == before


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_amplifiers_come_back_exactly(alphas: list[float]) -> None:
    """The text box shows the same numbers, to the last digit; it takes any separator."""
    assert parse_alphas(alphas_text(alphas)) == tuple(alphas)
    assert alphas_text((1.0, 0.5, 12)) == "1, 0.5, 12"
    assert parse_alphas("1;3  -6,1e1") == (1, 3, -6, 10)


def test_tokens_are_chips_with_visible_spaces(explorer: Explorer) -> None:
    """One chip per token; the last one is selected; repeated labels are kept apart."""
    explorer.prompt = "of of of"
    labels = [label for label, _ in explorer.view.tokens.options]
    assert "".join(labels[1:]) == "of·of·of"
    assert len(set(labels)) < len(labels)
    assert explorer.view.tokens.value == len(labels) - 1
    for index in range(len(labels)):
        explorer.view.tokens.index = index
        assert explorer.config.positions == index


def test_alpha_in_units_of_the_residual_norm(explorer: Explorer) -> None:
    """α = 2 makes every vector twice as long as what it replaces; the code says so too."""
    explorer.view.unit.value = "residual"
    explorer.view.alphas.value = "1, 2"
    for target in (0, "same"):
        explorer.view.target.value = target
        assert explorer.config.unit == "residual"
        table = finished(explorer).result.table  # type: ignore[union-attr]
        assert table["norm_ratio"].tolist() == pytest.approx(table["alpha"].tolist(), rel=1e-3)
        assert "unit='residual'" in explorer.code
    explorer.config = replace(explorer.config, unit="vector")
    assert explorer.view.unit.value == "vector"
    explorer.config = replace(explorer.config, unit="residual")
    assert (explorer.view.unit.label, explorer.config.unit) == ("the residual norm", "residual")


def test_every_kth_layer_comes_back(explorer: Explorer) -> None:
    """A range with a step is what the two controls show."""
    for layers in ((3,), (1, 3), (0, 3), (1, 2, 3), (0, 2)):
        explorer.config = replace(explorer.config, layers=layers)
        assert explorer.config.layers == layers


def test_the_constructor_takes_a_sweeps_keywords(chatty: LanguageModel) -> None:
    """They change its config, and show in the controls."""
    given = SweepConfig(kinds="attn_out", chat=True)
    made = Explorer(chatty, BAND, given, kinds="mlp_out", layers=range(0, 6, 2))
    config = made.config
    assert (config.kinds, config.layers, config.chat) == (("mlp_out",), (0, 2, 4), True)
    assert (made.view.layers.value, made.view.step.value) == ((0, 4), 2)
    assert made.view.target_preset.value == "question (chat)"


def test_all_settings_with_a_control_come_back(chatty: LanguageModel) -> None:
    """What is read from the controls is what was given, for a config and after another prompt."""
    config = SweepConfig(
        layers=(1, 3), alphas=(1, 2), positions="Hot", source_template="Tell me about {}",
        reference="a band", generate="best", chat=True, unit="residual",
    )  # fmt: skip
    made = Explorer(chatty, BAND, config)
    plans = [plan_sweep(chatty, BAND, replace(c, scorer=by_length)) for c in (config, made.config)]
    assert plans[0].sites == plans[1].sites
    assert plans[0].abouts == plans[1].abouts
    again = made.config
    for name in ("source_template", "reference", "generate", "chat", "unit", "target_prompt"):
        assert getattr(again, name) == getattr(config, name)
    assert again.about == "Hot"
    made.config = again
    assert made.config == again
    made.prompt = "Syria"
    assert (made.config.about, made.config.reference) == (None, None)
    several = {BAND: "a band", "Syria": "a country"}
    made.config = SweepConfig(reference=several)
    assert made.view.reference.value == "a country"
    assert made.view.reference.disabled
    assert made.config.reference == several


def test_the_chat_control_changes_tokens_and_question(chatty: LanguageModel) -> None:
    """A tick puts both prompts in the template and asks the question; custom texts stay."""
    made = Explorer(chatty, BAND)
    view = made.view
    assert (view.target_preset.value, made.config.target_prompt) == ("description (paper)", None)
    plain = len(view.tokens.options)
    view.tokens.value -= 1
    label = view.tokens.label
    view.chat.value = True
    assert view.tokens.label.strip("·") == label.strip("·")
    assert view.presets[view.target_preset.value] == CHAT_PROMPT
    assert len(view.tokens.options) > plain
    assert "role='alert'" not in view.status.value
    view.chat.value = False
    assert view.presets[view.target_preset.value] == DESCRIPTION_PROMPT
    assert len(view.tokens.options) == plain
    view.target_preset.value = "custom"
    view.target_text.value = "Who is x?"
    view.chat.value = True
    assert made.config.target_prompt == TargetPrompt("Who is x?")
    view.template.value = "Tell me about"
    assert "source_template: " in view.status.value
    view.template.value = "Tell me about {}"
    assert "role='status'" in view.status.value
    assert made.config.source_template == "Tell me about {}"


def test_the_cost_is_estimated_before_the_run(explorer: Explorer) -> None:
    """Cells and seconds are shown without a run; a warm-up measures the seconds."""
    assert explorer.view.chat.layout.display == "none"  # a model without a chat template
    assert "question (chat)" not in explorer.view.target_preset.options
    assert explorer.wait(WAIT)
    cells = explorer.model.n_layers * 3 * 2  # type: ignore[union-attr]
    assert f"{cells} cells" in explorer.view.estimate.value
    assert " s" in explorer.view.estimate.value.split("cells")[1]
