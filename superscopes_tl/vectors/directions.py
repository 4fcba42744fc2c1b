"""Vectors that a model holds: feed-forward keys and values, and differences of means.

A block's feed-forward layer with the weights `W_in` (and `W_gate`) and `W_out` reads the normalised
stream u and writes to the stream:

    m = act(u W_in)             keys are the columns of W_in, values the rows of W_out
    m = act(u W_gate) * (u W_in)    a gated one has two keys per value
    mlp_out = m W_out

A value lives in the residual stream. A key lives behind the block's layer norm: what it answers to
in the stream is the key times the norm's gain (`blocks[l].ln2`), less its mean where the norm
centres, unless the weights were folded when the model was loaded. Keys are returned as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import site_vectors
from superscopes_tl.errors import bad_value
from superscopes_tl.model import LanguageModel, Site, check_layers, tokenize


def mlp_keys(
    model: LanguageModel, layer: int, part: Literal["in", "gate"] | None = None
) -> Float[Tensor, "d_mlp d_model"]:
    """Return what the neurons of a feed-forward layer look for, in float32 on the CPU.

    Keys live behind the layer norm (see the module's docstring).

    Args:
        model: from `load_model`.
        layer: the block, counted from 0.
        part: of a gated layer (Llama, Gemma, ...) the "gate", which the activation function sees,
            or "in", the up-projection that it is multiplied with. The one that the activation
            function sees unless given.

    Raises:
        ValueError: no such layer or part, or a block without one plain feed-forward layer.
    """
    gate = _weight(model, layer, "W_gate")
    if part not in (None, "in", "gate") or (part == "gate" and gate is None):
        raise bad_value(
            "part", "'in'" if gate is None else "'in' or 'gate'", part,
            f"{model.name} has {'no gate' if gate is None else 'a gate'}: leave it out",
        )  # fmt: skip
    keys = gate if gate is not None and part != "in" else _needed(model, layer, "W_in")
    return keys.T.contiguous()


def mlp_values(model: LanguageModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """Return what the neurons of a feed-forward layer write to the residual stream.

    Where a model normalises the sum before it adds it (Gemma 2), these are the values before that.

    Args:
        model: from `load_model`.
        layer: the block, counted from 0.

    Raises:
        ValueError: no such layer, or a block without one plain feed-forward layer.
    """
    return _needed(model, layer, "W_out")


def _weight(model: LanguageModel, layer: int, name: str) -> Tensor | None:
    """Return a copy of a weight of a block's MLP, `None` if it has none of that name."""
    (number,) = check_layers(layer, model.n_layers, "layer")
    weight = getattr(getattr(model.tl.blocks[number], "mlp", None), name, None)
    return weight.detach().float().cpu().clone() if isinstance(weight, Tensor) else None


def _needed(model: LanguageModel, layer: int, name: str) -> Tensor:
    weight = _weight(model, layer, name)
    if weight is None or weight.dim() != 2:
        raise bad_value(
            "layer", f"a block with one feed-forward layer, whose {name} is a matrix",
            f"block {layer} of {model.name}", "take the vectors from the weights yourself",
        )  # fmt: skip
    return weight


def difference_of_means(
    model: LanguageModel,
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    kind: str,
    layer: int,
    *,
    chat: bool = False,
) -> Float[Tensor, " d_model"]:
    """Return mean(a) − mean(b) of an activation at the texts' last tokens: a steering vector.

    Args:
        model: from `load_model`.
        texts_a: what the vector points to.
        texts_b: what it points away from.
        kind: out of `KINDS`.
        layer: counted from 0.
        chat: whether the texts stand in the model's chat template.

    Raises:
        ValueError: no text, or a bad kind or layer.
    """
    (number,) = check_layers(layer, model.n_layers, "layer")
    (checked,) = model.checked_kinds(kind)
    means = []
    for argument, texts in (("texts_a", texts_a), ("texts_b", texts_b)):
        if isinstance(texts, str) or not len(texts):
            raise bad_value(argument, "texts", texts, "pass a list of texts")
        several = [tokenize(model, text, argument=argument, chat=chat) for text in texts]
        rows = [
            site_vectors(model, text, [Site(checked, number, text.own.stop - 1)])
            for text in several
        ]
        means.append(torch.cat(rows).mean(dim=0))
    return means[0] - means[1]
