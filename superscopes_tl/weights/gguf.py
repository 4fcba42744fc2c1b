"""GGUF, the file format of llama.cpp: find a file, check its header, convert it.

1. `locate_gguf` resolves a path, a folder, or a hub name with `gguf_file` to one file.
2. `read_header` walks the header and checks every declared size against the file's. An untrusted
   file can then neither hang the parser nor exhaust memory, and a truncated one is noticed.
3. transformers dequantizes the weights; `forget_quantization` removes its marks from the model.
4. `GGUFFile.provenance` records file name, hash and quantization for every result.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superscopes_tl.errors import ModelLoadError, bad_model, bad_value, brief

_MAGIC = b"GGUF"
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""The format's scalar types as `struct` codes."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """What a GGUF header declares, in llama.cpp's names: "gemma3", "Q4_K_M"."""

    architecture: str
    quantization: str


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file.

    Attributes:
        source: folder or hub name that transformers loads `file` from.
        file: its `gguf_file`, relative to `source`.
        path: the file on this machine.
        name: display name of the model.
    """

    source: str
    file: str
    path: Path
    name: str

    @classmethod
    def at(cls, path: Path) -> GGUFFile:
        """Return the file at a path, named by its stem."""
        return cls(str(path.parent), path.name, path, path.stem)

    def provenance(self) -> dict[str, str]:
        """Return file name, SHA-256 and quantization; a `ModelLoadError` if it is incomplete."""
        quantization = dequantized_from(read_header(self.path).quantization)
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": digest, "quantization": quantization}

    def unreadable(self, error: Exception) -> ModelLoadError:
        """Build the error for a complete file that transformers cannot load."""
        header = read_header(self.path)
        return bad_model(
            "model",
            "a GGUF file whose architecture and quantization transformers supports",
            f"{self.file} ({header.architecture[:40]}, {header.quantization})",
            f"use another quantization or the original weights ({brief(error)})",
        )


def locate_gguf(model: str, gguf_file: Any, hub_options: Mapping[str, Any]) -> GGUFFile | None:
    """Return the GGUF file of a path, folder or hub name, or `None` for an ordinary checkpoint.

    Raises:
        ModelLoadError: no such file, several candidates, or a failed download.
        ValueError: `gguf_file` is not a file name, or `model` is a file already.
    """
    if gguf_file is not None and (not isinstance(gguf_file, str) or not gguf_file.strip()):
        fix = "gguf_file='model-Q8_0.gguf'"
        raise bad_value("gguf_file", "the name of a .gguf file", gguf_file, fix)
    path = Path(model)
    if model.strip() and path.is_dir():  # Path("") is the working folder
        return _in_folder(path, gguf_file)
    if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
        if gguf_file is not None:
            fix = "leave it out, or pass the folder as model"
            raise bad_value("gguf_file", "None with the path of a file", gguf_file, fix)
        if not path.is_file():
            raise _missing(path, "check the path")
        return GGUFFile.at(path)
    return None if gguf_file is None else _on_hub(model, gguf_file, hub_options)


def _in_folder(folder: Path, gguf_file: str | None) -> GGUFFile | None:
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    if gguf_file is None:
        if not found or (folder / "config.json").is_file():
            return None
        if len(found) > 1:
            got = f"{folder} with {', '.join(found)}"
            fix = f"choose one, such as gguf_file={found[0]!r}"
            raise bad_model("model", "a folder with one .gguf file", got, fix)
        gguf_file = found[0]
    path = folder / gguf_file
    if not path.is_file():
        raise _missing(path, f"{folder} holds {brief(', '.join(found) or 'no .gguf file', 100)}")
    return GGUFFile(str(folder), gguf_file, path, path.stem)


def _on_hub(model: str, gguf_file: str, hub_options: Mapping[str, Any]) -> GGUFFile:
    from transformers.utils import cached_file

    shared = {k: v for k, v in hub_options.items() if k != "trust_remote_code"}
    try:
        path = cached_file(model, gguf_file, **shared)
    except Exception as error:  # wrong name, no network, no access
        fix = f"check both names and the connection ({brief(error)})"
        raise bad_model("model", f"a hub name with {gguf_file}", model, fix) from error
    return GGUFFile(model, gguf_file, Path(path), model)


def _missing(path: Path, fix: str) -> ModelLoadError:
    return bad_model("model", "an existing GGUF file", str(path), fix)


def _starts_as_gguf(path: Path) -> bool:
    """Whether a file has the magic bytes; some tools name such files by their hash."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):  # no such file, or not a possible file name
        return False


def read_header(path: Path) -> Header:
    """Parse the header of a GGUF file after checking that the file is complete.

    Raises:
        ModelLoadError: no GGUF file, truncated, or of an unknown version or type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, ValueError, struct.error) as error:
        fix = "download it again, or convert it again with llama.cpp"
        raise bad_model("model", "a complete GGUF file", f"{path} ({error})", fix) from error


@dataclass
class _Cursor:
    """A read position that only moves forward and never past the end of the file."""

    data: mmap.mmap
    at: int = 0

    def skip(self, count: int) -> int:
        """Advance, and return the position before."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError("truncated header")
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
        """Return a number or a string; skip an array."""
        kind = self.number()
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        kind, count = self.number(), self.number("Q")
        if kind == _STRING:
            for _ in range(count):  # each moves forward: a false count ends with the file
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _scalar(kind)))
        return None


def _tensor(cursor: _Cursor) -> tuple[str, int, int]:
    """Return a tensor's type, number of weights, and end within the tensor data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = cursor.text(), cursor.number()
    if dimensions > 4:  # GGML_MAX_DIMS
        raise ValueError(f"{name[:40]!r} has {dimensions} dimensions")
    count = math.prod(cursor.number("Q") for _ in range(dimensions))
    kind, offset = cursor.number(), cursor.number("Q")
    try:
        stored = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[stored]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name[:40]!r} has the unknown type {kind}") from error
    return stored.name, count, offset + count // block * size


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a field of the unknown type {kind}")
    return _SCALARS[kind]


def _parse(data: mmap.mmap) -> Header:
    """Walk a header of little-endian version 2 or 3."""
    cursor = _Cursor(data)
    if data[cursor.skip(len(_MAGIC)) : cursor.at] != _MAGIC:
        raise ValueError("no GGUF magic bytes")
    version = cursor.number()
    if version not in (2, 3):
        raise ValueError(f"version {version}, where little-endian 2 and 3 are supported")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.text()
        fields[name] = cursor.value()
    end, numbers = 0, Counter[str]()
    for _ in range(n_tensors):
        kind, count, last = _tensor(cursor)
        end, numbers[kind] = max(end, last), numbers[kind] + count
    align = fields.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"an alignment of {align!r}")
    missing = -(-cursor.at // align) * align + end - len(data)
    if n_tensors and missing > 0:
        raise ValueError(f"the last {missing} bytes are missing")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or not architecture or not n_tensors:
        raise ValueError("no architecture or no weights")
    return Header(architecture, _quantization(fields.get("general.file_type"), numbers))


def _quantization(file_type: object, numbers: Counter[str]) -> str:
    """Return llama.cpp's name for the file type, else the type of most weights."""
    from gguf import LlamaFileType

    try:
        named = LlamaFileType(file_type).name
    except ValueError:  # not stated, or newer than the installed gguf
        named = "GUESSED"
    if named == "GUESSED":
        return numbers.most_common(1)[0][0]
    return str(named.removeprefix("MOSTLY_").removeprefix("ALL_"))


def dequantized_from(quantization: str) -> str:
    """Return how provenance describes weights that were stored in this type."""
    plain = quantization in ("F64", "F32", "F16", "BF16")
    return f"none, stored as {quantization}" if plain else f"dequantized from {quantization}"


def forget_quantization(hf: Any) -> Any:
    """Return a dequantized model as an ordinary one, which `save_pretrained` accepts."""
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.hf_quantizer = None
    hf.is_quantized = False
    return hf


def to_safetensors(path: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder of float32 safetensors and a tokenizer.

    Raises:
        ModelLoadError: truncated, or not supported by transformers.
        OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_header(path)
    found = GGUFFile.at(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.source, gguf_file=found.file)
        hf = AutoModelForCausalLM.from_pretrained(
            found.source, gguf_file=found.file, dtype=torch.float32
        )
    except Exception as error:  # whatever the library raises
        raise found.unreadable(error) from error
    try:
        forget_quantization(hf).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # disk full, missing folder, no permission: text only
        raise OSError(errno.EIO, str(error)) from error
