"""Check that a TransformerLens object computes what the Hugging Face model does.

Converters and wrappers are written for the models that somebody tried. On others they may rotate
the wrong half of a vector, or forget what stood before, without an error. So a model is run on a
few tokens when it is loaded:

1. `probe` draws two rows of tokens that begin alike, and keeps the Hugging Face model's own logits
   for them. The bridge wraps that model in place, so this comes before the conversion.
2. `verify` runs the TransformerLens object on them once, whole, and compares the logits. During
   that pass it sees which hooks fire, at every layer, with one vector per token.
3. It runs them again as a sweep does: the common tokens through `prefill`, `expand`, then `step`
   with several tokens, with one, and with one when a row is dropped. The logits must be the same.
4. What the hooks saw must add up: `resid_mid = resid_pre + attn_out` and
   `resid_post = resid_mid + mlp_out`. A kind that does not is not offered, and `Seen.absent` says
   why. The last block's output must give the logits, or nothing is read through the unembedding.

Logits are compared by the root mean square of their difference over the vocabulary, relative to
that of the logits themselves, each taken from its mean at the position (a common shift changes no
probability); the worst position counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import reason
from superscopes_tl.model.decoder import Decoder
from superscopes_tl.model.sites import KINDS, HookKind, hook_name

Place: TypeAlias = tuple[HookKind, int]
"""A kind at a layer."""

TOKENS = 14
"""How many tokens a row of the probe has: more would cost time, fewer would show less."""

_SINGLE = 2  # of these, the last ones are run one by one
_LOOKED_AT = 3  # positions of each row whose activations are added up

_FLOAT32 = 1e-3
_HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}

NO_MLP = "this model has no MLP"
PARALLEL = (
    "attention and MLP run in parallel in this model, so there is no residual stream between them"
)
UNSEEN = "TransformerLens shows none in this architecture"
NOT_ADDED = (
    "what TransformerLens shows there is not what the block adds to the residual stream: "
    "a norm or a factor comes behind it"
)


@dataclass(frozen=True, eq=False)
class Probe:
    """A few tokens, and what the Hugging Face model itself makes of them.

    Attributes:
        tokens: two rows that begin alike.
        logits: the model's own, on the CPU in float32; `None` where only the TransformerLens
            object is there.
    """

    tokens: Int[Tensor, "rows pos"]
    logits: Float[Tensor, "rows pos vocab"] | None


@dataclass(frozen=True)
class Seen:
    """What the hooks of one pass showed.

    Attributes:
        kinds: the kinds that are there at every layer.
        absent: why each of the others is not.
        unembeds: whether the final norm and W_U make logits of the last block's outputs.
    """

    kinds: tuple[HookKind, ...]
    absent: Mapping[HookKind, str] = field(default_factory=lambda: MappingProxyType({}))
    unembeds: bool = True


def probe(tokenizer: Any, n_vocab: int, n_ctx: int, device: torch.device, hf: Any = None) -> Probe:
    """Return a few ordinary tokens and, of a Hugging Face model, its logits for them.

    Args:
        tokenizer: names the special tokens, which models treat in ways of their own.
        n_vocab: how many tokens have an embedding.
        n_ctx: longest sequence.
        device: where tokens have to be put.
        hf: the Hugging Face model, before anything wraps it.

    Raises:
        ValueError: the model cannot be run on them, or returns numbers that are not finite.
    """
    special = set(tokenizer.all_special_ids)
    known = range(min(n_vocab, len(tokenizer)))
    ordinary = [i for i in known if i not in special] or list(known)
    length = min(TOKENS, n_ctx)
    start = _prefix(length)
    # A prime stride walks over the whole vocabulary; the second row goes on elsewhere.
    drawn = [ordinary[(7919 * i + 101) % len(ordinary)] for i in range(2 * length - start)]
    rows = [drawn[:length], drawn[:start] + drawn[length:]]
    tokens = torch.tensor(rows, device=device)
    if hf is None:
        return Probe(tokens, None)
    with torch.no_grad():
        logits = hf(input_ids=tokens).logits.float().cpu()
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError(f"its own logits are not finite in {_number_type(hf.dtype)}")
    return Probe(tokens, logits)


def verify(lens: Any, decoder: Decoder, given: Probe) -> Seen:
    """Return what the hooks of a TransformerLens object show, if it computes what it should.

    Args:
        lens: the `HookedTransformer` or `TransformerBridge`.
        decoder: its cached decoding.
        given: from `probe`.

    Raises:
        ValueError: says in one clause which logits differ, and by how much.
    """
    dtype = next(iter(lens.parameters())).dtype
    allowed = tolerance(dtype)
    with torch.no_grad():
        with _said("a whole pass"):
            whole, found = _whole(lens, given.tokens)
        expected = whole if given.logits is None else given.logits
        _compare("the logits of a whole pass", expected, whole, allowed)
        with _said("a pass behind a cached prompt"):
            _check_cached(decoder, given.tokens, expected, tolerance(dtype, cached=True))
        kinds, absent = _offered(lens, found, dtype)
        last = found["resid_post", lens.cfg.n_layers - 1]
        return Seen(kinds, absent, _unembeds(decoder, last, whole[:, -_LOOKED_AT:], allowed))


def _unembeds(decoder: Decoder, last: Tensor, expected: Tensor, allowed: float) -> bool:
    """Tell whether the last block's outputs give the logits (a post-norm model has more to do)."""
    try:
        got = decoder.unembed(last).cpu()
    except Exception:  # noqa: BLE001  # a part that the wrapper does not have
        return False
    return got.shape == expected.shape and distance(expected, got) <= allowed


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Say of any error of a library what raised it."""
    try:
        yield
    except _OffError:
        raise
    except Exception as error:  # a pass may stumble over anything
        raise ValueError(f"{what} raises {reason(error)}") from error


def tolerance(dtype: torch.dtype, *, cached: bool = False) -> float:
    """Return how far logits may differ, as a share of their spread.

    Float noise of float32 was below 3e-5 in every model that was tried. In bfloat16 a whole pass
    was off by up to 1 %, a pass behind a cached prompt by 4 % (SmolLM2) and 11 % (GPT-Neo, which
    does not scale its attention scores); float16 has an eighth of that.

    Args:
        dtype: the number type of the weights.
        cached: for a pass behind a cached prompt, whose sums come in another order.
    """
    exact = torch.get_float32_matmul_precision() == "highest"  # else products are less than that
    if exact and dtype not in _HALF:
        return _FLOAT32
    return _HALF.get(dtype, _HALF[torch.float16]) * (4 if cached else 1)


def distance(expected: Float[Tensor, "*pos vocab"], got: Float[Tensor, "*pos vocab"]) -> float:
    """Return how far logits are off at the worst position, as a share of their spread."""
    # Some models rule tokens out with the lowest number there is.
    open_ = expected > -1e30
    counted = open_.sum(-1, keepdim=True)
    expected, got = expected.where(open_, 0.0), got.where(open_, 0.0)
    spread, off = expected, got - expected
    spread, off = (
        (x - x.sum(-1, keepdim=True) / counted).where(open_, 0.0).norm(dim=-1)
        for x in (spread, off)
    )
    return float((off / spread.clamp_min(torch.finfo(torch.float32).tiny)).max())


class _OffError(ValueError):
    """Logits that are not what they should be."""


def _compare(what: str, expected: Tensor, got: Tensor, allowed: float) -> None:
    if expected.shape != got.shape:
        raise _OffError(
            f"{what} have the shape {tuple(got.shape)} where {tuple(expected.shape)} was expected"
        )
    off = distance(expected, got)
    if not off <= allowed:  # NaN is not within it
        raise _OffError(f"{what} are off by {off:.2%} of their spread ({allowed:.1%} is noise)")


def _number_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prefix(length: int) -> int:
    """Return how many tokens the rows have in common."""
    return max(1, length // 2 - 2)


def _check_cached(decoder: Decoder, tokens: Tensor, expected: Tensor, allowed: float) -> None:
    """Run the tokens as a sweep does and compare the last logits of each step."""
    length, start = tokens.shape[1], _prefix(tokens.shape[1])
    cache = decoder.expand(decoder.prefill(tokens[:1, :start]), 2, length - start)
    what = "the logits behind a cached prompt"
    ends = range(length - _SINGLE, length)
    for begin, end in zip([start, *ends], ends, strict=False):
        got = decoder.step(tokens[:, begin:end], cache).cpu()
        _compare(what, expected[:, end - 1], got, allowed)
    decoder.keep(cache, torch.tensor([1], device=tokens.device))
    got = decoder.step(tokens[1:, -1:], cache).cpu()
    _compare(what, expected[1:, -1], got, allowed)


def _whole(lens: Any, tokens: Tensor) -> tuple[Tensor, dict[Place, Tensor]]:
    """Return the logits of one pass, and what the hooks saw of the last tokens."""
    found: dict[Place, Tensor] = {}
    shape = (*tokens.shape, lens.cfg.d_model)

    def record_at(place: Place) -> Any:
        def record(value: Any, hook: object) -> None:
            if isinstance(value, Tensor) and value.shape == shape:
                found[place] = value[:, -_LOOKED_AT:].detach().float().cpu()

        return record

    # Not through `lens.hooks`, which collects all points of a bridge anew for every hook.
    points, level = lens.hook_dict, lens.context_level + 1
    wanted = {(kind, layer) for kind in KINDS for layer in range(lens.cfg.n_layers)}
    at = {place: points[hook_name(*place)] for place in wanted if hook_name(*place) in points}
    try:
        for place, point in at.items():
            point.add_hook(record_at(place), level=level)
        logits = lens(tokens)
    finally:
        for point in at.values():
            point.remove_hooks(level=level)
    return logits.float().cpu(), found


def _offered(
    lens: Any, found: Mapping[Place, Tensor], dtype: torch.dtype
) -> tuple[tuple[HookKind, ...], Mapping[HookKind, str]]:
    """Return the kinds that are at every layer and add up, and why the others are not there.

    Raises:
        ValueError: there are no block outputs, which every patch is written over.
    """
    layers = range(lens.cfg.n_layers)
    at = {
        kind: torch.stack([found[kind, layer] for layer in layers])
        for kind in KINDS
        if all((kind, layer) in found for layer in layers)
    }
    if "resid_post" not in at:
        raise ValueError("its blocks have no output of one vector per token")
    if "resid_pre" in at and not _equal(at["resid_pre"][1:], [at["resid_post"][:-1]], dtype):
        del at["resid_pre"]

    def holds(total: HookKind, *parts: HookKind) -> bool | None:
        """Tell whether parts make up the total; `None` where one of them is not there."""
        if not {total, *parts} <= set(at):
            return None
        return _equal(at[total], [at[part] for part in parts], dtype)

    before = holds("resid_mid", "resid_pre", "attn_out")
    behind = holds("resid_post", "resid_mid", "mlp_out")
    beside = holds("resid_post", "resid_pre", "attn_out", "mlp_out")
    no_mlp = bool(holds("resid_post", "resid_pre", "attn_out"))
    sums: dict[HookKind, tuple[bool | None, ...]] = {
        "attn_out": (before, beside),
        "resid_mid": (before, behind),
        "mlp_out": (behind, beside),
    }
    absent: dict[HookKind, str] = {}
    for kind in KINDS:
        tried = sums.get(kind, ())
        if kind in at and (True in tried or False not in tried):
            continue
        if no_mlp and kind in ("resid_mid", "mlp_out"):
            absent[kind] = NO_MLP
        elif kind == "resid_mid" and beside:
            absent[kind] = PARALLEL
        else:
            absent[kind] = NOT_ADDED if kind in at else UNSEEN
    return tuple(kind for kind in at if kind not in absent), MappingProxyType(absent)


def _equal(total: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Tell whether a vector is the sum of others, at every layer and token.

    Measured against the last of the parts, beside what the rounding of the sum takes.
    """
    share, rounding = (0.05, 0.01) if dtype in _HALF else (1e-3, 1e-5)
    off = (total - sum(parts)).norm(dim=-1)
    allowed = share * parts[-1].norm(dim=-1) + rounding * total.norm(dim=-1)
    return bool((off <= allowed).all())
