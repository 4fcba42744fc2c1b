"""Vectors that are not read from a prompt: MLP weights, differences of means, rows of files.

1. An MLP with the weights `W_in` (and `W_gate`) and `W_out` reads the normalised stream u and
   writes to the stream:

       m = act(u W_in)                 keys are the columns of W_in, values the rows of W_out
       m = act(u W_gate) * (u W_in)    a gated one has two keys per value
       mlp_out = m W_out

   A value lives in the residual stream. A key lives after the block's layer norm: in the stream it
   responds to the key times the gain of the norm (`blocks[l].ln2`), less its mean where the norm
   centres, unless the weights were folded when the model was loaded. `mlp_keys` returns them raw.
2. `difference_of_means` is a steering vector.
3. `load_vectors` reads rows of files: sparse autoencoders, steering vectors, anything
   `[n d_model]` (`formats` knows them). Only the requested rows are read; they must be real, finite
   and no more than `MAX_BYTES`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_choice
from superscopes_tl.model import LanguageModel, Site, check_layers, tokenize
from superscopes_tl.vectors.formats import MAX_BYTES, Rows, broken, chosen, find_file, opened


def mlp_keys(
    model: LanguageModel, layer: int, part: Literal["in", "gate"] | None = None
) -> Float[Tensor, "d_mlp d_model"]:
    """Return the input weights of an MLP's neurons, in float32; they live after the layer norm.

    In a gated MLP (Llama, Gemma, ...) `part` is the "gate", the default, or "in", the
    up-projection that it is multiplied with.

    Raises:
        ValueError: no such layer or part, or a block without one plain MLP.
    """
    gate = _weight(model, layer, "W_gate")
    if part is not None:
        check_choice("part", part, ["in"] if gate is None else ["in", "gate"])
    keys = _matrix(model, layer, "W_in") if gate is None or part == "in" else gate
    return keys.T.contiguous()


def mlp_values(model: LanguageModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """Return the output weights of an MLP's neurons, in float32; before a norm on them (Gemma 2).

    Raises:
        ValueError: no such layer, or a block without one plain MLP.
    """
    return _matrix(model, layer, "W_out")


def _weight(model: LanguageModel, layer: int, name: str) -> Tensor | None:
    """Return a copy of a weight of a block's MLP, or `None`."""
    (number,) = check_layers(layer, model.n_layers, "layer")
    weight = getattr(getattr(model.tl.blocks[number], "mlp", None), name, None)
    return weight.detach().float().cpu().clone() if isinstance(weight, Tensor) else None


def _matrix(model: LanguageModel, layer: int, name: str) -> Tensor:
    weight = _weight(model, layer, name)
    if weight is None or weight.dim() != 2:
        expected = f"a block with one MLP, whose {name} is a matrix"
        raise bad_value("layer", expected, f"block {layer} of {model.name}", "use model.tl")
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

    Raises:
        ValueError: no text, or a bad kind or layer.
    """
    (number,) = check_layers(layer, model.n_layers, "layer")
    (checked,) = model.checked_kinds(kind)
    means = []
    for argument, texts in (("texts_a", texts_a), ("texts_b", texts_b)):
        if isinstance(texts, str) or not len(texts):
            raise bad_value(argument, "texts", texts, "pass a list of texts")
        rows = []
        for text in texts:
            tokens = tokenize(model, text, argument=argument, chat=chat)
            rows.append(site_vectors(model, tokens, [Site(checked, number, tokens.own.stop - 1)]))
        means.append(torch.cat(rows).mean(dim=0))
    return means[0] - means[1]


def load_vectors(
    path: str | os.PathLike[str], name: str | None = None, *, rows: Rows = None
) -> Float[Tensor, "n d_model"]:
    """Return vectors of a file or folder, in float32: `load_vectors("sae_folder", rows=[4])`.

    Every format in which vectors are handed on is read: `.safetensors`, `.npy`, `.npz`; `.pt` with
    tensors (CAA, persona vectors, a dump of an ActivationCache of one prompt); GGUF control vectors
    (repeng); Neuronpedia's JSON; folders of SAELens and sparsify, `params.npz` of Gemma Scope. No
    code in a file is run. `vector_names` says which row is what.

    Args:
        path: the file, or a folder with one file of weights.
        name: which array, such as "blocks.5.hook_resid_post". Defaults to the decoder of an SAE
            (`W_dec`), to the only array of one or two dimensions, or to one vector per layer.
        rows: which rows, counted from 0; negative numbers count from the end. Defaults to all.

    Raises:
        ValueError: no such file, array or row, a file that only running code could read, not finite
            real numbers, or more than `MAX_BYTES`. The message names what the file holds.
        TypeError: `rows` are not whole numbers.
    """
    file = find_file(Path(path))
    with opened(file) as arrays:
        name = chosen(arrays, name, file)
        array = arrays[name]
        # An array of one dimension is one row; numpy and safetensors would slice its numbers.
        n, width = (1, *array.shape)[-2:]
        wanted = _checked_rows(rows, n)
        size = 4 * width * (n if wanted is None or array.whole else len(wanted))
        if size > MAX_BYTES:
            expected, got = (f"{n / 2**30:.1f} GiB" for n in (MAX_BYTES, size))
            fix = "take some rows=[...]"
            if array.whole:
                fix = "save it uncompressed (numpy.savez, safetensors), so that rows can be read"
            raise bad_value("path", f"at most {expected} at once", got, fix)
        several = len(array.shape) == 2
        with broken(file):  # it may be truncated after its header
            taken = array.take(wanted if several else None)
    vectors = taken.float().reshape(-1, width)
    if not several and wanted is not None:
        vectors = vectors[wanted]
    finite = torch.isfinite(vectors).all(dim=-1)
    if not finite.all():
        got = f"{int((~finite).sum())} rows of {name!r} with NaN, or beyond float32"
        raise bad_value("path", "finite numbers", got, "take the other rows=[...]")
    return vectors


def vector_names(
    path: str | os.PathLike[str], name: str | None = None, *, rows: Rows = None
) -> tuple[str, ...]:
    """Return a name for each vector that `load_vectors` returns for the same arguments.

    That is what the file calls it (`direction.12`, `blocks.5.hook_resid_post`, Neuronpedia's model,
    layer and index), with the number of the row where an array has several.

    Raises:
        ValueError, TypeError: as `load_vectors`.
    """
    file = find_file(Path(path))
    with opened(file) as arrays:
        name = chosen(arrays, name, file)
        array = arrays[name]
        n = (1, *array.shape)[-2]
        wanted = _checked_rows(rows, n)
        numbers = range(n) if wanted is None else wanted
        if array.labels and len(set(array.labels)) == n:
            return tuple(array.labels[number] for number in numbers)
        return tuple(name if len(array.shape) == 1 else f"{name} {number}" for number in numbers)


def _checked_rows(rows: Rows, n: int) -> list[int] | None:
    """Return the row numbers, counted from 0."""
    if rows is None:
        return None
    given = list(rows)
    fix = f"choose from 0 to {n - 1}"
    if not given:
        raise bad_value("rows", "at least one row", given, fix)
    for row in given:
        if isinstance(row, bool) or not hasattr(row, "__index__"):
            raise bad_type("rows", "whole numbers", row, fix)
        if not -n <= row < n:
            raise bad_value("rows", f"rows of an array with {n} rows", row, fix)
    return [row.__index__() % n for row in given]
