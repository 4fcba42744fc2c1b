"""A trained reader of d_model + 1 numbers: f(v) = s·v/‖v‖ + b (SelfIE adapters).

"Learning Self-Interpretation from Interpretability Artifacts" (arXiv 2602.10352): the language
model stays frozen, and a scale s and a vector b are trained so that it describes what it is shown
at its input embedding. Of what training gains there, b brings 85 %.

1. `Adapter` is a mapping family, α·s·v/‖v‖ + b: α = 1 is f, α = 0 is b alone.
2. Files are safetensors with the tensors `log_scale` and `bias`, as the authors name them, and the
   model's fingerprint. Files of theirs with these two tensors can be loaded too.

`evaluation.fit_adapter` fits one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import TargetPrompt
from superscopes_tl.errors import bad_value
from superscopes_tl.files import read_json, reading, write_tensors
from superscopes_tl.model import LanguageModel, PatchedLayer
from superscopes_tl.vectors.amplify import MappingFunction, stable_hash

FORMAT = "superscopes_tl adapter 1"
MOST_BYTES = 2**24
ADAPTER_SETTINGS: Mapping[str, type] = {
    "chat": bool, "source_template": str, "max_new_tokens": int, "target_prompt": dict,
}  # fmt: skip
"""The settings of a sweep, as plain data, that an adapter is fitted with and keeps. A file may say
no others: one could name a model to be loaded."""
_WHERE = ("kind", "layer", "target_layer", "settings")
_TYPES: Mapping[str, Any] = {
    "model": str, "fingerprint": str, "kind": str, "layer": (int, type(None)),
    "target_layer": (int, str), "settings": dict, "training": dict,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Adapter:
    """f(v) = s·v/‖v‖ + b, a mapping family of a sweep: `sweep(model, name, **adapter.sweep)`.

    Attributes:
        scale: s.
        bias: b.
        model: name of the model.
        fingerprint: of its weights; empty where the file does not say it.
        kind: the kind of activation that it was fitted on.
        layer: the source layer; `None` where the file does not say it.
        target_layer: where f(v) is written.
        settings: those of `ADAPTER_SETTINGS` that it was fitted with.
        training: how it was fitted, as plain data.
    """

    scale: float
    bias: Float[Tensor, " d_model"] = field(compare=False)
    model: str = ""
    fingerprint: str = ""
    kind: str = "resid_post"
    layer: int | None = None
    target_layer: PatchedLayer = "embed"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        numbers = f"{stable_hash(self.scale, self.bias.tolist()):08x}"
        object.__setattr__(self, "digest", numbers)

    def __call__(self, alpha: float) -> MappingFunction:
        """Return v → α·s·v/‖v‖ + b."""

        def adapt(v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            if v.shape[-1] != len(self.bias):
                expected = f"{len(self.bias)} numbers, the width of {self.model or 'its model'}"
                raise bad_value("v", expected, v.shape[-1], "read vectors of that model")
            unit = torch.nn.functional.normalize(v.float(), dim=-1, eps=1e-30)
            return alpha * self.scale * unit + self.bias.to(v.device)

        return adapt

    def __repr__(self) -> str:
        where = f"{self.kind} of layer {self.layer} into {self.target_layer}"
        norm = float(self.bias.norm())
        return f"Adapter(<{where}, s = {self.scale:.3g}, |b| = {norm:.3g}, {self.digest}>)"

    @property
    def sweep(self) -> dict[str, Any]:
        """The settings of a sweep that reads with it, as it was fitted."""
        settings = dict(self.settings)
        if target := settings.get("target_prompt"):
            settings["target_prompt"] = TargetPrompt(**target)
        where = {"kinds": self.kind, "layers": self.layer, "target_layer": self.target_layer}
        return {**settings, **where, "mapping": self, "alphas": (1.0,)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, atomically; return the path.

        Raises:
            OSError: the file cannot be written.
        """
        about = {name: getattr(self, name) for name in _TYPES}
        header = {"format": FORMAT, "adapter": json.dumps(about, allow_nan=False)}
        tensors = {"log_scale": torch.tensor([math.log(self.scale)]), "bias": self.bias}
        write_tensors(Path(path), tensors, header)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel, **where: Any) -> Self:
        """Read a safetensors file of `save`, or a scalar-affine one of the paper's authors.

        Args:
            path: the file; theirs must have been trained on normalised vectors.
            model: the model that it is for.
            **where: `kind`, `layer`, `target_layer` and `settings`, which their files do not say.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: no adapter of this form, or a corrupt one.
            ValueError: an adapter of another model.
        """
        if unknown := sorted(set(where) - set(_WHERE)):
            raise bad_value("where", f"out of {_WHERE}", unknown, "correct the name")
        expected = "the tensors log_scale [1] and bias [d_model] of an adapter"
        fix = "pass a file that Adapter.save wrote, or another scalar-affine adapter"
        with reading(path, expected, fix, most=MOST_BYTES):
            tensors, about = _read(Path(path))
            scale, bias = (_numbers(tensors, name) for name in ("log_scale", "bias"))
            if len(scale) != 1 or set(tensors) != {"log_scale", "bias"}:
                raise ValueError(f"the tensors {sorted(tensors)}")
            number = math.exp(float(scale))
            if not 0 < number < math.inf:
                raise ValueError(f"the logarithm of a scale {float(scale)}")
            found = cls(number, bias, **{**about, **where})
            TargetPrompt(**found.settings.get("target_prompt", {"text": "x"}))
        if found.fingerprint not in ("", model.fingerprint) or len(bias) != model.d_model:
            wanted = f"an adapter of {model.name}, width {model.d_model} ({model.fingerprint})"
            got = f"one of {found.model or 'another model'}, width {len(bias)}"
            raise bad_value("path", wanted, f"{got} ({found.fingerprint})", "fit_adapter on it")
        return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's tensors, and what it says about them."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    about = read_json(header["adapter"]) if header.get("format") == FORMAT else {}
    for parts, types in ((about, _TYPES), (about.get("settings", {}), ADAPTER_SETTINGS)):
        if set(parts) - set(types) or not all(isinstance(v, types[k]) for k, v in parts.items()):
            raise ValueError(f"a header with {about}")
    return tensors, about


def _numbers(tensors: Mapping[str, Any], name: str) -> Float[Tensor, " n"]:
    found = tensors[name].float()
    if found.ndim != 1 or not bool(found.isfinite().all()):
        raise ValueError(f"{name} that is no vector of finite numbers")
    vector: Tensor = found
    return vector
