"""Files that hold vectors: one reader per format, each giving named arrays that are read by rows.

1. A folder is resolved to one file (`find_file`): an SAELens release folder holds
   `sae_weights.safetensors`, one of sparsify (EleutherAI) `sae.safetensors`, one of Gemma Scope
   `params.npz` (2: `params.safetensors`); further files, such as `sparsity.safetensors`, do not
   count. A folder above a single one of them will do.
2. `opened` gives a file's arrays by name, with their shapes; nothing else is read yet:

       .safetensors   any tensors
       .npy, .npz     arrays without objects; stored (not compressed) entries are memory-mapped, so
                      rows of a `W_dec` of 10 GB cost only those rows
       .pt, .pth, .bin   a tensor, or a dictionary or list of tensors (CAA and persona vectors, a
                      dump of an ActivationCache), read with `weights_only=True`: no code is run
       .gguf          any tensors; repeng's control vectors are `direction.1`, `direction.2`, ...,
                      number l for the output of block l
       .json          lists of numbers; Neuronpedia keeps a vector under `vector` or `values`

3. A leading dimension of 1 is dropped: a hook point's activation of one prompt, [1 pos d_model],
   has a row per token.
4. Single vectors of equal length whose names differ in one number alone (one per layer) are also
   the rows of one array, under the name with `*` in the number's place: `direction.*`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from superscopes_tl.errors import ModelLoadError, RunFileError, bad_value, brief, describe
from superscopes_tl.files import MAX_JSON_BYTES, check_member, parse_json, reading
from superscopes_tl.weights import read_gguf_header

MAX_BYTES = 4 * 2**30
"""Limit on what is read at once, counted in float32, and on files that are read as a whole."""

SAE_FILES = ("sae_weights.safetensors", "sae.safetensors", "params.npz", "params.safetensors")
"""The weights of SAELens, sparsify, Gemma Scope and Gemma Scope 2, which a folder may hold."""

DECODER = "w_dec"
"""The name of the decoder's rows, [d_sae d_model], in all of them, but for upper case."""

HEADER_BYTES = 2**16
"""More than numpy accepts as the header of an array; a packed one may unpack to gigabytes."""

MOST_NUMBERS = 8
"""How many numbers in an array's name may be the one that says the layer."""

DEEPEST, MOST_FOLDERS = 4, 10_000
"""How far below a folder weights are looked for, and in how many folders."""

Rows: TypeAlias = Sequence[int] | None
"""Row numbers, from 0 (negative: from the end); `None` for all of them."""


@dataclass(frozen=True)
class Array:
    """One array of a file.

    Attributes:
        shape: of one dimension, one vector; of two, a vector per row; others are not read.
        take: reads some rows, counted from 0, or all.
        whole: whether that reads all of them in any case.
        labels: names of the rows, where the file has them.
    """

    shape: tuple[int, ...]
    take: Callable[[Rows], Tensor]
    whole: bool = False
    labels: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be read as vectors."""
        return len(self.shape) in (1, 2) and 0 not in self.shape


Arrays: TypeAlias = Mapping[str, Array]
"""What a file holds, by name; an array says its shape, and reads the rows that are asked for."""


def find_file(path: Path) -> Path:
    """Return the file of a path, or the one with weights in a folder.

    Raises:
        ValueError: nothing there, or several; the message lists them.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        fix = "check the spelling"
        raise bad_value("path", "a file or folder with vectors", str(path), fix)
    found = list(_weights_below(path))
    if len(found) == 1:
        return found[0]
    wanted = f"a folder with one file of vectors, such as {SAE_FILES[0]}"
    if not found:
        names = sorted(p.name for p in path.iterdir())[:20]
        got = f"folder {path.name!r} with {', '.join(names) or 'nothing'}"
        raise bad_value("path", wanted, got, f"pass a file ending with {', '.join(ENDINGS[:-1])}")
    shown = sorted(str(p.relative_to(path)) for p in found)
    shown.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    # First the fix: a list of many layers would push it out of the message.
    first = path / shown[0]
    one = first.parent if first.name in SAE_FILES and first.parent != path else first
    got = f"folder {path.name!r} with {len(shown)}: {', '.join(shown)}"
    raise bad_value("path", wanted, got, f"pass one of them, such as {str(one)!r}")


def _weights_below(folder: Path) -> Iterator[Path]:
    """Yield the files of SAEs in a folder and those below, or else of any vectors in itself."""
    found = False
    for count, (where, below, names) in enumerate(os.walk(folder)):
        depth = len(Path(where).relative_to(folder).parts)
        if depth >= DEEPEST or count >= MOST_FOLDERS:
            below.clear()
        here = [name for name in SAE_FILES if name in names][:1]
        if here:
            found = True
            below.clear()
            yield Path(where) / here[0]
    if not found:
        other = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in ENDINGS[:-1]]
        yield from (p for p in other if p.is_file() and "sparsity" not in p.name)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Arrays]:
    """Open a file as its arrays by name; each is read on request, within this context.

    Raises:
        ValueError: another ending, a broken file, or one that only running code could read.
    """
    if (ending := file.suffix.lower()) not in ENDINGS:
        expected = f"a file ending with one of {', '.join(ENDINGS)}"
        raise bad_value("path", expected, str(file), "save the vectors as one")
    reader = _READERS[ending]
    with contextlib.ExitStack() as stack:
        with broken(file):
            arrays = reader(file, stack)
            if not arrays:
                raise ValueError("no arrays of numbers")
            arrays = {name: _unbatched(array) for name, array in arrays.items()}
        yield {**_stacks(arrays), **arrays}


def broken(file: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the errors of readers become `RunFileError`."""
    return reading(
        file,
        f"a complete {file.suffix} file of real numbers",
        "save it again with safetensors.torch.save_file or numpy.save",
    )


def chosen(arrays: Arrays, name: str | None, file: Path) -> str:
    """Return the name of the array to read.

    Without a name it is the decoder of an SAE, the only array that fits, or the stack of all.
    """
    fit = [n for n, array in arrays.items() if array.fits]
    if name is None:
        stacks = [n for n in fit if len(arrays[n].labels) == len(fit) - 1 > 0]
        decoders = [n for n in fit if n.rpartition(".")[2].lower() == DECODER]
        for only in (decoders, stacks, fit):
            if len(only) == 1:
                return only[0]
    if name is None or name not in fit:
        meant = name or ("".join(arrays) if len(arrays) == 1 else "")
        if meant in arrays and len(shape := arrays[meant].shape) == 3:
            fix = "save that of one prompt alone, such as {name: cache[name][:1] for name in cache}"
            wanted = "the activation of a single prompt, [1 pos d_model]"
            raise bad_value("name", wanted, f"{meant!r} of shape {list(shape)}", fix)
        shown = ", ".join(f"{n!r} {list(a.shape)}" for n, a in arrays.items()) or "nothing"
        got = f"{name!r}; {file.name} holds {shown}"
        raise bad_value("name", "one array [n d_model] or [d_model]", got, "pass its name")
    return name


def _unbatched(array: Array) -> Array:
    """Return an array without the batch dimension of a single prompt."""
    if len(array.shape) != 3 or array.shape[0] != 1:
        return array

    def take(rows: Rows) -> Tensor:
        found = array.take(None)[0]
        return found if rows is None else found[list(rows)]

    return Array(array.shape[1:], take, whole=True)


def _stacks(arrays: Arrays) -> dict[str, Array]:
    """Return the arrays whose rows are single vectors with names that differ in one number."""
    singles = [(n, a) for n, a in arrays.items() if a.fits and a.shape[:-1] in ((), (1,))]
    places: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for name, array in singles:
        for match in islice(re.finditer(r"\d{1,9}", name), MOST_NUMBERS):
            pattern = f"{name[: match.start()]}*{name[match.end() :]}"
            places.setdefault((pattern, array.shape[-1]), []).append((int(match[0]), name))
    stacks: dict[str, Array] = {}
    for (pattern, width), members in places.items():
        names = tuple(name for _, name in sorted(members))
        if len(names) < 2 or pattern in arrays:
            continue

        def take(rows: Rows, names: tuple[str, ...] = names, width: int = width) -> Tensor:
            wanted = names if rows is None else [names[row] for row in rows]
            return torch.stack([arrays[name].take(None).float().reshape(width) for name in wanted])

        stacks[pattern] = Array((len(names), width), take, labels=names)
    return stacks


def numbers(array: np.ndarray, rows: Rows) -> Tensor:
    """Return rows of an array in float32; a `TypeError` if they are no real numbers."""
    if array.dtype.kind not in "fiu":
        raise TypeError(f"numbers of type {array.dtype}")
    with np.errstate(over="ignore"):  # what overflows is infinite, which is refused
        return torch.from_numpy(array[slice(None) if rows is None else rows].astype(np.float32))


def _npy(file: Path, stack: contextlib.ExitStack) -> Arrays:
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    return {file.stem: Array(mapped.shape, partial(numbers, mapped))}


def _npz(file: Path, stack: contextlib.ExitStack) -> Arrays:
    archive = stack.enter_context(zipfile.ZipFile(file))
    return {i.filename.removesuffix(".npy"): _entry(file, archive, i) for i in archive.filelist}


def _entry(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """Return an array of an `.npz`: mapped where it is stored, else unpacked as a whole."""
    with archive.open(member) as packed:  # which checks the entry's own header
        stream = io.BytesIO(packed.read(HEADER_BYTES))
    shape, order, dtype = _npy_header(stream)
    start = stream.tell()
    if dtype.hasobject:
        raise TypeError(f"numbers of type {dtype}")
    if member.compress_type == zipfile.ZIP_STORED:
        if start + dtype.itemsize * int(np.prod(shape, dtype=object)) > member.file_size:
            raise ValueError(f"{member.filename} cut short")
        # The entry's data begins after its local header, whose extra field has its own length.
        with file.open("rb") as data:
            data.seek(member.header_offset + 26)
            lengths = struct.unpack("<HH", data.read(4))
        offset = member.header_offset + 30 + sum(lengths) + start
        if 0 in shape:
            return Array(shape, lambda rows: torch.zeros(shape))
        mapped = np.memmap(file, dtype, "r", offset, shape, order)
        return Array(shape, partial(numbers, mapped))
    # A number may have twice the bytes of float32, and the header takes some.
    check_member(member, 2 * MAX_BYTES + 2**16)

    def take(rows: Rows) -> Tensor:
        with archive.open(member) as stream:
            return numbers(np.lib.format.read_array(stream, allow_pickle=False), rows)

    return Array(shape, take, whole=True)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    """Return shape, order and type of the array that a stream begins with."""
    first = np.lib.format.read_magic(stream)[0] == 1
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    return shape, "F" if by_columns else "C", dtype


def _safetensors(file: Path, stack: contextlib.ExitStack) -> Arrays:
    from safetensors import safe_open

    found = stack.enter_context(safe_open(file, framework="pt"))
    return {name: _sliced(found.get_slice(name)) for name in found.keys()}  # noqa: SIM118 - no mapping


def _sliced(piece: Any) -> Array:
    def take(rows: Rows) -> Tensor:
        return _real(torch.cat([piece[:]] if rows is None else [piece[r : r + 1] for r in rows]))

    return Array(tuple(piece.get_shape()), take)


def _real(found: Tensor) -> Tensor:
    if found.is_complex() or found.dtype is torch.bool:
        raise TypeError(f"numbers of type {found.dtype}")
    return found


def _torch(file: Path, stack: contextlib.ExitStack) -> Arrays:
    """Return the tensors of a file of `torch.save`, mapped where its format allows it."""
    size = file.stat().st_size
    if packed := zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in archive.filelist:  # the names and shapes of tensors are in a .pkl
                check_member(member, MAX_JSON_BYTES if member.filename.endswith(".pkl") else size)
    elif size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes in torch's old format")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other protocols, which are refused
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or "Unsupported operand 14" in str(error):  # of newer ways to write objects
            raise _unsafe(file, named[1] if named else "") from error
        raise ValueError(
            brief(str(error).partition("WeightsUnpickler error:")[2] or error)
        ) from error
    arrays = {
        name: Array(tuple(tensor.shape), partial(_rows_of, tensor))
        for name, tensor in _tensors(found, "", file.stem, set())
    }
    if not arrays:
        keys = f" of {brief(', '.join(map(str, found)))}" if isinstance(found, dict) else ""
        raise ValueError(f"no tensor, but {type(found).__name__}{keys}")
    return arrays


def _unsafe(file: Path, kind: str) -> RunFileError:
    """Build the error for a file of objects, which only running its code would give."""
    got = f"{file.name} with objects{f' of {kind}' if kind else ''}, whose reading may run code"
    fix = (
        "if you trust its author, torch.load(file, weights_only=False) and torch.save its tensors "
        "alone, one or a dictionary (cache.cache_dict, vector.layer_activations)"
    )
    return RunFileError(describe("path", "tensors alone, read with weights_only=True", got, fix))


def _rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    return _real(tensor.clone() if rows is None else tensor[list(rows)])


def _tensors(
    found: Any, prefix: str, name: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a structure, with the names that lead to them.

    A part that is `seen` again is skipped: a small file can hold one a million times.
    """
    if isinstance(found, Tensor):
        if found.layout is torch.strided and found.device.type == "cpu" and not found.is_quantized:
            yield prefix or name, found.detach()
    elif isinstance(found, Mapping | list | tuple) and depth < 5 and id(found) not in seen:
        seen.add(id(found))
        parts = found.items() if isinstance(found, Mapping) else enumerate(found)
        for key, part in parts:
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from _tensors(part, path, name, seen, depth + 1)


def _gguf(file: Path, stack: contextlib.ExitStack) -> Arrays:
    """Return the tensors of a GGUF file, dequantized row by row."""
    import gguf

    try:
        read_gguf_header(file)  # which bounds what the library's reader would believe
    except ModelLoadError as error:
        raise ValueError(brief(error.__cause__ or error)) from error

    def take(data: np.ndarray, kind: Any, rows: Rows) -> Tensor:
        some = data if rows is None else data[rows]
        return numbers(some if some.dtype.kind == "f" else gguf.quants.dequantize(some, kind), None)

    return {
        tensor.name: Array(
            tuple(int(n) for n in reversed(tensor.shape)),
            partial(take, tensor.data, tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


VECTOR_FIELDS = ("vector", "values", "steeringVector")
"""Under which Neuronpedia's web page, Python package and steering requests keep a vector."""


def _json(file: Path, stack: contextlib.ExitStack) -> Arrays:
    """Return the lists of numbers in a JSON file: of one object, or of several in a list."""
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes of JSON")
    found = parse_json(file.read_bytes())
    if isinstance(found, list) and not any(isinstance(one, dict) for one in found):
        found = {file.stem: found}
    objects = [
        one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)
    ]
    if not objects:
        raise ValueError(f"JSON that is no object but {type(found).__name__}")
    known = [name for name in VECTOR_FIELDS if name in objects[0]]
    if known and any("hasVector" in one and not one.get(known[0]) for one in objects):
        raise ValueError(f"an empty {known[0]!r}: take the row of this feature from its SAE")
    arrays = {}
    for name in known[:1] or objects[0]:
        if not all(_is_numbers(one.get(name)) for one in objects):  # up to the first that is none
            continue
        values = [one[name] for one in objects]
        read = torch.tensor(values, dtype=torch.float32)  # raises if one is longer than another
        read = read if len(objects) > 1 else read[0]
        labels = tuple(map(_label, objects)) if known and read.numel() else ()
        arrays[str(name)] = Array(tuple(read.shape), partial(_rows_of, read), labels=labels)
    if not arrays:
        raise ValueError(f"no list of numbers, but {brief(', '.join(map(str, objects[0])))}")
    return arrays


def _is_numbers(value: object) -> bool:
    """Whether a value is a list of numbers, or of such lists."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            _is_numbers(one)
            if isinstance(one, list)
            else isinstance(one, int | float) and not isinstance(one, bool)
            for one in value
        )
    )


def _label(one: Mapping[str, Any]) -> str:
    """Return what Neuronpedia calls a vector: its own label, or model/layer/index."""
    label = one.get("label") or one.get("vectorLabel")
    parts = [
        one.get("modelId", one.get("model_id")),
        one.get("layer", one.get("source")),
        one.get("index"),
    ]
    named = "/".join(str(part) for part in parts if part not in (None, ""))
    return brief(" ".join(part for part in (str(label or ""), named) if part) or "vector", 80)


_READERS: Mapping[str, Callable[[Path, contextlib.ExitStack], Arrays]] = {
    ".safetensors": _safetensors,
    ".npy": _npy,
    ".npz": _npz,
    **dict.fromkeys((".pt", ".pth", ".bin"), _torch),
    ".gguf": _gguf,
    ".json": _json,
}
ENDINGS = tuple(_READERS)
