"""Check that a TransformerLens object computes what the Hugging Face model does.

Converters and wrappers are tested on some models. On others they may rotate the wrong half of a
vector, or lose the KV cache, without an error. Two such defects of the bridge are repaired
(`repair_bridge`), and every model is run on a few tokens when it is loaded:

1. `probe` makes two rows of tokens with a common prefix and keeps the Hugging Face model's own
   logits for them. The bridge wraps that model in place, so this precedes the conversion.
2. `verify` runs the TransformerLens object on them in one full pass and compares the logits. The
   pass records which hooks fire, at every layer, with one vector per token.
3. It runs them again as a sweep does: the prefix through `prefill` and `expand`, then `step` with
   several tokens, with one, and with one after a row is dropped. The logits must be the same.
4. The recorded activations must add up: `resid_mid = resid_pre + attn_out` and
   `resid_post = resid_mid + mlp_out`. A kind that does not is not offered; `Verified.absent` says
   why. If the last block's output does not unembed to the logits, the model offers no unembedding.
5. A hook on the first block's output appends a row, one on its input two. Where the model takes
   that, and computes for both rows what it does for each, a batch may grow on its way up
   (`Decoder.grows`).
6. Step 3 is repeated on the Hugging Face model itself, which then runs what needs no hooks.

The distance between logits is the root mean square of their difference over the vocabulary,
relative to that of the logits themselves, both centred per position (a common shift changes no
probability). The worst position counts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import reason
from superscopes_tl.model.decoder import (
    BridgeDecoder,
    Decoder,
    decoder_for,
    first_block_input,
    hooked,
)
from superscopes_tl.model.sites import EMBED, KINDS, HookKind, hook_name

Place: TypeAlias = tuple[HookKind, int]
"""A kind at a layer."""

TOKENS = 14
"""Length of a row of the probe: long enough to show the known defects."""

_SINGLE = 2  # of these, the last ones are run one by one
_RECORDED = 3  # last positions of each row whose activations are added up

_FLOAT32 = 1e-3
_HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}

NO_MLP = "this model has no MLP"
PARALLEL = (
    "attention and MLP run in parallel in this model, so there is no residual stream between them"
)
UNSEEN = "TransformerLens has no such hook point in this architecture"
NOT_ADDED = (
    "what TransformerLens shows there is not what the block adds to the residual stream: "
    "a norm or a factor is applied after it"
)


@dataclass(frozen=True, eq=False)
class Probe:
    """Two rows of tokens with a common prefix, and the Hugging Face model's logits, if any."""

    tokens: Int[Tensor, "rows pos"]
    logits: Float[Tensor, "rows pos vocab"] | None


@dataclass(frozen=True)
class Verified:
    """A TransformerLens object's decoder, the kinds at every layer, and why others are absent.

    `embeds` is whether the input embedding has a hook point, with one vector per token.
    """

    decoder: Decoder
    kinds: tuple[HookKind, ...]
    absent: Mapping[HookKind, str] = field(default_factory=lambda: MappingProxyType({}))
    embeds: bool = True


def probe(tokenizer: Any, n_vocab: int, n_ctx: int, device: torch.device, hf: Any = None) -> Probe:
    """Return a few ordinary tokens and a Hugging Face model's logits for them.

    Args:
        tokenizer: knows the special tokens.
        n_vocab: number of embeddings.
        n_ctx: context length.
        device: device of the tokens.
        hf: the Hugging Face model, before anything wraps it.

    Raises:
        ValueError: its logits are not finite.
    """
    special = set(tokenizer.all_special_ids)  # models may treat them specially
    known = range(min(n_vocab, len(tokenizer)))
    ordinary = [i for i in known if i not in special] or list(known)
    length = min(TOKENS, n_ctx)
    start = _prefix(length)
    # A prime stride covers the whole vocabulary; the second row continues differently.
    picked = [ordinary[(7919 * i + 101) % len(ordinary)] for i in range(2 * length - start)]
    rows = [picked[:length], picked[:start] + picked[length:]]
    tokens = torch.tensor(rows, device=device)
    if hf is None:
        return Probe(tokens, None)
    with torch.no_grad():
        logits = hf(input_ids=tokens).logits.float().cpu()
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError(f"its own logits are not finite in {str(hf.dtype).removeprefix('torch.')}")
    return Probe(tokens, logits)


def unverified(tl: Any) -> Verified:
    """Take every hook point that exists by name to be correct."""
    last = tl.cfg.n_layers - 1
    kinds = tuple(kind for kind in KINDS if hook_name(kind, last) in tl.hook_dict)
    return Verified(decoder_for(tl), kinds, embeds=hook_name("resid_post", EMBED) in tl.hook_dict)


def verify(tl: Any, given: Probe, twin: Any = None) -> Verified:
    """Check that a TransformerLens object computes what it should, and what its hooks show.

    Args:
        tl: a `HookedTransformer` or `TransformerBridge`.
        given: tokens, and the logits that they should have.
        twin: a Hugging Face model with a bridge's parameters (`bare_twin`), if any.

    Raises:
        ValueError: states in one clause which logits differ, and by how much.
    """
    dtype, decoder = next(iter(tl.parameters())).dtype, decoder_for(tl)
    allowed = tolerance(dtype)
    with torch.no_grad():
        with _explained("a full pass"):
            full, found = _full_pass(tl, given.tokens)
        expected = full if given.logits is None else given.logits
        _compare("the logits of a full pass", expected, full, allowed)
        with _explained("a pass after a cached prompt"):
            _check_cached(decoder, given.tokens, expected, tolerance(dtype, cached=True))
        kinds, absent = _offered(found, tl.cfg.n_layers, dtype)
        last = found["resid_post", tl.cfg.n_layers - 1]
        decoder.unembeds = _unembeds(decoder, last, full[:, -_RECORDED:], allowed)
        decoder.grows = decoder.unembeds and _grows(tl, decoder, given.tokens, full)
        if twin is not None:
            decoder = _with_twin(decoder, twin, given.tokens, expected)
    return Verified(decoder, kinds, absent, ("resid_post", EMBED) in found)


def _with_twin(decoder: Decoder, twin: Any, tokens: Tensor, expected: Tensor) -> Decoder:
    """Return the decoder, with a twin for passes without hooks if it computes the same."""
    faster = copy.copy(decoder)
    assert isinstance(faster, BridgeDecoder)
    faster.without_hooks(twin)
    try:
        _check_cached(faster, tokens, expected, tolerance(twin.dtype, cached=True))
    except Exception:  # noqa: BLE001  # whatever a model's own code raises
        return decoder
    return faster


def _unembeds(decoder: Decoder, last: Tensor, expected: Tensor, allowed: float) -> bool:
    """Whether the last block's output unembeds to the logits (not in a post-norm model)."""
    try:
        got = decoder.unembed(last).cpu()
    except Exception:  # noqa: BLE001  # a module that the wrapper lacks
        return False
    return got.shape == expected.shape and distance(expected, got) <= allowed


def _grows(tl: Any, decoder: Decoder, tokens: Tensor, full: Tensor) -> bool:
    """Whether rows that are put in before the first block, or after it, pass the others."""
    start = _prefix(tokens.shape[1])
    rest, prefix = tokens[:, start:], decoder.prefill(tokens[:1, :start])

    def replaced(kind: HookKind, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Run one row, with an activation of the first block replaced by more rows."""
        with hooked(tl, [(hook_name(kind, 0), lambda value, hook: rows(value))]):
            return decoder.step(rest[:1], decoder.expand(prefix, 1, rest.shape[1])).cpu()

    allowed = tolerance(next(iter(tl.parameters())).dtype, cached=True)
    try:
        cache = decoder.expand(prefix, 2, rest.shape[1])
        embedded = first_block_input(tl, lambda: decoder.step(rest, cache))
        before = replaced("resid_pre", lambda value: embedded)
        after = replaced("resid_post", lambda value: torch.cat([value, value]))
    except Exception:  # noqa: BLE001  # whatever the library raises
        return False
    return all(
        len(got) == 2 and distance(wanted.expand_as(got), got) <= allowed
        for wanted, got in ((full[:, -1], before), (full[:1, -1], after))
    )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Name the pass in which a library raised an error."""
    try:
        yield
    except _MismatchError:
        raise
    except Exception as error:  # whatever the library raises
        raise ValueError(f"{what} raises {reason(error)}") from error


def tolerance(dtype: torch.dtype, *, cached: bool = False) -> float:
    """Return the largest acceptable distance between logits.

    Measured noise: below 3e-5 in float32; in bfloat16 up to 1 % for a full pass, and 4 % (SmolLM2)
    to 11 % (GPT-Neo, which does not scale its attention scores) after a cached prompt, which sums
    in another order; an eighth of that in float16.
    """
    exact = torch.get_float32_matmul_precision() == "highest"  # otherwise TF32 or less
    if exact and dtype not in _HALF:
        return _FLOAT32
    return _HALF.get(dtype, _HALF[torch.float16]) * (4 if cached else 1)


def distance(expected: Float[Tensor, "*pos vocab"], got: Float[Tensor, "*pos vocab"]) -> float:
    """Return the distance between logits at the worst position, relative to their spread."""
    # Some models mask tokens with the lowest float.
    open_ = expected > -1e30
    counted = open_.sum(-1, keepdim=True)
    expected, got = expected.where(open_, 0.0), got.where(open_, 0.0)
    spread, off = (
        (x - x.sum(-1, keepdim=True) / counted).where(open_, 0.0).norm(dim=-1)
        for x in (expected, got - expected)
    )
    return float((off / spread.clamp_min(torch.finfo(torch.float32).tiny)).max())


class _MismatchError(ValueError):
    """Logits that differ."""


def _compare(what: str, expected: Tensor, got: Tensor, allowed: float) -> None:
    if expected.shape != got.shape:
        raise _MismatchError(f"{what} have shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    off = distance(expected, got)
    if not off <= allowed:  # NaN is not
        raise _MismatchError(f"{what} are off by {off:.2%} of their spread (noise: {allowed:.1%})")


def _prefix(length: int) -> int:
    """Return the length of the common prefix."""
    return max(1, length // 2 - 2)


def _check_cached(decoder: Decoder, tokens: Tensor, expected: Tensor, allowed: float) -> None:
    """Run the tokens as a sweep does, and compare the last logits of each step."""
    length, start = tokens.shape[1], _prefix(tokens.shape[1])
    cache = decoder.expand(decoder.prefill(tokens[:1, :start]), 2, length - start)
    what = "the logits after a cached prompt"
    ends = range(length - _SINGLE, length)
    for begin, end in zip([start, *ends], ends, strict=False):
        got = decoder.step(tokens[:, begin:end], cache).cpu()
        _compare(what, expected[:, end - 1], got, allowed)
    decoder.keep(cache, torch.tensor([1], device=tokens.device))
    got = decoder.step(tokens[1:, -1:], cache).cpu()
    _compare(what, expected[1:, -1], got, allowed)


def _full_pass(tl: Any, tokens: Tensor) -> tuple[Tensor, dict[Place, Tensor]]:
    """Return the logits of one pass, and the recorded activations of the last tokens."""
    found: dict[Place, Tensor] = {}
    shape = (*tokens.shape, tl.cfg.d_model)

    def record_at(place: Place) -> Any:
        def record(value: Any, hook: object) -> None:
            if isinstance(value, Tensor) and value.shape == shape:
                found[place] = value[:, -_RECORDED:].detach().float().cpu()

        return record

    there = tl.hook_dict
    places = [(kind, layer) for kind in KINDS for layer in range(tl.cfg.n_layers)]
    places.append(("resid_post", EMBED))
    named = [(hook_name(*place), record_at(place)) for place in places]
    with hooked(tl, [(name, record) for name, record in named if name in there]):
        logits = tl(tokens)
    return logits.float().cpu(), found


def _offered(
    found: Mapping[Place, Tensor], n_layers: int, dtype: torch.dtype
) -> tuple[tuple[HookKind, ...], Mapping[HookKind, str]]:
    """Return the kinds present at every layer that add up, and why the others are absent."""
    layers = range(n_layers)
    at = {
        kind: torch.stack([found[kind, layer] for layer in layers])
        for kind in KINDS
        if all((kind, layer) in found for layer in layers)
    }
    if "resid_post" not in at:  # which every patch replaces
        raise ValueError("its blocks do not return one vector per token")
    if "resid_pre" in at and not _equal(at["resid_pre"][1:], [at["resid_post"][:-1]], dtype):
        del at["resid_pre"]

    def holds(total: HookKind, *parts: HookKind) -> bool | None:
        """Whether the parts sum to the total; `None` if one of them is missing."""
        if not {total, *parts} <= set(at):
            return None
        return _equal(at[total], [at[part] for part in parts], dtype)

    before = holds("resid_mid", "resid_pre", "attn_out")
    after = holds("resid_post", "resid_mid", "mlp_out")
    parallel = holds("resid_post", "resid_pre", "attn_out", "mlp_out")
    no_mlp = bool(holds("resid_post", "resid_pre", "attn_out"))
    sums: dict[HookKind, tuple[bool | None, ...]] = {
        "attn_out": (before, parallel),
        "resid_mid": (before, after),
        "mlp_out": (after, parallel),
    }
    absent: dict[HookKind, str] = {}
    for kind in KINDS:
        tried = sums.get(kind, ())
        if kind in at and (True in tried or False not in tried):
            continue
        if no_mlp and kind in ("resid_mid", "mlp_out"):
            absent[kind] = NO_MLP
        elif kind == "resid_mid" and parallel:
            absent[kind] = PARALLEL
        else:
            absent[kind] = NOT_ADDED if kind in at else UNSEEN
    return tuple(kind for kind in at if kind not in absent), MappingProxyType(absent)


def _equal(total: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a vector is the sum of others, at every layer and token.

    The tolerance is a share of the last part, plus the rounding error of the sum.
    """
    share, rounding = (0.05, 0.01) if dtype in _HALF else (1e-3, 1e-5)
    off = (total - sum(parts)).norm(dim=-1)
    allowed = share * parts[-1].norm(dim=-1) + rounding * total.norm(dim=-1)
    return bool((off <= allowed).all())


def repair_bridge(tl: Any) -> None:
    """Repair in place what TransformerLens 3.9 gets wrong and 4 does not.

    1. Cohere rotates neighbouring pairs of a head's numbers, the bridge the two halves. The bridge
       can rotate pairs, if configured to and given the angles in the order that it expects.
    2. Attention with linear biases (ALiBi: MPT, some Falcon) does not put its keys and values into
       the cache.

    A bridge that does both correctly is left unchanged.
    """
    _rotate_pairs(tl)
    for block in tl.blocks:
        attention = getattr(block, "attn", None)
        if attention is not None and _ignores_cache(attention):
            _use_cache(attention)


def _rotate_pairs(tl: Any) -> None:
    repaired = hasattr(tl.cfg, "rotary_interleaved_cos_sin")  # TransformerLens 4
    if repaired or not type(tl.original_model).__name__.startswith("Cohere"):
        return

    def in_halves(module: Any, inputs: Any, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Reorder Cohere's angles 0 0 1 1 2 2 ... to 0 1 2 ... 0 1 2 ..."""
        return tuple(torch.cat([x[..., ::2], x[..., ::2]], dim=-1) for x in angles)

    tl.rotary_emb.register_forward_hook(in_halves)
    for block in tl.blocks:
        block.attn.config.rotary_adjacent_pairs = True


def _ignores_cache(attention: Any) -> bool:
    """Whether an ALiBi attention ignores the cache."""
    names = [cls.__name__ for cls in type(attention).__mro__]
    if "ALiBiJointQKVAttentionBridge" not in names:
        return False
    return "_update_kv_cache" not in type(attention)._reconstruct_attention.__code__.co_names


def _use_cache(attention: Any) -> None:
    """Put keys and values into the cache once they are split into heads."""
    attend, in_heads = attention._reconstruct_attention, attention._reshape_qkv_to_heads

    def attend_with_cache(*args: Any, **kwargs: Any) -> Any:
        def with_cache(*given: Any) -> Any:
            queries, keys, values, *sizes = in_heads(*given)
            keys, values = attention._update_kv_cache(keys, values, **kwargs)
            return queries, keys, values, *sizes

        attention._reshape_qkv_to_heads = with_cache
        try:
            return attend(*args, **kwargs)
        finally:
            attention._reshape_qkv_to_heads = in_heads

    attention._reconstruct_attention = attend_with_cache
