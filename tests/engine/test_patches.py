"""Ways to write a patch, sources of its vector, and the target model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from superscopes_tl import (
    LanguageModel,
    Patch,
    PatchedGenerator,
    Site,
    TargetPrompt,
    plan_sweep,
    sweep,
)
from superscopes_tl.engine.patch import patch_hooks
from superscopes_tl.experiment import Cell, make_patches
from tests.conftest import BACKENDS, tiny_model
from tests.support.plain_hf import blocks_of
from tests.support.same import assert_same_readings
from tests.support.spies import spied
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]

TWO = TargetPrompt("Syria: Country, x and x mean")
PROMPT = "Red Hot Chili Peppers"


def plain_next_token(hf: Any, ids: Sequence[int], positions: Sequence[int], patch: Patch) -> Tensor:
    """Return the next token's log-probabilities in plain Hugging Face, one forward pass."""
    vectors = patch.vector.expand(len(positions), -1)

    def write(module: Any, inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        for at, vector in zip(positions, vectors, strict=True):
            states[0, at] = patch.keep * states[0, at] + vector
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [blocks_of(hf)[layer].register_forward_hook(write) for layer in patch.layers]
    try:
        with torch.no_grad():
            logits = hf(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_to_write_is_what_plain_hugging_face_computes(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """One or several layers, one vector or one per placeholder, replaced or added: same numbers."""
    model = tiny(architecture, backend)
    generator = PatchedGenerator(model, TWO, max_new_tokens=3)
    torch.manual_seed(0)
    one, two = torch.randn(model.d_model) * 4, torch.randn(2, model.d_model) * 4
    patches = [
        Patch(one, 3),
        Patch(one, (2, 4)),
        Patch(two, 2),
        Patch(two, (3, 1), keep=1.0),
        Patch(0.3 * one, 2, keep=0.7),
        Patch(one, None),
    ]
    found = generator.next_token(patches)
    hf = tiny_hf(architecture)
    tokens, positions = generator.target.tokens.ids, generator.target.positions
    assert len(positions) == 2
    for patch, row in zip(patches, found, strict=True):
        expected = plain_next_token(hf, tokens, positions, patch)
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
    assert len({tuple(row.tolist()) for row in found}) == len(patches)


def test_the_next_token_is_the_first_of_the_text(llama: LanguageModel) -> None:
    """Greedy generation begins with the most likely next token, guided rows included."""
    generator = PatchedGenerator(llama, max_new_tokens=2, batch_size=2)
    torch.manual_seed(1)
    patches = [
        Patch(torch.randn(llama.d_model) * k, layer, guidance=w)
        for k, layer, w in ((4, 5, 1.0), (9, 2, 3.0), (2, 0, 0.5))
    ]
    likely = generator.next_token(patches)
    for generation, row in zip(generator.generate(patches, confidence=True), likely, strict=True):
        assert int(row.argmax()) == generation.token_ids[0]
        assert float(row.max()) == pytest.approx(generation.log_probabilities[0], abs=1e-3)


def test_a_row_does_not_depend_on_what_others_keep() -> None:
    """In half precision a replaced row stays replaced beside one that keeps an overflow."""
    model: Any = SimpleNamespace(
        n_layers=6, d_model=4, dtype=torch.float16, device=torch.device("cpu"), name="tiny"
    )
    patches = [Patch(torch.ones(4), 2), Patch(torch.full((4,), 4e4), 2, keep=0.5)]
    [(name, write)] = patch_hooks(model, patches, [0])
    old = torch.tensor([[[float("inf")] * 4], [[-4e4] * 4]], dtype=torch.float16)
    new = write(old, None)
    assert name == "blocks.2.hook_resid_post"
    assert new is not None
    assert new[0, 0].tolist() == [1.0] * 4
    # 0.5 · (−40000) + 40000, summed in float32 and rounded once
    assert new[1, 0].tolist() == [2e4] * 4


def test_a_share_that_is_no_number_is_refused(tiny: Tiny) -> None:
    """`keep` must be finite."""
    generator = PatchedGenerator(tiny("llama", "bridge"), TWO)
    with pytest.raises(ValueError, match="^keep:"):
        generator.generate([Patch(torch.zeros(32), 2, keep=float("nan"))])


def test_vectors_are_requested_once_for_all_places(tiny: Tiny, word_overlap: Any) -> None:
    """A source of vectors sees every (site, target layer) at once, and its name is recorded."""
    model = tiny("llama", "bridge")
    calls: list[Sequence[tuple[Site, int]]] = []

    def numbered(plan: Any, places: Sequence[tuple[Site, int]]) -> Tensor:
        calls.append(places)
        rows = torch.arange(len(places), dtype=torch.float32)
        return rows[:, None].expand(-1, model.d_model)

    plan = plan_sweep(
        model, PROMPT, layers=[5, 2], kinds=["mlp_out"], alphas=[1, 3], target_layer=[4, 1],
        vectors=numbered, scorer=word_overlap,
    )  # fmt: skip
    patches = dict(zip(plan.cells, make_patches(plan), strict=True))
    assert len(calls) == 1
    assert [(site.layer, target) for site, target in calls[0]] == [(5, 4), (2, 4), (5, 1), (2, 1)]
    for number, (site, target) in enumerate(calls[0]):
        assert float(patches[Cell.at(site, target, 3.0)].vector[0]) == 3 * number
    assert plan.mapping_name == "Scale(), of numbered"


def test_a_write_changes_the_patch_of_every_cell(tiny: Tiny, word_overlap: Any) -> None:
    """`write` gets the patch and its α; what it returns is run and its name recorded."""
    model = tiny("llama", "bridge")

    def half(patch: Patch, alpha: float) -> Patch:
        return replace(patch, keep=alpha / 2, target_layer=(2, 4))

    plan = plan_sweep(model, PROMPT, alphas=[1, 3], write=half, scorer=word_overlap)
    for cell, patch in zip(plan.cells, make_patches(plan), strict=True):
        assert (patch.keep, patch.layers) == (cell.alpha / 2, (2, 4))
    assert plan.mapping_name == "Scale(), by half"


@pytest.mark.parametrize(
    ("argument", "returned", "error"),
    [("write", None, TypeError), ("vectors", torch.zeros(1, 31), ValueError)],
    ids=["write", "vectors"],
)
def test_what_a_callable_returns_is_checked(
    argument: str, returned: Any, error: type[Exception], tiny: Tiny, word_overlap: Any
) -> None:
    """A source of vectors or a write that returns something else is refused by name."""
    settings_: dict[str, Any] = {argument: lambda *given: returned, "scorer": word_overlap}
    with pytest.raises(error, match=f"^{argument}:"):
        sweep(tiny("llama", "bridge"), PROMPT, progress=False, **settings_)


def test_the_target_model_may_be_another(tiny: Tiny, word_overlap: Any) -> None:
    """The model itself in another wrapper reads the same, and the result names both."""
    model, other = tiny("llama", BACKENDS[0]), tiny("llama", "bridge")
    other = replace(other, name="the other")
    settings: dict[str, Any] = {"layers": [5, 2], "scorer": word_overlap, "progress": False}
    alone = sweep(model, PROMPT, **settings)
    both = sweep(model, PROMPT, target_model=other, **settings)
    assert_same_readings(both.table, alone.table, ["text"])
    assert set(both.table["mapping"]) == {"Scale(), into the other"}
    assert both.provenance["target_model"]["name"] == "the other"
    assert alone.provenance["target_model"] is None


@settings(max_examples=12, deadline=None)
@given(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=12), size=st.integers(1, 4))
def test_equal_patches_are_generated_once_and_in_order(numbers: list[int], size: int) -> None:
    """Whatever repeats where, every patch gets its own text, and no row is computed twice."""
    model, spy = spied(tiny_model("llama", "bridge"))
    generator = PatchedGenerator(model, TWO, max_new_tokens=2, batch_size=size)
    torch.manual_seed(3)
    vector = torch.randn(model.d_model) * 5
    kinds = [  # each differs from the first in one thing alone
        Patch(vector, 2),
        Patch(vector, (1, 3)),
        Patch(vector, 2, keep=1.0),
        Patch(vector, 2, guidance=2.0),
        Patch(vector, 2, seed=7),
        Patch(-vector, 2),
        Patch(vector, None),
    ]
    alone = [generator.generate([kind])[0].token_ids for kind in kinds]
    spy.batches = []
    copies = [replace(kinds[n], vector=kinds[n].vector.clone()) for n in numbers]
    assert [text.token_ids for text in generator.generate(copies)] == [alone[n] for n in numbers]
    twins = int(3 in numbers)  # of the guided row
    assert sum(spy.batches) == len(set(numbers)) + twins
    assert max(spy.batches) <= size + twins
