"""GGUF files: located, checked, and loaded with the weights of the original."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import load_model
from superscopes_tl.errors import ModelLoadError
from superscopes_tl.weights.gguf import dequantized_from, locate_gguf, read_header
from tests.conftest import BACKENDS
from tests.support.refusals import refused
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file in a folder of its own, and the model with the same weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_gguf(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_computes_the_logits_of_its_original(
    tiny_file: tuple[Path, Any], backend: Any
) -> None:
    """The logits equal the original's; the provenance has name, hash and quantization."""
    path, original = tiny_file
    model = load_model(path, backend=backend, device="cpu")
    with torch.no_grad():
        expected = original(TOKENS).logits
        got = model.tl(TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert model.name == "tiny"
    assert model.bos_token_id == 0
    assert model.provenance()["source"] == {
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "quantization": "none, stored as F32",
    }


def test_a_folder_and_a_file_name_mean_the_same_file(
    tiny_file: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with one file, a chosen one of two, and a relative path lead to equal weights."""
    path, _ = tiny_file
    expected = load_model(path, backend="bridge").fingerprint
    assert load_model(path.parent, backend="bridge").fingerprint == expected
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(path, tmp_path / name)
    chosen = load_model(tmp_path, gguf_file="two.gguf", backend="bridge")
    assert (chosen.name, chosen.fingerprint) == ("two", expected)
    assert chosen.source is not None
    assert chosen.source["file"] == "two.gguf"
    monkeypatch.chdir(tmp_path)
    relative = load_model("one.gguf", backend="bridge")
    monkeypatch.chdir("/")
    assert relative.origin is not None
    assert relative.origin().fingerprint == expected


def test_provenance_has_the_quantization_of_the_weights(tmp_path: Path) -> None:
    """The type is read from the header; the logits differ slightly from the original's."""
    original = write_tiny_gguf(tmp_path / "q8.gguf", quantization="MOSTLY_Q8_0")
    model = load_model(tmp_path / "q8.gguf", backend="bridge")
    assert model.source is not None
    assert model.source["quantization"] == "dequantized from Q8_0"
    with torch.no_grad():
        difference = (model.tl(TOKENS) - original(TOKENS).logits).abs().max()
    assert 0 < difference < 0.1 * original(TOKENS).logits.abs().max()


def test_a_file_without_the_suffix_is_recognised_by_its_magic_bytes(
    tiny_file: tuple[Path, Any], tmp_path: Path
) -> None:
    """Some tools name GGUF files by their hash."""
    copy = shutil.copy(tiny_file[0], tmp_path / "sha256-0a1b")
    found = locate_gguf(str(copy), None, {})
    assert found is not None
    assert found.path == tmp_path / "sha256-0a1b"
    assert load_model(copy, backend="bridge").name == "sha256-0a1b"


def test_a_folder_with_a_configuration_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """A .gguf file beside ordinary weights is ignored."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "beside.gguf").write_bytes(b"GGUF")
    assert locate_gguf(str(tmp_path), None, {}) is None
    assert locate_gguf("", None, {}) is None
    assert locate_gguf("org/name", None, {}) is None


def test_what_names_no_single_file_is_refused(tiny_file: tuple[Path, Any], tmp_path: Path) -> None:
    """A missing file, several files, a file with a file name, and a name that is no string."""
    path, _ = tiny_file
    missing = tmp_path / "missing.gguf"
    assert "missing.gguf" in refused(lambda: load_model(missing), ModelLoadError, "model")
    other = refused(lambda: load_model(path.parent, gguf_file="x.gguf"), ModelLoadError, "model")
    assert "tiny.gguf" in other
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).touch()
    several = refused(lambda: load_model(tmp_path), ModelLoadError, "model")
    assert "gguf_file='one.gguf'" in several
    refused(lambda: load_model(path, gguf_file="tiny.gguf"), ValueError, "gguf_file")
    refused(lambda: load_model(path.parent, gguf_file=7), ValueError, "gguf_file")
    hub = refused(lambda: load_model("no-org/no", gguf_file="x.gguf"), ModelLoadError, "model")
    assert "no-org/no" in hub


def test_what_transformers_cannot_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown architecture, or a long error of its reader, is one short line."""
    write_tiny_gguf(tmp_path / "odd.gguf", architecture="clip")
    message = refused(lambda: load_model(tmp_path / "odd.gguf"), ModelLoadError, "model")
    assert "clip" in message

    def unable(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no such quantization" * 500 + "\nand more")

    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("gguf.dequantize", unable)
    refused(lambda: load_model(tmp_path / "tiny.gguf"), ModelLoadError, "model")


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 300, 5000, -1])
def test_a_truncated_file_is_refused(
    tiny_file: tuple[Path, Any], tmp_path: Path, kept: int
) -> None:
    """Truncation is found in the magic bytes, the header, and the last tensor."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_file[0].read_bytes()[:kept])
    refused(lambda: load_model(cut), ModelLoadError, "model")


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + bytes(500),
        b"GGUF" + struct.pack("<I", 1) + bytes(500),
        b"GGUF" + struct.pack(">I", 3) + bytes(500),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(500),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(500),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**62) + bytes(500),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 2**62) + bytes(500),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(500),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Another format, version or byte order, and counts beyond the file are errors."""
    (tmp_path / "bad.gguf").write_bytes(content)
    refused(lambda: load_model(tmp_path / "bad.gguf"), ModelLoadError, "model")


@given(place=st.integers(0, 5000), byte=st.integers(0, 255))
def test_no_changed_byte_breaks_the_header_reader(
    tiny_file: tuple[Path, Any], place: int, byte: int
) -> None:
    """The header is read or refused with a `ModelLoadError`; the reader never hangs."""
    content = bytearray(tiny_file[0].read_bytes())
    content[place] = byte
    changed = tiny_file[0].with_suffix(".changed")
    changed.write_bytes(content)
    with contextlib.suppress(ModelLoadError):
        assert read_header(changed).quantization


def test_only_quantized_types_were_dequantized() -> None:
    """Float types are stored as they are."""
    assert dequantized_from("Q4_K_M") == "dequantized from Q4_K_M"
    assert dequantized_from("BF16") == "none, stored as BF16"
