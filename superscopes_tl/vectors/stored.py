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
3. `load_vectors` reads safetensors, or numpy arrays without objects (whose reading could run code):
   sparse-autoencoder rows, steering vectors, anything `[n d_model]`. Only the requested rows are
   read; they must be real, finite and no more than `MAX_BYTES`.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_choice
from superscopes_tl.files import check_member, reading
from superscopes_tl.model import LanguageModel, Site, check_layers, tokenize

MAX_BYTES = 4 * 2**30
"""Limit on what is read at once, counted in float32, and on files of maps."""

Rows: TypeAlias = Sequence[int] | None
"""Row numbers, from 0 (negative: from the end); `None` for all of them."""


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
    """Return vectors of a file, in float32: `load_vectors("sae.safetensors", "W_dec", rows=[4])`.

    Args:
        path: a `.safetensors`, `.npy` or `.npz` file; a one-dimensional array is one vector.
        name: which array; defaults to the only one of one or two dimensions.
        rows: which rows; negative numbers count from the end. Defaults to all.

    Raises:
        ValueError: no such file, array or row; not finite real numbers; more than `MAX_BYTES`.
        TypeError: `rows` are not whole numbers.
    """
    file = Path(path)
    if not file.is_file():
        raise bad_value("path", "a file with vectors", str(file), "check the spelling")
    with _opened(file) as arrays:
        chosen = _chosen(arrays, name, file)
        array = arrays[chosen]
        # An array of one dimension is one row; numpy and safetensors would slice its numbers.
        n, width = (1, *array.shape)[-2:]
        wanted = _checked_rows(rows, n)
        size = 4 * width * (n if wanted is None or array.whole else len(wanted))
        if size > MAX_BYTES:
            expected, got = (f"{n / 2**30:.1f} GiB" for n in (MAX_BYTES, size))
            raise bad_value("path", f"at most {expected} at once", got, "take some rows=[...]")
        several = len(array.shape) == 2
        with _broken(file):  # it may be truncated after its header
            taken = array.take(wanted if several else None)
    vectors = taken.float().reshape(-1, width)
    if not several and wanted is not None:
        vectors = vectors[wanted]
    finite = torch.isfinite(vectors).all(dim=-1)
    if not finite.all():
        got = f"{int((~finite).sum())} rows of {chosen!r} with NaN, or beyond float32"
        raise bad_value("path", "finite numbers", got, "take the other rows=[...]")
    return vectors


@dataclass(frozen=True)
class _Array:
    """One array of a file: its shape, what reads rows of it, and whether that reads all of them."""

    shape: tuple[int, ...]
    take: Callable[[Rows], Tensor]
    whole: bool = False


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, _Array]]:
    """Open a file as its arrays by name; each is read on request."""
    from safetensors import safe_open

    if (ending := file.suffix.lower()) not in (".safetensors", ".npy", ".npz"):
        raise bad_value("path", "a .safetensors, .npy or .npz file", str(file), "save it as one")
    with contextlib.ExitStack() as stack:
        with _broken(file):
            if ending == ".npy":
                mapped = np.load(file, mmap_mode="r", allow_pickle=False)
                arrays = {file.stem: _Array(mapped.shape, partial(_numbers, mapped))}
            elif ending == ".npz":
                archive = stack.enter_context(zipfile.ZipFile(file))
                arrays = {
                    i.filename.removesuffix(".npy"): _packed(archive, i) for i in archive.filelist
                }
            else:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                arrays = {name: _sliced(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 - no mapping
        yield arrays


def _numbers(array: np.ndarray, rows: Rows) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise TypeError(f"numbers of type {array.dtype}")
    with np.errstate(over="ignore"):  # what overflows is infinite, which is refused
        return torch.from_numpy(array[slice(None) if rows is None else rows].astype(np.float32))


def _packed(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    """Return an array of an `.npz`; a compressed one cannot be read in part."""
    # A number may have twice the bytes of float32, and the header takes some.
    check_member(member, 2 * MAX_BYTES + 2**16)
    with archive.open(member) as stream:
        first = np.lib.format.read_magic(stream)[0] == 1
        header = (
            np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        )
        shape = header(stream)[0]

    def take(rows: Rows) -> Tensor:
        with archive.open(member) as stream:
            return _numbers(np.lib.format.read_array(stream, allow_pickle=False), rows)

    return _Array(shape, take, whole=True)


def _sliced(piece: Any) -> _Array:
    def take(rows: Rows) -> Tensor:
        found = torch.cat([piece[:]] if rows is None else [piece[row : row + 1] for row in rows])
        if found.is_complex() or found.dtype is torch.bool:
            raise TypeError(f"numbers of type {found.dtype}")
        return found

    return _Array(tuple(piece.get_shape()), take)


def _broken(file: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the errors of readers become `RunFileError`."""
    return reading(
        file,
        f"a complete {file.suffix} file of real numbers",
        "save it again with safetensors.torch.save_file or numpy.save",
    )


def _chosen(arrays: Mapping[str, _Array], name: str | None, file: Path) -> str:
    """Return the name of the array to read."""
    fit = [n for n, a in arrays.items() if len(a.shape) in (1, 2) and 0 not in a.shape]
    if name is None and len(fit) == 1:
        return fit[0]
    if name is None or name not in fit:
        shown = ", ".join(f"{n!r} {list(a.shape)}" for n, a in arrays.items()) or "nothing"
        got = f"{name!r}; {file.name} holds {shown}"
        raise bad_value("name", "one array [n d_model] or [d_model]", got, "pass its name")
    return name


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
