"""The two TransformerLens classes behind one small surface.

`HookedTransformer` (up to TransformerLens 3.x) and `TransformerBridge` (3.x and 4.x) agree on
hooks and on `run_with_cache`. They differ in how a forward pass takes a cache of keys and values;
a `Decoder` hides that difference in three steps:

1. `prefill` runs the tokens that all rows share once, and keeps their keys and values.
2. `expand` makes a cache of many rows that all begin with those, stored once (`keys_values`).
3. `step` runs some more tokens of every row and returns the logits of the last one; `logits`
   returns those of the last few.

All rows have the same length, so no padding and no mask has to be thought of.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import bad_value
from superscopes_tl.model.prefix_cache import Prefix, RowBuffer, SharedPrefix


class Decoder(Protocol):
    """Cached decoding, one implementation per TransformerLens class."""

    name: str

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        """Return the keys and values of `tokens` (which may be empty)."""

    def expand(self, prefix: Prefix, batch: int, room: int) -> Any:
        """Return a cache of `batch` rows like `prefix`, with room for `room` more tokens."""

    def keep(self, cache: Any, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows of a cache but these."""

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Run `tokens` behind `cache`, which grows, and return the last token's logits."""

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        """Run `tokens` behind `cache`, which grows, and return the logits of the `last` tokens."""

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Return the logits of block outputs: final norm, W_U, b_U, soft cap; float32.

        Computed in the model's own number type, on the unembedding's device; differentiable.
        """


class HookedDecoder:
    """Cached decoding on a `HookedTransformer`."""

    name = "hooked"

    def __init__(self, lens: Any) -> None:
        self._lens = lens

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        """See `Decoder.prefill`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self._lens.cfg, tokens.device, 1)
        if tokens.shape[1]:
            self._run(tokens, cache)
        return tuple(
            (
                _rotated(block.attn, entry.past_keys, 0).transpose(1, 2),
                entry.past_values.transpose(1, 2),
            )
            for block, entry in zip(self._lens.blocks, cache.entries, strict=True)
        )

    def expand(self, prefix: Prefix, batch: int, room: int) -> list[_HookedEntry]:
        """See `Decoder.expand`."""
        return [
            _HookedEntry(block.attn, RowBuffer(shared, batch, room))
            for block, shared in zip(self._lens.blocks, prefix, strict=True)
        ]

    def keep(self, cache: list[_HookedEntry], rows: Int[Tensor, " kept"]) -> None:
        """See `Decoder.keep`."""
        for entry in cache:
            entry.rows.keep(rows)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """See `Decoder.step`.

        The blocks are run without the unembedding, which is then applied to the last position
        alone: `HookedTransformer` would copy the whole matrix W_U at every call.
        """
        return self.unembed(self._run(tokens, cache)[:, -1])

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        """See `Decoder.logits`."""
        return self.unembed(self._run(tokens, cache)[:, -last:])

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
        with _each_key_rotated_once(lens):
            output: Tensor = lens(
                residual,
                start_at_layer=0,
                stop_at_layer=lens.cfg.n_layers,
                past_kv_cache=cache,
                shortformer_pos_embed=shortformer,
            )
        return output


class _HookedEntry:
    """One layer's `TransformerLensKeyValueCacheEntry`: keys are kept as attention uses them.

    TransformerLens's own entry keeps them as they were before the rotary embedding, and rotates
    all of them anew at every step.
    """

    def __init__(self, attn: Any, rows: RowBuffer) -> None:
        self._attn = attn
        self.rows = rows

    @property
    def past_keys(self) -> Float[Tensor, "batch pos heads d_head"]:
        """Asked for its length alone."""
        return self.rows.all()[0].permute(0, 2, 1, 3)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values and return all of them (TransformerLens's protocol)."""
        keys = _rotated(self._attn, keys, self.rows.length)
        found = self.rows.append(keys.transpose(1, 2), values.transpose(1, 2))
        return found[0].permute(0, 2, 1, 3), found[1].permute(0, 2, 1, 3)


def _rotated_once(attn: Any) -> bool:
    """Tell whether a key's rotary embedding depends on nothing but its position."""
    # A stretched base (`use_dynamic_ntk_rope`) changes with the length of the whole text.
    stretched = getattr(attn.cfg, "use_dynamic_ntk_rope", False)
    return attn.cfg.positional_embedding_type == "rotary" and not stretched


def _rotated(attn: Any, keys: Tensor, offset: int) -> Tensor:
    """Return keys with the rotary embedding of their positions, where that is final."""
    return attn.apply_rotary(keys, offset) if _rotated_once(attn) else keys


@contextlib.contextmanager
def _each_key_rotated_once(lens: Any) -> Iterator[None]:
    """Let attention take the keys of a `_HookedEntry`, which are rotated, as they are."""
    attentions = [block.attn for block in lens.blocks if _rotated_once(block.attn)]
    for attn in attentions:
        rotate = attn.apply_rotary

        def unless_rotated(x: Tensor, *args: Any, rotate: Any = rotate) -> Tensor:
            return x if isinstance(x, SharedPrefix) else rotate(x, *args)

        attn.apply_rotary = unless_rotated
    try:
        yield
    finally:
        for attn in attentions:
            del attn.apply_rotary


class BridgeDecoder:
    """Cached decoding on a `TransformerBridge`."""

    name = "bridge"

    def __init__(self, lens: Any, *, unembeds: bool = True) -> None:
        self._lens, self._unembeds = lens, unembeds
        accepted = inspect.signature(type(lens.original_model).forward).parameters
        self._can_keep_few = "logits_to_keep" in accepted

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        """See `Decoder.prefill`."""
        from transformers import DynamicCache

        cache, length = DynamicCache(), tokens.shape[1]
        # Nothing to run tells no shapes: run any token, and keep none of it.
        self.step(tokens if length else tokens.new_zeros(1, 1), cache)
        return tuple(
            (layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers
        )

    def expand(self, prefix: Prefix, batch: int, room: int) -> Any:
        """See `Decoder.expand`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = [_layer_class()(RowBuffer(shared, batch, room)) for shared in prefix]
        return cache

    def keep(self, cache: Any, rows: Int[Tensor, " kept"]) -> None:
        """See `Decoder.keep`."""
        for layer in cache.layers:
            layer.rows.keep(rows)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """See `Decoder.step`."""
        return self.logits(tokens, cache, 1)[:, -1]

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        """See `Decoder.logits`."""
        few = {"logits_to_keep": last} if self._can_keep_few else {}
        logits: Tensor = self._lens(tokens, past_key_values=cache, use_cache=True, **few)
        return logits[:, -last:].float()

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """See `Decoder.unembed`.

        Raises:
            ValueError: more than a final norm and W_U makes this model's logits.
        """
        lens = self._lens
        if not self._unembeds:
            raise bad_value(
                "model",
                "one whose logits are a final norm and W_U of the last block's output",
                type(lens.original_model).__name__,
                "read this model by patching alone, or take another one for its logits",
            )
        logits: Tensor = lens.unembed(lens.ln_final(residual.to(lens.unembed.W_U)))
        # The architecture's own: a soft cap (Gemma 2), a scale (Cohere, Granite).
        transformed: Tensor = lens.adapter.apply_output_logits_transform(logits)
        return transformed.float()


@cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class SharedPrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """One layer of a Hugging Face cache whose rows begin alike."""

        def __init__(self, rows: RowBuffer) -> None:
            super().__init__()
            self.rows = rows
            self.keys, self.values = rows.all()
            self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self.keys, self.values = self.rows.append(key_states, value_states)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.rows.length

    return SharedPrefixLayer


def decoder_for(lens: Any, *, unembeds: bool = True) -> Decoder:
    """Return the decoder that fits a TransformerLens object.

    Args:
        lens: the `HookedTransformer` or `TransformerBridge`.
        unembeds: whether its final norm and W_U make its logits, as far as is known.
    """
    if hasattr(lens, "original_model"):
        return BridgeDecoder(lens, unembeds=unembeds)
    return HookedDecoder(lens)
