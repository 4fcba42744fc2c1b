"""Files from anyone: what they may try, and that nothing comes of it but one clear error."""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, SweepResult, files
from superscopes_tl.errors import RunFileError
from superscopes_tl.experiment import Cell, EvaluationFile
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.neighbours import JacobianLens, TunedLens
from superscopes_tl.statistics import read_recording
from superscopes_tl.vectors import load_maps, load_vectors
from tests.experiment.test_results import LADDER, header, rewritten
from tests.support.killed_run import run

REFUSED = "(?s)^path: .*{}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small evaluation's file."""
    path = tmp_path_factory.mktemp("written") / "run.sqlite"
    run(path, layers=2, alphas=3, draws=0)
    return path.read_bytes()


@pytest.fixture
def database(written: bytes, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    path = tmp_path / "run.sqlite"
    path.write_bytes(written)
    return path


def peak(call: Callable[[], Any]) -> int:
    """Return how many bytes Python and numpy held at most while `call` ran into its error."""
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected"):
        call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


# Run files.


def zipped(path: Path, entries: list[tuple[str, bytes]], **options: Any) -> Path:
    """Write a zip of these entries."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "provenance.json", "more"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_other_names_are_refused(name: str, tmp_path: Path) -> None:
    """Nothing is unpacked to the disk; a path that leads elsewhere is not even read."""
    path = LADDER.save(tmp_path / "run.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(RunFileError, match=REFUSED.format("the entries")):
        SweepResult.load(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_lies_about_its_size_unpacks_no_more(method: int, tmp_path: Path) -> None:
    """200 MB that are declared as 20 bytes: at most some are unpacked, then it is refused."""
    path = zipped(
        tmp_path / "run.zip",
        [("provenance.json", bytes(200 * 2**20)), ("table.parquet", b"")],
        compression=method,
    )
    data = path.read_bytes().replace(struct.pack("<I", 200 * 2**20), struct.pack("<I", 20))
    path.write_bytes(data)
    assert len(data) < 10**6
    assert peak(lambda: SweepResult.load(path)) < 20 * 2**20


def test_a_zip_that_declares_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """The limit is that of all that a run file holds."""
    path = LADDER.save(tmp_path / "run.zip")
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("table.parquet").file_size
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 2**31)))
    with pytest.raises(RunFileError, match=REFUSED.format("more than 1073741824 bytes")):
        SweepResult.load(path)


def parquet(frame: pd.DataFrame, **options: Any) -> bytes:
    """Return a table as Parquet."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, **options)
    return buffer.getvalue()


def test_a_table_of_one_repeated_text_is_refused_before_it_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte in the file that would be gigabytes in memory: its sum is known beforehand."""
    many = pd.concat([LADDER.table.head(1)] * 6_000)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(many, preserve_index=False)
    at = table.column_names.index("text")
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(6_000, "int32")), ["x" * 200_000])
    table = table.set_column(at, pa.field("text", repeated.type), [repeated])
    buffer = io.BytesIO()
    pq.write_table(table, buffer, store_schema=False)  # so that the column says that it is a text
    path = rewritten(tmp_path / "run.zip", table=buffer.getvalue())
    assert path.stat().st_size < 3 * 2**20
    with pytest.raises(RunFileError, match=REFUSED.format("more than 1073741824 bytes of tab")):
        SweepResult.load(path)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"score": ["high"] * 12}, "score"), ({"text": [1] * 12}, "text"),
        ({"text": [b"x"] * 12}, "text"), ({"text": [None] * 12}, "text"),
        ({"few_shot_copy": [2] * 12}, "few_shot_copy"), ({"position": [-1] * 12}, "position"),
        ({"source_layer": [1.5] * 12}, "source_layer"), ({"alpha": [np.inf] * 12}, "alpha"),
        ({"source_layer": [-2] * 12}, "source_layer"), ({"more": [[1]] * 12}, "more"),
    ],
)  # fmt: skip
def test_columns_hold_what_they_say(change: Any, column: str, tmp_path: Path) -> None:
    """A table that the rest of the package could not rely on does not load, and is not saved."""
    spoilt = LADDER.table.assign(**change)
    path = rewritten(tmp_path / "run.zip", table=parquet(spoilt))
    with pytest.raises(RunFileError, match=REFUSED.format(column)):
        SweepResult.load(path)
    with pytest.raises(ValueError, match=f"^result: .*{column}"):
        SweepResult(spoilt, LADDER.provenance).save(tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


def test_a_table_that_is_packed_without_bound_is_refused(tmp_path: Path) -> None:
    """As this package writes them, and not by methods that pack a million bytes into a few."""
    path = rewritten(tmp_path / "run.zip", table=parquet(LADDER.table, compression="zstd"))
    with pytest.raises(RunFileError, match=REFUSED.format("a table packed by ZSTD")):
        SweepResult.load(path)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000, header(provenance={"seconds": np.nan}), b"9" * 10_000,
        header(provenance={"model": "tiny"}), header(provenance={"config": [1]}),
        header(provenance={"tokens": {"labels": 3}}), b" " * (files.MAX_JSON_BYTES + 1),
    ],
    ids=range(7),
)  # fmt: skip
def test_provenance_of_other_shapes_is_refused(text: bytes, tmp_path: Path) -> None:
    """Too deep, too large, not JSON, or parts of another type than the ones that are read."""
    with pytest.raises(RunFileError, match=REFUSED.format("run.zip")):
        SweepResult.load(rewritten(tmp_path / "run.zip", provenance=text))


def test_a_provenance_cannot_put_code_into_what_is_copied() -> None:
    """Neither behind a line break nor in letters that only look like others."""
    for mapping in ("x\nboom()", "ｂｏｏｍ()", "head\rboom()", "x\u2028boom()"):
        said = LADDER.provenance | {"config": {"mapping": mapping, "base": mapping}}
        code = code_for(SweepResult(LADDER.table, said), Cell.of(LADDER.table.iloc[0]))
        called = [line for line in code.splitlines() if "boom" in line and line[:1] != "#"]
        assert called == []
        assert "ｂｏｏｍ" not in code.replace("# my_", "").split("result = sweep")[1]


# Evaluation files.


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE VIEW more AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON readings BEGIN DELETE FROM readings; END",
        "ALTER TABLE readings ADD COLUMN more AS (hex(zeroblob(1000000000)))",
        "DROP TABLE readings",
        "DELETE FROM provenance",
        "UPDATE provenance SET text = NULL",
        f"UPDATE provenance SET text = '{'[' * 100_000}'",
        'UPDATE provenance SET text = replace(text, \'"config": \', \'"config": [], "x": \')',
        "UPDATE readings SET text = 5.5 || x'ff'",
        "UPDATE readings SET text = NULL",
        "UPDATE readings SET source_layer = 'x'",
        "UPDATE readings SET alpha = 9e999",
        "UPDATE readings SET position = -7",
        "UPDATE readings SET controls = '{\"score\": 1}'",
        "UPDATE readings SET controls = NULL",
    ],
)
def test_a_spoilt_database_is_refused(sql: str, database: Path) -> None:
    """Other tables, views, triggers, computed columns; values of other types."""
    with contextlib.closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(sql)
    with pytest.raises(RunFileError, match=REFUSED.format("run.sqlite")):
        SweepResult.load(database)


def test_a_file_of_no_evaluation_is_refused_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    """A run that is killed right at its beginning leaves an empty file; the next run resumes."""
    path = tmp_path / "run.sqlite"
    path.write_text("hello " * 100)
    for load in (SweepResult.load, partial(EvaluationFile, provenance={})):
        with pytest.raises(RunFileError, match="^path: "):
            load(path)
    path.write_bytes(b"")
    with pytest.raises(RunFileError, match=REFUSED.format("run.sqlite")):
        SweepResult.load(path)
    assert len(run(path, layers=2, alphas=3, draws=0)) == 12


# Both, and the other loaders.


LOADERS: dict[str, Callable[..., Any]] = {
    "run.zip": lambda path, model: SweepResult.load(path),
    "run.sqlite": lambda path, model: SweepResult.load(path),
    "maps.safetensors": lambda path, model: load_maps(path),
    "lens.safetensors": TunedLens.load,
    "jacobian.safetensors": JacobianLens.load,
    "jacobian.pt": JacobianLens.load,
    "vectors.safetensors": lambda path, model: load_vectors(path),
    "vectors.npy": lambda path, model: load_vectors(path),
    "recording.csv": lambda path, model: read_recording(path),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", LOADERS)
def test_a_pipe_is_not_waited_for(name: str, llama: LanguageModel, tmp_path: Path) -> None:
    """Neither a pipe nor a device has an end: they are not opened."""
    os.mkfifo(tmp_path / name)
    said: list[str] = []

    def load() -> None:
        with pytest.raises(ValueError, match="path: expected") as raised:
            LOADERS[name](tmp_path / name, llama)
        said.append(str(raised.value))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(30)
    assert said


@pytest.mark.parametrize("name", [name for name in LOADERS if name.endswith("safetensors")])
@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000) + b"{" * 100_000,
        struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
        struct.pack("<Q", 66)
        + b'{"v":{"dtype":"F32","shape":[1099511627776,9],"data_offsets":[0,8]}',
        struct.pack("<Q", 2) + b"{}",
    ],
    ids=range(5),
)
def test_headers_that_no_tensors_have_are_refused(
    name: str, head: bytes, llama: LanguageModel, tmp_path: Path
) -> None:
    """Longer than the file, nested without end, of shapes that are not there, or of nothing."""
    (tmp_path / name).write_bytes(head + b"\0" * 8)
    with pytest.raises(ValueError, match="(path|name): expected"):
        LOADERS[name](tmp_path / name, llama)


def spoil(whole: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    """Return a file's bytes, cut off and with some changed."""
    data = bytearray(whole[: max(1, int(len(whole) * cut))])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    return bytes(data)


spoilt = given(
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
lightly = settings(
    max_examples=60, deadline=5_000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.mark.parametrize("name", ["run.zip", "run.sqlite"])
@lightly
@spoilt
def test_any_damage_is_noticed_or_harmless(
    name: str, written: bytes, tmp_path: Path, cut: float, flips: list[tuple[float, int]]
) -> None:
    """The file loads or is refused with the reason; nothing else is raised."""
    path = tmp_path / name
    whole = written if name == "run.sqlite" else LADDER.save(path).read_bytes()
    path.write_bytes(spoil(whole, cut, flips))
    try:
        outcome = repr(SweepResult.load(path))
    except (RunFileError, OSError) as error:
        outcome = str(error)
    assert outcome.startswith(("SweepResult(", "path: expected a file"))
