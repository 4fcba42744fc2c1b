"""The two TransformerLens classes behind one small surface.

`HookedTransformer` (up to TransformerLens 3.x) and `TransformerBridge` (3.x and 4.x) agree on
hooks and on `run_with_cache`. They differ in how a forward pass takes a cache of keys and values;
a `Decoder` hides that difference in three steps:

1. `prefill` runs the tokens that all rows share once, and keeps their keys and values.
2. `expand` gives each row of a batch a copy of those, in buffers with room for what comes.
3. `step` runs some more tokens of every row and returns the logits of the last one.

Writing into a preallocated buffer saves copying the whole cache at every token, and all
rows have the same length, so no padding and no mask has to be thought of.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Decoder(Protocol):
    """Cached decoding, one implementation per TransformerLens class."""

    name: str

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Any:
        """Return the cache of keys and values of `tokens` (which may be empty)."""

    def expand(self, prefix: Any, batch: int, room: int) -> Any:
        """Return a cache of `batch` rows like `prefix`, with room for `room` more tokens."""

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Run `tokens` behind `cache`, which grows, and return the last token's logits."""

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Return the logits of block outputs: final norm, W_U, b_U, soft cap; float32.

        Computed in the model's own number type, on the unembedding's device; differentiable.
        """


class HookedDecoder:
    """Cached decoding on a `HookedTransformer`."""

    name = "hooked"

    def __init__(self, lens: Any) -> None:
        self._lens = lens

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Any:
        """See `Decoder.prefill`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self._lens.cfg, tokens.device, 1)
        if tokens.shape[1]:
            self._run(tokens, cache)
        return cache

    def expand(self, prefix: Any, batch: int, room: int) -> Any:
        """See `Decoder.expand`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        mask = prefix.previous_attention_mask  # a field that must be there, and is not read
        return TransformerLensKeyValueCache(
            entries=[
                _HookedBuffer(entry.past_keys, entry.past_values, batch, room)
                for entry in prefix.entries
            ],
            previous_attention_mask=mask.expand(batch, -1),
        )

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """See `Decoder.step`.

        The blocks are run without the unembedding, which is then applied to the last position
        alone: `HookedTransformer` would copy the whole matrix W_U at every call.
        """
        return self.unembed(self._run(tokens, cache)[:, -1])

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """See `Decoder.unembed`."""
        cfg, last = self._lens.cfg, self._lens.unembed
        residual = residual.to(last.W_U)
        if cfg.normalization_type is not None:
            residual = self._lens.ln_final(residual)
        logits: Tensor = residual @ last.W_U + last.b_U
        cap = cfg.output_logits_soft_cap
        if cap is not None and cap > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits.float()

    def _run(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the last block's output.

        The embedding is computed here because a forward pass from tokens with a cache wants an
        attention mask: without one, TransformerLens takes every token equal to the padding token
        (often the end-of-sequence token) for padding and hides it; with one, it looks positions
        up row by row, which costs time. From embeddings on, no mask means full causal attention.
        """
        lens = self._lens
        offset = cache[0].past_keys.shape[1]
        embedded = lens.hook_embed(lens.embed(tokens))
        residual, shortformer = lens.get_residual(embedded, offset, tokens=tokens)
        output: Tensor = lens(
            residual,
            start_at_layer=0,
            stop_at_layer=lens.cfg.n_layers,
            past_kv_cache=cache,
            shortformer_pos_embed=shortformer,
        )
        return output


class _HookedBuffer:
    """A `TransformerLensKeyValueCacheEntry` of `batch` equal rows that appends in place."""

    def __init__(
        self,
        keys: Float[Tensor, "1 pos heads d_head"],
        values: Float[Tensor, "1 pos heads d_head"],
        batch: int,
        room: int,
    ) -> None:
        self._length = keys.shape[1]
        self._buffers = tuple(_with_room(t, batch, room, dim=1) for t in (keys, values))
        self.frozen = False

    @property
    def past_keys(self) -> Float[Tensor, "batch pos heads d_head"]:
        return self._buffers[0][:, : self._length]

    @property
    def past_values(self) -> Float[Tensor, "batch pos heads d_head"]:
        return self._buffers[1][:, : self._length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values and return all of them (TransformerLens's protocol)."""
        end = self._length + keys.shape[1]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, self._length : end] = new
        self._length = end
        return self.past_keys, self.past_values


class BridgeDecoder:
    """Cached decoding on a `TransformerBridge`."""

    name = "bridge"

    def __init__(self, lens: Any) -> None:
        self._lens = lens
        accepted = inspect.signature(type(lens.original_model).forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Any:
        """See `Decoder.prefill`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if tokens.shape[1]:
            self.step(tokens, cache)
        return cache

    def expand(self, prefix: Any, batch: int, room: int) -> Any:
        """See `Decoder.expand`."""
        from transformers import DynamicCache

        rows = DynamicCache()
        rows.layers = [
            _buffer_layer_class()(layer.keys, layer.values, batch, room) for layer in prefix.layers
        ]
        return rows

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """See `Decoder.step`."""
        logits: Tensor = self._lens(
            tokens, past_key_values=cache, use_cache=True, **self._last_only
        )
        return logits[:, -1].float()

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """See `Decoder.unembed`."""
        lens = self._lens
        logits: Tensor = lens.unembed(lens.ln_final(residual.to(lens.unembed.W_U)))
        # The architecture's own: a soft cap (Gemma 2), a scale (Cohere, Granite).
        transformed: Tensor = lens.adapter.apply_output_logits_transform(logits)
        return transformed.float()


@cache
def _buffer_layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class BufferLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """One layer of a Hugging Face cache of equal rows that appends in place."""

        def __init__(
            self,
            keys: Float[Tensor, "1 heads pos d_head"],
            values: Float[Tensor, "1 heads pos d_head"],
            batch: int,
            room: int,
        ) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.buffers = tuple(_with_room(t, batch, room, dim=2) for t in (keys, values))
            self._show(keys.shape[2])

        def _show(self, end: int) -> None:
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
            self._show(end)
            return self.keys, self.values

    return BufferLayer


def _with_room(rows: Tensor, batch: int, room: int, *, dim: int) -> Tensor:
    """Return `batch` copies of the one row in `rows`, with `room` more places along `dim`."""
    shape = list(rows.shape)
    shape[0], shape[dim] = batch, shape[dim] + room
    buffer = rows.new_zeros(shape)
    buffer.narrow(dim, 0, rows.shape[dim]).copy_(rows.expand(batch, -1, -1, -1))
    return buffer


def decoder_for(lens: Any) -> Decoder:
    """Return the decoder that fits a TransformerLens object."""
    return BridgeDecoder(lens) if hasattr(lens, "original_model") else HookedDecoder(lens)
