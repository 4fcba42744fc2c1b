"""A vector for each placeholder, and the difference of two models: both by plain Hugging Face."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, TargetPrompt, load_model, plan_sweep, sweep
from superscopes_tl.experiment import make_control, make_patches, other_prompts
from superscopes_tl.model import tokenize
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import Accumulated, Add, MinusModel, PlaceholderState, Span
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import random_hf, sharp_llama, tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]
PROMPT = "Red Hot Chili Peppers"
THREE = TargetPrompt("Syria: Country in the Middle East, _ _ of _", "_")
NEAR_TIE = 5e-5
ASKED: dict[str, Any] = {"target_prompt": THREE, "scorer": no_scores, "vectors": Span()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_of_a_span_is_patched_at_its_own_placeholder(backend: str, tiny: Tiny) -> None:
    """The text is that of plain Hugging Face with three different vectors in their order."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    found = sweep(
        model, PROMPT, layers=(5, 2), kinds=("mlp_out", "resid_post"), alphas=(1, 3),
        target_layer=(0, 4), positions=(-1, 3), max_new_tokens=3, progress=False, **ASKED,
    )  # fmt: skip
    source = list(tokenize(model, PROMPT).ids)
    assert found.plan is not None
    target = found.plan.generator.target
    for row in found.table.to_dict("records"):
        seen = plain_hf.source_vectors(hf, source, row["kind"], row["source_layer"])
        end = row["position"] + 1
        vectors = row["alpha"] * seen[end - 3 : end]
        ids, at = list(target.tokens.ids), target.positions
        new, _ = plain_hf.generate(hf, ids, at, vectors, row["target_layer"], n_new=3, eos=1)
        if row["margin"] > NEAR_TIE:
            assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True)
        assert row["vector_norm"] == pytest.approx(float(vectors.norm(dim=-1).mean()), rel=1e-4)
    assert len(found.table) == 2 * 2 * 2 * 2 * 2
    assert set(found.table["mapping"]) == {"Scale(), of Span()"}


def test_what_a_span_recovers_is_that_of_plain_hugging_face(llama: LanguageModel) -> None:
    """The own words after three vectors; of a single placeholder a span is the site itself."""
    asked: dict[str, Any] = {
        "layers": 5, "kinds": "resid_post", "alphas": 1, "target_layer": 2, "generate": "none",
        "progress": False,
    }  # fmt: skip
    found = sweep(llama, PROMPT, **ASKED, **asked)
    assert found.plan is not None
    target, (patch,) = found.plan.generator.target, make_patches(found.plan)
    assert patch.vector.shape == (3, llama.d_model)
    (words,) = found.plan.own_words([found.plan.cells[0].position]).values()
    nats = plain_hf.log_probability(
        sharp_llama(), list(target.tokens.ids), list(words.token_ids),
        (target.positions, patch.vector, 2),
    )  # fmt: skip
    recovered = found.table["recovered"].iloc[0]
    assert recovered == pytest.approx(words.recovered(nats), rel=1e-2, abs=1e-2)
    one = TargetPrompt("Syria: Country in the Middle East, x")
    single, plain = (
        sweep(llama, PROMPT, target_prompt=one, scorer=no_scores, vectors=vectors, **asked).table
        for vectors in (Span(), None)
    )
    assert single["recovered"].iloc[0] == pytest.approx(plain["recovered"].iloc[0], abs=1e-4)


def test_the_unit_the_base_and_the_controls_hold_for_each_vector(llama: LanguageModel) -> None:
    """Every vector has the norm of the state that it replaces; random ones have equal norms."""
    asked: dict[str, Any] = {"layers": (5, 2), "kinds": "mlp_out", "target_layer": (1, 3), **ASKED}
    plan = plan_sweep(llama, PROMPT, unit="residual", alphas=2, write=Add(), **asked)
    patches = make_patches(plan)
    states = plan.generator.placeholder_states
    for cell, patch in zip(plan.cells, patches, strict=True):
        norms = states[cell.target_layer].norm(dim=-1)
        torch.testing.assert_close(patch.vector.norm(dim=-1), 2 * norms)
        assert patch.keep == 1
    random = make_control("random_direction", plan, plan.cells, patches)
    for one, other in zip(patches, random, strict=True):
        torch.testing.assert_close(one.vector.norm(dim=-1), other.vector.norm(dim=-1))
        alike = torch.cosine_similarity(other.vector[:1], other.vector[1:], dim=-1)
        assert alike.abs().max() < 0.6, "three directions, not one"
    other = make_control("other_prompt", plan, plan.cells, patches)
    name = other_prompts(plan, plan.cells[0].position, patches)[0]
    there = plan.at_prompt(name)
    assert len(there.source.own) >= 3
    for one, same in zip(make_patches(there), other, strict=True):
        torch.testing.assert_close(one.vector, same.vector)
    based = plan_sweep(llama, PROMPT, base=PlaceholderState(), alphas=(0, 1), **asked)
    for cell, patch in zip(based.cells, make_patches(based), strict=True):
        if cell.alpha == 0:
            expected = states[cell.target_layer].mean(dim=0).expand(3, -1)
            torch.testing.assert_close(patch.vector, expected)


def test_a_span_longer_than_the_prompt_is_refused(llama: LanguageModel) -> None:
    """In one line, with the token and the number of placeholders; so is a source of other shape."""
    plan = plan_sweep(llama, PROMPT, layers=2, positions=1, **ASKED)
    with pytest.raises(ValueError, match=r"^positions: .*3 placeholders, got token 1 of"):
        make_patches(plan)
    wrong = plan.with_settings(vectors=lambda run, places: torch.zeros(len(places), 2, 32))
    with pytest.raises(ValueError, match=r"^vectors: .*\(3, 3, 32\)"):
        make_patches(wrong)


@pytest.fixture(scope="module")
def tuned() -> tuple[LanguageModel, LanguageModel, torch.Tensor]:
    """A model with another MLP bias in block 2 and another unembedding, its base, the change."""
    base = random_hf("gpt2")
    hf, change = copy.deepcopy(base), torch.linspace(-1, 1, 32)
    with torch.no_grad():
        hf.transformer.h[2].mlp.c_proj.bias += change
    mine, other = (load_model(one, tiny_tokenizer(), backend="bridge") for one in (hf, base))
    return mine, other, change


def test_the_difference_of_two_models(
    tuned: tuple[LanguageModel, LanguageModel, torch.Tensor],
) -> None:
    """Nothing below the change, the change itself there, and above it plain Hugging Face's."""
    mine, other, change = tuned
    plan = plan_sweep(mine, PROMPT, kinds=("mlp_out", "resid_post"), scorer=no_scores, alphas=1,
                      positions=(-1, 2), target_layer=0, vectors=MinusModel(other))  # fmt: skip
    found = {
        cell.site: patch.vector for cell, patch in zip(plan.cells, make_patches(plan), strict=True)
    }
    for site, vector in found.items():
        if site.layer < 2:
            torch.testing.assert_close(vector, torch.zeros(32), atol=1e-5, rtol=0)
        elif site.layer == 2:
            torch.testing.assert_close(vector, change, atol=1e-4, rtol=0)
    ids = list(plan.source.ids)
    both = [
        plain_hf.source_vectors(one.tl.original_model, ids, "resid_post", 5)
        for one in (mine, other)
    ]
    for site, vector in found.items():
        if (site.kind, site.layer) == ("resid_post", 5):
            expected = (both[0] - both[1])[site.position]
            torch.testing.assert_close(vector, expected, atol=1e-3, rtol=1e-3)
    same = plan.with_settings(vectors=MinusModel(mine))
    assert all(float(patch.vector.norm()) == 0 for patch in make_patches(same))


def test_models_are_subtracted_by_value(
    tuned: tuple[LanguageModel, LanguageModel, torch.Tensor], llama: LanguageModel
) -> None:
    """Equal if the weights are; named in the table; another process loads what a folder holds."""
    mine, other, _ = tuned
    assert MinusModel(other) == MinusModel(other) != MinusModel(mine)
    assert repr(MinusModel(other)) == f"MinusModel({other.name!r}, {other.fingerprint})"
    sent = pickle.loads(pickle.dumps(MinusModel(llama)))
    assert sent == MinusModel(llama)
    with pytest.raises(ValueError, match="^base: expected a model that another process can load"):
        pickle.dumps(MinusModel(other))
    wider = load_model(random_hf("gpt2", width=64), tiny_tokenizer(), backend="bridge")
    plan = plan_sweep(mine, PROMPT, layers=2, scorer=no_scores, vectors=MinusModel(wider))
    with pytest.raises(ValueError, match=r"^base: .*width 32 .*width 64"):
        make_patches(plan)
    assert Accumulated() != Span() == Span()
