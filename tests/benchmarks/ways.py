"""The ways to compute cells that are measured beside each other.

Each is a function from cells to the new tokens of each, without the one that ends a text. Those
that take one cell at a time patch in a hook while the prompt is run, and let the library's own
`generate` do the rest.

The limit is what a loop around a Hugging Face model can do that has nothing else to do:

1. Run the target prompt up to the placeholder once.
2. Copy its keys and values into buffers with a row per cell and room for all that follows. The
   buffers are kept: the next batch of as many rows only overwrites what follows the placeholder.
3. Run the rest of the prompt with a plain forward hook per target layer, then one token per step,
   the most likely one, a fixed number of times. No row is looked at before the end.
4. Of as many rows per batch as the engine takes, and all cells in one batch, the faster counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from superscopes_tl import PatchedGenerator
from superscopes_tl.model import hook_name
from tests.benchmarks.work import Cell
from tests.support.plain_hf import blocks_of

Tokens: TypeAlias = tuple[int, ...]
Run: TypeAlias = Callable[[Sequence[Cell]], list[Tokens]]


def until_end(ids: Sequence[int], eos: Sequence[int]) -> Tokens:
    """Return the tokens before the first one that ends a text."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])


def one_generate_per_cell(hf: Any, generator: PatchedGenerator) -> Run:
    """The usual way: a forward hook that patches during the prompt, then `generate`."""
    ids = generator.target.tokens.tensor(hf.device)
    (position,) = generator.target.positions

    def text(cell: Cell) -> Tokens:
        vector = cell.patch.vector.to(hf.device, hf.dtype)

        def write(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.shape[1] == ids.shape[1]:
                states[0, position] = vector

        handle = blocks_of(hf)[cell.target_layer].register_forward_hook(write)
        try:
            with torch.no_grad():
                out = hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=generator.max_new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
        finally:
            handle.remove()
        return until_end(out[0, ids.shape[1] :].tolist(), generator.model.eos_token_ids)

    return lambda cells: [text(cell) for cell in cells]


def one_hooked_generate_per_cell(lens: Any, generator: PatchedGenerator) -> Run:
    """`HookedTransformer.generate`, with a hook that patches during the prompt."""
    ids = generator.target.tokens.tensor(generator.model.device)
    (position,) = generator.target.positions
    eos = list(generator.model.eos_token_ids)

    def text(cell: Cell) -> Tokens:
        vector = cell.patch.vector.to(generator.model.device, generator.model.dtype)

        def write(states: Tensor, hook: Any) -> Tensor:
            if states.shape[1] == ids.shape[1]:
                states[0, position] = vector
            return states

        with lens.hooks(fwd_hooks=[(hook_name("resid_post", cell.target_layer), write)]):
            out = lens.generate(
                ids,
                max_new_tokens=generator.max_new_tokens,
                stop_at_eos=bool(eos),
                eos_token_id=eos or None,
                do_sample=False,
                return_type="tokens",
                verbose=False,
            )
        return until_end(out[0, ids.shape[1] :].tolist(), eos)

    return lambda cells: [text(cell) for cell in cells]


def nnterp_patchscope(hf: Any, tokenizer: Any, generator: PatchedGenerator) -> Run:
    """`patchscope_generate` of nnterp: same layer, hidden states, α = 1, no shared prefix.

    Raises:
        ImportError: nnterp is not installed, or does not fit what is installed.
    """
    from nnterp import StandardizedTransformer
    from nnterp.interventions import TargetPrompt, patchscope_generate

    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # it must have one; nothing here is padded
    model = StandardizedTransformer(hf, tokenizer=tokenizer)
    (position,) = generator.target.positions
    length = len(generator.target.tokens)
    target = TargetPrompt(generator.target.tokens.text, position)

    def run(cells: Sequence[Cell]) -> list[Tokens]:
        prompts = list(dict.fromkeys(cell.prompt for cell in cells))
        # The layers' states are looked up by layer number: they have to begin at 0.
        layers = list(range(1 + max(cell.layer for cell in cells)))
        found = patchscope_generate(
            model, prompts, target, max_length=generator.max_new_tokens, layers=layers
        )
        return [
            until_end(
                found[cell.layer][prompts.index(cell.prompt), length:].tolist(),
                generator.model.eos_token_ids,
            )
            for cell in cells
        ]

    return run


def engine(generator: PatchedGenerator) -> Run:
    """superscopes_tl, with default settings."""
    return lambda cells: [
        generation.token_ids for generation in generator.generate([cell.patch for cell in cells])
    ]


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, in buffers that are written in place."""

    def __init__(self, layer: Any, rows: int, room: int) -> None:
        super().__init__()
        self.start = self.length = layer.keys.shape[-2]
        self.buffers = tuple(
            _with_room(states, rows, room) for states in (layer.keys, layer.values)
        )
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


def _with_room(states: Tensor, rows: int, room: int) -> Tensor:
    _, heads, length, d_head = states.shape
    buffer = states.new_empty(rows, heads, length + room, d_head)
    buffer[:, :, :length] = states
    return buffer


class Limit:
    """A batched loop around a Hugging Face model, with the prompt's common part computed once.

    Args:
        hf: the model; no hook of another way is on it.
        generator: gives the target prompt and the longest text.
        rows: cells per batch.
    """

    def __init__(self, hf: Any, generator: PatchedGenerator, rows: int) -> None:
        self._hf, self._eos = hf, generator.model.eos_token_ids
        self._steps, self.rows = generator.max_new_tokens, rows
        ids = generator.target.tokens.tensor(hf.device)
        (first,) = generator.target.positions
        self._prefix, self._tail = DynamicCache(), ids[:, first:]
        with torch.no_grad():
            self._step(ids[:, :first], self._prefix)
        self._caches: dict[int, Any] = {}

    def run(self, cells: Sequence[Cell]) -> list[Tokens]:
        """Return the new tokens of each cell."""
        starts = range(0, len(cells), self.rows)
        with torch.no_grad():
            written = [self.write(cells[start : start + self.rows]) for start in starts]
        return [until_end(row, self._eos) for batch in written for row in batch.tolist()]

    def write(self, cells: Sequence[Cell]) -> Tensor:
        """Return the new tokens of one batch, `batch new`."""
        cache = self._cache(len(cells))
        handles = [
            blocks_of(self._hf)[layer].register_forward_hook(_writer(self._hf, cells, layer))
            for layer in {cell.target_layer for cell in cells}
        ]
        try:
            chosen = [self._step(self._tail.expand(len(cells), -1), cache)]
        finally:
            for handle in handles:
                handle.remove()
        for _ in range(self._steps - 1):
            chosen.append(self._step(chosen[-1], cache))
        return torch.cat(chosen, dim=1)

    def _step(self, tokens: Tensor, cache: Any) -> Tensor:
        out = self._hf(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen: Tensor = out.logits[:, -1:].argmax(dim=-1)
        return chosen

    def _cache(self, rows: int) -> Any:
        """Return a cache of `rows` rows that have read the prompt up to the placeholder."""
        if rows not in self._caches:
            room = self._tail.shape[1] + self._steps
            cache = DynamicCache()
            cache.layers = [PreallocatedLayer(layer, rows, room) for layer in self._prefix.layers]
            self._caches[rows] = cache
        for layer in self._caches[rows].layers:
            layer.length = layer.start
        return self._caches[rows]


def _writer(hf: Any, cells: Sequence[Cell], layer: int) -> Any:
    """Return a forward hook that writes the vectors of the cells of one target layer."""
    rows = [row for row, cell in enumerate(cells) if cell.target_layer == layer]
    vectors = torch.stack([cells[row].patch.vector for row in rows]).to(hf.device, hf.dtype)

    def write(module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states[rows, 0] = vectors  # the placeholder is the first token after the prefix

    return write


def fastest(hf: Any, generator: PatchedGenerator, cells: Sequence[Cell]) -> Limit:
    """Return the limit with the number of rows per batch that is faster for these cells."""
    tried = []
    for rows in {min(generator.batch_size, len(cells)), len(cells)}:
        one = Limit(hf, generator, rows)
        one.run(cells)  # makes the buffers
        started = time.perf_counter()
        one.run(cells)
        tried.append((time.perf_counter() - started, rows, one))
    return min(tried)[2]
