"""The table of a sweep or of an evaluation, and its analysis.

1. `SweepResult` holds one row per cell beside its provenance; figures and statistics read this
   table, and no cell is computed again.
2. `best` and `by_layer` choose α as the paper's automatic amplifier does; `rows_at` selects the
   rows of one token, target layer, kind and α.
3. `contextualization` returns ℓ_c of one token (paper, section 4.1): the first source layer whose
   unamplified block output reads the entity, judged by the share of the model's own words that it
   recovers, by its score, or by a callable that knows the entity.
4. `caveats` lists what makes a result misleading, at most three lines, the gravest first, each with
   a setting to try.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import pandas as pd
from jinja2 import Environment, PackageLoader

from superscopes_tl.engine import is_echo
from superscopes_tl.errors import bad_type, bad_value, check_choice
from superscopes_tl.experiment.plan import SweepPlan
from superscopes_tl.experiment.store import (
    COLUMNS,
    OUTLIER,
    SITE,
    Reading,
    read_readings,
    write_run,
)
from superscopes_tl.model import EMBED, KINDS, PatchedLayer, layer_name
from superscopes_tl.scores import LEAST_GAP, PAPER_THRESHOLD, above_others
from superscopes_tl.vectors import PAPER_MAPPING

By: TypeAlias = Literal["score", "recovered"]
"""The number that ranks the cells of a site."""
Reads: TypeAlias = Callable[[str, str], bool]
"""Judges whether a description reads its entity, from the source prompt and the description."""

LEAST_RECOVERED = 0.2
"""Below this share of the model's own words nothing was read: half of nothing is noise."""
USUAL_RATIO = (0.1, 10.0)
"""Usual norms of an unamplified vector, in units of the residual stream that it replaces."""
MOST_CAVEATS = 3

_NO_CONTENT = (
    "about also been from have into more most over some such than that their them then there "
    "these they this those under very were what when where which while will with your "
)
"""Longer words that say nothing of an entity."""

_PAGES = Environment(loader=PackageLoader("superscopes_tl.experiment"), autoescape=True)

_SHOWN = ("description", "alpha", "score", "recovered", "target_layer", "written")


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The readings of a sweep ("Show All"), or of many source prompts, and their provenance.

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
        # Not `asdict`, which copies every value and takes most of the time of a map.
        rows: list[dict[str, Any]] = [dict(vars(reading)) for reading in readings]
        rows = [row | row.pop("controls") for row in rows]
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        return cls(pd.DataFrame(rows, columns=list(columns)), provenance, plan)

    def __len__(self) -> int:
        return len(self.table)

    def at(
        self,
        *,
        position: int | None = None,
        target_layer: PatchedLayer | Literal["same", "all"] | None = None,
        kind: str | None = None,
        alpha: float | None = None,
    ) -> SweepResult:
        """Return the readings of one token and one target layer, as `rows_at` selects them."""
        rows = rows_at(
            self.table, position=position, target_layer=target_layer, kind=kind, alpha=alpha
        )
        return replace(self, table=rows)

    def best(self, *, by: By | None = None) -> pd.DataFrame:
        """Return the best cell of every site: the paper's automatic amplifier (section 5.1).

        The α is chosen by the same number that judges it, so the best one is an upper bound, to be
        compared with as many samples of a control. Among equal numbers the smallest |α| wins; a
        site without any keeps its smallest |α|.

        Args:
            by: "score" or "recovered"; defaults to the score, or to the share recovered where not
                all cells have a text.
        """
        column = self._by(by)
        order = self.table.sort_values("alpha", key=abs, kind="stable")
        order = order.sort_values(column, ascending=False, kind="stable")
        return order.drop_duplicates(SITE).sort_index().reset_index(drop=True)

    def by_layer(
        self, *, alpha: float | None = None, position: int | None = None, by: By | None = None
    ) -> pd.DataFrame:
        """Return the readings of one token, a row per source layer, as the paper shows them.

        Of several target layers per source layer the best one counts.

        Args:
            alpha: this α for all (the paper's Figure 5 has α = 1); defaults to the best of each
                site (Figure 6).
            position: the token; defaults to the rightmost one.
            by: the criterion for the best, as in `best`.

        Returns:
            A table with the source layer as index and the columns `(kind, "description")`, and so
            on for "alpha", "score", "recovered", "target_layer" and "written", and for
            "other_prompt_recovered" where that control was computed.

        Raises:
            ValueError: an α or position that the sweep does not have.
        """
        column = self._by(by)
        at = self.at(position=position, target_layer="all", alpha=alpha)
        chosen = at.best(by=by) if alpha is None else at.table
        order = chosen.sort_values(column, ascending=False, kind="stable")
        one = order.drop_duplicates(["source_layer", "kind"])
        shown = [*_SHOWN, *({"other_prompt_recovered"} & set(one.columns))]
        wide = one.pivot(index="source_layer", columns="kind", values=shown)
        kinds = list(dict.fromkeys(chosen["kind"]))
        columns = [(column, kind) for kind in kinds for column in shown]
        return wide[columns].swaplevel(axis="columns")

    def contextualization_layer(
        self,
        *,
        by: By | None = None,
        threshold: float | None = None,
        reads: Reads | None = None,
        position: int | None = None,
        target_layer: PatchedLayer | None = None,
    ) -> Contextualization:
        """Return ℓ_c: the first source layer whose unamplified `resid_post` reads the entity.

        This is the paper's definition (section 4.1). The layer comes with its text and numbers.

        Args:
            by: "recovered" (the default where it is defined): the first layer that recovers at
                least half of the best one's share, each above that of other prompts' vectors
                where the sweep has them (`controls="other_prompt"`). "score": the paper's
                threshold.
            threshold: the least score that reads the entity; defaults to the paper's 0.3.
            reads: judges prompt and description instead, for example
                `lambda prompt, text: "rock band" in text`.
            position: the token; defaults to the rightmost one.
            target_layer: which target layer, if the sweep patched several per source layer.

        Raises:
            ValueError: the sweep has no `resid_post` at α = 1, or several target layers.
        """
        rows = self.at(position=position, target_layer="all").table
        rows = rows[(rows["kind"] == "resid_post") & (rows["alpha"] == 1)]
        if rows.empty:
            expected = "a sweep with kind 'resid_post' and α = 1"
            swept = {c: self.table[c].unique().tolist() for c in ("kind", "alpha")}
            raise bad_value("contextualization_layer", expected, swept, "sweep over these too")
        rows = rows_at(rows, position=position, target_layer=target_layer)
        if rows.duplicated("source_layer").any():
            got, fix = f"mappings {set(rows['mapping'])}", "choose one mapping and draw with .of()"
            raise bad_value("result", "one reading per source layer", got, fix)
        return contextualization(rows, by=by, threshold=threshold, reads=reads)

    @property
    def caveats(self) -> tuple[str, ...]:
        """Reasons why this result may mislead, with settings to try: at most three lines."""
        return caveats(self.table, self.provenance)

    def _by(self, by: By | None) -> By:
        """Return the column that judges."""
        usual: By = "score" if self.table["written"].all() else "recovered"
        return usual if by is None else check_choice("by", by, ("score", "recovered"))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The source prompts, in the order of the table."""
        return tuple(dict.fromkeys(self.table["prompt"]))

    def of(
        self, prompt: str | None = None, *, mapping: str | None = None, draw: int | None = None
    ) -> Self:
        """Return the readings of one source prompt, as its own sweep would return them.

        Args:
            prompt: one of `prompts`; defaults to the only one.
            mapping: one of the column `mapping`; defaults to `Scale()` if it is there, else to all.
            draw: 0 for the greedy texts, k for the k-th samples; defaults to the first.

        Raises:
            ValueError: there are none, or several prompts to choose from.
        """
        rows = self.table
        if prompt is None and len(self.prompts) == 1:
            (prompt,) = self.prompts
        rows = rows[rows["prompt"] == check_choice("prompt", prompt, self.prompts)]
        if mapping is None and PAPER_MAPPING in set(rows["mapping"]):
            mapping = PAPER_MAPPING
        if mapping is not None:
            check_choice("mapping", mapping, rows["mapping"].unique().tolist())
            rows = rows[rows["mapping"] == mapping]
        draws = sorted(rows["draw"].unique().tolist())
        draw = draws[0] if draw is None else check_choice("draw", draw, draws)
        config = self.provenance.get("config", {})
        config = {**config, "mapping": mapping or config.get("mapping"), "draw": draw}
        provenance = {**self.provenance, "prompt": prompt, "config": config}
        rows = rows[rows["draw"] == draw].reset_index(drop=True)
        return replace(self, table=rows, provenance=provenance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write table and provenance to one file, whole or not at all; return its path.

        Raises:
            ValueError: a table or provenance that `load` would refuse.
            TypeError: a provenance that JSON cannot hold.
            OSError: the file cannot be written; an older one of that name stays.
        """
        return write_run(path, self.table, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` or `evaluate` wrote, finished or not. No model is needed.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: it is corrupt, foreign, too large, or of another format.
            OSError: it cannot be read.
        """
        return cls(*read_readings(path))

    def __repr__(self) -> str:
        model = self.provenance.get("model", {}).get("name")
        several = f"{len(self.prompts)} prompts" if len(self.prompts) > 1 else ""
        prompt = several or repr(self.provenance.get("prompt", *self.prompts))
        return f"SweepResult({len(self)} cells of {prompt}, {model})"

    def _repr_html_(self) -> str:
        """Return the best reading per layer and kind as an HTML table; all text is escaped."""
        shown: dict[str, Any] = {"name": repr(self)}
        if len(self.prompts) == 1:
            wide = self.by_layer()
            kinds = wide.columns.get_level_values(0).unique()
            shown["layers"] = [(n, [row[kind] for kind in kinds]) for n, row in wide.iterrows()]
            token = self.at(target_layer="all").table["token"].iloc[0]
            shown |= {"kinds": kinds, "token": token, "caveats": self.caveats}
        return _PAGES.get_template("result.html").render(shown)


def rows_at(
    table: pd.DataFrame,
    *,
    position: int | None = None,
    target_layer: PatchedLayer | Literal["same", "all"] | None = None,
    kind: str | None = None,
    alpha: float | None = None,
) -> pd.DataFrame:
    """Select the rows of one token and one target layer; a table of a lens has no target layer.

    Args:
        table: readings of one source prompt or of many.
        position: the token; defaults to the rightmost one of each prompt.
        target_layer: a target layer, or "same" as the source layer. Defaults to the only one per
            source layer; "all" keeps the rows of several.
        kind: one kind of activation; defaults to all of them.
        alpha: one amplifier; defaults to all of them.

    Raises:
        ValueError: an empty table, a value that the table does not have, or several target layers
            of which none was chosen.
    """
    if not isinstance(table, pd.DataFrame):
        raise bad_type("table", "a table of readings", table, "pass result.table")
    if table.empty:
        raise bad_value("table", "at least one cell", "none", "let the sweep finish a batch")
    prompts = table["prompt"] if "prompt" in table else pd.Series("", index=table.index)
    wanted = table["position"].groupby(prompts).transform("max") if position is None else position
    rows = table[table["position"] == wanted]
    if lacking := set(prompts) - set(prompts[rows.index]):
        check_choice("position", position, _values(table[prompts == min(lacking)], "position"))
    for column, value in (("kind", kind), ("alpha", alpha)):
        if value is not None:
            check_choice(column, value, _values(rows, column))
            rows = rows[rows[column] == value]
    if "target_layer" not in rows or target_layer == "all":
        return rows
    targets = [layer_name(number) for number in _values(rows, "target_layer")]
    if target_layer is not None:
        named: dict[Any, Any] = {"same": rows["source_layer"], "embed": EMBED}
        chosen: pd.DataFrame = rows[rows["target_layer"] == named.get(target_layer, target_layer)]
        if chosen.empty:
            check_choice("target_layer", target_layer, ["same", *targets])
        return chosen
    place = [c for c in ("prompt", "kind", "source_layer") if c in rows]
    if (rows.groupby(place)["target_layer"].nunique() > 1).any():
        choices = f"one of {targets}"
        raise bad_value("target_layer", choices, None, "choose one")
    return rows


def _values(table: pd.DataFrame, column: str) -> list[Any]:
    values: list[Any] = sorted(table[column].unique().tolist())
    return values


@dataclass(frozen=True)
class Contextualization:
    """The contextualization layer ℓ_c of one token, with its reading.

    Attributes:
        layer: the first source layer that reads the entity; `None` if none does. The other fields
            then describe the layer that comes nearest.
        position: the token, counted from 0; further fields are those of a `Reading`.
        by: the criterion: "recovered", "score", or "reads" for a callable.
        others: the share that other prompts' vectors recover there; NaN without that control.
    """

    layer: int | None
    position: int
    token: str
    about: str
    by: str
    description: str
    score: float
    recovered: float
    others: float
    own_words: str
    echo: bool

    def __str__(self) -> str:
        where = "no layer" if self.layer is None else f"layer {self.layer}"
        parts = [f"contextualization layer of {self.about!r} (token {self.token!r}): {where}"]
        if self.description:
            parts.append(repr(self.description) + (" (repeats the name)" if self.echo else ""))
        if not math.isnan(self.score):
            parts.append(f"score {self.score:.2f}")
        if not math.isnan(self.recovered):
            others = "" if math.isnan(self.others) else f", other names' vectors {self.others:.2f}"
            parts.append(f"recovers {self.recovered:.2f} of {self.own_words!r}{others}")
        return "; ".join([*parts, f"judged by {self.by}"])


def contextualization(
    rows: pd.DataFrame,
    *,
    by: By | None = None,
    threshold: float | None = None,
    reads: Reads | None = None,
) -> Contextualization:
    """Return ℓ_c of one token from its unamplified block outputs.

    Args:
        rows: `resid_post` at α = 1, one row per source layer.
        by: as in `SweepResult.contextualization_layer`; "recovered" is the default where it is
            defined and no threshold is given.
        threshold: as there.
        reads: as there.

    Raises:
        ValueError: a threshold beside `by="recovered"`, or texts to judge that were not generated.
    """
    rows = rows.sort_values("source_layer")
    written = bool(rows["written"].all())
    if by is None:
        defined = bool(rows["recovered"].notna().any())
        # With neither shares nor texts the answer is no layer.
        shares = threshold is None and reads is None and (defined or not written)
        by = "recovered" if shares else "score"
    check_choice("by", by, ("recovered", "score"))
    if by == "recovered" and threshold is not None:
        raise bad_value("threshold", "None with by='recovered'", threshold, "use by='score'")
    if (by == "score" or reads is not None) and not written:
        expected = "'recovered', as not all cells have a text"
        raise bad_value("by", expected, by, "sweep with generate='all'")
    if reads is not None:
        pairs = zip(rows["prompt"], rows["description"], strict=True)
        worth, least = pd.Series([float(reads(*p)) for p in pairs], index=rows.index), 1.0
    elif by == "score":
        worth, least = rows["score"], PAPER_THRESHOLD if threshold is None else threshold
    else:
        worth, least = worth_recovered(rows)
    hits = rows[worth >= least]
    nearest = rows.loc[[worth.idxmax()]] if worth.notna().any() else rows.head(1)
    row = (hits if len(hits) else nearest).iloc[0]
    return Contextualization(
        layer=int(row["source_layer"]) if len(hits) else None,
        position=int(row["position"]),
        token=str(row["token"]),
        about=str(row["about"]) or str(row["prompt"]),
        by=by if reads is None else "reads",
        description=str(row["description"]),
        score=float(row["score"]),
        recovered=float(row["recovered"]),
        others=float(row.get("other_prompt_recovered", math.nan)),
        own_words=str(row["own_words"]),
        echo=bool(row["echo"]),
    )


def worth_recovered(rows: pd.DataFrame) -> tuple[pd.Series[float], float]:
    """Return the shares recovered, above others' where these are there, and the least that reads.

    That is half of the best one; infinite if even the best one is under `LEAST_RECOVERED`.
    """
    worth = rows["recovered"]
    if "other_prompt_recovered" in rows:
        worth = above_others(worth, rows["other_prompt_recovered"])
    return worth, worth.max() / 2 if worth.max() >= LEAST_RECOVERED else math.inf


def caveats(table: pd.DataFrame, provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the caveats of a table of one prompt's cells, given the provenance of its sweep."""
    if table.empty:
        return ()
    lines = (rule(table, provenance.get("config", {})) for rule in _RULES)
    return tuple(line for line in lines if line)[:MOST_CAVEATS]


def flags(norm_outlier: float, unchanged: bool) -> tuple[str, ...]:
    """Return, in words, what the two columns say against a reading (see `Reading`)."""
    far = f"{norm_outlier:,.0f} times the usual norm of its layer"
    return (*(far,) * (norm_outlier >= OUTLIER), *("changes nothing",) * bool(unchanged))


def _attention_sink(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    read = table["kind"].isin(KINDS)  # the position of a given vector is its number
    times = table["norm_outlier"]
    # Of an older file only the place is known.
    rows = table[read & ((times >= OUTLIER) | (times.isna() & (table["position"] == 0)))]
    plain = rows[rows["alpha"] == 1]
    if plain.empty:
        return ""
    most = plain["norm_outlier"].max()
    norm = (
        "the first of its text"
        if pd.isna(most)
        else f"{most:,.0f} times as long as is usual in its layer"
    )
    return (
        f"token {plain['token'].iloc[0]!r} is {norm}, and so an attention sink that carries little "
        "about the name. Try source_template='Tell me about {}'."
    )


def _nothing_changed(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    unchanged = int(table["unchanged"].sum())
    if 2 * unchanged < len(table):
        return ""
    return (
        f"{unchanged} of {len(table)} patches change nothing: the model writes or expects the same "
        "without them. Try an earlier target layer, or a larger α."
    )


def _nothing_recovered(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    rows = _plain(table)
    rows = rows[rows["kind"] == "resid_post"]
    best = rows["recovered"].max()
    if pd.isna(best) or best >= LEAST_RECOVERED or rows["source_layer"].nunique() < 3:
        return ""
    return (
        f"no unamplified block output recovers more than {best:.2f} of the model's own words "
        f"({rows['own_words'].iloc[0]!r}): this setting may not read this model. Try "
        + ("" if config.get("target_layer") == "same" else "target_layer='same', or ")
        + "`superscopes check MODEL`."
    )


def _poor_own_words(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    abouts = table.drop_duplicates("about")
    gap = abouts["plain_nats"] - abouts["unpatched_nats"]
    undefined = abouts[(abouts["about"] != "") & ~(gap >= LEAST_GAP)]
    if len(undefined):
        return (
            f"recovered is not defined for {undefined['about'].iloc[0]!r}: with the name in the "
            f"target prompt the model says {undefined['own_words'].iloc[0]!r}, hardly more likely "
            "than without it. Try another target prompt, or reference='a true fact'."
        )
    for about, words in zip(abouts["about"], abouts["own_words"], strict=True):
        if is_echo(words, about):
            return (
                f"the model's own words of {about!r} repeat the name ({words!r}): recovered then "
                "measures copying. Try another target prompt, or reference='a true fact'."
            )
    return ""


def _no_shared_word(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Judge the text at the contextualization layer that shares of the own words choose."""
    rows = rows_at(table, target_layer="all")
    rows = rows[(rows["kind"] == "resid_post") & (rows["alpha"] == 1)].sort_values("source_layer")
    if rows.empty or rows.duplicated("source_layer").any():  # no single one
        return ""
    found = contextualization(rows)
    own = _content_words(found.own_words)
    if found.by != "recovered" or found.layer is None or not found.description or not own:
        return ""
    if is_echo(found.own_words, found.about) or {*own} & {*_content_words(found.description)}:
        return ""
    line = (
        f"the text at layer {found.layer} ({found.description!r}), the contextualization layer, "
        f"shares no word with the own words ({found.own_words!r}); "
    )
    later = rows[rows["source_layer"] > found.layer]
    for layer, text in zip(later["source_layer"], later["description"], strict=True):
        if shared := [word for word in own if word in _content_words(str(text))]:
            judge = f"reads=lambda _, text: {shared[-1]!r} in text.casefold()"
            return f"{line}the first later one that does is at layer {layer}. Try {judge}."
    return f"{line}nor does any later one. Try reads= with a judge of your own."


def _content_words(text: str) -> list[str]:
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return [word for word in words if len(word) > 3 and f" {word} " not in f" {_NO_CONTENT}"]


def _unusual_norms(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    ratio = _plain(table)["norm_ratio"].median()
    if pd.isna(ratio) or USUAL_RATIO[0] <= ratio <= USUAL_RATIO[1]:
        return ""
    return (
        f"at α = 1 the vectors are {ratio:.3g} times as long as the residual stream that they "
        "replace (median). Try unit='residual', or a target layer near the source."
    )


def _same_texts(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    rows = _plain(table)
    texts = rows.loc[rows["written"], "description"]
    if len(texts) < 4 or not 2 * (count := int(texts.value_counts().iloc[0])) > len(texts):
        return ""
    same = config.get("target_layer") == "same"
    return (
        f"{count} of {len(texts)} unamplified cells of {rows['kind'].iloc[0]} read as "
        f"{texts.value_counts().index[0]!r}. Try "
        + ("another target prompt." if same else "target_layer='same'.")
    )


def _echoes(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    scored = table[table["score"] >= table["score"].quantile(0.9)]
    count = int(scored["echo"].sum())
    if len(scored) < 3 or 3 * count < len(scored):
        return ""
    return (
        f"{count} of the {len(scored)} texts with the highest scores repeat the name, which "
        "similarity rewards. Try the column recovered."
    )


_RULES = (
    _attention_sink, _nothing_changed, _nothing_recovered, _poor_own_words, _no_shared_word,
    _unusual_norms, _same_texts, _echoes,
)  # fmt: skip


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the unamplified block outputs, or all unamplified cells where there are none."""
    plain = table[table["alpha"] == 1]
    outputs = plain[plain["kind"] == "resid_post"]
    return outputs if len(outputs) else plain
