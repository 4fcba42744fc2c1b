"""Bases and units: f(v) = b + α(v − b), and lengths in residual norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, PatchedGenerator, SweepConfig, capture, plan_sweep, sweep
from superscopes_tl.experiment import Cell, make_patches
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import Add, AtLayers, Both, MeanActivation, PlaceholderState, ResidMid

PROMPT = "Red Hot Chili Peppers"
TEXTS = ("Pearl Jam", "Will Smith", "Titanic")


def _vectors(model: LanguageModel, scorer: Any, **settings: Any) -> dict[Any, torch.Tensor]:
    plan = plan_sweep(model, PROMPT, scorer=scorer, **settings)
    return dict(zip(plan.cells, (p.vector for p in make_patches(plan)), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bases_by_hand(architecture: str, tiny: Any, word_overlap: Any) -> None:
    """B + α(v − b) with b the mean of texts, the state before the MLP, or the placeholder's."""
    model = tiny(architecture, "bridge")
    generator = PatchedGenerator(model)
    own = capture(model, PROMPT)
    others = [capture(model, text) for text in TEXTS]
    for name, base in (
        ("mean", MeanActivation(TEXTS)),
        ("mid", ResidMid()),
        ("placeholder", PlaceholderState()),
    ):
        made = _vectors(
            model, word_overlap, layers=(5, 2), kinds=("mlp_out", "resid_post"),
            alphas=(0, 1, 3), target_layer=(4, 1), base=base,
        )  # fmt: skip
        for cell, vector in made.items():
            site, target_layer, alpha = *cell.place, cell.alpha
            v = own.at(site)
            b = {
                "mean": torch.stack([o[site.kind, site.layer][-1] for o in others]).mean(0),
                "mid": own["resid_mid", site.layer][site.position],
                "placeholder": generator.placeholder_states[target_layer].mean(0),
            }[name]
            torch.testing.assert_close(vector, b + alpha * (v - b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target_layer", [0, "same"])
def test_residual_units_make_the_norm_ratio_alpha(
    target_layer: Any, llama: LanguageModel, word_overlap: Any
) -> None:
    """`unit="residual"`: α = 1 is as long as what it replaces, at every target layer."""
    table = sweep(
        llama, PROMPT, layers=(5, 2), alphas=(0.5, 1, 4), target_layer=target_layer,
        unit="residual", max_new_tokens=3, scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    assert table["norm_ratio"].tolist() == pytest.approx(table["alpha"].tolist(), rel=1e-4)


def test_the_table_names_how_alpha_acts(llama: LanguageModel, word_overlap: Any) -> None:
    """Rows of different settings can be told apart in one table."""
    settings: dict[str, Any] = {
        "layers": 5, "kinds": "mlp_out", "alphas": 3, "scorer": word_overlap,
    }  # fmt: skip
    for extra, name in (
        ({}, "Scale()"),
        ({"base": ResidMid()}, "Scale(), from ResidMid()"),
        ({"base": MeanActivation(TEXTS)}, "Scale(), from MeanActivation(<3 texts 2d5333e8>)"),
        ({"unit": "residual"}, "Scale(), in residual norms"),
        ({"guide": "logits"}, "Scale(), on logits"),
        ({"write": Add()}, "Scale(), by Add()"),
        ({"write": Both(Add(), AtLayers(5, 2))}, "Scale(), by Both(Add(), AtLayers(5, 2))"),
    ):
        assert plan_sweep(llama, PROMPT, **settings, **extra).mapping_name == name


@pytest.mark.parametrize(
    "extra",
    [{"base": ResidMid()}, {"base": PlaceholderState()}, {"unit": "residual"}, {"guide": "logits"},
     {"draw": 3}],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_the_code_of_a_cell_reads_it_again(
    extra: dict[str, Any],
    llama: LanguageModel,
    llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Python that the Explorer shows prints the same text for every amplifier."""
    monkeypatch.chdir(llama_folder.parent)  # where the model's name is that of its folder
    result = sweep(
        llama, PROMPT, layers=5, kinds="mlp_out", alphas=3, max_new_tokens=5, scorer=no_scores,
        progress=False, **extra,
    )  # fmt: skip
    row = result.table.iloc[0]
    exec(compile(code_for(result, Cell.of(row)), "code", "exec"), {})
    assert repr(row["text"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting", [{"unit": "meter"}, {"guide": "both"}, {"draw": -1}, {"draw": 1.5}, {"base": 3}]
)
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    """By name, before anything is computed."""
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(setting))}: "):
        SweepConfig(**setting)


def test_a_base_of_another_shape_is_refused(tiny: Any, word_overlap: Any) -> None:
    """One vector per site is expected, as wide as the model."""

    def narrow(plan: Any, places: Any) -> torch.Tensor:
        return torch.zeros(len(places), 3)

    model = tiny("llama", "bridge")
    plan = plan_sweep(model, PROMPT, base=narrow, scorer=word_overlap, kinds="mlp_out")
    with pytest.raises(ValueError, match="^base: "):
        make_patches(plan)


def test_a_mean_needs_several_texts() -> None:
    """One text has no mean; a string is no list of texts."""
    for texts in (("Pearl Jam",), "Pearl Jam"):
        with pytest.raises(ValueError, match="^texts: "):
            MeanActivation(texts)
