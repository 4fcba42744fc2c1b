"""A reading, and the two kinds of files that keep readings; both are data alone.

1. A sweep is saved whole: a zip with `provenance.json` and `table.parquet`.
2. An evaluation grows: an SQLite database with one row per reading. A batch is written in one
   transaction, so a run that is killed loses at most the batch in flight, and the next run resumes
   from the cells in the file.
3. Model, target prompt, length, scorer and controls are fixed within one evaluation: they are
   written once, and a run that differs there is refused. Prompts, layers, α, mappings and samples
   may be added.
4. `read_readings` reads both kinds without a model. Files may come from anyone: their size is
   bounded, a database has exactly the tables made here, and the table is checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from superscopes_tl.errors import RunFileError, bad_value, describe, reason
from superscopes_tl.experiment.plan import Cell
from superscopes_tl.files import (
    check_format,
    checked_provenance,
    checked_rows,
    read_json,
    read_parquet,
    read_zip,
    reading,
    unwritable,
    written_whole,
)

RUN, RUN_VERSION = "superscopes_tl.sweep", 1
EVALUATION, EVALUATION_VERSION = "superscopes_tl.evaluation", 2
ENTRIES = ("provenance.json", "table.parquet")
MAX_FILE_BYTES = 2**30
"""A sweep that unpacks to more than this is refused."""
MAX_DATABASE_BYTES = 4 * 2**30
BUSY_SECONDS = 60
"""The wait for another process that is writing to the same file."""

Content: TypeAlias = tuple[pd.DataFrame, dict[str, Any]]
"""A table of readings and its provenance."""


@dataclass(frozen=True)
class Reading:
    """One cell: a vector, amplified and patched, and the description that the model generates.

    Attributes:
        prompt: the source prompt.
        position: the token whose activation was read, counted from 0.
        token: that token, with visible white space.
        kind: the kind of activation.
        source_layer: where it was read.
        target_layer: where it was patched; −1 (`EMBED`) is the input embedding.
        mapping: the mapping family, `scale` in the paper.
        alpha: the amplifier α.
        vector_norm: the norm of f(v), the patched vector.
        norm_ratio: that norm in units of the residual stream that it replaced.
        text: the generated text.
        description: the part of it that describes the placeholder.
        score: of the description or text; NaN where there was nothing to score.
        few_shot_copy: whether the description repeats a name of the target prompt.
        n_tokens: the number of generated tokens.
        margin: the smallest margin among them, in logits (see `Generation`).
        draw: 0 for greedy decoding, k for the k-th text sampled at temperature 1.
        entropy: mean entropy of the description's tokens, in nats.
        log_probability: their mean log-probability, in nats per token.
        written: whether a text was generated; without one, its columns are empty or NaN.
        echo: whether the description repeats the name that it should describe.
        about: the text that the reading is scored against.
        recovered: the share of the model's own words that the patch recovers (see `own_words`);
            NaN where it is not defined.
        own_words: the model's description of `about`, given in the target prompt.
        plain_nats: log-probability of the own words there, in nats.
        unpatched_nats: their log-probability after the unpatched target prompt.
        norm_outlier: how many times as long the activation at the site is as those of its kind and
            layer usually are (`usual_norms`); from `OUTLIER` on it is an attention sink or another
            outlier. NaN for vectors that come from elsewhere.
        unchanged: whether the patch changed nothing that was looked at: the greedy text is that of
            the unpatched prompt, token for token, or the log-probability of the own words is.
        controls: texts and scores of the controls, each a column of the table (see `controls`).
    """

    prompt: str
    position: int
    token: str
    kind: str
    source_layer: int
    target_layer: int
    mapping: str
    alpha: float
    vector_norm: float
    norm_ratio: float
    text: str = ""
    description: str = ""
    score: float = math.nan
    few_shot_copy: bool = False
    n_tokens: int = 0
    margin: float = math.nan
    draw: int = 0
    entropy: float = math.nan
    log_probability: float = math.nan
    written: bool = True
    echo: bool = False
    about: str = ""
    recovered: float = math.nan
    own_words: str = ""
    plain_nats: float = math.nan
    unpatched_nats: float = math.nan
    norm_outlier: float = math.nan
    unchanged: bool = False
    controls: Mapping[str, float | str] = field(default_factory=dict, hash=False)


COLUMNS = tuple(f.name for f in fields(Reading) if f.name != "controls")
"""The columns of every table of readings; `Reading` says what each holds."""
TYPES = {f.name: str(f.type) for f in fields(Reading) if f.name in COLUMNS}
"""The type of each column of `COLUMNS`, by its name."""
LATER: Mapping[str, float | bool] = {"norm_outlier": math.nan, "unchanged": False}
"""Columns that files of earlier versions lack, and what stands there then. An evaluation keeps them
beside the controls, so that an older one can still be resumed."""
OUTLIER = 4.0
"""From how many usual norms on a site is an outlier of its layer. In SmolLM2 and Gemma 3 270M block
outputs of first tokens have 2.5 to 160 of them, of other tokens at most 1.5; MLP outputs of other
tokens up to 4."""
SITE = ["prompt", "position", "kind", "source_layer", "target_layer", "mapping"]
"""The columns that name a site and where it is patched; the cells of a site differ in α."""

_EXPECTED = (
    f"a file of format {RUN} version {RUN_VERSION} or {EVALUATION} version {EVALUATION_VERSION}"
)
_FIX = "pass a complete file that SweepResult.save or evaluate wrote"
_SQL = {"int": "INTEGER", "bool": "INTEGER", "float": "REAL", "str": "TEXT"}
_PANDAS = {"int": "int64", "bool": "bool", "float": "float64", "str": "object"}
_KEPT = [name for name in COLUMNS if name not in LATER]
_COLUMNS = ", ".join([*(f"{name} {_SQL[TYPES[name]]}" for name in _KEPT), "controls TEXT"])
_KEY = "prompt, position, kind, source_layer, target_layer, mapping, alpha, draw"
_UPDATE = ", ".join(f"{name} = excluded.{name}" for name in (*_KEPT, "controls"))
_TABLES = {
    "readings": f"CREATE TABLE readings ({_COLUMNS}, UNIQUE ({_KEY}))",
    "provenance": "CREATE TABLE provenance (text TEXT)",
}
_REFUSED = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOLFS,
}  # fmt: skip
"""Errors of the disk, the folder or another process; all others are about the content."""
_WEIGHTS = ("fingerprint", "dtype", "prepend_bos", "weight_processing")
_CONSTANT = {
    "model": _WEIGHTS,
    "target_model": _WEIGHTS,
    "target_prompt": ("text", "placeholder", "answer"),
    "config": ("max_new_tokens", "scorer", "score_on", "score_against", "controls", "chat",
               "source_template", "others", "precision", "reference", "about"),
}  # fmt: skip
"""The fixed settings of an evaluation, by part of its provenance."""


def write_run(path: str | os.PathLike[str], table: pd.DataFrame, provenance: Any) -> Path:
    """Write a sweep to one file (see `SweepResult.save`)."""
    target, buffer = Path(path), io.BytesIO()
    table.to_parquet(buffer, index=False, compression="snappy")
    header = {"format": RUN, "version": RUN_VERSION, "provenance": provenance}
    text = json.dumps(header, indent=1, ensure_ascii=False).encode()
    try:
        _run(text, buffer.getvalue())
    except ValueError as error:
        fix = "keep result.table as the sweep made it; save your own table with pandas"
        expected = "a table and provenance to read again"
        raise bad_value("result", expected, reason(error), fix) from error
    with (
        written_whole(target) as fresh,
        zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, data in zip(ENTRIES, (text, buffer.getvalue()), strict=True):
            archive.writestr(name, data)
    return target


def read_readings(path: str | os.PathLike[str]) -> Content:
    """Read a file that `write_run` or an `EvaluationFile` wrote (see `SweepResult.load`)."""
    with reading(path, _EXPECTED, _FIX, most=MAX_DATABASE_BYTES, passing=(OSError,)):
        with Path(path).open("rb") as file:
            is_database = file.read(15) == b"SQLite format 3"
        if not is_database:
            return _run(*read_zip(path, ENTRIES, MAX_FILE_BYTES))
        # A journal is what a killed writer left: undoing the batch in flight needs to write.
        mode = "rw" if Path(f"{Path(path).resolve()}-journal").exists() else "ro"
        with _explained(path), contextlib.closing(_open(path, mode)) as database:
            return _content(database, path)


def _run(text: bytes, data: bytes) -> Content:
    """Return what the two entries of a sweep hold."""
    header = read_json(text)
    check_format(header, RUN, RUN_VERSION)
    table = _with_later(read_parquet(data, MAX_FILE_BYTES))
    if missing := [c for c in COLUMNS if c not in table.columns]:
        raise ValueError(f"no column {missing}")
    return checked_rows(table, TYPES), checked_provenance(header.get("provenance"))


def _with_later(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the columns that its file may lack, behind the others of a reading."""
    for name, value in LATER.items():
        found = table.pop(name) if name in table else [None] * len(table)
        known = [value if pd.isna(one) else one for one in found]
        where = sum(column in COLUMNS for column in table)
        table.insert(where, name, pd.Series(known, table.index, dtype=_PANDAS[TYPES[name]]))
    return table


class EvaluationFile:
    """The growing file of an evaluation; without a path the readings are kept in memory.

    Raises:
        RunFileError: the file is something else.
        ValueError: it holds an evaluation with another model or other settings.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, provenance: dict[str, Any]) -> None:
        self._path = path or "memory"
        with contextlib.ExitStack() as on_error, _explained(self._path):
            self._database = _open(path, "rwc")
            on_error.callback(self._database.close)
            self._begin(provenance)
            on_error.pop_all()

    def _begin(self, ours: dict[str, Any]) -> None:
        """Make the tables, or check that they are those of this evaluation."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")  # all tables at once, by one process
            (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                for table in _TABLES.values():
                    self._database.execute(table)
                header = {"format": EVALUATION, "version": EVALUATION_VERSION, "provenance": ours}
                self._database.execute("INSERT INTO provenance VALUES (?)", [json.dumps(header)])
        theirs = _provenance(self._database, self._path)
        ours = json.loads(json.dumps(ours))
        for part, names in _CONSTANT.items():
            # Without a target model of its own, neither side has the settings of one.
            our, their = (side.get(part) or {} for side in (ours, theirs))
            for name in names:
                if our.get(name) != their.get(name):
                    expected = f"an evaluation with {name} {our.get(name)!r} of the {part}"
                    got = f"{self._path} with {their.get(name)!r}"
                    fix = "choose another file, or the settings of this one"
                    raise bad_value("path", expected, got, fix)

    def written(self, prompt: str, mapping: str, draw: int) -> dict[Cell, bool]:
        """Return the finished cells of a source prompt, and whether each has a text."""
        found = (
            "SELECT position, kind, source_layer, target_layer, alpha, written FROM readings "
            "WHERE prompt = ? AND mapping = ? AND draw = ?"
        )
        rows = self._database.execute(found, [prompt, mapping, draw])
        return {Cell(*cell): bool(written) for *cell, written in rows}

    def alphas(self, mapping: str) -> set[float]:
        """Return the α of a mapping that the file holds."""
        found = "SELECT DISTINCT alpha FROM readings WHERE mapping = ?"
        return {alpha for (alpha,) in self._database.execute(found, [mapping])}

    def add(self, readings: Sequence[Reading]) -> None:
        """Write a batch, whole or not at all; raise an `OSError` where that is impossible."""
        rows = []
        for one in readings:
            beside = {**one.controls, **{name: getattr(one, name) for name in LATER}}
            rows.append([*(getattr(one, name) for name in _KEPT), json.dumps(beside)])
        places = ", ".join("?" * (len(_KEPT) + 1))
        with _explained(self._path), self._database:
            self._database.executemany(
                # A cell that is there stays, unless a text comes for one that had none.
                f"INSERT INTO readings VALUES ({places}) ON CONFLICT ({_KEY}) DO UPDATE SET "
                f"{_UPDATE} WHERE excluded.written AND NOT readings.written",
                rows,
            )

    def content(self) -> Content:
        """Return all readings and the provenance."""
        with _explained(self._path):
            return _content(self._database, self._path)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _open(path: str | os.PathLike[str] | None, mode: str) -> sqlite3.Connection:
    where = ":memory:" if path is None else f"{Path(path).absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(where, uri=path is not None, timeout=BUSY_SECONDS)
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _provenance(database: sqlite3.Connection, path: object) -> dict[str, Any]:
    """Return the provenance; raise a ValueError where the database is no evaluation."""
    tables = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))
    if tables != _TABLES:  # a view, a trigger, a computed column: nothing else is read
        raise _foreign(path, f"the tables {sorted(tables)}, not made by evaluate")
    try:
        header = read_json(*database.execute("SELECT text FROM provenance").fetchone())
        check_format(header, EVALUATION, EVALUATION_VERSION)
        return checked_provenance(header.get("provenance"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _foreign(path, reason(error)) from error


def _content(database: sqlite3.Connection, path: object) -> Content:
    provenance = _provenance(database, path)
    names = [*_KEPT, "controls"]
    rows = database.execute(f"SELECT {', '.join(names)} FROM readings ORDER BY rowid").fetchall()
    frame = pd.DataFrame(rows, columns=names)
    several = [read_json(text, nan=True) for text in frame["controls"]]
    controls = pd.DataFrame(several, index=frame.index)
    readings = frame[_KEPT].astype({name: _PANDAS[TYPES[name]] for name in _KEPT})
    table = _with_later(pd.concat([readings, controls], axis="columns"))
    return checked_rows(table, TYPES), provenance


def _foreign(path: object, got: str) -> RunFileError:
    return RunFileError(describe("path", _EXPECTED, f"{path} with {got}", _FIX))


@contextlib.contextmanager
def _explained(path: object) -> Iterator[None]:
    """Name the file in what SQLite raises: an `OSError` of the disk or a `RunFileError`."""
    try:
        yield
    except sqlite3.Error as error:
        # The lowest byte is the kind of error. No code at all: a text that is no text.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
            raise unwritable(path, error) from error
        raise _foreign(path, reason(error)) from error
