"""The authors' recorded generations, counted again: Figure 3 without running their model.

1. Read a recording: a CSV file with the columns `source prompt`, `token`, `layer`,
   `amplification value` and `result`, one row per generated text. It is data alone and untrusted:
   every cell is checked, nothing in it is run.
2. Patchscopes is α = 1 of the one file, Superscopes every other α of the other.
3. `compare` them, with baselines of equal budget: as many draws of α = 1 as there are α, where
   they were recorded, and always one α alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.statistics.comparison import Comparison, compare

MAX_FILE_BYTES = 32 * 2**20
"""A larger recording is refused: as rows it takes up to a hundred times the memory."""

HIGHEST_LAYER = 9_999

COLUMNS = {
    "source prompt": "prompt",
    "token": "token",
    "layer": "source_layer",
    "amplification value": "alpha",
    "result": "text",
}
"""The columns of the authors' files and their names here."""

CONDITION = ["prompt", "token", "source_layer", "alpha"]


@dataclass(frozen=True, eq=False)
class Recording:
    """Generated texts that someone recorded.

    Attributes:
        table: one row per text: prompt, token, source_layer, alpha, text.
        notes: what was unusual in the file and what was made of it.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a file of recorded generations in the format of the authors' evaluation.

    A condition (prompt, token, layer, α) that occurs several times is kept as so many draws; an
    empty text is kept and has no score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than 32 MiB, no CSV file, without one of the columns or without
            rows, or a line of it has no layer, α or prompt.
    """
    text, notes = _decoded(Path(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        heads = next(reader, [])
        names = {name.strip(): at for at, name in enumerate(heads)}
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            raise _bad(
                path, expected=f"the columns {', '.join(COLUMNS)}", got=f"no {', '.join(missing)}"
            )
        if len(names) < len(heads):
            raise _bad(path, expected="each column once", got="two columns of one name")
        table = pd.DataFrame(
            [_row(path, reader.line_num, _cells(row, names)) for row in reader if row],
            columns=list(COLUMNS.values()),
        )
    except csv.Error as error:
        raise _bad(path, expected="a CSV file", got=f"{error} at line {reader.line_num}") from error
    if table.empty:
        raise _bad(path, expected="at least one generated text", got="a header alone")
    extra = [name for name in names if name not in COLUMNS]
    if extra:
        notes.append(f"Ignored columns: {', '.join(map(repr, extra))}.")
    return Recording(table, (*notes, *_notes(table)))


def replay(
    baseline: Recording | str | os.PathLike[str],
    amplified: Recording | str | os.PathLike[str],
    **options: Any,
) -> Comparison:
    """Compare recorded Patchscopes with recorded Superscopes, as the paper's Figure 3 does.

    The methods are "Patchscopes" (the first draw of α = 1), "Patchscopes, equal budget" (as many
    draws of α = 1 as Superscopes has α, if the baseline has them everywhere), "Superscopes" (the
    best of all α but 1, every draw) and "Superscopes, one alpha" (the mean over these α). α = 1
    of the amplified file is Patchscopes by definition and left out, so that one file with all α
    may be given as both.

    Args:
        baseline: a recording with α = 1, or its file.
        amplified: a recording with amplifiers, or its file.
        **options: those of `compare`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad file, no α = 1 in the baseline, no other α in the amplified recording,
            or what `compare` refuses.
    """
    given = {
        name: part if isinstance(part, Recording) else read_recording(part)
        for name, part in (("Baseline", baseline), ("Amplified", amplified))
    }
    notes = [f"{name}: {note}" for name, part in given.items() for note in part.notes]
    plain, scaled = (part.table for part in given.values())
    plain, other = plain[plain["alpha"] == 1], plain[plain["alpha"] != 1]
    scaled, unscaled = scaled[scaled["alpha"] != 1], scaled[scaled["alpha"] == 1]
    for argument, rows, wanted in (
        ("baseline", plain, "texts with α = 1"),
        ("amplified", scaled, "texts with an α other than 1"),
    ):
        if rows.empty:
            raise bad_value(argument, wanted, "none", "give the baseline's file first")
    for name, rows in (("Baseline: α other than", other), ("Amplified: α of", unscaled)):
        if len(rows):
            notes.append(f"{name} 1 is left out ({len(rows)} texts).")
    budget = scaled["alpha"].nunique()
    draw = plain.groupby(CONDITION).cumcount()
    methods = {"Patchscopes": plain[draw == 0]}
    fewest, most = (int(f(plain.groupby(CONDITION).size())) for f in (min, max))
    if fewest >= budget:
        methods["Patchscopes, equal budget"] = plain[draw < budget]
    else:
        notes.append(
            f"Superscopes chooses among {budget} α. A baseline that chooses among as many texts "
            f"cannot be had from these files: of α = 1 they hold {_count(fewest, most)} per "
            "condition. 'Superscopes, one alpha' has the budget of the baseline instead."
        )
    methods["Superscopes"] = scaled
    found = compare(methods, one_alpha=True, **options)
    return Comparison(
        found.cells, found.counts, found.differences, (*notes, *found.notes), found.settings
    )


def _decoded(path: Path) -> tuple[str, list[str]]:
    """Return a file's text and what was noticed on the way."""
    size = path.stat().st_size
    if path.is_dir() or not size or size > MAX_FILE_BYTES:
        what = "a folder" if path.is_dir() else f"{size} bytes"
        raise _bad(path, expected=f"a file of 1 to {MAX_FILE_BYTES} bytes", got=what)
    data = path.read_bytes()
    if data.startswith(b"SQLite format 3"):
        raise bad_value(
            "path", "a CSV file of recorded texts", f"an evaluation ({path.name!r})",
            "count it with compare(methods(Evaluation.load(path))), or superscopes evaluate "
            "--out with the same file",
        )  # fmt: skip
    notes = []
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        encoding = "latin-1"
        text = data.decode(encoding)
    if "\0" in text:
        raise _bad(path, expected="a CSV file", got="binary data")
    if encoding != "utf-8-sig":
        notes.append(f"The file is not UTF-8: read as {encoding}.")
    return text, notes


def _cells(row: list[str], names: dict[str, int]) -> dict[str, str | None]:
    """Return the cells of a line that count; `None` where the line ends before them."""
    return {c: row[names[c]] if names[c] < len(row) else None for c in COLUMNS}


def _row(path: object, line: int, cells: dict[str, str | None]) -> dict[str, Any]:
    """Return one checked row; `line` is the one on which it ends."""
    place = f"line {line}"
    if None in cells.values():
        short = [column for column, cell in cells.items() if cell is None]
        raise _bad(path, expected="every column in every line", got=f"no {short[0]} in {place}")
    layer, alpha = (_number(cells[column]) for column in ("layer", "amplification value"))
    if not (layer.is_integer() and 0 <= layer <= HIGHEST_LAYER):
        got = f"{cells['layer']!r} in {place}"
        raise _bad(
            path, expected=f"layers that are whole numbers from 0 to {HIGHEST_LAYER}", got=got
        )
    if not math.isfinite(alpha):
        got = f"{cells['amplification value']!r} in {place}"
        raise _bad(path, expected="amplification values that are finite numbers", got=got)
    if not str(cells["source prompt"]).strip():
        raise _bad(path, expected="a source prompt in every line", got=f"an empty one in {place}")
    row: dict[str, Any] = {name: cells[column] for column, name in COLUMNS.items()}
    return row | {"source_layer": int(layer), "alpha": alpha}


def _number(text: str | None) -> float:
    """Return the number that a text is, NaN if it is none."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _notes(table: pd.DataFrame) -> Iterator[str]:
    """Yield what is unusual in the rows."""
    texts = table.groupby(CONDITION)["text"]
    several = texts.size() > 1
    if several.any():
        differing = int((texts.nunique() > 1).sum())
        yield (
            f"{int(several.sum())} conditions were recorded more than once, {differing} of them "
            "with different texts: every text counts as a further draw."
        )
    empty = int((table["text"].str.strip() == "").sum())
    if empty:
        yield f"Empty texts, which have no score: {empty} of {len(table)}."
    tokens = table.groupby("prompt")["token"].nunique()
    if (tokens > 1).any():
        yield f"{int((tokens > 1).sum())} prompts were read at several tokens: all of them count."


def _count(fewest: int, most: int) -> str:
    return f"{fewest} text" if fewest == most == 1 else f"{fewest} to {most} texts"


def _bad(path: object, *, expected: str, got: str) -> ValueError:
    return bad_value(
        "path",
        expected,
        f"{got} ({Path(str(path)).name!r})",
        "pass a CSV file like those in the folder data of github.com/GalNivs/Superscopes",
    )
