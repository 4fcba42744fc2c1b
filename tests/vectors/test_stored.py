"""Vectors from files: every format, every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from superscopes_tl.vectors import load_vectors
from superscopes_tl.vectors import stored as vector_files

MATRIX = torch.arange(35, dtype=torch.float32).reshape(7, 5) / 4 - 3


def _save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write arrays in the format that the path's ending names; an `.npy` holds one."""
    if path.suffix == ".safetensors":
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        (array,) = arrays.values()
        np.save(path, array)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".npz"])
@pytest.mark.parametrize("rows", [None, [5, 2], [-1, 0, 0]])
def test_every_format_gives_the_rows_asked_for(
    ending: str, rows: list[int] | None, tmp_path: Path
) -> None:
    """Rows come in the order asked for, repeated and negative numbers included, in float32."""
    path = _save(tmp_path / f"v{ending}", {"v": MATRIX.numpy().astype(np.float16)})
    loaded = load_vectors(path, rows=rows)
    assert loaded.dtype is torch.float32
    assert torch.equal(loaded, MATRIX if rows is None else MATRIX[rows])


@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".npz"])
def test_one_vector_is_one_row(ending: str, tmp_path: Path) -> None:
    """An array of one dimension is one vector, and row 0 is all of it."""
    path = _save(tmp_path / f"v{ending}", {"v": MATRIX[2].numpy()})
    for rows in (None, [0], [-1]):
        assert torch.equal(load_vectors(path, rows=rows), MATRIX[2:3])
    with pytest.raises(ValueError, match="^rows: "):
        load_vectors(path, rows=[1])


def test_dtypes_become_float32(tmp_path: Path) -> None:
    """bfloat16 of safetensors, big-endian numbers and whole numbers of numpy are read."""
    save_file({"v": MATRIX.bfloat16()}, tmp_path / "v.safetensors")
    assert torch.equal(load_vectors(tmp_path / "v.safetensors"), MATRIX.bfloat16().float())
    for dtype in (">f8", "<i2"):
        np.save(tmp_path / "v.npy", MATRIX.numpy().astype(dtype))
        expected = torch.from_numpy(MATRIX.numpy().astype(dtype).astype(np.float32))
        assert torch.equal(load_vectors(tmp_path / "v.npy"), expected)


def test_what_is_loaded_can_be_written_to_and_leaves_the_file_alone(tmp_path: Path) -> None:
    """The numbers are a copy, not the mapped file."""
    path = _save(tmp_path / "v.npy", {"v": MATRIX.numpy()})
    load_vectors(path).zero_()
    assert torch.equal(load_vectors(path), MATRIX)


def test_the_only_fitting_array_is_chosen_and_otherwise_the_names_are_shown(tmp_path: Path) -> None:
    """Arrays of other shapes do not count; of several, one has to be named."""
    cube, matrix = np.zeros((2, 2, 2), np.float32), MATRIX.numpy()
    path = _save(tmp_path / "a.safetensors", {"cube": cube, "W_dec": matrix})
    assert torch.equal(load_vectors(path), MATRIX)
    for name in ("cube", "W"):
        with pytest.raises(ValueError, match="^name: "):
            load_vectors(path, name)
    path = _save(tmp_path / "b.safetensors", {"W_dec": matrix, "b_dec": matrix[0]})
    assert torch.equal(load_vectors(path, "b_dec"), MATRIX[:1])
    assert torch.equal(load_vectors(path), MATRIX)  # the decoder of an SAE
    path = _save(tmp_path / "c.safetensors", {"one": matrix, "two": matrix + 1})
    with pytest.raises(ValueError, match="^name: "):
        load_vectors(path)


def test_bad_rows_and_paths_are_refused(tmp_path: Path) -> None:
    """No such row, no rows, no whole number; no such file, or a foreign one."""
    path = _save(tmp_path / "v.npy", {"v": MATRIX.numpy()})
    bad: Any
    for bad in ([7], [], [1.5]):
        with pytest.raises((ValueError, TypeError), match="^rows: "):
            load_vectors(path, rows=bad)
    (tmp_path / "v.pt").write_bytes(b"x")
    for name in ("none.npy", "v.pt"):
        with pytest.raises(ValueError, match="^path: "):
            load_vectors(tmp_path / name)


@pytest.mark.parametrize(
    "array", [[[1.0, np.nan], [1.0, 2.0]], [[1e300]], [[1j]], [[True]], [["a"]], [[None]]]
)
def test_what_is_not_finite_and_real_is_refused(array: Any, tmp_path: Path) -> None:
    """NaN, overflow, complex numbers, booleans, strings, and objects, which are pickles."""
    with pytest.raises(ValueError, match="^path: "):
        load_vectors(_save(tmp_path / "v.npy", {"v": np.array(array)}))


def test_a_row_with_nan_does_not_spoil_the_others(tmp_path: Path) -> None:
    """Rows that are not asked for are not judged."""
    array = MATRIX.numpy().copy()
    array[3, 1] = np.nan
    path = _save(tmp_path / "v.npy", {"v": array})
    assert torch.equal(load_vectors(path, rows=[5, 2]), MATRIX[[5, 2]])


@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".npz"])
def test_broken_files_are_refused(ending: str, tmp_path: Path) -> None:
    """A cut-off file and one of another format raise `ValueError`, whatever the reader raises."""
    path = _save(tmp_path / f"v{ending}", {"v": MATRIX.numpy()})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a file of numbers" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^path: "):
            load_vectors(path)


def test_too_much_at_once_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows of a large array can be read where the format can be sliced."""
    monkeypatch.setattr(vector_files, "MAX_BYTES", 4 * 5 * 3)
    for ending in (".safetensors", ".npy"):
        path = _save(tmp_path / f"v{ending}", {"v": MATRIX.numpy()})
        with pytest.raises(ValueError, match="^path: .* at once"):
            load_vectors(path)
        assert torch.equal(load_vectors(path, rows=[6, 1]), MATRIX[[6, 1]])
    with pytest.raises(ValueError, match="^path: "):  # unpacked as a whole
        load_vectors(_save(tmp_path / "v.npz", {"v": MATRIX.numpy()}), rows=[1])
