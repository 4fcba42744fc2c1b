"""GGUF files, the format of llama.cpp: found, checked, told apart, made ordinary.

1. `locate` finds the file that a path, a folder or a hub name and `gguf_file` mean.
2. `read_header` reads its header with every size checked against the file's, so that a file from
   anyone can neither hang nor flood the library that parses it next, and a cut one is noticed.
3. transformers dequantizes the weights; `as_ordinary` takes away what it remembers of that.
4. `source_of` states the file, its hash and its quantization, for the provenance of results.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from superscopes_tl.errors import ModelLoadError, bad_value, describe

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""The format's number types, as `struct` writes them."""
_STRING, _ARRAY = 8, 9
_PLAIN = ("F64", "F32", "F16", "BF16")
_LONGEST_REASON = 160

_MOST_DIMENSIONS = 4  # of the format


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, and how transformers is told of it.

    Attributes:
        source: the folder or hub name that transformers gets.
        file: its `gguf_file`, relative to that.
        path: where the file lies on this machine.
        name: how to call the model.
    """

    source: str
    file: str
    path: Path
    name: str


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        architecture: llama.cpp's name of it, such as "llama" or "gemma3".
        quantization: the type that most weights are stored in, such as "Q4_K_M" or "F16".
    """

    architecture: str
    quantization: str


def locate(model: str, gguf_file: Any, hub_options: Mapping[str, Any]) -> GGUFFile | None:
    """Return the GGUF file that is meant, or `None` where an ordinary model is.

    Args:
        model: the path of a GGUF file, a folder or a hub name.
        gguf_file: the file's name in the folder or repository, if it was given.
        hub_options: `revision`, `cache_dir`, `token` and the like.

    Raises:
        ModelLoadError: no such file, several of them, or none that the hub gives.
        ValueError: `gguf_file` is no file name, or beside a path that is a file already.
    """
    if gguf_file is not None and (not isinstance(gguf_file, str) or not gguf_file.strip()):
        raise bad_value(
            "gguf_file",
            "the name of a .gguf file in the folder or repository",
            gguf_file,
            "pass for example gguf_file='model-Q8_0.gguf'",
        )
    path = Path(model)
    if model.strip() and path.is_dir():  # "" is no folder, though Path("") is the working one
        return _in_folder(path, gguf_file)
    if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
        if gguf_file is not None:
            raise bad_value(
                "gguf_file",
                "no such argument beside the path of a file",
                gguf_file,
                "leave it out, or pass the folder as the model",
            )
        if not path.is_file():
            raise _missing(str(path), "check the path")
        return GGUFFile(str(path.parent), path.name, path, path.stem)
    return None if gguf_file is None else _on_the_hub(model, gguf_file, hub_options)


def _in_folder(folder: Path, gguf_file: str | None) -> GGUFFile | None:
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    if gguf_file is None:
        if not found or (folder / "config.json").is_file():
            return None
        if len(found) > 1:
            raise ModelLoadError(
                describe(
                    "model",
                    "a folder with one .gguf file",
                    f"{folder} with {', '.join(found)}",
                    f"choose one, such as gguf_file={found[0]!r}",
                )
            )
        gguf_file = found[0]
    path = folder / gguf_file
    if not path.is_file():
        there = f"{folder} holds {', '.join(found)[:100]}" if found else "it holds no .gguf file"
        raise _missing(str(path), there)
    return GGUFFile(str(folder), gguf_file, path, path.stem)


def _on_the_hub(model: str, gguf_file: str, hub_options: Mapping[str, Any]) -> GGUFFile:
    from transformers.utils import cached_file

    shared = {k: v for k, v in hub_options.items() if k != "trust_remote_code"}
    try:
        path = cached_file(model, gguf_file, **shared)
    except Exception as error:  # a wrong name, no network, no rights: the hub's own words
        raise ModelLoadError(
            describe(
                "model",
                f"a hub name with {gguf_file}",
                model,
                f"check both names and the connection ({_short(error)})",
            )
        ) from error
    return GGUFFile(model, gguf_file, Path(path), model)


def _missing(path: str, hint: str) -> ModelLoadError:
    return ModelLoadError(describe("model", "a GGUF file that is there", path, hint))


def _starts_as_gguf(path: Path) -> bool:
    """Tell by the first bytes: some tools name such files by their hash."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):  # no such file, or a name that cannot be one
        return False


def read_header(path: Path) -> Header:
    """Return what a GGUF file says of itself, after checking that all of it is there.

    Raises:
        ModelLoadError: not a GGUF file, cut off, or of a kind that nothing here reads.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, ValueError, struct.error) as error:
        raise ModelLoadError(
            describe(
                "model",
                "a whole GGUF file",
                f"{path} ({_short(error)})",
                "download it again, or convert it anew with llama.cpp",
            )
        ) from error


@dataclass
class _Cursor:
    """A place in the file that only moves forward, and never beyond the end."""

    data: mmap.mmap
    at: int = 0

    def skip(self, count: int) -> int:
        """Move on, and return where that began."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError("it ends inside its header")
        self.at += count
        return start

    def number(self, code: str = "I") -> Any:
        start = self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def text(self) -> str:
        count = self.number("Q")
        start = self.skip(count)
        return self.data[start : start + count].decode("utf-8", "replace")

    def value(self) -> Any:
        """Return a number or a text; skip an array."""
        kind = self.number()
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        kind, count = self.number(), self.number("Q")
        if kind == _STRING:
            for _ in range(count):  # each takes at least its length, so the file's end stops it
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _scalar(kind)))
        return None


@dataclass
class _Tensors:
    """How much of the file the tensors take, and in which types."""

    end: int = 0
    numbers: Counter[str] = field(default_factory=Counter)

    def add(self, cursor: _Cursor) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, count, dimensions = cursor.text(), 1, cursor.number()
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:40]!r} has {dimensions} dimensions")
        for _ in range(dimensions):
            count *= cursor.number("Q")
        kind, offset = cursor.number(), cursor.number("Q")
        try:
            stored = GGMLQuantizationType(kind)
            block, size = GGML_QUANT_SIZES[stored]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name[:40]!r} is stored as type {kind}, unknown here") from error
        self.end = max(self.end, offset + count // block * size)
        self.numbers[stored.name] += count


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"it has a field of type {kind}, unknown here")
    return _SCALARS[kind]


def _parse(data: mmap.mmap) -> Header:
    """Walk through a header of little-endian version 2 or 3."""
    cursor = _Cursor(data)
    if data[cursor.skip(len(_MAGIC)) : cursor.at] != _MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version = cursor.number()
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; versions 2 and 3, little-endian, can be read")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.text()
        fields[name] = cursor.value()
    tensors = _Tensors()
    for _ in range(n_tensors):
        tensors.add(cursor)
    align = fields.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"an alignment of {align!r}")
    missing = -(-cursor.at // align) * align + tensors.end - len(data)
    if n_tensors and missing > 0:
        raise ValueError(f"its last {missing} bytes are missing")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or not architecture or not n_tensors:
        raise ValueError("it holds no model: an architecture or the weights are missing")
    return Header(architecture, _quantization(fields.get("general.file_type"), tensors.numbers))


def _quantization(file_type: object, numbers: Counter[str]) -> str:
    """Return llama.cpp's name of the file's type, else the type of most of its numbers."""
    from gguf import LlamaFileType

    try:
        named = LlamaFileType(file_type).name
    except ValueError:  # newer than the installed gguf, or not stated
        named = "GUESSED"
    if named == "GUESSED":
        return numbers.most_common(1)[0][0]
    return str(named.removeprefix("MOSTLY_").removeprefix("ALL_"))


def dequantized_from(quantization: str) -> str:
    """Return how results name what was lost before the weights came here."""
    plain = quantization in _PLAIN
    return f"none, stored as {quantization}" if plain else f"dequantized from {quantization}"


def source_of(path: Path) -> dict[str, str]:
    """Return what tells this file from any other: its name, hash and quantization.

    Raises:
        ModelLoadError: as `read_header`.
    """
    quantization = dequantized_from(read_header(path).quantization)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "quantization": quantization}


def unreadable(found: GGUFFile, error: Exception) -> ModelLoadError:
    """Return (not raise) what to say of a file that is whole and that transformers cannot load."""
    header = read_header(found.path)
    return ModelLoadError(
        describe(
            "model",
            "a GGUF file whose architecture and quantization transformers can read",
            f"{found.file} ({header.architecture[:40]}, {header.quantization})",
            f"take another quantization, or the original weights ({_short(error)})",
        )
    )


def as_ordinary(hf: Any) -> Any:
    """Return a dequantized model without the marks of its quantization, as if always float."""
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.hf_quantizer = None
    hf.is_quantized = False
    return hf


@contextlib.contextmanager
def own_bar(description: str, *, shown: bool) -> Iterator[None]:
    """Give transformers' bar over a GGUF file's tensors our description, or hide it."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as library

    def bar(tensors: Any, **_: Any) -> Any:
        return tqdm(tensors, desc=description, disable=not shown, unit=" tensors", leave=False)

    theirs = getattr(library, "tqdm", None)
    if theirs is None:  # another version of transformers, with other bars
        yield
        return
    library.tqdm = bar
    try:
        yield
    finally:
        library.tqdm = theirs


def to_safetensors(path: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary Hugging Face folder: float32 safetensors and tokenizer.

    Raises:
        ModelLoadError: the file is cut off, or transformers cannot read it.
        OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_header(path)
    found = GGUFFile(str(path.parent), path.name, path, path.stem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.source, gguf_file=found.file)
        hf = AutoModelForCausalLM.from_pretrained(
            found.source, gguf_file=found.file, dtype=torch.float32
        )
    except Exception as error:  # whatever the library stumbles over
        raise unreadable(found, error) from error
    try:
        as_ordinary(hf).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its reason is a text: no space, no folder, no rights
        raise OSError(str(error)) from error


def _short(error: Exception) -> str:
    """Return the first line of a library's reason, cut."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].rstrip(".")
    return first if len(first) <= _LONGEST_REASON else f"{first[: _LONGEST_REASON - 1]}…"
