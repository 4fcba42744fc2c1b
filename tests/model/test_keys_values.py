"""Keys and values whose beginning is stored once behave as if every row had its own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt
from superscopes_tl.model import tokenize
from superscopes_tl.model.prefix_cache import RowBuffer, SharedPrefix
from tests.conftest import BACKENDS
from tests.support.tiny_models import ARCHITECTURES

TARGET = TargetPrompt("Syria: Country in the Middle East, x")

Tiny = Callable[[str, str], LanguageModel]


def _pair(seed: int, rows: int, heads: int, first: int, own: int) -> tuple[SharedPrefix, Any]:
    """Return both forms of keys of width 5: the common part stored once, and everything whole."""
    torch.manual_seed(seed)
    shared, rest = torch.randn(1, heads, first, 5), torch.randn(rows, heads, own, 5)
    whole = torch.cat([shared.expand(rows, -1, -1, -1), rest], dim=2)
    return SharedPrefix(shared, rest, -2), whole


sizes = {
    "seed": st.integers(0, 99),
    "rows": st.integers(1, 4),
    "heads": st.integers(1, 3),
    "first": st.integers(0, 6),
    "own": st.integers(1, 4),
}

WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda keys: keys,
    "positions before heads and back": lambda keys: keys.permute(0, 2, 1, 3).permute(0, 2, 1, 3),
    "every head repeated": lambda keys: torch.repeat_interleave(keys, 2, dim=1),
    "grouped heads expanded": lambda keys: (
        keys[:, :, None, :, :]
        .expand(keys.shape[0], keys.shape[1], 3, keys.shape[2], 5)
        .reshape(keys.shape[0], 3 * keys.shape[1], keys.shape[2], 5)
    ),
    "what it has no parts for": lambda keys: keys * 2 + 1,
}


@pytest.mark.parametrize("way", WAYS)
@given(**sizes)
def test_products_by_parts_are_products_with_the_whole(
    way: str, seed: int, rows: int, heads: int, first: int, own: int
) -> None:
    """Scores q·kᵀ and mixtures p·v are the same, however the keys were rearranged before."""
    shared, whole = _pair(seed, rows, heads, first, own)
    found, expected = WAYS[way](shared), WAYS[way](whole)
    assert found.shape == expected.shape
    queries = torch.randn(rows, expected.shape[1], 2, 5)
    pattern = torch.randn(rows, expected.shape[1], 2, first + own)
    for got, wanted in (
        (queries @ found.transpose(-1, -2), queries @ expected.transpose(-1, -2)),
        (torch.matmul(queries, found.transpose(2, 3)), queries @ expected.transpose(2, 3)),
        (pattern @ found, pattern @ expected),
    ):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@given(**sizes, steps=st.lists(st.integers(1, 3), max_size=3))
def test_a_buffer_grows_and_shrinks_like_a_list_of_rows(
    seed: int, rows: int, heads: int, first: int, own: int, steps: list[int]
) -> None:
    """Appending is concatenation along the positions; keeping rows is indexing."""
    torch.manual_seed(seed)
    shared = (torch.randn(1, heads, first, 5), torch.randn(1, heads, first, 5))
    buffer = RowBuffer(shared, rows, own + sum(steps))
    expected = [part.expand(rows, -1, -1, -1) for part in shared]
    kept = torch.arange(rows)
    for count in [own, *steps]:
        new = [torch.randn(len(kept), heads, count, 5) for _ in shared]
        found = buffer.append(new[0], new[1])
        expected = [torch.cat(pair, dim=2) for pair in zip(expected, new, strict=True)]
        assert buffer.length == expected[0].shape[2]
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got.whole(), wanted)
        kept = torch.arange(0, len(kept), 2)
        buffer.keep(kept)
        expected = [part[kept] for part in expected]


def test_a_full_buffer_takes_no_more() -> None:
    """More tokens than there is room for are an error, not numbers that get lost."""
    part = torch.zeros(1, 2, 3, 5)
    buffer = RowBuffer((part, part), 4, 2)
    new = torch.ones(4, 2, 1, 5)
    buffer.append(new, new)
    buffer.append(new, new)
    with pytest.raises(AssertionError, match="room"):
        buffer.append(new, new)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prefix_is_stored_once_for_all_rows(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """A batch of 50 rows adds room for what its rows write, and no copy of the prefix."""
    model = tiny(architecture, backend)
    prefix = model.decoder.prefill(tokenize(model, TARGET.text).tensor(model.device))
    cache = model.decoder.expand(prefix, 50, 4)
    layers = cache if backend == "hooked" else cache.layers
    for layer, parts in zip(layers, prefix, strict=True):
        for both, part in zip(layer.rows.all(), parts, strict=True):
            assert both.shared.data_ptr() == part.data_ptr()
            assert both.shape == (50, *part.shape[1:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_reads_the_prefix_by_parts(
    architecture: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In HookedTransformer no step makes the whole tensor of keys or values."""
    made: list[int] = []
    whole = SharedPrefix.whole

    def spy(self: SharedPrefix) -> torch.Tensor:
        made.append(1)
        return whole(self)

    monkeypatch.setattr(SharedPrefix, "whole", spy)
    if "hooked" not in BACKENDS:
        pytest.skip("this TransformerLens has no HookedTransformer")
    generator = PatchedGenerator(tiny(architecture, "hooked"), TARGET, max_new_tokens=3)
    generator.generate([Patch(torch.ones(generator.model.d_model), layer) for layer in (4, 2)])
    assert not made
