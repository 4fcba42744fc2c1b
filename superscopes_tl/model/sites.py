"""Places in a model: kinds of activation, layers and sites.

1. A *kind* is a point of a transformer block; each has one TransformerLens hook point.
2. A *site* is a kind, a layer and a token position: where a source vector is read.
3. Patching always replaces the block output (`hook_resid_post`) of the target layer, whatever the
   kind of the source vector: the place that is read and the place that is patched are independent.
4. The target layer "embed" is the input embedding (`hook_embed`), the output before block 0: what
   a Hugging Face model takes as `inputs_embeds`. Learned positions (GPT-2) are added after it, a
   factor on embeddings (Gemma) is applied before. Its number in plans and tables is `EMBED`.

Layer `l` is block `l`, counted from 0, so `resid_post` of layer `l` is the output of block `l`
(`hidden_states[l + 1]` of a Hugging Face model). In a pre-norm block

    resid_pre  -> (+ attn_out) -> resid_mid -> (+ mlp_out) -> resid_post

Hence `resid_post = resid_mid + mlp_out`, the decomposition of the paper's Figure 1. `resid_mid`
is the paper's h_PreMLP (section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from superscopes_tl.errors import bad_type, bad_value

HookKind = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""A kind of activation: where in a block a vector is read."""

KINDS: tuple[HookKind, ...] = get_args(HookKind)
"""All kinds, in the order in which a block computes them."""

PAPER_KINDS: tuple[HookKind, ...] = ("resid_mid", "mlp_out", "resid_post")
"""The three kinds that the paper reads (section 5.1)."""

PatchedLayer: TypeAlias = int | Literal["embed"]
"""A target layer by its name: a block number, or the input embedding."""

EMBED = -1
"""The number of the input embedding among target layers, below that of the first block."""


@dataclass(frozen=True)
class Site:
    """One place in a source run: `kind` at block `layer` and token `position` (0 = first)."""

    kind: HookKind
    layer: int
    position: int


def hook_name(kind: HookKind, layer: int) -> str:
    """Return the TransformerLens name, such as `blocks.3.hook_mlp_out`.

    The `resid_post` of layer `EMBED` is the input embedding.
    """
    if (kind, layer) == ("resid_post", EMBED):
        return "hook_embed"
    return f"blocks.{layer}.hook_{kind}"


def layer_name(number: int) -> PatchedLayer:
    """Return the name of a target layer in a plan or table: "embed" for `EMBED`."""
    return "embed" if number == EMBED else number


def check_layers(
    layers: int | Iterable[int] | None, n_layers: int, argument: str = "layers"
) -> tuple[int, ...]:
    """Return layers as numbers from 0, in the given order, without duplicates.

    `None` means all layers; negative numbers count from the last layer.

    Raises:
        ValueError: no layer, or one out of range.
        TypeError: not whole numbers.
    """
    if layers is None:
        return tuple(range(n_layers))
    wanted = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    fix = f"choose from 0 to {n_layers - 1} (or -{n_layers} to -1, counted from the last layer)"
    if not wanted:
        raise bad_value(argument, "at least one layer", wanted, fix)
    checked: dict[int, None] = {}
    for layer in wanted:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise bad_type(argument, "whole numbers", layer, fix)
        number = layer.__index__()
        if not -n_layers <= number < n_layers:
            raise bad_value(argument, f"layers from 0 to {n_layers - 1}", number, fix)
        checked[number % n_layers] = None
    return tuple(checked)
