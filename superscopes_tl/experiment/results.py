"""The table of a sweep and where it came from.

1. A sweep yields one `Reading` per cell.
2. `SweepResult` holds them as a long table (pandas, one row per cell) beside its provenance.
   Whatever draws or judges reads this table; nothing computes a cell again.
3. One file holds both: a zip with `provenance.json` and `table.parquet`. It contains data alone,
   no code, and opens without a model.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd

from superscopes_tl.errors import RunFileError, bad_value, check_choice, describe, reason
from superscopes_tl.experiment.plan import SweepPlan
from superscopes_tl.experiment.summary import (
    By,
    Contextualization,
    Reads,
    caveats,
    contextualization,
    rows_at,
)
from superscopes_tl.files import (
    checked_provenance,
    checked_rows,
    read_json,
    read_parquet,
    read_zip,
    written_whole,
)

FORMAT = "superscopes_tl.sweep"
FORMAT_VERSION = 1
ENTRIES = ("provenance.json", "table.parquet")
MAX_FILE_BYTES = 2**30
"""A run file that unpacks to more than this is refused."""

SITE = ["prompt", "position", "kind", "source_layer", "target_layer", "mapping"]
"""The columns that name a site and where it is patched; the cells of a site differ in α."""


@dataclass(frozen=True)
class Reading:
    """One cell: a vector, amplified and patched, and what the model wrote about it.

    Attributes:
        prompt: the source prompt.
        position: the token whose activation was read, counted from 0.
        token: that token, with visible white space.
        kind: the kind of activation.
        source_layer: where it was read.
        target_layer: where it was patched.
        mapping: the mapping family, `scale` in the paper.
        alpha: the amplifier α.
        vector_norm: the norm of f(v), the patched vector.
        norm_ratio: that norm in units of the residual stream that it replaced.
        text: everything that the model wrote.
        description: the part of it that is about the placeholder.
        score: the scorer's number; NaN where there was nothing to score.
        few_shot_copy: whether the description repeats a name that the target prompt gave.
        n_tokens: how many tokens were written.
        margin: the closest call among them, in logits (see `decoding.Generation`).
        draw: 0 for the likeliest tokens, k for the k-th text drawn at temperature 1.
        entropy: how unsure the model was, in nats: the mean over the tokens up to the end of the
            description.
        log_probability: how likely these tokens were, in nats per token.
        written: whether the cell was written out; if not, all that a text gives is empty or NaN.
        echo: whether the description repeats the name that it should be about.
        about: what the reading is scored against.
        recovered: the share of the model's own words that the patch recovers (see `own_words`);
            NaN where it is not defined.
        own_words: what the model says of `about` when it reads it as it stands.
        plain_nats: how likely that is behind the target prompt with the name, in nats.
        unpatched_nats: and behind the unpatched target prompt.
        controls: what was written and scored in the cell's place without its meaning, where that
            was asked for; each is a column of the table (see `controls`).
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
    text: str
    description: str
    score: float
    few_shot_copy: bool
    n_tokens: int
    margin: float
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
    controls: Mapping[str, float | str] = field(default_factory=dict, hash=False)


_SHOWN = ("description", "alpha", "score", "recovered", "target_layer")

COLUMNS = tuple(f.name for f in fields(Reading) if f.name != "controls")
TYPES = {f.name: str(f.type) for f in fields(Reading) if f.name in COLUMNS}
_LATER = {f.name: f.default for f in fields(Reading) if f.default is not MISSING}


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Every cell of a sweep ("Show All") and its provenance.

    Attributes:
        table: one row per cell; the columns are the fields of `Reading`.
        provenance: model, versions, prompts, tokens and settings, as plain data.
        plan: the plan of the sweep, where it was run in this session; no file holds it.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    plan: SweepPlan | None = None

    @classmethod
    def from_readings(
        cls, readings: Iterable[Reading], provenance: dict[str, Any], plan: SweepPlan | None = None
    ) -> Self:
        """Return the result that holds `readings`."""
        rows = [asdict(reading) for reading in readings]
        rows = [row | row.pop("controls") for row in rows]
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        return cls(pd.DataFrame(rows, columns=list(columns)), provenance, plan)

    def __len__(self) -> int:
        return len(self.table)

    def at(
        self,
        position: int | None = None,
        target_layer: int | Literal["same", "all"] | None = None,
        kind: str | None = None,
        alpha: float | None = None,
    ) -> SweepResult:
        """Return the readings of one token and one target layer (see `rows_at`).

        Args:
            position: the token; defaults to the rightmost one.
            target_layer: a target layer, or "same" as the source layer. Defaults to the only one
                per source layer; "all" keeps several.
            kind: one kind of activation; defaults to all of them.
            alpha: one amplifier; defaults to all of them.

        Raises:
            ValueError: an empty result, a value that it does not have, or several target layers
                of which none was chosen.
        """
        rows = rows_at(
            self.table, position=position, target_layer=target_layer, kind=kind, alpha=alpha
        )
        return SweepResult(rows, self.provenance, self.plan)

    def best(self, *, by: By | None = None) -> pd.DataFrame:
        """Return the best cell of every site: the automatic amplifier.

        This is the paper's "Show Best Results" (section 5.1). The α is chosen by the same number
        that judges it, so a best one is an upper bound, to be compared with equal draws of a
        control. Among equal numbers the smallest |α| wins; a site without any keeps its
        smallest |α|.

        Args:
            by: "score" or "recovered"; unless given the score, or what is recovered where not
                all cells were written out.
        """
        column = self._by(by)
        order = self.table.assign(_size=self.table["alpha"].abs()).sort_values(
            [column, "_size"], ascending=[False, True], na_position="last", kind="stable"
        )
        first = order.drop_duplicates(SITE).drop(columns="_size")
        return first.sort_index().reset_index(drop=True)

    def by_layer(
        self, *, alpha: float | None = None, position: int | None = None, by: By | None = None
    ) -> pd.DataFrame:
        """Return the readings of one token as the paper shows them: a row per source layer.

        Where a source layer was patched at several target layers, the best one counts.

        Args:
            alpha: this α for all (the paper's Figure 5 has α = 1); the best of each site unless
                given (Figure 6).
            position: the token; the rightmost one of the sweep unless given.
            by: what the best is judged by, as in `best`.

        Returns:
            A table with the source layer as index and, for every kind, the columns
            `(kind, "description")`, `(kind, "alpha")`, `(kind, "score")`, `(kind, "recovered")`
            and `(kind, "target_layer")`.

        Raises:
            ValueError: an α or position that the sweep does not have.
        """
        column = self._by(by)
        at = self.at(position, "all", alpha=alpha)
        chosen = at.best(by=by) if alpha is None else at.table
        order = chosen.sort_values(column, ascending=False, kind="stable")
        one = order.drop_duplicates(["source_layer", "kind"])
        wide = one.pivot(index="source_layer", columns="kind", values=list(_SHOWN))
        kinds = list(dict.fromkeys(chosen["kind"]))
        columns = [(column, kind) for kind in kinds for column in _SHOWN]
        return wide[columns].swaplevel(axis="columns")

    def contextualization_layer(
        self,
        *,
        by: By | None = None,
        threshold: float | None = None,
        reads: Reads | None = None,
        position: int | None = None,
        target_layer: int | None = None,
    ) -> Contextualization:
        """Return ℓ_c: the first layer at which unamplified Patchscopes reads the entity.

        That is, the first source layer whose `resid_post` at α = 1 reads it (paper, section 4.1).
        The answer comes with what is read there: a number alone misleads.

        Args:
            by: "recovered" (as unless given, where that is defined): the first layer that
                recovers at least half of what the best one does, less what other prompts'
                vectors recover above nothing where the sweep has them
                (`controls="other_prompt"`). "score": the paper's threshold.
            threshold: with the score, from which a description counts as reading the entity;
                the paper's 0.3 unless given.
            reads: judges prompt and description instead, for example
                `lambda prompt, text: "rock band" in text`.
            position: the token; the rightmost one of the sweep unless given.
            target_layer: which target layer, if the sweep patched several per source layer.

        Returns:
            The layer (`None` if no layer of the sweep reads it) with its text, score and shares.

        Raises:
            ValueError: the sweep has no `resid_post` at α = 1, or several target layers.
        """
        rows = self.at(position, "all").table
        rows = rows[(rows["kind"] == "resid_post") & (rows["alpha"] == 1)]
        if rows.empty:
            raise bad_value(
                "contextualization_layer", "a sweep with kind 'resid_post' and α = 1",
                {c: self.table[c].unique().tolist() for c in ("kind", "alpha")},
                "sweep over these too",
            )  # fmt: skip
        rows = rows_at(rows, position=position, target_layer=target_layer)
        if rows.duplicated("source_layer").any():
            raise bad_value(
                "result", "one reading per source layer", f"mappings {set(rows['mapping'])}",
                "choose the rows of one mapping and draw",
            )  # fmt: skip
        return contextualization(rows, by=by, threshold=threshold, reads=reads)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What makes this result misleading, and what to try: at most three lines."""
        return caveats(self.table, self.provenance)

    def _by(self, by: By | None) -> By:
        """Return the column that judges."""
        if by is None:
            return "score" if self.table["written"].all() else "recovered"
        return check_choice("by", by, ("score", "recovered"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write table and provenance to one file, whole or not at all; return its path.

        Raises:
            ValueError, TypeError: a table or provenance that `load` would refuse.
            OSError: the file cannot be written; an older one of that name stays.
        """
        target = Path(path)
        buffer = io.BytesIO()
        self.table.to_parquet(buffer, index=False, compression="snappy")
        header = {"format": FORMAT, "version": FORMAT_VERSION, "provenance": self.provenance}
        text = json.dumps(header, indent=1, ensure_ascii=False).encode()
        try:
            _parsed(text, buffer.getvalue())
        except ValueError as error:
            raise bad_value(
                "result", "a table and provenance to read again", reason(error),
                "keep result.table as the sweep made it; save your own table with pandas",
            ) from error  # fmt: skip
        with (
            written_whole(target) as fresh,
            zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name, data in zip(ENTRIES, (text, buffer.getvalue()), strict=True):
                archive.writestr(name, data)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote. No model is needed.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: it is corrupt, foreign, too large, or of a newer format.
        """
        try:
            return cls(*_parsed(*read_zip(path, ENTRIES, MAX_FILE_BYTES)))
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever zip, JSON and Parquet readers raise on bad bytes
            raise _unreadable(path, reason(error)) from error

    def __repr__(self) -> str:
        model = self.provenance.get("model", {}).get("name")
        return f"SweepResult({len(self)} cells of {self.provenance.get('prompt')!r}, {model})"

    def _repr_html_(self) -> str:
        """Return the best reading per layer and kind as an HTML table; all text is escaped."""
        if self.table.empty:
            return f"<p>{html.escape(repr(self))}</p>"
        wide = self.by_layer()
        kinds = list(wide.columns.get_level_values(0).unique())
        head = "".join(f"<th style='text-align:left'>{html.escape(k)}</th>" for k in kinds)
        rows = []
        for layer, row in wide.iterrows():
            cells = "".join(_html_cell(row[k]) for k in kinds)
            rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
        token = html.escape(str(self.at(target_layer="all").table["token"].iloc[0]))
        caption = f"{html.escape(repr(self))}: best reading of token <bdi>{token}</bdi> per layer"
        lines = "".join(f"<p>Caveat: {html.escape(line)}</p>" for line in self.caveats)
        return (
            f"<table><caption>{caption}</caption><thead><tr><th>layer</th>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{lines}"
        )


def _parsed(text: bytes, data: bytes) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the table and the provenance that the two entries of a run file hold."""
    header = read_json(text)
    if header.get("format") != FORMAT:
        raise ValueError("a zip that is not a sweep")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(f"format version {header.get('version')!r}")
    table = read_parquet(data, MAX_FILE_BYTES)
    # A column with a default came later than the first files.
    table = table.assign(**{c: v for c, v in _LATER.items() if c not in table.columns})
    if missing := [c for c in COLUMNS if c not in table.columns]:
        raise ValueError(f"no column {missing}")
    return checked_rows(table, TYPES), checked_provenance(header.get("provenance"))


def _html_cell(cell: pd.Series) -> str:
    if pd.isna(cell["alpha"]):
        return "<td>not computed</td>"
    score = "no description" if pd.isna(cell["score"]) else f"{cell['score']:.2f}"
    share = "" if pd.isna(cell["recovered"]) else f", recovers {cell['recovered']:.2f}"
    return (
        f"<td style='text-align:left'><bdi>{html.escape(cell['description'])}</bdi> "
        f"<small>α = {cell['alpha']:g}, {score}{share}</small></td>"
    )


def _unreadable(path: object, got: str) -> RunFileError:
    return RunFileError(
        describe(
            "path",
            f"a run file of format {FORMAT} version {FORMAT_VERSION}",
            f"{path} with {got}",
            "pass a file that SweepResult.save wrote, complete",
        )
    )
