"""An experiment over many prompts: its table, and the one file that it grows in.

1. The file is an SQLite database with one row per reading, the columns of `SweepResult.table`.
2. A batch is written in one transaction: a run that is killed loses at most the batch in flight,
   and the next run asks the file which cells are finished.
3. What must not differ within one experiment (model, target prompt, length, scorer, controls) is
   written once; another run that differs there is refused. Prompts, layers, α, mappings and draws
   may be added.
4. `Evaluation.load` reads the file without a model. A file is data alone: its size is bounded, its
   tables are those that are made here to the letter, and it is opened read-only, unless a killed
   run left a journal beside it: then the batch in flight is undone first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from superscopes_tl.errors import RunFileError, bad_value, describe, reason
from superscopes_tl.experiment import (
    COLUMNS,
    TYPES,
    Cell,
    Generate,
    Reading,
    SweepPlan,
    SweepResult,
    finished_cells,
)
from superscopes_tl.files import checked_provenance, checked_rows, read_json, unfit, unwritable
from superscopes_tl.vectors import PAPER_MAPPING

FORMAT = "superscopes_tl.evaluation"
FORMAT_VERSION = 2
MAX_FILE_BYTES = 4 * 2**30
"""A file that holds more than this is refused."""
MAX_TEXT_BYTES = 64 * 2**20
"""And so is one with a longer text."""

BUSY_SECONDS = 60
"""How long to wait for another process that is writing to the same file."""

_SQL = {"int": "INTEGER", "bool": "INTEGER", "float": "REAL", "str": "TEXT"}
_PANDAS = {"int": "int64", "bool": "bool", "float": "float64", "str": "object"}
_PYTHON: dict[str, set[type]] = {
    "int": {int},
    "bool": {int},
    "float": {float, int, type(None)},
    "str": {str},
}
"""What SQLite gives back: it knows no bool and keeps NaN as NULL."""
_COLUMNS = ", ".join([*(f"{name} {_SQL[type_]}" for name, type_ in TYPES.items()), "controls TEXT"])
_KEY = "prompt, position, kind, source_layer, target_layer, mapping, alpha, draw"
_UPDATE = ", ".join(f"{name} = excluded.{name}" for name in (*TYPES, "controls"))
_TABLES = {
    "readings": f"CREATE TABLE readings ({_COLUMNS}, UNIQUE ({_KEY}))",
    "provenance": "CREATE TABLE provenance (text TEXT)",
}
_REFUSED = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOLFS,
}  # fmt: skip
"""What the disk, the folder or another process may answer; all else is about the content."""
_JOURNAL_OF_SEVERAL = bytes.fromhex("d9d505f920a163d7")
"""How a journal ends that names a file for SQLite to read, and to delete."""
_CONSTANT = (
    *(
        (model, name)
        for model in ("model", "target_model")
        for name in ("fingerprint", "dtype", "prepend_bos", "weight_processing")
    ),
    *(("target_prompt", name) for name in ("text", "placeholder", "answer")),
    *(
        ("config", name)
        for name in (
            "max_new_tokens",
            "scorer",
            "score_on",
            "controls",
            "chat",
            "source_template",
            "others",
            "reference",
        )
    ),
)
"""What must be the same for every reading of a file."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The readings of many source prompts and where they come from.

    Attributes:
        table: one row per reading; the columns of `SweepResult.table`.
        provenance: model, versions, target prompt and settings, as plain data.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `evaluate` wrote, finished or not. No model is needed.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: it is corrupt, foreign, too large, of a newer format, or empty.
            OSError: it cannot be read.
        """
        if why := unfit(path, MAX_FILE_BYTES):
            raise _unreadable(path, why)
        # A journal is what a killed writer left: undoing the batch in flight needs to write.
        mode = "rw" if _journal(path).exists() else "ro"
        with _explained(path), contextlib.closing(_open(path, mode)) as database:
            return cls(*_content(database, path))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The source prompts, in the order in which they were finished."""
        return tuple(dict.fromkeys(self.table["prompt"]))

    def of(self, prompt: str, *, mapping: str = PAPER_MAPPING, draw: int = 0) -> SweepResult:
        """Return the readings of one source prompt as the result of its sweep.

        Args:
            prompt: one of `prompts`.
            mapping: how α acted, out of the column `mapping`.
            draw: 0 for the greedy texts, k for the k-th drawn ones.

        Raises:
            ValueError: there are none.
        """
        rows = self.table
        for column, wanted in (("prompt", prompt), ("mapping", mapping), ("draw", draw)):
            there = list(dict.fromkeys(rows[column]))
            if wanted not in there:
                raise bad_value(column, f"one of {there}", wanted, "choose one of these")
            rows = rows[rows[column] == wanted]
        config = {**self.provenance.get("config", {}), "mapping": mapping, "draw": draw}
        provenance = {**self.provenance, "prompt": prompt, "config": config}
        return SweepResult(rows.reset_index(drop=True), provenance)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        model = self.provenance.get("model", {}).get("name")
        return f"Evaluation({len(self)} readings of {len(self.prompts)} prompts, {model})"


class EvaluationFile:
    """The growing file of one experiment.

    Args:
        path: the file; made if it is not there. `None` keeps the experiment in memory.
        ours: what must not differ within the experiment, from `common_provenance`.

    Raises:
        RunFileError: the file is something else.
        ValueError: it holds an experiment with another model or other settings.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, ours: dict[str, Any]) -> None:
        self._path = path or "memory"
        with _explained(self._path):
            self._database = _open(path, "rwc")
            try:
                self._begin(ours)
            except BaseException:
                self._database.close()
                raise

    def _begin(self, ours: dict[str, Any]) -> None:
        """Make the tables, or check that this is their experiment."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")  # all tables at once, by one process
            tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables[0]:
                for table in _TABLES.values():
                    self._database.execute(table)
                header = {"format": FORMAT, "version": FORMAT_VERSION}
                header |= {"provenance": ours}
                self._database.execute("INSERT INTO provenance VALUES (?)", [json.dumps(header)])
        theirs = _provenance(self._database, self._path)
        ours = json.loads(json.dumps(ours))
        for part, name in _CONSTANT:
            # Where there is no target model of its own, neither side has its settings.
            our, their = ((side.get(part) or {}).get(name) for side in (ours, theirs))
            if our != their:
                raise bad_value(
                    "path",
                    f"an experiment with {name} {our!r} of the {part}",
                    f"{self._path} with {their!r}",
                    "choose another file, or the settings of this one",
                )

    def finished(self, prompt: str, mapping: str, draw: int, generate: Generate) -> frozenset[Cell]:
        """Return the cells of a source prompt that need no more work (see `finished_cells`)."""
        rows = self._database.execute(
            "SELECT kind, source_layer, position, target_layer, alpha, written FROM readings "
            "WHERE prompt = ? AND mapping = ? AND draw = ?",
            [prompt, mapping, draw],
        )
        written = {
            Cell(at, kind, layer, into, alpha): bool(there)
            for kind, layer, at, into, alpha, there in rows
        }
        return finished_cells(written, generate)

    def alphas(self, mapping: str) -> set[float]:
        """Return the α of a mapping that the file holds."""
        found = "SELECT DISTINCT alpha FROM readings WHERE mapping = ?"
        return {alpha for (alpha,) in self._database.execute(found, [mapping])}

    def add(self, readings: Sequence[Reading]) -> None:
        """Write a batch, whole or not at all.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        rows = [
            [*(getattr(reading, name) for name in COLUMNS), json.dumps(dict(reading.controls))]
            for reading in readings
        ]
        places = ", ".join("?" for _ in (*COLUMNS, "controls"))
        with _explained(self._path), self._database:
            self._database.executemany(
                # A cell that is there stays, unless a text comes for one that had none.
                f"INSERT INTO readings VALUES ({places}) ON CONFLICT ({_KEY}) DO UPDATE SET "
                f"{_UPDATE} WHERE excluded.written AND NOT readings.written",
                rows,
            )

    def evaluation(self) -> Evaluation:
        """Return what the file holds."""
        with _explained(self._path):
            return Evaluation(*_content(self._database, self._path))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def common_provenance(plan: SweepPlan) -> dict[str, Any]:
    """Return what the provenance of a plan says of every plan of its experiment."""
    provenance = plan.provenance()
    names = ("superscopes_tl", "python", "created", "model", "target_model", "target_prompt")
    settings = ("max_new_tokens", "scorer", "scorer_weights", "score_on", "controls", "chat",
                "source_template", "others", "reference")  # fmt: skip
    return {name: provenance[name] for name in names} | {
        "config": {name: provenance["config"][name] for name in settings}
    }


def _journal(path: str | os.PathLike[str]) -> Path:
    """Return where SQLite keeps what it may have to undo: beside the file, not beside a link."""
    return Path(f"{Path(path).resolve()}-journal")


def _open(path: str | os.PathLike[str] | None, mode: str) -> sqlite3.Connection:
    if path is not None and _journal(path).is_file():
        with _journal(path).open("rb") as journal:
            journal.seek(-min(8, _journal(path).stat().st_size), os.SEEK_END)
            if journal.read() == _JOURNAL_OF_SEVERAL:
                raise _unreadable(path, "a journal that names other files")
    where = ":memory:" if path is None else f"{Path(path).absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(where, uri=path is not None, timeout=BUSY_SECONDS)
    database.execute("PRAGMA trusted_schema = OFF")  # a file may come from anyone
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES)
    return database


def _content(database: sqlite3.Connection, path: object) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the readings and the provenance."""
    provenance = _provenance(database, path)  # first: is this such a file at all?
    with _read(path):
        return _table(database), provenance


def _provenance(database: sqlite3.Connection, path: object) -> dict[str, Any]:
    """Return the provenance, after checking that the file is an evaluation."""
    with _read(path):
        # A view, a trigger, a column that is computed: whatever else is there is not read.
        tables = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))
        if not tables:
            raise ValueError("nothing yet: its run was stopped before the first line")
        if tables.get("provenance") != _TABLES["provenance"] or set(tables) != set(_TABLES):
            raise ValueError(f"the tables {sorted(tables)}, not made by evaluate")
        first = database.execute("SELECT text FROM provenance").fetchone()
        if first is None:
            raise ValueError(f"the tables {sorted(tables)}, not made by evaluate")
        header = read_json(first[0])
        if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
            raise ValueError(f"format {header.get('format')!r} {header.get('version')!r}")
        if tables != _TABLES:
            raise ValueError(f"the tables {sorted(tables)}, not made by evaluate")
        return checked_provenance(header.get("provenance"))


def _table(database: sqlite3.Connection) -> pd.DataFrame:
    """Return the readings in the types of `Reading`, and the controls beside them."""
    names = [*TYPES, "controls"]
    rows, size = [], 0
    for row in database.execute(f"SELECT {', '.join(names)} FROM readings ORDER BY rowid"):
        # Counted, for a damaged file may lead SQLite to one page again and again.
        size += 8 * len(row) + sum(len(v) for v in row if isinstance(v, str | bytes))
        if size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes of content")
        rows.append(row)
    for (name, type_), values in zip(TYPES.items(), zip(*rows, strict=True), strict=False):
        if not set(map(type, values)) <= _PYTHON[type_]:
            raise ValueError(f"a column {name!r} that does not hold {type_}")
    frame = pd.DataFrame(rows, columns=names)
    several = [read_json(text, nan=True) for text in frame["controls"]]
    if len(set().union(*several)) * 8 * len(rows) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES} bytes of controls")
    controls = pd.DataFrame(several, index=frame.index)
    readings = frame[list(COLUMNS)].astype({name: _PANDAS[type_] for name, type_ in TYPES.items()})
    return checked_rows(pd.concat([readings, controls], axis="columns"), TYPES)


@contextlib.contextmanager
def _read(path: object) -> Iterator[None]:
    """Say of whatever the content makes SQLite, JSON and pandas raise that this is no such file."""
    try:
        yield
    except sqlite3.Error:  # see `_explained`
        raise
    except Exception as error:
        raise _unreadable(path, reason(error)) from error


@contextlib.contextmanager
def _explained(path: object) -> Iterator[None]:
    """Say which file it was and what to do when the database refuses."""
    try:
        yield
    except sqlite3.Error as error:
        # The lowest byte is the kind of error. No code at all: a text that is no text.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
            raise unwritable(path, error) from error
        raise _unreadable(path, reason(error)) from error


def _unreadable(path: object, got: str) -> RunFileError:
    return RunFileError(
        describe(
            "path",
            f"a file of format {FORMAT} version {FORMAT_VERSION}",
            f"{path} with {got}",
            "pass a file that evaluate wrote",
        )
    )
