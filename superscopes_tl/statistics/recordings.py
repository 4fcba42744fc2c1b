"""The authors' recorded generations, counted again: Figure 3 without running their model.

1. Read a recording: a CSV file with the columns `source prompt`, `token`, `layer`,
   `amplification value` and `result`, one row per generated text. What spreadsheets make of one is
   read as well: semicolons or tabs, another encoding, an index column, names in snake case.
2. Patchscopes is α = 1 of the one file, Superscopes every other α of the other.
3. `compare` them, with baselines of equal budget: as many samples of α = 1 as there are α, where
   they were recorded, and always one α alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from superscopes_tl.errors import bad_value, brief, reason
from superscopes_tl.files import parse_table, read_text
from superscopes_tl.statistics.comparison import Comparison, compare

MAX_FILE_BYTES = 32 * 2**20

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
    """Recorded generations.

    Attributes:
        table: one row per text: prompt, token, source_layer, alpha, text.
        notes: what is unusual in the file, and how it is counted.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a file of recorded generations in the format of the authors' evaluation.

    Rows of one condition (prompt, token, layer, α) are samples; an empty text has no score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than 32 MiB, no CSV file, without one of the columns or without
            rows, or a row of it has no layer, α or prompt.
    """
    if _is_evaluation(Path(path)):
        fix = "use compare(methods(SweepResult.load(path))), or superscopes evaluate --out"
        got = f"an evaluation ({Path(path).name!r})"
        raise bad_value("path", "a CSV file of texts", got, fix)
    try:
        text, encoding = read_text(path, MAX_FILE_BYTES)
        rows, names, separator = parse_table(text, lambda name: _known(name) in COLUMNS)
    except ValueError as error:
        raise _bad(path, f"a CSV file of up to {MAX_FILE_BYTES} bytes", reason(error)) from error
    notes = [] if encoding == "utf-8" else [f"The file is not UTF-8: read as {encoding}."]
    rows = rows.rename(columns=_known)
    found = brief(", ".join(name.strip() or "''" for name in names))
    wanted = f"the columns {', '.join(COLUMNS)}, separated by commas, semicolons or tabs"
    if missing := [column for column in COLUMNS if column not in rows]:
        raise _bad(path, wanted, f"no {', '.join(missing)} among {found}")
    if rows.columns.duplicated().any():
        raise _bad(path, wanted, f"one of them twice among {found}")
    if rows.empty:
        raise _bad(path, "at least one generated text", "a header alone")
    if extra := [name.strip() for name in names if _known(name) not in COLUMNS]:
        notes.append(f"Ignored columns: {', '.join(map(repr, extra))}.")
    if separator == ";":  # where spreadsheets write decimal commas
        rows["amplification value"] = rows["amplification value"].str.replace(",", ".", n=1)
    table = rows[list(COLUMNS)].rename(columns=COLUMNS)
    layers, alphas = (pd.to_numeric(table[c], "coerce") for c in ("source_layer", "alpha"))
    for column, fine, expected in (
        ("source_layer", (layers >= 0) & (layers % 1 == 0), "layers that are whole numbers from 0"),
        ("alpha", np.isfinite(alphas), "amplification values that are finite numbers"),
        ("prompt", table["prompt"].str.strip() != "", "a source prompt in every row"),
    ):
        if not fine.all():
            row = int(np.argmin(fine))
            raise _bad(path, expected, f"{table[column].iloc[row]!r} in row {row + 1}")
    table = table.assign(source_layer=layers.astype("int64"), alpha=alphas.astype(float))
    return Recording(table, (*notes, *_notes(table)))


def replay(
    baseline: Recording | str | os.PathLike[str],
    amplified: Recording | str | os.PathLike[str],
    **options: Any,
) -> Comparison:
    """Compare recorded Patchscopes with recorded Superscopes, as the paper's Figure 3 does.

    The methods are "Patchscopes" (the first sample of α = 1), "Patchscopes, equal budget" (as many
    samples of α = 1 as Superscopes has α, if every condition has them), "Superscopes" (the best of
    all α but 1) and "Superscopes, one alpha" (the mean over these α). α = 1 of the amplified file
    is left out, so one file with all α may be passed as both.

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
            raise bad_value(argument, wanted, "none", "pass the baseline's file first")
    for name, rows in (("Baseline: α other than", other), ("Amplified: α of", unscaled)):
        if len(rows):
            notes.append(f"{name} 1 is left out ({len(rows)} texts).")
    budget = scaled["alpha"].nunique()
    draw = plain.groupby(CONDITION).cumcount()
    methods = {"Patchscopes": plain[draw == 0]}
    samples = plain.groupby(CONDITION).size()
    fewest, most = samples.min(), samples.max()
    if fewest >= budget:
        methods["Patchscopes, equal budget"] = plain[draw < budget]
    else:
        held = "1 text" if most == 1 else f"{fewest} to {most} texts"
        notes.append(
            f"Superscopes chooses among {budget} α, and these files have no baseline of that "
            f"budget: of α = 1 they hold {held} per condition. "
            "'Superscopes, one alpha' has the budget of the baseline instead."
        )
    methods["Superscopes"] = scaled
    found = compare(methods, one_alpha=True, **options)
    return replace(found, notes=(*notes, *found.notes))


def _known(name: str) -> str:
    """Return a column's name as the authors write it: `source_prompt` is their `source prompt`."""
    plain = " ".join(name.replace("_", " ").lower().split())
    ours = {column.replace("_", " "): theirs for theirs, column in COLUMNS.items()}
    return ours.get(plain, plain)


def _is_evaluation(path: Path) -> bool:
    """Whether a file is one of `evaluate`, which holds texts, too."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(15) == b"SQLite format 3"


def _notes(table: pd.DataFrame) -> Iterator[str]:
    """Yield what is unusual in the rows."""
    texts = table.groupby(CONDITION)["text"]
    several = texts.size() > 1
    if several.any():
        differing = int((texts.nunique() > 1).sum())
        yield (
            f"{int(several.sum())} conditions were recorded more than once, {differing} of them "
            "with different texts: every text counts as a further sample."
        )
    empty = int((table["text"].str.strip() == "").sum())
    if empty:
        yield f"Empty texts, which have no score: {empty} of {len(table)}."
    tokens = table.groupby("prompt")["token"].nunique()
    if (tokens > 1).any():
        yield f"{int((tokens > 1).sum())} prompts were read at several tokens: all of them count."


def _bad(path: object, expected: str, got: str) -> ValueError:
    fix = "pass a CSV file like those in the folder data of github.com/GalNivs/Superscopes"
    return bad_value("path", expected, f"{got} ({Path(str(path)).name!r})", fix)
