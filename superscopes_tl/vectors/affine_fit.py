"""Fit affine maps between layers or models by least squares (Patchscopes, section 3).

1. Read every text once per model (`capture`): the vectors of the source layers, and the block
   outputs of the target layers, at every token but the BOS. A beginning that several texts share
   gives the same vectors each time: it counts once.
2. Two models may cut a text into different tokens. A token of one meets the token of the other
   that ends at the same character: up to there both have read the same. "Pep|pers" and "P|eppers"
   meet at the end of the word; a token that meets none is left out.
3. Every fifth text is held out. On the others solve min Σ‖A·x + b − y‖² + λ‖A‖² in float64, with
   means taken off, so that b is free. λ = 0, plain least squares, where there are more vectors
   than dimensions. Where there are not, many maps fit exactly, and λ is `SMALL_RIDGE` times the
   vectors' summed variance along a mean dimension, which prefers a small A. Directions weaker
   than `RESOLUTION` of the strongest are rounding errors of float32 and ignored.
4. R² of each map on the held-out texts: the share of their variance, summed over dimensions, that
   the map explains.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Activations, capture
from superscopes_tl.errors import bad_value
from superscopes_tl.model import HookKind, LanguageModel, TokenizedText, check_layers, load_model
from superscopes_tl.vectors.affine import AffineMap, Place

SMALL_RIDGE = 1e-3
"""λ where there are no more vectors than dimensions, in units of a mean dimension."""
RESOLUTION = 1e-6
"""What float32 can tell apart: weaker directions, relative to the strongest, are not inverted."""

_Solved: TypeAlias = tuple[Tensor, Tensor, float, float | None]
"""A, b, λ and R² of a map."""


def fit_affine(
    model: LanguageModel | Any,
    texts: Sequence[str],
    pairs: Iterable[tuple[int, int]],
    *,
    kinds: str | Sequence[str] = "resid_post",
    target_model: LanguageModel | Any = None,
    ridge: float | None = None,
) -> tuple[AffineMap, ...]:
    """Fit an affine map for each kind and each (source layer, target layer).

    Args:
        model: the model that is read.
        texts: at least two different ones; every fifth (or the last, of fewer) is held out.
        pairs: source and target layers, such as `[(5, 0), (2, 0)]`; all are fitted from one
            forward pass per text and model.
        kinds: the kinds of activation that are mapped.
        target_model: whose block outputs they are mapped to; `model` itself unless given.
        ridge: λ in units of a mean dimension; see the module's step 3 for what is done unless
            given.

    Returns:
        The maps, kind by kind, in the order of `pairs`.

    Raises:
        ValueError, TypeError: bad texts, layers, kinds or ridge; tokens that nowhere meet.
    """
    model = load_model(model)
    target = model if target_model is None else load_model(target_model)
    wanted = model.checked_kinds(kinds)
    layers = _check_pairs(pairs, model, target)
    distinct = _check_texts(texts)
    if ridge is not None and not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise bad_value("ridge", "0 or more", ridge, "leave it out")
    held_out = distinct[4::5] or distinct[-1:]
    kept_back = set(held_out)
    fitted_on = [text for text in distinct if text not in kept_back]
    places: list[Place] = [(kind, *pair) for kind in wanted for pair in layers]
    seen = _Vectors(model, target, places)
    n = seen.read(fitted_on)
    both = seen.read(held_out)
    if not 0 < n < both:
        raise bad_value(
            "texts",
            "texts to fit on and held-out ones that begin unlike these, with tokens that "
            "end at the same characters in both models",
            f"{n} vectors to fit on, {both - n} held out",
            "give more and different texts, PAPER_PROMPTS for example",
        )
    digest = f"{zlib.crc32(repr((fitted_on, held_out)).encode()):08x}"
    fingerprints = (model.name, model.fingerprint, target.name, target.fingerprint)
    solved: dict[Place, AffineMap] = {}
    for kind, source_layer in dict.fromkeys(place[:2] for place in places):
        targets = [place[2] for place in places if place[:2] == (kind, source_layer)]
        outputs = [seen.target(layer) for layer in targets]
        found = _solve(seen.source((kind, source_layer)), outputs, n, ridge)
        for layer, (weight, bias, used, r2) in zip(targets, found, strict=True):
            solved[kind, source_layer, layer] = AffineMap(
                weight, bias, kind, source_layer, layer, *fingerprints, digest, n, used, r2
            )
    return tuple(solved[place] for place in places)


def _solve(
    x: Float[Tensor, "vectors d_in"],
    outputs: Sequence[Float[Tensor, "vectors d_out"]],
    n: int,
    ridge: float | None,
) -> list[_Solved]:
    """Return A, b, λ and R² of the maps from one source to several targets.

    The first `n` vectors are fitted on, the others are held out; x is factorised once.
    """
    if ridge is None:
        ridge = 0.0 if n > x.shape[1] else SMALL_RIDGE
    y = torch.cat(list(outputs), dim=1)
    weight, bias = least_squares(x[:n], y[:n], ridge=ridge)
    predicted = x[n:] @ weight.T + bias
    width = outputs[0].shape[1]
    solved: list[_Solved] = []
    for target, output in enumerate(outputs):
        own = slice(target * width, (target + 1) * width)
        r2 = r_squared(predicted[:, own], output[n:])
        solved.append((weight[own].clone(), bias[own].clone(), float(ridge), r2))
    return solved


def least_squares(
    x: Float[Tensor, "vectors d_in"], y: Float[Tensor, "vectors d_out"], *, ridge: float = 0.0
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """Return the A and b (float32) of the least Σ‖A·x + b − y‖² + λ‖A‖².

    Where several are least, the one with the smallest A.

    Args:
        x: what is mapped.
        y: what it is mapped to.
        ridge: λ in units of Σ‖x − mean‖² / d_in.
    """
    x, y = x.double().cpu(), y.double().cpu()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    if ridge:
        # As many more equations √λ·A = 0 as there are dimensions.
        root = math.sqrt(ridge * float(x.square().sum()) / x.shape[1])
        x = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
        y = torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])
    solution = torch.linalg.lstsq(x, y, rcond=RESOLUTION, driver="gelsd").solution
    bias = y_mean - x_mean @ solution
    return solution.T.float().contiguous(), bias.float()


def r_squared(
    predicted: Float[Tensor, "vectors d_out"], y: Float[Tensor, "vectors d_out"]
) -> float | None:
    """Return 1 − Σ‖y − predicted‖² / Σ‖y − mean‖²; `None` where all y are alike."""
    variance = float((y - y.mean(dim=0)).square().sum())
    return 1 - float((y - predicted).square().sum()) / variance if variance else None


class _Vectors:
    """The vectors of source and target layers at the tokens where two models meet."""

    def __init__(
        self, model: LanguageModel, target: LanguageModel, places: Sequence[Place]
    ) -> None:
        self._model, self._target = model, target
        self._sources: dict[tuple[str, int], list[Tensor]] = {p[:2]: [] for p in places}
        self._targets: dict[int, list[Tensor]] = {p[2]: [] for p in places}
        self._begun: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def read(self, texts: Sequence[str]) -> int:
        """Read texts with both models; return how many vectors there are by now."""
        for text in texts:
            self._read(text)
        return len(self._begun)

    def _read(self, text: str) -> None:
        """Read a text, in one forward pass if the two models are one."""
        source, target = self._capture(text)
        if source is target:
            met = [(p, p) for p in range(source.tokens.prefix, len(source.tokens))]
        else:
            met = matched(source.tokens, target.tokens)
        fresh: list[tuple[int, int]] = []
        for p, q in met:
            begun = source.tokens.ids[: p + 1], target.tokens.ids[: q + 1]
            if begun not in self._begun:
                self._begun.add(begun)
                fresh.append((p, q))
        at, there = [p for p, _ in fresh], [q for _, q in fresh]
        for (kind, layer), rows in self._sources.items():
            rows.append(source[cast("HookKind", kind), layer][at].float().cpu())
        for layer, rows in self._targets.items():
            rows.append(target["resid_post", layer][there].float().cpu())

    def _capture(self, text: str) -> tuple[Activations, Activations]:
        kinds = dict.fromkeys(kind for kind, _ in self._sources)
        layers = dict.fromkeys(layer for _, layer in self._sources)
        if self._model is not self._target:
            return (
                capture(self._model, text, kinds=kinds, layers=layers),
                capture(self._target, text, kinds="resid_post", layers=self._targets),
            )
        both = capture(
            self._model,
            text,
            kinds=dict.fromkeys([*kinds, "resid_post"]),
            layers=dict.fromkeys([*layers, *self._targets]),
        )
        return both, both

    def source(self, place: tuple[str, int]) -> Float[Tensor, "vectors d_in"]:
        """Return the vectors of a kind and source layer, in the order they were read."""
        return torch.cat(self._sources[place])

    def target(self, layer: int) -> Float[Tensor, "vectors d_out"]:
        """Return the block outputs of a target layer, in the same order."""
        return torch.cat(self._targets[layer])


def matched(source: TokenizedText, target: TokenizedText) -> list[tuple[int, int]]:
    """Return the positions of tokens that end at the same character of one text.

    A character may take several tokens (an emoji, say): its last one counts. A BOS, or a space
    that a tokenizer put in by itself, covers nothing and meets nothing.
    """

    def ends(tokens: TokenizedText) -> dict[int, int]:
        return {end: p for p, (start, end) in enumerate(tokens.spans) if end > start}

    there = ends(target)
    return [(position, there[end]) for end, position in ends(source).items() if end in there]


def _check_pairs(
    pairs: Iterable[tuple[int, int]], model: LanguageModel, target: LanguageModel
) -> list[tuple[int, int]]:
    """Return the distinct pairs of layers, counted from 0."""
    given = list(pairs)
    if not given or not all(isinstance(p, Sequence) and len(p) == 2 for p in given):
        raise bad_value(
            "pairs",
            "pairs of a source and a target layer",
            given,
            "pass for example [(5, 0), (2, 0)]",
        )
    checked = {
        (
            check_layers(source, model.n_layers, "source layer")[0],
            check_layers(target_layer, target.n_layers, "target layer")[0],
        ): None
        for source, target_layer in given
    }
    return list(checked)


def _check_texts(texts: Sequence[str]) -> list[str]:
    distinct = [] if isinstance(texts, str) else list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise bad_value(
            "texts", "at least two different texts", texts, "PAPER_PROMPTS, for example"
        )
    return distinct
