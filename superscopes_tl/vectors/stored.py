"""Vectors from files: sparse-autoencoder rows, steering vectors, anything `[n d_model]`.

1. Open the file without reading it: safetensors, or numpy without objects (whose
   reading could run code).
2. Choose the array: by name, or the only one of one or two dimensions.
3. Take the rows asked for, and nothing else where the format allows it (safetensors are sliced,
   `.npy` is mapped into memory; an `.npz` is compressed, so its arrays are read whole).
4. Check them: real, finite, no more than `MAX_BYTES`.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.files import check_member

MAX_BYTES = 4 * 2**30
"""More than this, counted in float32, is not read at once."""

Rows: TypeAlias = Sequence[int] | None
"""Numbers of rows, from 0 (negative: from the end); `None` for all of them."""


@dataclass(frozen=True)
class _Array:
    """One array of a file.

    Attributes:
        shape: its shape.
        take: reads some of its rows.
        whole: whether all of it has to be read for that.
    """

    shape: tuple[int, ...]
    take: Callable[[Rows], Any]
    whole: bool


def load_vectors(
    path: str | os.PathLike[str], name: str | None = None, *, rows: Rows = None
) -> Float[Tensor, "n d_model"]:
    """Return the vectors of a file, in float32 on the CPU.

    Example:
        >>> load_vectors("sae.safetensors", "W_dec", rows=[4, 70_001]).shape  # doctest: +SKIP
        torch.Size([2, 2304])

    Args:
        path: a `.safetensors`, `.npy` or `.npz` file; an array of one dimension is one vector.
        name: which array; the only one of one or two dimensions unless given.
        rows: which rows; negative numbers count from the end. All of them unless given.

    Raises:
        ValueError: no such file, array or row; an array of another shape, or of something else
            than finite real numbers; more than `MAX_BYTES`.
        TypeError: `rows` are no whole numbers.
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
        count = n if wanted is None or array.whole else len(wanted)
        _check_size(f"{count} rows of {width} numbers", 4 * count * width)
        several = len(array.shape) == 2
        taken = _read(array, wanted if several else None, file).reshape(-1, width)
    vectors = taken if several or wanted is None else taken[wanted]
    finite = torch.isfinite(vectors).all(dim=-1)
    if not finite.all():
        raise bad_value(
            "path", "finite numbers",
            f"{int((~finite).sum())} rows of {chosen!r} with NaN, or beyond float32",
            "take the other rows with rows=[...]",
        )  # fmt: skip
    return vectors


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, _Array]]:
    """Open a file as its arrays by name; none is read before it is asked for."""
    readers = {".safetensors": _safetensors, ".npy": _npy, ".npz": _npz}
    if file.suffix.lower() not in readers:
        raise bad_value(
            "path", f"a file that ends in {', '.join(readers)}", str(file),
            "save it with safetensors.torch.save_file or numpy.save",
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        try:
            arrays = readers[file.suffix.lower()](file, stack)
        except Exception as error:  # whatever the readers raise on bad bytes
            raise _unreadable(file, error) from error
        yield arrays


def _safetensors(file: Path, stack: contextlib.ExitStack) -> dict[str, _Array]:
    from safetensors import safe_open

    opened = stack.enter_context(safe_open(file, framework="pt"))

    def take(name: str, rows: Rows) -> Tensor:
        if rows is None:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
        piece = opened.get_slice(name)
        return torch.cat([piece[row : row + 1] for row in rows])

    return {name: _lazy(opened.get_slice(name).get_shape(), take, name) for name in opened.keys()}  # noqa: SIM118 - no mapping


def _npy(file: Path, stack: contextlib.ExitStack) -> dict[str, _Array]:
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    return {file.stem: _lazy(mapped.shape, lambda _, rows: _rows_of(mapped, rows), file.stem)}


def _npz(file: Path, stack: contextlib.ExitStack) -> dict[str, _Array]:
    stream = stack.enter_context(file.open("rb"))  # numpy leaves a broken file of its own open
    opened = stack.enter_context(np.load(stream, allow_pickle=False))
    archive = stack.enter_context(zipfile.ZipFile(file))

    def shape(name: str) -> tuple[int, ...]:
        with archive.open(f"{name}.npy") as member:
            first = np.lib.format.read_magic(member)[0] == 1
            read = (np.lib.format.read_array_header_1_0 if first else
                    np.lib.format.read_array_header_2_0)  # fmt: skip
            return tuple(read(member)[0])

    def take(name: str, rows: Rows) -> np.ndarray:
        # The shape is known to fit, but each number of it may be of any size: float64 has twice
        # that of float32, and a header takes some.
        check_member(archive.getinfo(f"{name}.npy"), 2 * MAX_BYTES + 2**16)
        return _rows_of(opened[name], rows)

    return {name: _lazy(shape(name), take, name, whole=True) for name in opened.files}


def _lazy(
    shape: Sequence[int], take: Callable[[str, Rows], Any], name: str, *, whole: bool = False
) -> _Array:
    return _Array(tuple(shape), lambda rows: take(name, rows), whole)


def _rows_of(array: np.ndarray, rows: Rows) -> np.ndarray:
    return array if rows is None else array[list(rows)]


def _chosen(arrays: Mapping[str, _Array], name: str | None, file: Path) -> str:
    """Return the name of the array to read."""
    fit = [n for n, a in arrays.items() if len(a.shape) in (1, 2) and 0 not in a.shape]
    shown = ", ".join(f"{n!r} {list(a.shape)}" for n, a in arrays.items()) or "nothing"
    if name is None and len(fit) == 1:
        return fit[0]
    if name is None:
        raise bad_value(
            "name", "one array of the shape [n d_model] or [d_model] to choose",
            f"{shown} in {file.name}", "name the array: load_vectors(path, name)",
        )  # fmt: skip
    if name not in fit:
        raise bad_value(
            "name", "an array of the shape [n d_model] or [d_model]",
            f"{name!r}; {file.name} holds {shown}", "choose one of these",
        )  # fmt: skip
    return name


def _checked_rows(rows: Rows, n: int) -> list[int] | None:
    """Return the numbers of rows, counted from 0."""
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


def _check_size(what: str, size: int) -> None:
    if size > MAX_BYTES:
        raise bad_value(
            "path", f"at most {MAX_BYTES / 2**30:g} GiB of numbers at once",
            f"{what}, {size / 2**30:.1f} GiB", "take some rows with rows=[...]",
        )  # fmt: skip


def _read(array: _Array, rows: Rows, file: Path) -> Tensor:
    """Return an array's rows in float32."""
    try:
        taken = array.take(rows)
    except Exception as error:  # as above: a file may be cut off behind its header
        raise _unreadable(file, error) from error
    real = (
        taken.dtype.kind in "fiu"
        if isinstance(taken, np.ndarray)
        else not (taken.is_complex() or taken.dtype is torch.bool)
    )
    if not real:
        raise bad_value(
            "path", "real numbers", f"{taken.dtype} in {file.name}",
            "save them as float32",
        )  # fmt: skip
    if isinstance(taken, np.ndarray):
        with np.errstate(over="ignore"):  # what overflows is infinite, which is checked
            # A copy: the file may be closed, and what is mapped from it must not be written to.
            return torch.from_numpy(np.array(taken, dtype=np.float32))
    vectors: Tensor = taken.float()
    return vectors


def _unreadable(file: Path, error: Exception) -> ValueError:
    return bad_value(
        "path", f"a whole {file.suffix} file of numbers, not of objects",
        f"{file} ({type(error).__name__}: {error})",
        "save it again with safetensors.torch.save_file or numpy.save",
    )  # fmt: skip
