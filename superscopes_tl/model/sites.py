"""Name a place in a model, and check that the model has it.

1. A *kind* is a point of a transformer block; each has one TransformerLens hook point.
2. A *site* is a kind, a layer and a token position: where the source vector is read.
3. Patching always replaces the block output (`hook_resid_post`) of the target layer, whatever
   the kind of the source vector: the place read and the place patched are two different things.

Layer `l` means block `l`, counted from 0, so `resid_post` of layer `l` is the output of block
`l` (`hidden_states[l + 1]` of a Hugging Face model). In a pre-norm block

    resid_pre  -> (+ attn_out) -> resid_mid -> (+ mlp_out) -> resid_post

hence `resid_post = resid_mid + mlp_out`, the decomposition of the paper's Figure 1. `resid_mid`
is the paper's h_PreMLP (section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from superscopes_tl.errors import UnavailableKindError, bad_type, bad_value, describe

HookKind = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]

KINDS: tuple[HookKind, ...] = get_args(HookKind)
"""Every kind, in the order in which a block computes them."""

PAPER_KINDS: tuple[HookKind, ...] = ("resid_mid", "mlp_out", "resid_post")
"""The three kinds that the paper reads (section 5.1)."""


@dataclass(frozen=True)
class Site:
    """One place in a source run: `kind` at block `layer` and token `position` (0 = first)."""

    kind: HookKind
    layer: int
    position: int


def hook_name(kind: HookKind, layer: int) -> str:
    """Return the TransformerLens name, such as `blocks.3.hook_mlp_out`."""
    return f"blocks.{layer}.hook_{kind}"


def check_kinds(
    kinds: str | Iterable[str],
    available: Sequence[HookKind],
    model_name: str,
    absent: Mapping[HookKind, str] = MappingProxyType({}),
) -> tuple[HookKind, ...]:
    """Return `kinds` as a tuple after checking that the model has each of them.

    Args:
        kinds: what somebody asks for.
        available: what the model has.
        model_name: how messages call it.
        absent: why it has not got the others.

    Raises:
        ValueError: no kind at all, or a name that is no kind.
        UnavailableKindError: a kind that this model does not compute.
    """
    if not isinstance(kinds, Iterable):
        raise bad_type("kinds", "names of kinds", kinds, f"choose from {KINDS}")
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not wanted:
        raise bad_value("kinds", "at least one kind", wanted, f"choose from {KINDS}")
    checked: list[HookKind] = []
    for kind in wanted:
        if kind not in KINDS:
            raise bad_value("kinds", f"kinds out of {KINDS}", kind, "correct the spelling")
        if kind not in available:
            raise UnavailableKindError(
                describe(
                    "kinds",
                    f"kinds that {model_name} has, which are {tuple(available)}",
                    kind,
                    f"leave {kind!r} out" + (f" ({absent[kind]})" if kind in absent else ""),
                )
            )
        if kind not in checked:
            checked.append(kind)
    return tuple(checked)


def check_layers(
    layers: int | Iterable[int] | None, n_layers: int, argument: str = "layers"
) -> tuple[int, ...]:
    """Return layer numbers 0 to `n_layers - 1`, in the given order, without repeats.

    `None` means every layer; a negative number counts from the last layer.

    Raises:
        ValueError: no layer, or one that the model does not have.
        TypeError: something that is not a whole number.
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
            raise bad_value(argument, f"layers of a model with {n_layers} layers", number, fix)
        checked[number % n_layers] = None
    return tuple(checked)
