"""Affine mapping functions between layers or models, f(v) = A·v + b (Patchscopes, section 3).

An `AffineMap` maps a vector of a source layer to the block output of a target layer, of the same
model or of another one. `Mapped(maps)` is the source of vectors that sends every site's activation
through the map of its source layer and target layer; amplification comes after it: α·(A·v + b).
`save_maps` and `load_maps` keep several in one safetensors file: tensors and a JSON header, no
code. `fit_affine` makes them by least squares:

1. One forward pass per text and model: vectors of the source layers and block outputs of the
   target layers, at every token but the BOS. A prefix that several texts share counts once.
2. Two models may tokenize a text differently. Tokens that end at the same character are paired, as
   up to there both models have read the same; tokens without a partner are left out.
3. Every fifth text is held out. On the others minimise Σ‖A·x + b − y‖² + λ‖A‖² in float64, with
   means subtracted, so that b is not penalised. λ = 0, plain least squares, where there are more
   vectors than dimensions. Otherwise many maps fit exactly, and λ is `SMALL_RIDGE` times the
   vectors' summed variance per dimension, which prefers a small A. Singular values below
   `RESOLUTION` of the largest are rounding errors of float32 and ignored.
4. R² of each map on the held-out texts: the share of their variance, summed over dimensions, that
   the map explains.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, cast, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import capture, site_vectors
from superscopes_tl.errors import bad_value
from superscopes_tl.files import check_format, reading, write_tensors
from superscopes_tl.model import HookKind, LanguageModel, TokenizedText, check_layers, load_model
from superscopes_tl.vectors.amplify import stable_hash
from superscopes_tl.vectors.formats import MAX_BYTES
from superscopes_tl.vectors.sources import Places, SourceRun

FORMAT = "superscopes_tl.affine"
FORMAT_VERSION = 1

SMALL_RIDGE = 1e-3
"""λ where there are no more vectors than dimensions, in units of the variance per dimension."""
RESOLUTION = 1e-6
"""Relative precision of float32: smaller singular values are not inverted."""

Place: TypeAlias = tuple[str, int, int]
"""What a map is for: a kind, a source layer and a target layer."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """f(v) = A·v + b, from a source layer of one model to the block output of a target layer.

    Attributes:
        weight: A.
        bias: b.
        kind: the kind of activation that is mapped.
        source_layer: where it is read.
        target_layer: whose block output it is mapped to.
        source_model: name of the source model.
        source_fingerprint: of its weights.
        target_model: name of the target model; often the same.
        target_fingerprint: of its weights.
        texts: digest of the fitted and the held-out texts.
        n_vectors: number of vectors it was fitted on.
        ridge: λ, in units of the variance per dimension; 0 is plain least squares.
        r2: R² on the held-out texts; `None` if these have a single vector.
    """

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]
    kind: str
    source_layer: int
    target_layer: int
    source_model: str
    source_fingerprint: str
    target_model: str
    target_fingerprint: str
    texts: str
    n_vectors: int
    ridge: float
    r2: float | None

    def __call__(self, v: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Map vectors, in float32.

        Raises:
            ValueError: vectors of another width.
        """
        if v.shape[-1] != (width := self.weight.shape[1]):
            expected = f"{width} numbers, the width of {self.source_model}"
            raise bad_value("v", expected, v.shape[-1], "map vectors of that model")
        out: Tensor = v.float() @ self.weight.to(v.device).T + self.bias.to(v.device)
        return out

    def __repr__(self) -> str:
        r2 = "unknown" if self.r2 is None else f"{self.r2:.2f}"
        return (
            f"AffineMap({self.kind} of {self.source_model}, layer {self.source_layer}, to "
            f"{self.target_model}, layer {self.target_layer}: "
            f"{self.n_vectors} vectors, R² {r2} on held-out texts)"
        )

    def provenance(self) -> dict[str, Any]:
        """Return every attribute but the weights, as plain data."""
        names = [one.name for one in fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("weight", "bias")}

    def check_models(self, source: LanguageModel, target: LanguageModel) -> None:
        """Raise `ValueError` for models that the map was not fitted on."""
        for argument, name, fingerprint, model in (
            ("model", self.source_model, self.source_fingerprint, source),
            ("target_model", self.target_model, self.target_fingerprint, target),
        ):
            if model.fingerprint != fingerprint:
                expected = f"{name} with fingerprint {fingerprint}, as in {self!r}"
                got = f"{model.name} with fingerprint {model.fingerprint}"
                raise bad_value(argument, expected, got, "fit_affine on these models")


@dataclass(frozen=True, repr=False)
class Mapped:
    """Source: the captured vectors through affine maps, `sweep(vectors=Mapped(maps))`.

    Attributes:
        maps: one for every kind, source layer and target layer of the sweep.
        digest: identifies layers, texts and weights that the maps were fitted on.
    """

    maps: Sequence[AffineMap] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        maps = tuple(self.maps)
        if twice := [place for place, n in Counter(map(_place, maps)).items() if n > 1]:
            raise bad_value("maps", "one map for the same layers", twice[0], "leave one out")
        # R² is left out because its last digits differ between machines.
        fitted = [one.provenance() | {"r2": None} for one in maps]
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "digest", f"{stable_hash(fitted):08x}")

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return A·v + b of every site, by the map to its target layer."""
        found = {_place(one): one for one in self.maps}
        wanted = [(site.kind, site.layer, target_layer) for site, target_layer in places]
        if missing := [place for place in wanted if place not in found]:
            expected = "a map for every (kind, source layer, target layer) of the sweep"
            got = f"none for {missing[0]}, only for {sorted(found)}"
            raise bad_value("maps", expected, got, "fit_affine with these pairs of layers")
        read = site_vectors(run.model, run.source, [site for site, _ in places])
        vectors = torch.empty(len(places), run.generator.model.d_model)
        for place in dict.fromkeys(wanted):
            found[place].check_models(run.model, run.generator.model)
            rows = [row for row, other in enumerate(wanted) if other == place]
            vectors[rows] = found[place](read[rows])
        return vectors

    def __repr__(self) -> str:
        return f"Mapped(<{len(self.maps)} maps {self.digest}>)"


def _place(one: AffineMap) -> Place:
    return one.kind, one.source_layer, one.target_layer


def save_maps(maps: Iterable[AffineMap], path: str | os.PathLike[str]) -> Path:
    """Write maps to one safetensors file, atomically; return its path.

    Raises:
        ValueError: no maps.
        OSError: the file cannot be written.
    """
    chosen, target = tuple(maps), Path(path)
    if not chosen:
        raise bad_value("maps", "at least one map", chosen, "fit_affine makes them")
    tensors = {
        f"{i}.{name}": getattr(one, name).contiguous()
        for i, one in enumerate(chosen)
        for name in ("weight", "bias")
    }
    header = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "maps": json.dumps([one.provenance() for one in chosen], allow_nan=False),
    }
    write_tensors(target, tensors, header)
    return target


def load_maps(path: str | os.PathLike[str]) -> tuple[AffineMap, ...]:
    """Read a file that `save_maps` wrote; models are checked when the maps are used.

    Raises:
        FileNotFoundError: there is no such file.
        RunFileError: it is corrupt, foreign, too large or of a newer format.
    """
    from safetensors import safe_open

    expected = f"a file of format {FORMAT} version {FORMAT_VERSION}"
    fix = "pass a file that save_maps wrote"
    with reading(path, expected, fix, most=MAX_BYTES), safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        check_format(header, FORMAT, str(FORMAT_VERSION))
        return tuple(
            _checked(AffineMap(file.get_tensor(f"{i}.weight"), file.get_tensor(f"{i}.bias"), **row))
            for i, row in enumerate(json.loads(header["maps"]))
        )


def _checked(one: AffineMap) -> AffineMap:
    """Return a map read from a file if its parts fit together."""
    shapes = tuple(one.weight.shape), tuple(one.bias.shape)
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"a map of shapes {shapes}")
    if not all(n.dtype == torch.float32 and n.isfinite().all() for n in (one.weight, one.bias)):
        raise ValueError("a map that is not of finite float32 numbers")
    types = get_type_hints(AffineMap)
    for name, value in one.provenance().items():
        if not isinstance(value, types[name]):
            raise TypeError(f"{name} {value!r}")
    return one


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
        model: the source model.
        texts: at least two different ones; every fifth (or the last, of fewer) is held out.
        pairs: source and target layers, such as `[(5, 0), (2, 0)]`.
        kinds: the kinds of activation that are mapped.
        target_model: whose block outputs they are mapped to; defaults to `model`.
        ridge: λ in units of the variance per dimension; for the default see step 3 above.

    Returns:
        The maps, kind by kind, in the order of `pairs`.

    Raises:
        ValueError, TypeError: bad texts, layers, kinds or ridge; tokens without partners.
    """
    model = load_model(model)
    target = model if target_model is None else load_model(target_model)
    wanted = model.checked_kinds(kinds)
    layers = _checked_pairs(pairs, model, target)
    distinct = [] if isinstance(texts, str) else list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise bad_value("texts", "at least two different texts", texts, "pass PAPER_PROMPTS")
    if ridge is not None and not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise bad_value("ridge", "0 or more", ridge, "leave it out")
    held_out = distinct[4::5] or distinct[-1:]
    fitted_on = [text for text in distinct if text not in held_out]
    places: list[Place] = [(kind, *pair) for kind in wanted for pair in layers]
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    x, y = _read(model, target, places, fitted_on, seen)
    n = len(seen)
    held_x, held_y = _read(model, target, places, held_out, seen)
    if not 0 < n < len(seen):
        expected = "texts with different beginnings, and tokens that both models have"
        got = f"{n} vectors to fit on, {len(seen) - n} held out"
        raise bad_value("texts", expected, got, "pass more texts, such as PAPER_PROMPTS")
    digest = f"{stable_hash(fitted_on, held_out):08x}"
    names = (model.name, model.fingerprint, target.name, target.fingerprint)
    used = ridge if ridge is not None else 0.0 if n > model.d_model else SMALL_RIDGE
    maps: dict[Place, AffineMap] = {}
    for source in x:  # factorised once for all target layers
        into = [place[2] for place in places if place[:2] == source]
        weights, biases = least_squares(x[source], torch.cat([y[t] for t in into], 1), ridge=used)
        for layer, weight, bias in zip(
            into, weights.chunk(len(into)), biases.chunk(len(into)), strict=True
        ):
            r2 = r_squared(held_x[source] @ weight.T + bias, held_y[layer])
            maps[*source, layer] = AffineMap(
                weight.clone(), bias.clone(), *source, layer, *names, digest, n, float(used), r2
            )
    return tuple(maps[place] for place in places)


def _read(
    model: LanguageModel,
    target: LanguageModel,
    places: Sequence[Place],
    texts: Sequence[str],
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]],
) -> tuple[dict[tuple[str, int], Tensor], dict[int, Tensor]]:
    """Return the vectors of source and target layers at paired tokens with prefixes not `seen`."""
    sources: dict[tuple[str, int], list[Tensor]] = {place[:2]: [] for place in places}
    targets: dict[int, list[Tensor]] = {place[2]: [] for place in places}
    kinds, layers = {kind for kind, _ in sources}, {layer for _, layer in sources}
    for text in texts:
        if model is target:
            one = capture(model, text, kinds=kinds | {"resid_post"}, layers=layers | {*targets})
            other = one
            pairs = [(p, p) for p in range(one.tokens.prefix, len(one.tokens))]
        else:
            one = capture(model, text, kinds=kinds, layers=layers)
            other = capture(target, text, kinds="resid_post", layers=targets)
            pairs = matched(one.tokens, other.tokens)
        fresh: list[tuple[int, int]] = []
        for p, q in pairs:
            prefix = one.tokens.ids[: p + 1], other.tokens.ids[: q + 1]
            if prefix not in seen:
                seen.add(prefix)
                fresh.append((p, q))
        for (kind, layer), rows in sources.items():
            rows.append(one[cast("HookKind", kind), layer][[p for p, _ in fresh]].float().cpu())
        for layer, rows in targets.items():
            rows.append(other["resid_post", layer][[q for _, q in fresh]].float().cpu())
    return (
        {place: torch.cat(rows) for place, rows in sources.items()},
        {layer: torch.cat(rows) for layer, rows in targets.items()},
    )


def least_squares(
    x: Float[Tensor, "vectors d_in"], y: Float[Tensor, "vectors d_out"], *, ridge: float = 0.0
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """Return the A and b that minimise Σ‖A·x + b − y‖² + λ‖A‖², with the smallest A.

    λ is `ridge` times Σ‖x − mean‖² / d_in.
    """
    x, y = x.double().cpu(), y.double().cpu()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    if ridge:
        # One more equation √λ·A = 0 per dimension.
        root = math.sqrt(ridge * float(x.square().sum()) / x.shape[1])
        x = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
        y = torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])
    solution = torch.linalg.lstsq(x, y, rcond=RESOLUTION, driver="gelsd").solution
    bias = y_mean - x_mean @ solution
    return solution.T.float().contiguous(), bias.float()


def r_squared(
    predicted: Float[Tensor, "vectors d_out"], y: Float[Tensor, "vectors d_out"]
) -> float | None:
    """Return 1 − Σ‖y − predicted‖² / Σ‖y − mean‖²; `None` where all y are equal."""
    variance = float((y - y.mean(dim=0)).square().sum())
    return 1 - float((y - predicted).square().sum()) / variance if variance else None


def matched(source: TokenizedText, target: TokenizedText) -> list[tuple[int, int]]:
    """Return the positions of tokens that end at the same character of a text.

    Of several tokens of one character (an emoji, say) the last counts. A BOS, or a space that a
    tokenizer inserts, covers no character and has no partner.
    """

    def ends(tokens: TokenizedText) -> dict[int, int]:
        return {end: p for p, (start, end) in enumerate(tokens.spans) if end > start}

    there = ends(target)
    return [(position, there[end]) for end, position in ends(source).items() if end in there]


def _checked_pairs(
    pairs: Iterable[tuple[int, int]], model: LanguageModel, target: LanguageModel
) -> list[tuple[int, int]]:
    """Return the distinct pairs of layers, counted from 0."""
    given = list(pairs)
    if not given or not all(isinstance(p, Sequence) and len(p) == 2 for p in given):
        raise bad_value("pairs", "pairs of source and target layers", given, "such as [(5, 0)]")
    checked: list[tuple[int, int]] = []
    for source, target_layer in given:
        checked += zip(
            check_layers(source, model.n_layers, "source layer"),
            check_layers(target_layer, target.n_layers, "target layer"),
            strict=True,
        )
    return list(dict.fromkeys(checked))
