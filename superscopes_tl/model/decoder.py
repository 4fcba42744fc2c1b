"""Decoding with a KV cache, on either TransformerLens class.

`HookedTransformer` (up to TransformerLens 3.x) and `TransformerBridge` (3.x and 4.x) agree on
hooks and on `run_with_cache`, but not on how a forward pass takes a KV cache. A `Decoder` hides
that difference:

1. `prefill` runs the tokens that all rows share once, and returns their KV cache.
2. `expand` makes a cache of many rows that all start with it; it is stored once (`prefix_cache`).
3. `step` runs the next tokens of every row and returns the logits of the last one; `logits`
   returns those of the last few.

All rows have the same length, so neither padding nor attention masks are needed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import bad_value
from superscopes_tl.model.prefix_cache import Prefix, RowBuffer, SharedPrefix
from superscopes_tl.model.sites import hook_name

Hook = Callable[..., Tensor | None]
"""Called with an activation and its hook point; what it returns, if anything, replaces it."""


class Decoder(Protocol):
    """Decoding with a KV cache; one implementation per TransformerLens class.

    Attributes:
        name: "hooked" or "bridge".
        unembeds: whether final norm and W_U turn the last block's output into the logits.
        grows: whether a hook on a block's output, or on the first one's input, may return more
            rows than it is given.
    """

    name: str
    unembeds: bool
    grows: bool

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        """Return the KV cache of `tokens`, of which there may be none."""

    def expand(self, prefix: Prefix, batch: int, room: int) -> Any:
        """Return a cache of `batch` rows that start with `prefix`, with room for `room` tokens."""

    def keep(self, cache: Any, rows: Int[Tensor, " kept"]) -> None:
        """Drop all other rows of a cache."""

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Append `tokens` to `cache` and return the logits after the last one."""

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        """Append `tokens` to `cache` and return the logits after each of the `last` ones."""

    def unembed(
        self, residual: Float[Tensor, "... d_model"], tokens: Int[Tensor, " vocab"] | None = None
    ) -> Float[Tensor, "... vocab"]:
        """Return the logits of block outputs (final norm, W_U, b_U, soft cap) in float32.

        Those of all tokens of the vocabulary, or of some alone.

        Raises:
            ValueError: these do not make the model's logits.
        """

    def unembed_parts(
        self, residual: Float[Tensor, "... d_model"], size: int
    ) -> Iterator[Float[Tensor, "... part"]]:
        """Yield the logits of `unembed` for `size` tokens of the vocabulary at a time."""


class HookedDecoder:
    """Decoding on a `HookedTransformer`."""

    name = "hooked"

    def __init__(self, tl: Any) -> None:
        self._tl = tl
        self.unembeds, self.grows = True, False

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self._tl.cfg, tokens.device, 1)
        if tokens.shape[1]:
            self._run(tokens, cache)
        return tuple(
            (
                _rotated(block.attn, entry.past_keys, 0).transpose(1, 2),
                entry.past_values.transpose(1, 2),
            )
            for block, entry in zip(self._tl.blocks, cache.entries, strict=True)
        )

    def expand(self, prefix: Prefix, batch: int, room: int) -> list[_HookedEntry]:
        return [
            _HookedEntry(block.attn, RowBuffer(shared, batch, room))
            for block, shared in zip(self._tl.blocks, prefix, strict=True)
        ]

    def keep(self, cache: list[_HookedEntry], rows: Int[Tensor, " kept"]) -> None:
        for entry in cache:
            entry.rows.keep(rows)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        # Not through `HookedTransformer`'s own unembedding, which copies W_U at every call.
        return self.unembed(self._run(tokens, cache)[:, -1])

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        return self.unembed(self._run(tokens, cache)[:, -last:])

    def unembed(
        self, residual: Float[Tensor, "... d_model"], tokens: Int[Tensor, " vocab"] | None = None
    ) -> Float[Tensor, "... vocab"]:
        (logits,) = self._unembed(residual, [slice(None) if tokens is None else tokens])
        return logits

    def unembed_parts(
        self, residual: Float[Tensor, "... d_model"], size: int
    ) -> Iterator[Float[Tensor, "... part"]]:
        return self._unembed(residual, _parts(self._tl.unembed.W_U.shape[1], size))

    def _unembed(
        self, residual: Float[Tensor, "... d_model"], parts: Iterable[slice | Tensor]
    ) -> Iterator[Float[Tensor, "... part"]]:
        cfg, last = self._tl.cfg, self._tl.unembed
        residual = residual.to(last.W_U)
        if cfg.normalization_type is not None:
            residual = self._tl.ln_final(residual)
        cap = cfg.output_logits_soft_cap
        for part in parts:
            logits: Tensor = _biased(residual @ last.W_U[:, part], last.b_U[part])
            if cap is not None and cap > 0:
                logits = cap * torch.tanh(logits / cap)
            yield logits.float()

    def _run(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the last block's output.

        The embedding is computed here because a forward pass from token ids with a cache needs an
        attention mask: without one, TransformerLens takes every token equal to the padding token
        (often the EOS token) for padding; with one, it looks up positions row by row, which is
        slow. A pass from embeddings needs no mask for full causal attention.
        """
        tl = self._tl
        offset = cache[0].past_keys.shape[1]
        embedded = tl.hook_embed(tl.embed(tokens))
        residual, shortformer = tl.get_residual(embedded, offset, tokens=tokens)
        with _each_key_rotated_once(tl):
            output: Tensor = tl(
                residual,
                start_at_layer=0,
                stop_at_layer=tl.cfg.n_layers,
                past_kv_cache=cache,
                shortformer_pos_embed=shortformer,
            )
        return output


class _HookedEntry:
    """One layer's `TransformerLensKeyValueCacheEntry`, with rotated keys.

    TransformerLens's own entry keeps keys without the rotary embedding and rotates all of them
    again at every step.
    """

    def __init__(self, attn: Any, rows: RowBuffer) -> None:
        self._attn = attn
        self.rows = rows

    @property
    def past_keys(self) -> Float[Tensor, "batch pos heads d_head"]:
        """All keys; TransformerLens reads their number."""
        return self.rows.all()[0].permute(0, 2, 1, 3)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values and return all of them (TransformerLens's protocol)."""
        keys = _rotated(self._attn, keys, self.rows.length)
        found = self.rows.append(keys.transpose(1, 2), values.transpose(1, 2))
        return found[0].permute(0, 2, 1, 3), found[1].permute(0, 2, 1, 3)


def _rotated_once(attn: Any) -> bool:
    """Whether a key's rotary embedding depends only on its position."""
    # The base of `use_dynamic_ntk_rope` changes with the length of the sequence.
    stretched = getattr(attn.cfg, "use_dynamic_ntk_rope", False)
    return attn.cfg.positional_embedding_type == "rotary" and not stretched


def _rotated(attn: Any, keys: Tensor, offset: int) -> Tensor:
    """Apply the rotary embedding to keys, where it is final."""
    return attn.apply_rotary(keys, offset) if _rotated_once(attn) else keys


@contextlib.contextmanager
def _each_key_rotated_once(tl: Any) -> Iterator[None]:
    """Keep attention from rotating the keys of a `_HookedEntry` again."""
    attentions = [block.attn for block in tl.blocks if _rotated_once(block.attn)]
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
    """Decoding on a `TransformerBridge`, and where there is no hook on it, on the bare model.

    The bridge computes norms and attention in Python, so that each step of them has a hook point.
    """

    name = "bridge"

    def __init__(self, tl: Any) -> None:
        self._tl = tl
        self.unembeds, self.grows = True, False
        self._plain: Any = None
        self._unchanged = False
        accepted = inspect.signature(type(tl.original_model).forward).parameters
        self._can_keep_few = "logits_to_keep" in accepted

    def prefill(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        from transformers import DynamicCache

        self._look()
        cache, length = DynamicCache(), tokens.shape[1]
        # An empty prompt gives no cache shapes: run any token and keep none of it.
        self.step(tokens if length else tokens.new_zeros(1, 1), cache)
        return tuple(
            (layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers
        )

    def expand(self, prefix: Prefix, batch: int, room: int) -> Any:
        from transformers import DynamicCache

        self._look()
        cache = DynamicCache()
        cache.layers = [_layer_class()(RowBuffer(shared, batch, room)) for shared in prefix]
        return cache

    def keep(self, cache: Any, rows: Int[Tensor, " kept"]) -> None:
        for layer in cache.layers:
            layer.rows.keep(rows)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        return self.logits(tokens, cache, 1)[:, -1]

    def logits(
        self, tokens: Int[Tensor, "batch pos"], cache: Any, last: int
    ) -> Float[Tensor, "batch last vocab"]:
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self._can_keep_few:
            options["logits_to_keep"] = last
        if self._unchanged and user_hooks(self._modules) == self._state[0]:
            logits: Tensor = self._plain(tokens, **options).logits
        else:
            logits = self._tl(tokens, **options)
        return logits[:, -last:].float()

    def without_hooks(self, plain: Any) -> None:
        """Run passes without hooks on a Hugging Face model with the same parameters.

        No longer after a weight or module of the bridge is changed, not even in place: some
        architectures' bridges compute with copies of weights.
        """
        self._plain, self._state = plain, state_of(self._tl)
        self._modules = list(self._tl.modules())

    def _look(self) -> None:
        """Look, before a batch, whether the bridge is as it was."""
        self._unchanged = self._plain is not None and state_of(self._tl)[1:] == self._state[1:]

    def unembed(
        self, residual: Float[Tensor, "... d_model"], tokens: Int[Tensor, " vocab"] | None = None
    ) -> Float[Tensor, "... vocab"]:
        if not self.unembeds:
            expected = "one with logits made by a final norm and W_U of the last block's output"
            fix = "read this model by patching, or use another one for its logits"
            raise bad_value("model", expected, type(self._tl.original_model).__name__, fix)
        (logits,) = self._unembed(residual, [slice(None) if tokens is None else tokens])
        return logits

    def unembed_parts(
        self, residual: Float[Tensor, "... d_model"], size: int
    ) -> Iterator[Float[Tensor, "... part"]]:
        return self._unembed(residual, _parts(self._tl.unembed.W_U.shape[1], size))

    def _unembed(
        self, residual: Float[Tensor, "... d_model"], parts: Iterable[slice | Tensor]
    ) -> Iterator[Float[Tensor, "... part"]]:
        tl, last = self._tl, self._tl.unembed
        residual = residual.to(last.W_U)
        rows = residual if residual.ndim > 2 else residual[None]  # as the model's own passes do
        normed = tl.ln_final(rows).view_as(residual)
        whole = last(normed) if user_hooks(last.modules()) else None
        for part in parts:
            if whole is not None:
                logits = whole[..., part]
            else:
                logits = _biased(normed @ last.W_U[:, part], last.b_U[part])
            # The architecture's own: a soft cap (Gemma 2), a scale (Cohere, Granite).
            yield tl.adapter.apply_output_logits_transform(logits).float()


@cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class SharedPrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """One layer of a Hugging Face cache whose rows share a prefix."""

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


@contextlib.contextmanager
def hooked(tl: Any, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """Return a context in which the named hook points run the given functions."""
    # `tl.hooks` collects all points of a bridge again for every hook, which with a hook per layer
    # takes longer than a small batch.
    points = tl.hook_dict if hooks else {}
    placed = [(points[name], function) for name, function in hooks]
    tl.context_level += 1
    level = tl.context_level
    try:
        for point, function in placed:
            point.add_hook(function, level=level)
        yield
    finally:
        for point, _ in placed:
            point.remove_hooks(level=level)
        tl.context_level -= 1


class _StopError(Exception):
    """Ends a forward pass."""


def first_block_input(tl: Any, run: Callable[[], Any]) -> Float[Tensor, "batch pos d_model"]:
    """Return the first block's input in a forward pass, which ends there.

    Raises:
        KeyError: no such hook point.
    """
    found: list[Tensor] = []

    def stop(value: Tensor, hook: object) -> None:
        found.append(value)
        raise _StopError

    with hooked(tl, [(hook_name("resid_pre", 0), stop)]), contextlib.suppress(_StopError):
        run()
    return found[0]


def linked(
    tl: Any, run: Callable[[], Any], names: Sequence[str]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """Return the activations of a forward pass at the named hook points, linked for gradients.

    The one computed first is a leaf, so that gradients end there; the pass ends at the last one.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, value: Tensor, hook: object) -> Tensor:
        found[name] = value if found else value.detach().requires_grad_()
        if len(found) == len(names):
            raise _StopError
        return found[name]

    hooks = [(name, partial(note, name)) for name in names]
    with torch.enable_grad(), hooked(tl, hooks), contextlib.suppress(_StopError):
        run()
    return [found[name] for name in names]


def _biased(logits: Tensor, bias: Tensor) -> Tensor:
    """Return logits plus a bias; TransformerLens gives every model one, mostly of zeros."""
    return logits + bias if bias.any() else logits


def _parts(whole: int, size: int) -> Iterator[slice]:
    """Yield slices of `size`, the last one as long as there is left."""
    for start in range(0, whole, size):
        yield slice(start, start + size)


def user_hooks(modules: Iterable[Any]) -> int:
    """Return how many hooks there are, without those that the libraries put on their modules."""
    found = 0
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                point = hasattr(module, "fwd_hooks")  # it wraps the hooks that it is given
                found += sum(point or not _of_library(hook) for hook in hooks.values())
    return found


def _of_library(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("transformer_lens", "transformers"))


def state_of(tl: Any) -> tuple[Any, ...]:
    """Return what tells two states of a TransformerLens object apart.

    They are its hooks, its mode, its modules, and its parameters with the number of their changes.
    """
    modules = list(tl.modules())
    parameters = tuple((id(p), 0 if p.is_inference() else p._version) for p in tl.parameters())
    mode = bool(getattr(tl, "compatibility_mode", False))
    return user_hooks(modules), mode, tuple(map(id, modules)), parameters


def bare_twin(hf: Any) -> Any:
    """Return a second Hugging Face model on the same parameters; the bridge takes the first.

    Its attention is computed in parts, as `prefix_cache` needs it, and GPT-2's activation in one
    operation instead of eight. Returns `None` where the model cannot be copied, or where a copy
    would take memory.
    """
    if getattr(hf, "is_quantized", False):  # the scales of its weights are no parameters
        return None
    from transformers.activations import NewGELUActivation

    shared = {id(tensor): tensor for tensor in [*hf.parameters(), *hf.buffers()]}
    try:
        twin = copy.deepcopy(hf, shared)
        twin.set_attn_implementation("eager")
    except Exception:  # noqa: BLE001  # whatever a model's own code raises
        return None
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return twin


def decoder_for(tl: Any) -> Decoder:
    """Return the decoder of a `HookedTransformer` or `TransformerBridge`."""
    return BridgeDecoder(tl) if hasattr(tl, "original_model") else HookedDecoder(tl)
