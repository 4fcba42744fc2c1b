"""Controls: vectors in a cell's place that carry no meaning of its source."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from superscopes_tl import (
    CONTROLS,
    PAPER_PROMPTS,
    LanguageModel,
    Patch,
    PatchedGenerator,
    SweepConfig,
    SweepResult,
    iter_sweep,
    plan_sweep,
    sweep,
)
from superscopes_tl.engine import crop_description, description_is_over
from superscopes_tl.experiment import make_control, make_patches, rescored
from superscopes_tl.experiment.controls import OTHER_PROMPTS
from superscopes_tl.vectors import MeanActivation

PROMPT = "Red Hot Chili Peppers"
SETTINGS: dict[str, Any] = {
    "layers": (5, 2),
    "kinds": ("mlp_out", "resid_post"),
    "alphas": (1, 3, 9),
    "target_layer": 0,
}


@pytest.fixture(scope="module")
def controlled(llama: LanguageModel, word_overlap: Any) -> SweepResult:
    """A small sweep with every control."""
    return sweep(llama, PROMPT, controls=CONTROLS, scorer=word_overlap, progress=False, **SETTINGS)


def test_controls_are_columns_beside_the_same_readings(
    controlled: SweepResult, llama: LanguageModel, word_overlap: Any
) -> None:
    """A score and a text per control, and the readings are those of a sweep without controls."""
    plain = sweep(llama, PROMPT, scorer=word_overlap, progress=False, **SETTINGS).table
    assert list(controlled.table["text"]) == list(plain["text"])
    for name in CONTROLS[:-1]:
        for row in controlled.table.to_dict("records"):
            judged = crop_description(row[f"{name}_text"])
            if not judged:  # no description, no score
                assert math.isnan(row[name])
                continue
            assert row[name] == pytest.approx(word_overlap([PROMPT], [judged])[0])


def test_unpatched_and_alpha_zero_have_one_text(
    controlled: SweepResult, llama: LanguageModel
) -> None:
    """One text for all cells, without a patch; α = 0 patches zeros, as the paper's α·v does."""
    generator = PatchedGenerator(llama, until=description_is_over)
    assert set(controlled.table["unpatched_text"]) == {generator.unpatched().text}
    (zero,) = generator.generate([Patch(torch.zeros(llama.d_model), 0)])
    assert set(controlled.table["alpha_zero_text"]) == {zero.text}


def test_alpha_zero_with_a_base_is_the_base(llama: LanguageModel, word_overlap: Any) -> None:
    """f(v) = b + 0·(v − b) is b, one vector per layer."""
    base = MeanActivation(PAPER_PROMPTS[:3])
    plan = plan_sweep(llama, PROMPT, base=base, scorer=word_overlap, **SETTINGS)
    zero = make_control("alpha_zero", plan, plan.cells, make_patches(plan))
    places = [cell.place for cell in plan.cells]
    torch.testing.assert_close(torch.stack([p.vector for p in zero]), base(plan, places))


def test_random_and_shuffled_vectors_keep_the_norm(llama: LanguageModel, word_overlap: Any) -> None:
    """Equal length; the shuffled one has the same numbers; neither points where v does."""
    plan = plan_sweep(llama, PROMPT, scorer=word_overlap, **SETTINGS)
    patches = make_patches(plan)
    for name in ("random_direction", "shuffled_dimensions"):
        made = make_control(name, plan, plan.cells, patches)
        for patch, control in zip(patches, made, strict=True):
            torch.testing.assert_close(control.vector.norm(), patch.vector.norm())
            assert torch.cosine_similarity(patch.vector, control.vector, dim=0).abs() < 0.5
            if name == "shuffled_dimensions":
                assert torch.equal(control.vector.sort().values, patch.vector.sort().values)
        by_alpha = torch.stack([made[k].vector / made[k].vector.norm() for k in range(3)])
        torch.testing.assert_close(by_alpha, by_alpha[:1].expand(3, -1))  # one direction per site
        elsewhere = plan.at_prompt("Pearl Jam")
        other = make_control(name, elsewhere, elsewhere.cells, make_patches(elsewhere))
        assert torch.cosine_similarity(made[0].vector, other[0].vector, dim=0).abs() < 0.5


def test_other_prompt_is_the_vector_of_another_prompt(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """The same kind, layer and α at the last token of one other prompt, the same for all cells."""
    plan = plan_sweep(llama, PROMPT, scorer=word_overlap, **SETTINGS)
    made = make_control("other_prompt", plan, plan.cells, make_patches(plan))
    found = []
    for prompt in OTHER_PROMPTS:
        there = plan.only(plan.all_cells[:1]).at_prompt(prompt)
        if torch.equal(make_patches(there)[0].vector, made[0].vector):
            found.append(there)
    assert len(found) == 1
    assert found[0].source.text != PROMPT
    for patch, control in zip(make_patches(found[0]), made, strict=True):
        torch.testing.assert_close(control.vector, patch.vector)


def test_unpatched_log_probability_is_that_of_the_description(
    controlled: SweepResult, llama: LanguageModel
) -> None:
    """The description after the unpatched prompt is less likely than after the patched one."""
    rows = controlled.table[controlled.table["description"] != ""]
    assert (rows["unpatched_log_probability"] < 0).all()
    lift = rows["log_probability"] - rows["unpatched_log_probability"]
    assert lift.mean() > 0.5
    own = PatchedGenerator(llama).unpatched()
    zero = Patch(torch.zeros(llama.d_model), None)
    likely = PatchedGenerator(llama).log_probabilities([zero], [own.token_ids])[0]
    assert likely == pytest.approx(own.log_probabilities, abs=1e-4)


def test_rescored_judges_controls_too(
    controlled: SweepResult, llama: LanguageModel, word_overlap: Any
) -> None:
    """Another scorer's numbers everywhere, without a new text."""

    def length(references: Any, candidates: Any) -> list[float]:
        return [float(len(text)) for text in candidates]

    config = SweepConfig(**SETTINGS, controls=("unpatched", "other_prompt"), scorer=word_overlap)
    plan = plan_sweep(llama, PROMPT, config)
    readings = list(iter_sweep(llama, PROMPT, config, progress=False))
    for reading in rescored(plan.with_settings(scorer=length), readings):
        if reading.description:
            assert reading.score == len(reading.description)
        assert reading.controls["unpatched"] == len(
            crop_description(str(reading.controls["unpatched_text"]))
        )


def test_controls_survive_the_run_file(controlled: SweepResult, tmp_path: Any) -> None:
    """They are saved and loaded as the other columns are."""
    loaded = SweepResult.load(controlled.save(tmp_path / "run.zip"))
    assert list(loaded.table.columns) == list(controlled.table.columns)
    assert loaded.table["random_direction"].equals(controlled.table["random_direction"])
