"""Affine mapping functions between layers or models, f(v) = A·v + b (Patchscopes, section 3).

1. An `AffineMap` takes a vector of a source layer to the block output of a target layer, of the
   same model or of another one. `affine_fit.fit_affine` makes them.
2. `Mapped(maps)` is the source of vectors that sends every site's activation through the map of its
   source layer and target layer. Amplification comes after it: α·(A·v + b).
3. `save_maps` and `load_maps` keep several maps in one safetensors file: tensors and a JSON header,
   no code. Maps of other weights than those at hand are refused when they are used.

What is read through a map is what is linearly there; its R² says how much of the target layer's
activations that is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import site_vectors
from superscopes_tl.errors import RunFileError, bad_value, describe
from superscopes_tl.files import unfit, write_tensors
from superscopes_tl.model import LanguageModel, Site
from superscopes_tl.vectors.sources import SourceRun

FORMAT = "superscopes_tl.affine"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 4 * 2**30

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
        source_model: the name of the model that is read.
        source_fingerprint: of that model's weights.
        target_model: the name of the model that is asked; often the same.
        target_fingerprint: of that model's weights.
        texts: a digest of the texts that it was fitted on and held out.
        n_vectors: how many vectors it was fitted on.
        ridge: λ, in units of a mean dimension; 0 is plain least squares.
        r2: R² on the held-out texts, at most 1; `None` where these have one vector alone.
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
        if v.shape[-1] != self.weight.shape[1]:
            raise bad_value(
                "v",
                f"{self.weight.shape[1]} numbers, the width of {self.source_model}",
                f"{v.shape[-1]} numbers",
                "map vectors of the model that the map was fitted on",
            )
        out: Tensor = v.float() @ self.weight.to(v.device).T + self.bias.to(v.device)
        return out

    def __repr__(self) -> str:
        good = "unknown" if self.r2 is None else f"{self.r2:.2f}"
        into = "" if self.target_model == self.source_model else f" of {self.target_model}"
        return (
            f"AffineMap({self.kind} of layer {self.source_layer} of {self.source_model} to layer "
            f"{self.target_layer}{into}: {self.n_vectors} vectors, R² {good} on held-out texts)"
        )

    def provenance(self) -> dict[str, Any]:
        """Return everything but the numbers of the map, as plain data."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        return {k: v for k, v in plain.items() if k not in ("weight", "bias")}

    def check_models(self, source: LanguageModel, target: LanguageModel) -> None:
        """Refuse models that the map was not fitted on.

        Raises:
            ValueError: other weights than those that the map was fitted on.
        """
        for argument, name, fingerprint, model in (
            ("model", self.source_model, self.source_fingerprint, source),
            ("target_model", self.target_model, self.target_fingerprint, target),
        ):
            if model.fingerprint != fingerprint:
                raise bad_value(
                    argument,
                    f"{name} with fingerprint {fingerprint}, on which the map of layer "
                    f"{self.source_layer} to {self.target_layer} was fitted",
                    f"{model.name} with fingerprint {model.fingerprint}",
                    "fit_affine on these models",
                )


@dataclass(frozen=True, repr=False)
class Mapped:
    """Source: the captured vectors through affine maps, `sweep(vectors=Mapped(maps))`.

    Two are equal if their maps were fitted on the same texts, layers and weights.

    Attributes:
        maps: one for every kind, source layer and target layer of the sweep.
        digest: identifies the maps.
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
        object.__setattr__(self, "digest", f"{zlib.crc32(json.dumps(fitted).encode()):08x}")

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return A·v + b of every site, by the map to its target layer."""
        found = {_place(one): one for one in self.maps}
        wanted = [(site.kind, site.layer, target_layer) for site, target_layer in places]
        if missing := [place for place in wanted if place not in found]:
            raise bad_value(
                "maps",
                "a map for every (kind, source layer, target layer) of the sweep",
                f"none for {missing[0]}, only for {sorted(found)}",
                "name these layers in fit_affine(model, texts, pairs)",
            )
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
    """Write maps to one safetensors file, whole or not at all; return its path.

    Raises:
        ValueError: no maps.
        OSError: the file cannot be written; an older one of that name stays.
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
    """Read a file that `save_maps` wrote. No model is needed; models are checked at use.

    Raises:
        FileNotFoundError: there is no such file.
        RunFileError: it is corrupt, foreign, too large or of a newer format.
    """
    from safetensors import safe_open

    if reason := unfit(path, MAX_FILE_BYTES):
        raise _unreadable(path, reason)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise _unreadable(path, "safetensors that are no affine maps")
            if header.get("version") != str(FORMAT_VERSION):
                raise _unreadable(path, f"format version {header.get('version')!r}")
            return tuple(
                _checked(
                    AffineMap(file.get_tensor(f"{i}.weight"), file.get_tensor(f"{i}.bias"), **row)
                )
                for i, row in enumerate(json.loads(header["maps"]))
            )
    except RunFileError:
        raise
    except Exception as error:  # whatever the safetensors and JSON readers raise on bad bytes
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _checked(one: AffineMap) -> AffineMap:
    """Return a map read from a file if its parts fit together."""
    shapes = tuple(one.weight.shape), tuple(one.bias.shape)
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"a map of shapes {shapes}")
    for numbers in (one.weight, one.bias):
        if numbers.dtype != torch.float32 or not bool(numbers.isfinite().all()):
            raise ValueError("a map that is not of finite float32 numbers")
    types = get_type_hints(AffineMap)
    for name, value in one.provenance().items():
        if not isinstance(value, types[name]):
            raise TypeError(f"{name} {value!r}")
    return one


def _unreadable(path: object, got: str) -> RunFileError:
    return RunFileError(
        describe(
            "path",
            f"affine maps, a file of format {FORMAT} version {FORMAT_VERSION}",
            f"{path} with {got}",
            "pass a file that save_maps wrote, complete",
        )
    )
