"""Presets, against the formulas of the methods that they are named after."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from superscopes_tl import LanguageModel, SweepConfig, plan_sweep, sweep
from superscopes_tl.cli.main import app
from superscopes_tl.cli.options import Cells
from superscopes_tl.experiment import make_patches
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import PRESETS, Add
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf

PROMPT = "Red Hot Chili Peppers"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_oracle_preset_is_the_norm_matched_addition(architecture: str, tiny: object) -> None:
    """The text is that of h' = h + ‖h‖·v/‖v‖ after block 1, by hooks on plain Hugging Face."""
    model, hf = tiny(architecture, "bridge"), tiny_hf(architecture)  # type: ignore[operator]
    result = sweep(
        model, PROMPT, layers=(5, 2), kinds="mlp_out", max_new_tokens=4, scorer=no_scores,
        progress=False, **PRESETS["oracle"],
    )  # fmt: skip
    source = [0, *model.tokenizer.encode(PROMPT, add_special_tokens=False)]
    target = result.plan.generator.target  # type: ignore[union-attr]
    ids, at = list(target.tokens.ids), target.positions
    h = plain_hf.source_vectors(hf, ids, "resid_post", 1)[at[0]]
    assert len(at) == 1
    assert result.table["norm_ratio"].tolist() == pytest.approx([1, 1])
    for row in result.table.to_dict("records"):
        v = plain_hf.source_vectors(hf, source, "mlp_out", row["source_layer"])[-1]
        new, _ = plain_hf.generate(hf, ids, at, h + h.norm() * v / v.norm(), 1, n_new=4, eos=1)
        assert row["margin"] < 5e-5 or row["text"] == model.tokenizer.decode(new)


def test_every_preset_is_a_sweep(llama: LanguageModel) -> None:
    """Its settings are valid, and the vectors have the strength that its method states."""
    for name, settings in PRESETS.items():
        plan = plan_sweep(llama, PROMPT, layers=3, kinds="mlp_out", scorer=no_scores, **settings)
        patches = make_patches(plan)
        (into,) = {patch.target_layer for patch in patches}
        unit = patches[0].norm / abs(plan.alphas[0])
        assert [patch.norm / unit for patch in patches] == pytest.approx(plan.alphas)
        if plan.config.unit == "residual":
            assert unit == pytest.approx(float(plan.generator.placeholder_norms[into]))  # type: ignore[call-overload]
        assert {patch.keep for patch in patches} == {
            {"oracle": 1.0, "selfie": 1 - alpha}.get(name, 0.0) for alpha in plan.alphas
        }
    paper = SweepConfig(**PRESETS["superscopes"])
    assert paper == SweepConfig()


def test_a_preset_fills_in_what_other_options_leave_open() -> None:
    """An option that is given wins; an unknown preset is an error of one line."""
    found = Cells(preset="oracle").settings()
    assert (found["write"], found["unit"], found["target_layer"]) == (Add(), "residual", 1)
    assert Cells(preset="oracle", target_layer="embed").settings()["target_layer"] == ["embed"]
    assert Cells(preset="selfie", alphas="0.5").settings()["alphas"] == [0.5]
    assert Cells().settings() == Cells(preset="").settings()
    refused = CliRunner().invoke(app, ["sweep", PROMPT, "--preset", "oracel"])
    assert refused.exit_code == 2
    assert "--preset" in refused.output
