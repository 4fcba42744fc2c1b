"""Prompts from files: lists of lines, tables of any kind, and the field's data sets of facts.

1. A text file has a prompt per line; one that is a table is refused. CSV, TSV, JSON and JSONL are
   always tables: `column` names the prompts, `reference_column` a fact about each.
2. Two tables are known by their columns:

       Patchscopes (PAIR-code/interpretability, preprocessed_data/*.tsv; section 4.2 of the paper):
           prompt_source, source_cropped_toks, prompt_target with the placeholder x, object, subject
       facts (ROME's known_1000.json; SelfIE has it as CSV): prompt, subject, attribute

3. Both read a token inside a prompt, the last one of the subject. Its number, `position_source`,
   is that of another model's tokens; here the text of those tokens says where it is, and the
   source prompt ends there: a causal model's activation depends on nothing that comes later.
4. A fact is the reference: `recovered` is the share of the object's log-probability, as it
   continues the target prompt, and the score is 1 where the text contains it (`Contains`).
   In `known_1000.json` the target prompt is the prompt with the placeholder for the subject.

Rows without a prompt, without a fact where there is a column of facts, or whose prompt does not
begin with those tokens, are left out and counted; the authors leave the last out, too (prompts with
line breaks were cut when they were saved).
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from superscopes_tl.errors import RunFileError, bad_value, brief, describe
from superscopes_tl.files import MAX_CELLS, parse_json, parse_table, read_text, reading
from superscopes_tl.scores import Contains

MAX_FILE_BYTES, MOST_ROWS = 64 * 2**20, 1_000_000
"""The largest file, and the most lines or rows in it: a row takes many times its bytes."""

DELIMITED, JSON, JSON_LINES = (".csv", ".tsv", ".tab"), (".json",), (".jsonl", ".ndjson")

PATCHSCOPES = ("prompt_source", "source_cropped_toks", "prompt_target", "object", "subject")
INDEX = "position_source"
"""The number of the last token, from 0 without BOS, which has to agree with the tokens."""

FACTS = ("prompt", "subject", "attribute")
USUAL = ("prompt", "prompt_source", "source prompt", "source_prompt", "text")
"""Names of a column of prompts that need not be passed."""

PLACEHOLDER = "x"
ANSWER_TOKENS = 20
"""How far Patchscopes looks for the object in the text after the target prompt (their code)."""


@dataclass(frozen=True)
class SourcePrompt:
    """One row of a file of prompts.

    Attributes:
        prompt: the whole prompt.
        until: its beginning up to the token that is read, that included; empty for all of it.
        subject: what that token stands for; empty where the file does not say.
        reference: a fact about it, such as the object of a relation; empty where there is none.
        target_prompt: with the placeholder `x` for the subject; empty where there is none.
    """

    prompt: str
    until: str = ""
    subject: str = ""
    reference: str = ""
    target_prompt: str = ""

    @property
    def text(self) -> str:
        """The source prompt of a sweep, whose last token is read."""
        return self.until or self.prompt


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, for `evaluate(model, file.prompts, **file.settings)`.

    Attributes:
        rows: one per source prompt and target prompt.
        notes: what was left out, in sentences.
    """

    rows: tuple[SourcePrompt, ...]
    notes: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """The source prompts, each up to the token that is read."""
        return tuple(dict.fromkeys(row.text for row in self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """What the file says about them, as settings of `evaluate`; empty for prompts alone.

        There is a target prompt where all rows have the same one (see `by_target_prompt`). The
        first fact about a source prompt counts.
        """
        found: dict[str, Any] = {}
        backwards = self.rows[::-1]
        if about := {row.text: row.subject for row in backwards if row.subject}:
            found["about"] = about
        if reference := {row.text: row.reference for row in backwards if row.reference}:
            found |= {"reference": reference, "score_against": "own words", "score_on": "text"}
            found["scorer"] = Contains()
        if len(targets := {row.target_prompt for row in self.rows}) == 1 and any(targets):
            found |= {"target_prompt": targets.pop(), "max_new_tokens": ANSWER_TOKENS}
        return found

    def by_target_prompt(self) -> dict[str, PromptFile]:
        """Return a part for each target prompt, as an evaluation has one."""
        parts: dict[str, list[SourcePrompt]] = {}
        for row in self.rows:
            parts.setdefault(row.target_prompt, []).append(row)
        return {target: PromptFile(tuple(rows)) for target, rows in parts.items()}


def load_prompts(
    path: str | os.PathLike[str], *, column: str | None = None, reference_column: str | None = None
) -> PromptFile:
    """Read source prompts from a file, with their facts and target prompt where it has them.

    Example:
        >>> found = load_prompts("country_currency.tsv")  # doctest: +SKIP
        >>> evaluate(model, found.prompts, layers=[8], **found.settings)  # doctest: +SKIP

    Args:
        path: a text file with one prompt per line; a `.csv`, `.tsv`, `.json` or `.jsonl` table.
        column: of a table, the column of the prompts. Defaults to what a known table has, to one
            called `prompt` or the like, or to the only one.
        reference_column: of a table, the column of facts about them. Defaults to a known table's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: more than 64 MiB (JSON: 16 MiB) or a million rows, no text, no such column, no
            prompt, or a table in a text file. The message names the columns found.
    """
    file = Path(path)
    ending = file.suffix.lower()
    fix = "pass a UTF-8 text file, one prompt per line, or a .csv, .tsv, .json or .jsonl table"
    with reading(file, "a file of prompts", fix):
        text, _ = read_text(file, MAX_FILE_BYTES)
        if ending in (*DELIMITED, *JSON, *JSON_LINES):
            table = _table(text, ending)
        else:
            table = pd.DataFrame(
                {"line": _lines(text, file, column or reference_column)}, dtype=str
            )
            column, reference_column = "line", None
    names = [str(name) for name in table.columns]
    if column is None and reference_column is None and set(PATCHSCOPES) <= set(names):
        rows = _patchscopes(table)
    elif column is None and reference_column is None and set(FACTS) <= set(names):
        rows = _facts(table)
    else:
        chosen = table[_column(column, "column", names, file)].tolist()
        known = [""] * len(chosen)
        if reference_column is not None:
            known = table[_column(reference_column, "reference_column", names, file)].tolist()
        rows = [
            SourcePrompt(prompt.strip(), reference=fact.strip())
            if prompt.strip() and (fact.strip() or reference_column is None)
            else None
            for prompt, fact in zip(chosen, known, strict=True)
        ]
    return _collected(rows, file)


def _collected(rows: Sequence[SourcePrompt | None], file: Path) -> PromptFile:
    """Return the rows that can be read, with notes on the others."""
    kept: dict[tuple[str, str], SourcePrompt] = {}
    targets = {row.target_prompt for row in rows if row is not None}
    twice = 0
    for row in rows:
        if row is not None:
            first = kept.setdefault((row.text, row.target_prompt), row)
            twice += replace(first, prompt=row.prompt) != row
    if not kept:
        got = f"none in the {len(rows)} rows of {file.name}"
        raise bad_value("path", "at least one prompt that can be read", got, "add prompts")
    notes = []
    if lacking := sum(row is None for row in rows):
        notes.append(
            f"{lacking} of {len(rows)} rows are left out: no prompt up to the subject, or no fact."
        )
    if twice:
        notes.append(f"{twice} rows repeat a prompt with another fact: the first one counts.")
    if len(targets) > 1:
        notes.append(
            f"The file has {len(targets)} target prompts: by_target_prompt() separates them."
        )
    return PromptFile(tuple(kept.values()), tuple(notes))


def _column(name: str | None, argument: str, names: Sequence[str], file: Path) -> str:
    """Return the name of a column, by default one that is called as prompts usually are."""
    if name is not None and name in names:
        return name
    usual = [usual for usual in USUAL if usual in names] or (names if len(names) == 1 else [])
    if name is None and usual:
        return usual[0]
    got = f"{name!r}; {file.name} has {', '.join(map(repr, names))}"
    raise bad_value(
        argument, "a column of the table", got, f"pass its name: {argument}={names[0]!r}"
    )


def _patchscopes(table: pd.DataFrame) -> list[SourcePrompt | None]:
    """Return the rows of a table of Patchscopes; `None` for one whose token cannot be found."""
    rows: list[SourcePrompt | None] = []
    indices = table[INDEX] if INDEX in table else [""] * len(table)
    cells = table[list(PATCHSCOPES)].itertuples(index=False)
    for (prompt, tokens, target, fact, subject), index in zip(cells, indices, strict=True):
        until = _joined(tokens, index)
        fits = until.strip() and prompt.startswith(until) and fact.strip() and target.strip()
        rows.append(
            SourcePrompt(prompt, until, subject.strip(), fact.strip(), target) if fits else None
        )
    return rows


def _joined(cell: str, index: str) -> str:
    """Return the text of a list of tokens, written as in Python, whose last one has an index."""
    try:
        tokens = ast.literal_eval(cell) if len(cell) < 100_000 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return ""
    return "".join(tokens) if index in ("", str(len(tokens) - 1)) else ""


def _facts(table: pd.DataFrame) -> list[SourcePrompt | None]:
    """Return the rows of a table of facts; `None` for one without its subject in the prompt."""
    rows: list[SourcePrompt | None] = []
    for prompt, subject, fact in table[list(FACTS)].itertuples(index=False):
        before, found, after = prompt.partition(subject)
        fits = subject.strip() and found and fact.strip()
        target = f"{before}{PLACEHOLDER}{after}"
        rows.append(
            SourcePrompt(prompt, before + found, subject.strip(), fact.strip(), target)
            if fits
            else None
        )
    return rows


def _table(text: str, ending: str) -> pd.DataFrame:
    """Return a table of texts; a `ValueError` for anything else."""
    if ending in DELIMITED:
        _check_rows(max(text.count("\n"), text.count("\r")))
        table, _, _ = parse_table(text)
    else:
        if ending in JSON_LINES:
            _check_rows(text.count("\n"))
            found = [parse_json(line, nan=True) for line in text.split("\n") if line.strip()]
        else:
            found = parse_json(text, nan=True)
        table = _of_json(found)
    table = table.rename(columns=lambda name: str(name).strip())
    return table.loc[:, ~table.columns.duplicated()]


def _check_rows(number: int) -> None:
    """Raise a `ValueError` for a file of too many rows."""
    if number > MOST_ROWS:
        raise ValueError(f"more than {MOST_ROWS} rows")


def _of_json(found: Any) -> pd.DataFrame:
    """Return the rows of a JSON list, or of the only list in an object, or of one by columns."""
    if isinstance(found, dict):
        lists = [part for part in found.values() if isinstance(part, list)]
        by_column = bool(found) and all(isinstance(part, dict | list) for part in found.values())
        if len(lists) == 1:
            (found,) = lists
        elif by_column:
            _check_rows(max(map(len, found.values())))
            columns = {k: list(v.values()) if isinstance(v, dict) else v for k, v in found.items()}
            found = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
    if not isinstance(found, list) or not found:
        raise ValueError(f"JSON that is no list of rows but {type(found).__name__}")
    _check_rows(len(found))
    if not all(isinstance(row, dict) for row in found):
        if not all(isinstance(row, str) for row in found):
            raise ValueError("a JSON list of other things than rows or texts")
        found = [{"prompt": row} for row in found]
    names = list(dict.fromkeys(name for row in found for name in row))
    if len(names) * len(found) > MAX_CELLS:
        raise ValueError(f"more than {MAX_CELLS} cells")
    return pd.DataFrame(
        {name: [_cell(row.get(name)) for row in found] for name in names}, dtype=str
    )


def _cell(value: Any) -> str:
    """Return a cell as a text; empty for nothing."""
    return (
        "" if value is None or value != value else value if isinstance(value, str) else str(value)
    )


_TABLE = re.compile(r"(?<!\d)[,;](?=\S)|[,;](?=[^\s\d])")
"""A separator in a line: a comma or semicolon that neither a space nor a number follows."""


def _lines(text: str, file: Path, column: str | None) -> list[str]:
    """Return the lines of a text file that is no table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    _check_rows(len(lines))
    kind = ""
    if lines and lines[0][0] in "[{" and lines[0][-1] in "[{,]}":
        kind = ".jsonl" if lines[0][0] == "{" and lines[0][-1] == "}" else ".json"
    elif any("\t" in line for line in lines[:20]):
        kind = ".tsv"
    elif len(lines) > 1 and all(_TABLE.search(line) for line in lines[:20]):
        kind = ".csv"
    if kind:
        got = f"{file.name} with {brief(lines[0], 60)!r}, a table"
        fix = f"rename it to {file.stem}{kind}; column= (--column) names its prompts"
        raise RunFileError(describe("path", "a prompt per line", got, fix))
    if column is not None:
        got = f"{file.name} and the column {column!r}"
        raise RunFileError(
            describe("path", "a .csv, .tsv, .json or .jsonl table", got, "rename it")
        )
    return lines
