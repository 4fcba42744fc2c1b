"""When things go wrong: killed and concurrent runs, full disks, folders that cannot be written."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from superscopes_tl import SweepResult, heatmap, write_html
from superscopes_tl.experiment import COLUMNS
from superscopes_tl.figures import save_as
from superscopes_tl.figures.export import SUFFIXES
from superscopes_tl.neighbours import TunedLens
from superscopes_tl.vectors import AffineMap, save_maps
from tests.experiment.test_results import LADDER
from tests.support.browser import ROOT
from tests.support.killed_run import child, run
from tests.support.same import assert_same_readings

KEY = ["prompt", "position", "kind", "source_layer", "target_layer", "mapping", "alpha", "draw"]

forks = pytest.mark.skipif(sys.platform == "win32", reason="no processes by fork")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Start processes that have imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.killed_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # whence it takes what it is to import
        forkserver.ensure_running()
    return context


def start(processes: Any, path: Path, **changes: Any) -> tuple[Any, Connection]:
    """Start an evaluation and wait until it begins."""
    said, says = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=(str(path), says, changes), daemon=True)
    process.start()
    says.close()
    assert said.poll(120)
    assert said.recv() == "ready"
    return process, said


def last_words(said: Connection) -> list[Any]:
    """Return all messages of a process until it ended."""
    words = []
    with contextlib.suppress(EOFError):
        while said.poll(120):
            words.append(said.recv())
    return words


def rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the readings in an order of their own."""
    return table[list(COLUMNS)].sort_values(KEY).reset_index(drop=True)


@forks
def test_a_run_that_is_killed_several_times_loses_nothing(processes: Any, tmp_path: Path) -> None:
    """SIGKILL right after some batches: every one of them is in the file, and the end is whole."""
    path = tmp_path / "run.sqlite"
    held = pd.DataFrame(columns=list(COLUMNS))
    for batches in (1, 5):
        process, said = start(processes, path)
        safe = [said.recv() for _ in range(batches)][-1]
        process.kill()
        process.join()
        now = SweepResult.load(path).table[list(COLUMNS)]
        assert not now.duplicated(KEY).any()
        assert len(now) >= len(held) + safe
        pd.testing.assert_frame_equal(now.head(len(held)), held, check_dtype=False)
        held = now
    assert_same_readings(rows(run(path).table), rows(run(None).table))
    assert [p.name for p in tmp_path.iterdir()] == ["run.sqlite"]


@forks
def test_two_runs_on_one_file_share_it(processes: Any, tmp_path: Path) -> None:
    """Both finish, no cell is there twice, and the table is that of one run alone."""
    path = tmp_path / "run.sqlite"
    both = [start(processes, path) for _ in range(2)]
    for process, said in both:
        assert last_words(said)[-1] == "done"
        process.join()
    found = SweepResult.load(path).table
    assert not found.duplicated(KEY).any()
    # What one run has finished is missing from the other's batches, and the margin, a difference of
    # two float32 logits, is not quite the same in other batches.
    assert_same_readings(rows(found), rows(run(None).table))


@forks
def test_a_run_with_other_settings_is_refused_while_the_first_one_writes(
    processes: Any, tmp_path: Path
) -> None:
    """Of two runs that begin together one has the file; the other one is refused."""
    path = tmp_path / "run.sqlite"
    both = [start(processes, path, max_new_tokens=count) for count in (3, 4)]
    ends = sorted(last_words(said)[-1] for _, said in both)
    for process, _ in both:
        process.join()
    assert ends[1] == "done"
    assert ends[0].startswith("ValueError: path: expected an evaluation with max_new_tokens ")
    table = SweepResult.load(path).table
    assert len(table) == len(run(None).table)


# Writers.


def maps() -> AffineMap:
    """Return a map of 64 numbers to 64 numbers."""
    return AffineMap(
        torch.eye(64), torch.zeros(64), "resid_post", 5, 2, "a", "1", "a", "1", "t", 9, 0.0, 0.5
    )


def lens() -> TunedLens:
    """Return an untrained lens."""
    return TunedLens(
        matrices=torch.zeros(6, 32, 32), biases=torch.zeros(6, 32), model="a", fingerprint="1",
        training={},
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], Any]] = {
    "run.zip": LADDER.save,
    "page.html": lambda path: write_html(heatmap(LADDER), path),
    "maps.safetensors": lambda path: save_maps([maps()], path),
    "lens.safetensors": lambda path: lens().save(path),
    **{f"table{suffix}": lambda path: save_as(LADDER, path) for suffix in SUFFIXES},
}
REFUSED = "path: .*{}"


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: a disk that is full, without one."""
    resource = pytest.importorskip("resource", reason="no limit on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB of its own, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_does_not_fit_leaves_the_older_one(
    name: str, there: bool, tmp_path: Path
) -> None:
    """The message names the file and what to check; nothing half is left beside it."""
    path = tmp_path / name
    if there:
        path.write_bytes(b"old")
    with at_most(500), pytest.raises(OSError, match=REFUSED.format(f"{name} .*too large")):
        WRITERS[name](path)
    assert [p.name for p in tmp_path.iterdir()] == ([name] if there else [])
    assert not there or path.read_bytes() == b"old"
    WRITERS[name](path)  # with room it works, and replaces the older one
    assert path.stat().st_size > 500
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_disk_that_reports_late_that_it_is_full_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some disks accept what they cannot keep, and report it only on sync."""

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    path = LADDER.save(tmp_path / "run.zip")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=REFUSED.format("No space left")):
        LADDER.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.zip"]


def test_an_evaluation_that_does_not_fit_keeps_what_is_finished(tmp_path: Path) -> None:
    """It ends with an `OSError` and a valid file; with more room the next call resumes."""
    path = tmp_path / "run.sqlite"
    with at_most(20_000), pytest.raises(OSError, match=REFUSED.format("run.sqlite .*I/O error")):
        run(path)
    held = SweepResult.load(path).table
    assert 0 < len(held) < 96
    assert len(held) % 2 == 0
    assert not path.with_name(f"{path.name}-journal").exists()
    whole = run(path).table
    pd.testing.assert_frame_equal(whole.head(len(held)), held)
    assert_same_readings(rows(whole), rows(run(None).table))


@pytest.mark.parametrize("name", [*WRITERS, "run.sqlite"])
@pytest.mark.parametrize("place", ["missing", "file", "."])
def test_a_path_that_cannot_be_written_is_named(name: str, place: str, tmp_path: Path) -> None:
    """A folder that is missing or a file, or a folder in the file's place: nothing is left."""
    (tmp_path / "file").write_text("x")
    path = tmp_path / place / name
    if place == ".":
        path.mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises((OSError, ValueError), match=f"^path: .*{path.parent}"):
        (WRITERS | {"run.sqlite": run})[name](path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [*WRITERS, "run.sqlite"])
def test_a_folder_that_is_read_only_is_named(name: str, disk: Path) -> None:
    """The older file stays, an evaluation's rows too."""
    path, write = disk / name, (WRITERS | {"run.sqlite": run})[name]
    write(path) if name != "run.sqlite" else run(path, layers=2)
    before = path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=REFUSED.format(f"{name} .*(Read-only|readonly|unable)")):
        write(path)
    assert path.read_bytes() == before
    assert [p.name for p in disk.iterdir()] == [name]
    if name == "run.sqlite":
        assert len(SweepResult.load(path)) == 48
