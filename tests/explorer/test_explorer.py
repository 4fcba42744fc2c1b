"""The Explorer without a browser: widgets are plain objects whose messages go nowhere."""

from __future__ import annotations

import base64
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from superscopes_tl import (
    Explorer,
    LanguageModel,
    PatchedGenerator,
    SweepConfig,
    SweepResult,
    TargetPrompt,
    plan_sweep,
    sweep,
)
from superscopes_tl.experiment import Cell, make_patches
from superscopes_tl.explorer.cell import (
    Control,
    LensReading,
    Probe,
    TokenEffect,
    code_for,
    ladder,
    probe,
    reading_at,
)
from superscopes_tl.explorer.settings import alphas_text, parse_alphas
from superscopes_tl.figures import value_range
from superscopes_tl.vectors import in_units_of, placeholder_state, random_direction
from tests.explorer.test_background import hook_count
from tests.support.same import assert_same_readings

PROMPT = "Will Smith"
WAIT = 120


def flat(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    return [len(c) / 100 for c in candidates]


@pytest.fixture
def model(tiny: Callable[[str, str], LanguageModel]) -> LanguageModel:
    return tiny("llama", "bridge")


@pytest.fixture
def config() -> SweepConfig:
    return SweepConfig(alphas=(1, 3), max_new_tokens=4, scorer=flat)


@pytest.fixture
def explorer(model: LanguageModel, config: SweepConfig) -> Iterator[Explorer]:
    made = Explorer(model, PROMPT, config)
    yield made
    made.cancel()
    assert made.wait(WAIT)
    assert hook_count(model) == 0


@pytest.fixture
def ran(explorer: Explorer) -> Explorer:
    explorer.view.run.click()
    assert explorer.wait(WAIT)
    assert explorer.state == "done"
    return explorer


def shows(explorer: Explorer) -> str:
    return str(explorer.view.status.value)


def test_run_fills_the_map_and_chooses_the_best_cell(ran: Explorer) -> None:
    """After Run every cell is there, the best one is shown, and Run can be pressed again."""
    expected = sweep(ran.model, PROMPT, ran.config, progress=False)
    assert ran.result is not None
    assert_same_readings(ran.result.table, expected.table)
    best = expected.best().sort_values("score", ascending=False).iloc[0]
    assert ran.selection == Cell.of(best)
    assert "data-state='done' data-run='1'" in shows(ran)
    assert not ran.view.run.disabled
    assert ran.view.cancel.disabled
    figure = ran.view.stage.children[0]
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.meta for trace in heat] == ["resid_mid", "mlp_out", "resid_post"]
    shown = [score for trace in heat for row in trace.z for score in row]
    assert len(shown) == len(expected)


def test_controls_and_config_say_the_same(explorer: Explorer, config: SweepConfig) -> None:
    """What is set in Python shows in the controls, and the other way round."""
    assert explorer.config.alphas == (1, 3)
    assert explorer.view.alphas.value == "1, 3"
    explorer.config = SweepConfig(
        layers=(1, 2),
        kinds="mlp_out",
        alphas=(2, -0.5),
        positions=1,
        target_layer="same",
        target_prompt=TargetPrompt("_ means", "_"),
        score_on="text",
        scorer=flat,
        mapping=random_direction(3),
    )
    view = explorer.view
    assert view.layers.value == (1, 2)
    assert [kind for kind, box in view.kinds.items() if box.value] == ["mlp_out"]
    assert view.alphas.value == "2, -0.5"
    assert view.tokens.value == 1
    assert view.target.value == "same"
    assert (view.target_text.value, view.placeholder.value) == ("_ means", "_")
    assert explorer.config.mapping.__name__ == "random_direction(seed=3)"
    view.target.value = "fixed"
    view.fixed.value = 2
    view.score_on.value = "description"
    assert explorer.config.target_layer == 2
    assert explorer.config.score_on == "description"
    view.alpha_preset.value = "fine"
    assert len(explorer.config.alphas) == 13  # type: ignore[arg-type]
    view.target_preset.value = "identity"
    assert "hello" in explorer.config.target_prompt.text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": (0, 1, 3)}, "layers: expected every layer of a range, or every k-th"),
        ({"positions": slice(None)}, "positions: expected one token"),
        ({"target_layer": (0, 1)}, "target_layer: expected one layer"),
        ({"kinds": "resid"}, "kinds: expected"),
        ({"score_on": "words"}, "score_on: expected 'description' or 'text'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"scorer": 5}, "scorer: expected a callable"),
        (
            {"mapping": in_units_of(5.0), "target_layer": 0},
            r"mapping: expected in_units_of\(.*\), the model's own",
        ),
        (
            {"mapping": in_units_of(5.0), "target_layer": "same"},
            "expected one target layer, whose norm is meant",
        ),
        ({"target_prompt": TargetPrompt("a  x b", " x")}, "placeholder: expected no blanks"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_config_that_the_controls_cannot_show_is_refused(
    explorer: Explorer, setting: Any, message: str
) -> None:
    """It raises, says what to do, and changes nothing."""
    before = explorer.config
    others = {"layers": (1, 2), "kinds": "mlp_out", "alphas": 7, "positions": 0, **setting}
    with pytest.raises((ValueError, TypeError), match=message):
        explorer.config = SweepConfig(**others)
    assert explorer.config == before
    with pytest.raises(TypeError, match="config: expected a SweepConfig"):
        explorer.config = others  # type: ignore[assignment]


def test_another_model_that_is_asked_is_refused(
    explorer: Explorer, model: LanguageModel, mini: LanguageModel
) -> None:
    """Its layers and norms are not those of the controls: refused unloaded, not clamped."""
    before = explorer.config
    message = f"target_model: expected the model that is read, .*got {mini.name}.*Fix: leave it out"
    other = SweepConfig(target_model=mini, vectors=placeholder_state, target_layer=8)
    with pytest.raises(ValueError, match=message):
        explorer.config = other
    assert explorer.config == before
    with pytest.raises(ValueError, match=message):
        Explorer(model, PROMPT, other)
    with pytest.raises(ValueError, match=r"target_model: .*got no/such-model"):
        explorer.config = SweepConfig(target_model="no/such-model")


@pytest.mark.parametrize("alphas", [(1 / 3, 2), (0.1, 1e-7, 123456789), (1, 3, 6, 9, 12, 15)])
def test_amplifiers_come_back_exactly(explorer: Explorer, alphas: tuple[float, ...]) -> None:
    """What the text box shows means the same number, to the last digit."""
    explorer.config = SweepConfig(alphas=alphas)
    assert explorer.config.alphas == alphas
    assert parse_alphas(alphas_text(alphas)) == alphas
    assert alphas_text((1.0, 0.5, 12)) == "1, 0.5, 12"


def test_the_models_own_norm_comes_back_exactly(explorer: Explorer, model: LanguageModel) -> None:
    """An `in_units_of` of the norm that the control means is kept, digit by digit."""
    mapping = in_units_of(float(PatchedGenerator(model).placeholder_norms[2]))
    explorer.config = SweepConfig(mapping=mapping, target_layer=2)
    assert explorer.view.units.value == "norm"
    assert explorer.config.mapping is mapping
    explorer.view.fixed.value = 3
    assert explorer.config.mapping is not mapping


def test_tokens_are_chips_with_visible_spaces(explorer: Explorer) -> None:
    """One chip per token of the prompt; the last one is chosen; repeated labels are told apart."""
    explorer.prompt = "of of of"
    labels = [label for label, _ in explorer.view.tokens.options]
    assert "".join(labels[1:]) == "of·of·of"
    assert len(set(labels)) < len(labels)
    assert explorer.view.tokens.value == len(labels) - 1
    for index in range(len(labels)):
        explorer.view.tokens.index = index
        assert explorer.config.positions == index


def test_the_cost_is_estimated_before_the_run(explorer: Explorer) -> None:
    """Cells and seconds are shown without a run; a warm-up measures the seconds."""
    assert explorer.wait(WAIT)
    cells = explorer.model.n_layers * 3 * 2  # type: ignore[union-attr]
    assert f"{cells} cells" in explorer.view.estimate.value
    assert " s" in explorer.view.estimate.value.split("cells")[1]


def test_a_second_run_reuses_cells(ran: Explorer) -> None:
    """The status says how many came from the first run."""
    count = len(ran.result)  # type: ignore[arg-type]
    ran.view.alphas.value = "1, 3, 6"
    assert f"{count} of them from earlier runs" in ran.view.estimate.value
    ran.view.run.click()
    assert ran.wait(WAIT)
    assert f"{count} from earlier runs" in shows(ran)
    assert len(ran.result) == count * 3 // 2  # type: ignore[arg-type]


def test_cancel_keeps_what_is_finished(model: LanguageModel, tmp_path: Path) -> None:
    """Cancel during the first batch: that batch is shown, the rest is marked as not computed."""
    began, go_on = threading.Event(), threading.Event()

    def slow(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        began.set()
        assert go_on.wait(WAIT)
        return [0.5 for _ in candidates]

    made = Explorer(model, PROMPT, SweepConfig(max_new_tokens=2, batch_size=3, scorer=slow))
    assert made.wait(WAIT)
    made.view.run.click()
    assert began.wait(WAIT)
    # A change during the run is for the next one.
    made.view.alphas.value = "7"
    made.prompt = "Top Gun"
    made.view.cancel.click()
    go_on.set()
    assert made.wait(WAIT)
    assert made.state == "cancelled"
    assert len(made.result) == 3  # type: ignore[arg-type]
    assert set(made.result.table["prompt"]) == {PROMPT}  # type: ignore[union-attr]
    assert "Cancelled: 3 of" in shows(made)
    crosses = [t for t in made.view.stage.children[0].data if t.name == "not computed"]
    assert sum(len(t.x) for t in crosses) == model.n_layers * 3 * 6 - 3
    assert hook_count(model) == 0
    made.select(kind="mlp_out", layer=model.n_layers - 1, alpha=15)  # none of the finished cells
    made.view.show.value = "parts"
    assert "not computed" in made.view.stage.children[0].value
    for suffix in (".html", ".png", ".csv"):
        assert made.export(tmp_path / f"part{suffix}").stat().st_size


def test_cancel_from_python_waits_its_turn(explorer: Explorer) -> None:
    """It takes the lock that callbacks take: a run that ends meanwhile is not said to stop."""
    with explorer._guard.lock:
        cancelling = threading.Thread(target=explorer.cancel)
        cancelling.start()
        cancelling.join(0.2)
        assert cancelling.is_alive()
    cancelling.join(WAIT)
    assert not cancelling.is_alive()


def test_an_infinite_score_is_shown_as_an_error(model: LanguageModel) -> None:
    """The run fails with a message; the Explorer stays usable, with huge scores too."""
    scores = [math.inf]
    config = SweepConfig(alphas=(1, 3), max_new_tokens=4, scorer=lambda r, c: scores * len(c))
    made = Explorer(model, PROMPT, config)
    made.run().wait(WAIT)
    assert made.state == "failed"
    assert "scorer: expected finite scores, got inf" in shows(made)
    for score in (1e9, 1e308, -1e308, 0.5):
        scores[0] = score
        fresh = Explorer(model, PROMPT, config)
        fresh.run().wait(WAIT)
        assert fresh.state == "done"
        low, high = value_range(fresh.result.table, "score")  # type: ignore[union-attr,misc]
        assert low <= score <= high
        assert low < high


def test_a_saved_result_with_an_infinite_score_opens(
    model: LanguageModel, config: SweepConfig, tmp_path: Path
) -> None:
    """A file of an earlier version may hold one: it is shown, without a colour of its own."""
    result = sweep(model, PROMPT, config, progress=False)
    result.table.loc[0, "score"] = math.inf
    shown = Explorer.from_result(result)
    assert math.isfinite(value_range(result.table, "score")[1])
    for view in ("best", "parts", "all"):
        shown.view.show.value = view
        assert "role='alert'" not in shows(shown)
    assert shown.export(tmp_path / "a.png").stat().st_size


def test_a_bad_alpha_list_is_shown_and_raised(explorer: Explorer) -> None:
    """A click shows the message; the method raises it; nothing has run."""
    explorer.view.alphas.value = "1, two"
    assert "alphas: expected numbers" in explorer.view.estimate.value
    explorer.view.run.click()
    assert "role='alert'" in shows(explorer)
    assert "alphas: expected numbers with commas between them, got 1, two" in shows(explorer)
    assert explorer.state == "idle"
    assert not explorer.view.run.disabled
    with pytest.raises(ValueError, match="alphas: expected numbers"):
        explorer.run()
    explorer.view.alphas.value = "1"
    explorer.view.run.click()
    assert explorer.wait(WAIT)
    assert explorer.state == "done"


def test_an_empty_prompt_is_shown(explorer: Explorer) -> None:
    """The message says what to do, at the change and at Run; another prompt heals it."""
    explorer.view.prompt.value = "  "
    explorer.view.run.click()
    assert "role='alert'" in shows(explorer)
    assert "prompt: expected a text" in shows(explorer)
    explorer.view.prompt.value = "Top Gun"
    assert "role='status'" in shows(explorer)
    explorer.view.run.click()
    assert explorer.wait(WAIT)
    assert explorer.state == "done"


def test_a_scorer_that_raises_is_shown(model: LanguageModel) -> None:
    """The run fails with the scorer's message; with another scorer the next one works."""

    def broken(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        raise RuntimeError("<no> scores today")

    made = Explorer(
        model, PROMPT, SweepConfig(alphas=1, max_new_tokens=2), scorers={"b": broken, "f": flat}
    )
    made.view.scorer.value = broken
    made.run().wait(WAIT)
    assert made.state == "failed"
    assert "RuntimeError: " in shows(made)
    assert "&lt;no&gt; scores today" in shows(made)
    assert "traceback" in shows(made)
    made.view.scorer.value = flat
    made.run().wait(WAIT)
    assert made.state == "done"
    assert hook_count(model) == 0


def test_memory_that_runs_out_is_shown(
    model: LanguageModel, config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to make smaller; afterwards everything works again."""
    made = Explorer(model, PROMPT, config)
    assert made.wait(WAIT)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("superscopes_tl.engine.generation.PatchedGenerator.step", full)
        made.run().wait(WAIT)
    assert made.state == "failed"
    assert "MemoryError" in shows(made)
    assert "Fix: a shorter target prompt" in shows(made)
    assert hook_count(model) == 0
    made.run().wait(WAIT)
    assert made.state == "done"


def test_click_cursors_and_python_choose_the_same_cell(ran: Explorer) -> None:
    """Each way leads to the same selection, panel and outline."""
    from plotly.callbacks import InputDeviceState, Points

    figure = ran.view.stage.children[0]
    trace = next(t for t in figure.data if t.type == "heatmap" and t.meta == "mlp_out")
    points = Points(point_inds=[[1, 1]], xs=["3"], ys=["1"], trace_name="", trace_index=3)
    trace._dispatch_on_click(points, InputDeviceState())
    clicked = ran.selection
    assert clicked == Cell(clicked.position, "mlp_out", 1, 1, 3.0)  # type: ignore[union-attr]
    assert "data-cell='mlp_out/1/3'" in ran.view.detail.value
    ran.view.layer.value = 2
    ran.view.kind.value = "resid_post"
    ran.view.alpha.value = 1.0
    assert "data-cell='resid_post/2/1'" in ran.view.detail.value
    assert ran.select(kind="mlp_out", layer=1, alpha=3) == clicked
    assert (ran.view.kind.value, ran.view.layer.value, ran.view.alpha.value) == ("mlp_out", 1, 3.0)
    shape = figure.layout.shapes[0]
    assert (shape.xref, shape.x0, shape.y0) == ("x2", 0.5, 0.5)
    with pytest.raises(ValueError, match="selection: expected a cell"):
        ran.select(alpha=2)
    with pytest.raises(ValueError, match="select: expected kind"):
        ran.select(row=1)


def test_the_panel_shows_text_ladder_controls_and_token_effects(ran: Explorer) -> None:
    """What the panel says is what the table and the model say."""
    ran.select(kind="resid_post", layer=1, alpha=3)
    assert ran.wait(WAIT)
    reading = reading_at(ran.result, ran.selection)  # type: ignore[arg-type]
    assert f"{reading.norm_ratio:.2f}" in ran.view.detail.value  # type: ignore[union-attr]
    assert ran.view.ladder.value.count("<tr") == 3  # head and two α
    assert "unpatched" in ran.view.probe.value
    assert "random vector of equal norm" in ran.view.probe.value
    assert ran.view.probe.value.count("powers of ten") == 2 * reading.n_tokens  # type: ignore[union-attr]


def test_the_probe_weighs_each_token(model: LanguageModel, config: SweepConfig) -> None:
    """Unpatched greedy text is its own control; log-probabilities agree with a plain forward."""
    plan = plan_sweep(model, PROMPT, config)
    result = sweep(model, PROMPT, config, progress=False)
    reading = reading_at(result, Cell.of(result.table.iloc[5]))
    found = probe(plan, reading)  # type: ignore[arg-type]
    generator = plan.generator
    assert "".join(t.token for t in found.tokens) == reading.text  # type: ignore[union-attr]
    assert found.controls[0].text == generator.unpatched().text
    alone = replace(plan, finished=frozenset(plan.all_cells) - {Cell.of(reading)})  # type: ignore[arg-type]
    ids = generator.generate(make_patches(alone))[0].token_ids
    assert len(ids) == reading.n_tokens > 0  # type: ignore[union-attr]
    tokens = torch.tensor([[*generator.target.tokens.ids, *ids]])
    with torch.no_grad():
        logits = model.tl(tokens)[0].log_softmax(dim=-1)
    start = len(generator.target.tokens) - 1
    for step, (token, effect) in enumerate(zip(ids, found.tokens, strict=True)):
        assert effect.unpatched == pytest.approx(float(logits[start + step, token]), abs=1e-3)


def assert_escaped(*shown: str) -> None:
    """Nothing of what the next test writes is markup, and each place shows some of it."""
    for page in shown:
        assert "&lt;" in page
        for markup in ("<script>", "<img", "<b>&</b>"):
            assert markup not in page


def test_text_from_outside_is_escaped(
    model: LanguageModel, config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a prompt nor a generated text can bring markup into the page."""
    nasty = Probe(
        tokens=(TokenEffect("<img src=x>", -1.0, -2.0),),
        controls=(Control("<b>&</b>", "<b>&</b>", "<img src=x>", 0.1),),
        lenses=(LensReading("<b>&</b>", (("<img src=x>", 0.5),)),),
    )
    monkeypatch.setattr("superscopes_tl.explorer.panel.probe", lambda plan, reading, lenses: nasty)
    made = Explorer(model, "<script>alert(1)</script> x", config)
    made.run().wait(WAIT)
    assert "data-probe='done'" in made.view.probe.value
    made.pin()
    assert_escaped(made.view.probe.value, made.view.pins.value, made.view.caption.value)
    table = made.result.table.assign(description="<img src=x>", text="<b>&</b>")  # type: ignore[union-attr]
    shown = Explorer.from_result(SweepResult(table, made.result.provenance))  # type: ignore[union-attr]
    shown.pin()
    for view in ("best", "parts"):
        shown.view.show.value = view
        assert_escaped(shown.view.stage.children[-1].value)
    kept = shown.view
    assert_escaped(*(w.value for w in (kept.detail, kept.ladder, kept.code, kept.pins)))
    shown.view.show.value = "all"
    heat = [trace for trace in shown.view.stage.children[0].data if trace.type == "heatmap"]
    assert_escaped(*(hover for trace in heat for row in trace.customdata for hover in row))
    made.view.alphas.value = "<img src=x>"
    made.view.run.click()
    assert_escaped(shows(made), made.view.estimate.value)


def test_pins_stay_for_comparison(ran: Explorer) -> None:
    """Two pinned cells stand side by side until they are cleared."""
    for layer in (0, 1):
        ran.select(kind="mlp_out", layer=layer, alpha=1)
        ran.view.pin.click()
    assert len(ran.pins) == 2
    assert ran.view.pins.value.count("<article>") == 2
    ran.view.unpin.click()
    assert not ran.pins
    assert ran.view.pins.value == ""


def test_views(ran: Explorer) -> None:
    """Best α is the table of `by_layer`; the decomposition shows the three kinds."""
    ran.view.show.value = "best"
    best = ran.view.stage.children[1].value
    assert best.count("<tr>") == 1 + ran.model.n_layers  # type: ignore[union-attr]
    ran.view.best_alpha.value = 1.0
    assert "α = 1" in ran.view.stage.children[1].value
    ran.view.show.value = "parts"
    shown = ran.view.stage.children[0].value
    assert all(kind in shown for kind in ("resid_mid", "mlp_out", "resid_post"))
    ran.view.show.value = "all"
    heat = [trace for trace in ran.view.stage.children[0].data if trace.type == "heatmap"]
    shown = [score for trace in heat for row in trace.z for score in row if score is not None]
    assert sorted(shown) == sorted(ran.result.table["score"].dropna())  # type: ignore[union-attr]


def test_a_reloaded_page_gets_the_present_figure(ran: Explorer) -> None:
    """The state that a page reads when it is opened holds the scores, not the empty start."""
    figure = ran.view.stage.children[0]
    assert figure._widget_data[0]["z"] == figure._data[0]["z"]
    assert any(score is not None for row in figure._widget_data[0]["z"] for score in row)
    assert figure._widget_layout["shapes"]


def test_the_code_reads_exactly_this_cell(mini: LanguageModel) -> None:
    """Run as it stands, the code prints the cell's text and score."""
    result = sweep(mini, PROMPT, layers=(1, 2), alphas=(3,), progress=False)
    chosen = Cell.of(result.table.iloc[3])
    space: dict[str, Any] = {}
    exec(code_for(result, chosen), space)
    assert len(space["result"]) == 1
    reading = reading_at(result, chosen)
    assert space["table"]["text"].iloc[0] == reading.text  # type: ignore[union-attr]
    assert space["table"]["score"].iloc[0] == pytest.approx(reading.score, abs=1e-4)  # type: ignore[union-attr]


def test_the_code_names_what_differs_from_the_defaults(model: LanguageModel) -> None:
    """Another target prompt, mapping, scorer and protocol are all in it."""
    result = sweep(
        model, PROMPT, alphas=(2,), kinds="mlp_out", max_new_tokens=2, score_on="text",
        target_prompt=TargetPrompt("_ is", "_"), mapping=random_direction(1), scorer=flat,
        progress=False,
    )  # fmt: skip
    code = code_for(result, Cell.of(result.table.iloc[1]))
    for part in (
        "TargetPrompt('_ is', '_')", "mapping=random_direction(seed=1)", "score_on='text'",
        "scorer='flat'", "from superscopes_tl import load_model, random_direction, sweep",
    ):  # fmt: skip
        assert part in code
    compile(code, "code", "exec")


def test_the_ladder_has_every_alpha_of_a_site(model: LanguageModel, config: SweepConfig) -> None:
    """One row per α, smallest first."""
    result = sweep(model, PROMPT, config, progress=False)
    rows = ladder(result, Cell.of(result.table.iloc[0]))
    assert rows["alpha"].tolist() == [1.0, 3.0]


def test_a_saved_result_opens_without_a_model(ran: Explorer, tmp_path: Path) -> None:
    """Map, panel, code and export work; a run is refused."""
    best = ran.selection
    saved = SweepResult.load(ran.export(tmp_path / "run.zip"))
    shown = Explorer.from_result(saved)
    assert shown.state == "saved"
    assert shown.selection == best
    again = reading_at(saved, best)
    assert again.text == reading_at(ran.result, best).text  # type: ignore[union-attr,arg-type]
    assert "Opened without a model" in shown.view.probe.value
    assert shown.view.run.disabled
    assert shown.code == code_for(saved, shown.selection)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an Explorer with a model"):
        shown.run()
    with pytest.raises(ValueError, match="at least one cell"):
        Explorer.from_result(SweepResult.from_readings([], {}))


def test_a_saved_grid_has_cursors_for_token_and_target(
    model: LanguageModel, config: SweepConfig
) -> None:
    """Several tokens and target layers: one map at a time, chosen by the cursors."""
    result = sweep(
        model, PROMPT, alphas=(1, 2), positions=slice(None), target_layer=(0, 2), scorer=flat,
        max_new_tokens=2, progress=False,
    )  # fmt: skip
    shown = Explorer.from_result(result)
    assert shown.view.position.layout.display == shown.view.into.layout.display == ""
    shown.view.into.value = 2
    shown.view.position.value = 1
    chosen = shown.selection
    assert (chosen.position, chosen.target_layer) == (1, 2)  # type: ignore[union-attr]
    assert "into layer 2" in shown.view.caption.value
    shown.view.show.value = "best"
    table = result.table[(result.table["target_layer"] == 2) & (result.table["position"] == 1)]
    expected = SweepResult(table, result.provenance).by_layer()["mlp_out"]["score"]
    scores = re.findall(r"ssx-chip[^>]*>([^<]*)<", shown.view.stage.children[1].value)
    assert scores[1::3] == ["–" if math.isnan(s) else f"{s:.2f}" for s in expected]


@pytest.mark.parametrize("suffix", [".html", ".png", ".csv", ".parquet", ".zip"])
def test_export(ran: Explorer, tmp_path: Path, suffix: str) -> None:
    """Each format opens again with what opens it."""
    path = ran.export(tmp_path / f"out{suffix}")
    if suffix == ".csv":
        assert len(pd.read_csv(path)) == len(ran.result)  # type: ignore[arg-type]
    elif suffix == ".parquet":
        assert pd.read_parquet(path).equals(ran.result.table)  # type: ignore[union-attr]
    elif suffix == ".zip":
        assert SweepResult.load(path).table.equals(ran.result.table)  # type: ignore[union-attr]
    elif suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        page = path.read_text(encoding="utf-8")
        assert len(page) > 1_000_000, "plotly.js is inlined"
        assert "<script src=" not in page


def test_the_save_button_says_where_and_what_went_wrong(
    ran: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to download and the whole path, or a message; folders are for `export` alone."""
    monkeypatch.chdir(tmp_path)
    ran.view.format.value = ".csv"
    ran.view.file.value = "mine.csv"
    ran.view.save.click()
    assert f"Saved {(tmp_path / 'mine.csv').resolve()}" in ran.view.saved.value
    assert (tmp_path / "mine.csv").is_file()
    assert base64.b64encode(b"prompt,").decode()[:8] in ran.view.saved.value
    (tmp_path / "below").mkdir()
    for name in ("below/mine", "../mine", str(tmp_path / "other"), "below/"):
        ran.view.status.value = ""
        ran.view.file.value = name
        ran.view.save.click()
        assert "file name: expected a name without folders" in shows(ran)
    assert {path.name for path in tmp_path.rglob("*")} == {"mine.csv", "below"}
    assert not (tmp_path.parent / "mine.csv").exists()
    assert ran.export(tmp_path / "below" / "mine.csv").is_file()
    with pytest.raises(ValueError, match="path: expected a folder that exists"):
        ran.export("nowhere/mine.csv")
    with pytest.raises(ValueError, match="path: expected a file name that ends in"):
        ran.export("mine.pdf")


def test_nothing_to_export_before_a_run(explorer: Explorer, tmp_path: Path) -> None:
    """An empty result is refused with what to do."""
    with pytest.raises(ValueError, match="run a sweep first"):
        explorer.export(tmp_path / "a.png")


def test_clicks_from_two_threads_do_not_mix(explorer: Explorer) -> None:
    """Kernels run callbacks on several threads: cursors move during a run without an error."""
    explorer.run()
    deadline = time.monotonic() + WAIT
    while explorer._panel.axes is None and time.monotonic() < deadline:
        time.sleep(0.01)

    def poke(kind: str) -> None:
        for layer in (0, 1, 2, 0):
            explorer.select(kind=kind, layer=layer, alpha=1)

    threads = [threading.Thread(target=poke, args=(kind,)) for kind in ("mlp_out", "resid_post")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert explorer.wait(WAIT)
    assert explorer.state == "done"
    assert "role='alert'" not in shows(explorer) + explorer.view.probe.value


@pytest.mark.parametrize(
    ("text", "numbers"), [("1, 3", (1, 3)), ("1;3  6", (1, 3, 6)), ("-0.5,1e1", (-0.5, 10))]
)
def test_alphas_are_read_with_any_separator(text: str, numbers: tuple[float, ...]) -> None:
    """Commas, semicolons and spaces."""
    assert parse_alphas(text) == numbers


def test_the_first_display_is_quick_and_python_ends_in_peace() -> None:
    """Under 2 s after the import; ending at once, in the middle of the warm-up, is no crash."""
    code = (
        "import time\n"
        "from superscopes_tl import Explorer, load_model\n"
        "model = load_model('mini', backend='bridge')\n"
        "start = time.perf_counter()\n"
        "Explorer(model)._ipython_display_()\n"
        "print(time.perf_counter() - start)\n"
        "Explorer(model).run()"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 2


def test_alpha_in_units_of_the_residual_norm(explorer: Explorer) -> None:
    """α = 2 makes every vector twice as long as what it replaces; the code says so too."""
    explorer.view.units.value = "norm"
    explorer.view.target.value = 0
    explorer.view.alphas.value = "1, 2"
    explorer.run().wait(WAIT)
    assert explorer.state == "done"
    table = explorer.result.table  # type: ignore[union-attr]
    assert table["norm_ratio"].tolist() == pytest.approx(table["alpha"].tolist(), rel=1e-3)
    assert "mapping=in_units_of(" in explorer.code
    assert "import in_units_of, load_model, sweep" in explorer.code
    kept = explorer.config
    explorer.view.units.value = "vector"
    assert explorer.config.mapping.__name__ == "scale"
    explorer.config = kept
    assert explorer.view.units.value == "norm"
    explorer.view.target.value = "same"  # of each layer its own
    assert explorer.config.unit == "residual"
    explorer.run().wait(WAIT)
    table = explorer.result.table  # type: ignore[union-attr]
    assert table["norm_ratio"].tolist() == pytest.approx(table["alpha"].tolist(), rel=1e-3)
    explorer.config = explorer.config
    assert explorer.view.units.value == "norm"
