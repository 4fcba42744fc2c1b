"""Ways to write a vector into the target prompt (SelfIE, Chen et al. 2024).

SelfIE ("SelfIE: Self-Interpretation of Large Language Model Embeddings") differs from Patchscopes
in the target prompt, which has several placeholders, and in how a vector is injected. Each way is a
value of `SweepConfig.write`, a callable from a cell's patch and its α to the patch that is run:

1. Replace, new = α·v: what the engine does if no `write` is given (the paper, section 3.1).
2. `add`: new = old + α·v. α = 0 is the unpatched prompt.
3. `interpolate`: new = (1 − α)·old + α·v. Here α is a share, from 0 (unpatched) to 1 (replace). At
   one placeholder it is the base `guided.placeholder_state`, f(v) = b + α·(v − b) with b = old;
   with several, each of them keeps its own old state instead of their mean.
4. `at_layers(0, 3)`: the same vector at several layers. With replace, later layers undo what the
   blocks between them made of it; with add, it comes again.

`both(add, at_layers(0, 3))` is one after the other. Which way fits which α has to be measured: old
is as long as the residual stream, and `norm_ratio` in the table says how long α·v is beside it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from superscopes_tl.engine import Patch, TargetPrompt
from superscopes_tl.errors import bad_type, bad_value, check_callable
from superscopes_tl.vectors.amplify import family_name
from superscopes_tl.vectors.protocols import Write

SELFIE_PROMPT = TargetPrompt(
    "Portugal: Country in Southern Europe, Frida Kahlo: Mexican painter, Toyota: Japanese "
    "multinational automotive manufacturer, _ _ _ _ _",
    placeholder="_",
)
"""A description prompt with five placeholders in a row, for models that are not chat models."""


def add(patch: Patch, alpha: float) -> Patch:
    """Add to what stands at the placeholder, new = old + α·v: `sweep(..., write=add)`."""
    return replace(patch, keep=1.0)


def interpolate(patch: Patch, alpha: float) -> Patch:
    """Mix with what stands at the placeholder: new = (1 − α)·old + α·v, with α from 0 to 1.

    `sweep(..., write=interpolate, alphas=(0.25, 0.5, 0.75))`: α = 1 replaces, and the paper's
    larger α are legal, but move on along the same line, beyond v.

    Raises:
        ValueError: α acts on the logits, so that it is no share of the vector.
    """
    if patch.guidance != 1:
        raise bad_value(
            "write", "add or at_layers where α acts on the logits", "interpolate",
            "leave out guide='logits'",
        )  # fmt: skip
    return replace(patch, keep=1.0 - alpha)


def at_layers(*layers: int) -> Write:
    """Write at several layers, whatever the cell's target layer is.

    The table's `target_layer`, the units and the norm ratio are still those of the cell's target
    layer: make it the first of the layers.

    Args:
        *layers: block numbers from 0; negative ones count from the last.

    Raises:
        ValueError: no layer.
        TypeError: something that is not a whole number.
    """
    if not layers:
        raise bad_value("layers", "at least one layer", layers, "for example at_layers(0, 3)")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise bad_type("layers", "whole numbers", layer, "for example at_layers(0, 3)")

    return _at_layers(layers)


@cache
def _at_layers(layers: tuple[int, ...]) -> Write:
    def write(patch: Patch, alpha: float) -> Patch:
        return replace(patch, target_layer=layers)

    write.__name__ = f"at_layers({', '.join(map(str, layers))})"
    return write


def both(*writes: Write) -> Write:
    """Return one way after the other: `sweep(..., write=both(add, at_layers(0, 3)))`.

    Raises:
        TypeError: something that is no way to write.
    """
    for one in writes:
        fix = "pass both(add, at_layers(0, 3))"
        check_callable("writes", one, expected="ways to write", fix=fix)
    return _both(writes)


@cache
def _both(writes: tuple[Write, ...]) -> Write:
    def write(patch: Patch, alpha: float) -> Patch:
        for one in writes:
            patch = one(patch, alpha)
        return patch

    write.__name__ = f"both({', '.join(map(family_name, writes))})"
    return write
