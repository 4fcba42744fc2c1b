"""The engine against an independent plain Hugging Face implementation, token for token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt, capture, sweep
from superscopes_tl.engine import NEAR_TIE
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings
from tests.support.spies import spied
from tests.support.tiny_models import ARCHITECTURES, tiny_hf

SOURCE = "Red Hot Chili Peppers"
TARGETS = {
    "last": TargetPrompt("Syria: Country in the Middle East, x"),
    "middle": TargetPrompt("Syria: Country, x is a band in the East"),
    "several": TargetPrompt("The x and the x of Peppers", "x"),
    "first": TargetPrompt("x: American rock band"),
    "long": TargetPrompt("Syria: Country in the Middle East, Red Hot Chili Peppers: band, x"),
}
LAYERS = (5, 2, 0)
ALPHAS = (0.5, 1.0, 3.0, 15.0)
N_NEW = 5

Tiny = Callable[[str, str], LanguageModel]


def _kinds(model: LanguageModel) -> list[str]:
    return [k for k in ("resid_mid", "mlp_out", "resid_post") if k in model.kinds]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cell_of_a_sweep_equals_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny, word_overlap: Any
) -> None:
    """Kinds x layers x alphas x target layers give the texts of one forward pass at a time."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    source = [0, *model.tokenizer.encode(SOURCE, add_special_tokens=False)]
    target = TARGETS["last"]
    ids = [0, *model.tokenizer.encode(target.text, add_special_tokens=False)]
    cells = different = 0
    for target_layer in (0, "same", 5):
        result = sweep(
            model, SOURCE, layers=LAYERS, kinds=_kinds(model), alphas=ALPHAS,
            target_layer=target_layer, target_prompt=target, max_new_tokens=N_NEW,
            scorer=word_overlap, progress=False,
        )  # fmt: skip
        for row in result.table.to_dict("records"):
            vector = plain_hf.source_vectors(hf, source, row["kind"], row["source_layer"])[-1]
            patch = ((len(ids) - 1,), row["alpha"] * vector, row["target_layer"])
            expected, _ = plain_hf.generate(hf, ids, *patch, n_new=N_NEW, eos=1)
            cells += 1
            if row["margin"] > NEAR_TIE:
                assert row["text"] == model.tokenizer.decode(expected, skip_special_tokens=True)
                assert row["n_tokens"] == len(expected), row
            else:
                different += 1
        same_layer = result.table["source_layer"] == result.table["target_layer"]
        assert same_layer.all() == (target_layer == "same")
    assert cells == 3 * len(_kinds(model)) * len(LAYERS) * len(ALPHAS)
    assert different <= cells // 50, "near ties must be the exception"
    assert result.table["text"].nunique() > 1, "a constant text would prove nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_vectors_equal_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Every captured kind and layer is what a hook on the original module sees."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    activations = capture(model, SOURCE, kinds=_kinds(model), layers=(5, 2))
    for kind in _kinds(model):
        for layer in (5, 2):
            expected = plain_hf.source_vectors(hf, list(activations.tokens.ids), kind, layer)
            torch.testing.assert_close(activations[kind, layer], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", TARGETS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_every_step_equal_plain_hugging_face(
    architecture: str, backend: str, place: str, tiny: Tiny
) -> None:
    """The cached, batched logits are those of a whole forward pass, to 1e-4 relative."""
    (model, spy), hf = spied(tiny(architecture, backend)), tiny_hf(architecture)
    # With a share of 0 rows keep their numbers.
    generator = PatchedGenerator(model, TARGETS[place], max_new_tokens=N_NEW, live_share=0)
    torch.manual_seed(3)
    patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in (5, 2, 0, 2)]
    generations = generator.generate(patches)
    ids, positions = list(generator.target.tokens.ids), generator.target.positions
    for row, (patch, generation) in enumerate(zip(patches, generations, strict=True)):
        new, logits = plain_hf.generate(
            hf, ids, positions, patch.vector, patch.target_layer, n_new=N_NEW, eos=1
        )
        assert list(generation.token_ids) == new
        for got, expected in zip(spy.seen, logits, strict=False):
            scale = expected.abs().max()
            assert (got[row] - expected).abs().max() / scale < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_a_placeholder_may_be_the_very_first_token(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Without a BOS there may be nothing to cache before the placeholder."""
    model = dataclasses.replace(tiny(architecture, backend), prefix_ids=())
    hf = tiny_hf(architecture)
    generator = PatchedGenerator(model, TARGETS["first"], max_new_tokens=N_NEW)
    assert generator.target.positions == (0,)
    torch.manual_seed(7)
    patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in (5, 2, 0)]
    ids = list(generator.target.tokens.ids)
    for patch, generation in zip(patches, generator.generate(patches), strict=True):
        new, _ = plain_hf.generate(
            hf, ids, (0,), patch.vector, patch.target_layer, n_new=N_NEW, eos=1
        )
        assert list(generation.token_ids) == new


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_end_of_text_ends_one_row_and_leaves_the_others(backend: str, tiny: Tiny) -> None:
    """A row ends at its EOS; the other rows of its batch are unchanged."""
    model = tiny("llama", backend)
    torch.manual_seed(5)
    patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in (5, 2, 0, 1, 3, 4)]
    whole = PatchedGenerator(model, TARGETS["last"], max_new_tokens=6).generate(patches)
    eos = whole[0].token_ids[2]
    ending = dataclasses.replace(model, eos_token_ids=(eos,))
    ended = PatchedGenerator(ending, TARGETS["last"], max_new_tokens=6).generate(patches)
    assert len(ended[0].token_ids) <= 2
    for before, after in zip(whole, ended, strict=True):
        upto = before.token_ids.index(eos) if eos in before.token_ids else 6
        assert after.token_ids == before.token_ids[:upto]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size_gives_the_same_table(
    backend: str, batch_size: int, tiny: Tiny, word_overlap: Any
) -> None:
    """Cells do not influence each other: the table does not depend on how they are batched."""
    settings: dict[str, Any] = {
        "layers": (5, 2), "alphas": (1, 3, 15), "target_layer": (4, 1), "max_new_tokens": 4,
        "target_prompt": TARGETS["middle"], "scorer": word_overlap, "progress": False,
    }  # fmt: skip
    one = sweep(tiny("qwen2", backend), SOURCE, batch_size=5, **settings).table
    other = sweep(tiny("qwen2", backend), SOURCE, batch_size=batch_size, **settings).table
    exact = ["kind", "source_layer", "target_layer", "alpha", "text", "description", "score"]
    assert_same_readings(one, other, exact)


def test_a_near_tie_is_recorded_in_the_margin(tiny: Tiny) -> None:
    """The margin is the smallest distance of the two best logits over the steps."""
    model = tiny("llama", "bridge")
    generator = PatchedGenerator(model, TARGETS["last"], max_new_tokens=3)
    hf = tiny_hf("llama")
    vector = torch.ones(model.d_model)
    generation = generator.generate([Patch(vector, 2)])[0]
    ids = list(generator.target.tokens.ids)
    _, logits = plain_hf.generate(hf, ids, generator.target.positions, vector, 2, n_new=3, eos=1)
    gaps = [float(torch.diff(step.topk(2).values).abs()) for step in logits]
    assert generation.margin == pytest.approx(min(gaps), abs=1e-3)
