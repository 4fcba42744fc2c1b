"""Ways to write a vector into the target prompt (SelfIE, Chen et al. 2024).

SelfIE differs from Patchscopes in the target prompt, which has several placeholders, and in how a
vector is injected. A write is a callable from a cell's patch and its α to the patch that is run,
the setting `write` of a sweep:

1. Replace, new = α·v: the default (the paper, section 3.1).
2. `Add()`: new = old + α·v. α = 0 is the unpatched prompt.
3. `Interpolate()`: new = (1 − α)·old + α·v, with α from 0 (unpatched) to 1 (replace). At one
   placeholder this equals the base `PlaceholderState()`; with several, each keeps its own old
   state instead of their mean.
4. `AtLayers(0, 3)`: the same vector at several layers. With replace, later layers overwrite what
   the blocks in between made of it; with add, it is added again.
5. `Both(Add(), AtLayers(0, 3))`: one after the other.

`norm_ratio` in the table is the norm of α·v relative to that of old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from superscopes_tl.engine import Patch, TargetPrompt
from superscopes_tl.errors import bad_type, bad_value, check_callable
from superscopes_tl.model import PatchedLayer
from superscopes_tl.vectors.amplify import label

SELFIE_PROMPT = TargetPrompt(
    "Portugal: Country in Southern Europe, Frida Kahlo: Mexican painter, Toyota: Japanese "
    "multinational automotive manufacturer, _ _ _ _ _",
    placeholder="_",
)
"""A description prompt with five placeholders in a row, for models without a chat template."""

Write: TypeAlias = Callable[[Patch, float], Patch]
"""Changes how a cell's patch is written, given its α."""


@dataclass(frozen=True)
class Add:
    """Add to the state of the placeholder, new = old + α·v: `sweep(..., write=Add())`."""

    def __call__(self, patch: Patch, alpha: float) -> Patch:
        """Return the patch that keeps the old state."""
        return replace(patch, keep=1.0)


@dataclass(frozen=True)
class Interpolate:
    """Mix with the state of the placeholder: new = (1 − α)·old + α·v, with α from 0 to 1.

    Larger α extrapolate along the same line, beyond v.
    """

    def __call__(self, patch: Patch, alpha: float) -> Patch:
        """Return the patch that keeps 1 − α of the old state."""
        if patch.guidance != 1:
            expected = "Add() or AtLayers(...) where α acts on the logits"
            raise bad_value("write", expected, self, "leave out guide='logits'")
        return replace(patch, keep=1.0 - alpha)


@dataclass(frozen=True, init=False, repr=False)
class AtLayers:
    """Write at several layers (negative ones count from the last), or "embed", the embedding.

    `target_layer`, units and norm ratio remain those of the cell: make it the first of the layers.
    """

    layers: tuple[PatchedLayer, ...]

    def __init__(self, *layers: PatchedLayer) -> None:
        fix = "for example AtLayers(0, 3)"
        if not layers:
            raise bad_value("layers", "at least one layer", layers, fix)
        for layer in layers:
            if layer != "embed" and (isinstance(layer, bool) or not isinstance(layer, int)):
                raise bad_type("layers", "whole numbers or 'embed'", layer, fix)
        object.__setattr__(self, "layers", layers)

    def __call__(self, patch: Patch, alpha: float) -> Patch:
        """Return the patch at these layers."""
        return replace(patch, target_layer=self.layers)

    def __repr__(self) -> str:
        return f"AtLayers({', '.join(map(repr, self.layers))})"


@dataclass(frozen=True, init=False, repr=False)
class Both:
    """One way after the other: `sweep(..., write=Both(Add(), AtLayers(0, 3)))`."""

    writes: tuple[Write, ...]

    def __init__(self, *writes: Write) -> None:
        for write in writes:
            fix = "pass Both(Add(), AtLayers(0, 3))"
            check_callable("writes", write, expected="ways to write", fix=fix)
        object.__setattr__(self, "writes", writes)

    def __call__(self, patch: Patch, alpha: float) -> Patch:
        """Return the patch as every way in turn changes it."""
        for write in self.writes:
            patch = write(patch, alpha)
        return patch

    def __repr__(self) -> str:
        return f"Both({', '.join(map(label, self.writes))})"
