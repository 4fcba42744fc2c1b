"""Several methods on the same prompts, counted as in the paper and with a correction for chance.

1. Score every text of every method against every prompt; each distinct text is embedded once.
2. Per method, layer and prompt keep the best text of the budget: one cell.
3. A cell is a hit when its score exceeds the paper's threshold (section 4.1, Figure 3), and a
   corrected hit when it exceeds what the other prompts' texts of the same method and layer reach
   against that prompt (`chance`).
4. Count the hits per layer, with bootstrap intervals over prompts and the counts expected by
   chance, and take the difference of every method to the first, paired by prompt. Likewise how
   often the right prompt is found among all (`ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from superscopes_tl.engine import crop_description
from superscopes_tl.errors import bad_value, check_choice, check_count
from superscopes_tl.scores import PAPER_THRESHOLD, Scorer, as_scorer, scorer_name, similarities
from superscopes_tl.statistics import chance, ranks

COLUMNS = {"prompt": str, "source_layer": Real, "alpha": Real, "text": str}
DISCOVERY = 0.05
"""The q-value up to which a cell is a discovery."""

_MARKS = {"hits": "hit", "corrected": "corrected", "recall_at_1": "found", "mrr": "reciprocal_rank"}
"""The columns of counts and differences, and what they are sums of, the latter two means of."""
_SUMMED = (*_MARKS.values(), "chance", "chance_corrected", "discovery")
_PLACE = ["method", "source_layer"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hits of several methods, counted with and without correction for chance.

    Attributes:
        cells: one row per method, prompt and source layer: `score`, the best of its texts against
            its own prompt, with its `alpha` and `text`; `hit`, whether it exceeds the threshold;
            `null`, the percentile of the other prompts; `corrected`, whether it exceeds that;
            `p_value` and `q_value` (Benjamini-Hochberg over all cells of the method); `chance`
            and `chance_corrected`, the probability of either hit by chance; `found`, whether its
            own is the prompt that its texts resemble most, and `reciprocal_rank` of it (`ranks`).
            A method
            "…, one alpha" has a row per α, each judged alone.
        counts: one row per method and source layer: `prompts`, `hits` and `corrected`, each with
            the ends `_low` and `_high` of its 95 % bootstrap interval, `expected_by_chance`
            hits, `expected_corrected` hits by chance, and `discoveries`, cells with a q-value up
            to 0.05; `recall_at_1` and `mrr` of the right prompt among all, with the ends of their
            intervals, and what they are by chance, `chance_recall_at_1` and `chance_mrr`. The
            counts of a method "…, one alpha" are means over its α.
        differences: the method minus the first method, over the prompts that both have: `prompts`,
            `hits`, `corrected`, `recall_at_1` and `mrr` with the ends of their paired bootstrap
            intervals.
        notes: what is missing, empty or unequal.
        settings: threshold, percentile, scorer, score_on, resamples and seed.
    """

    cells: pd.DataFrame
    counts: pd.DataFrame
    differences: pd.DataFrame
    notes: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were given."""
        return list(dict.fromkeys(self.counts["method"]))

    @property
    def layers(self) -> list[int]:
        """The source layers that some method has."""
        return sorted({int(layer) for layer in self.counts["source_layer"]})

    def lines(self, corrected: bool = False) -> list[str]:
        """Return a line per method, its name and its counts: `Patchscopes 13 3 1 1 5 4 2`.

        Layers ascend, with `-` where a method lacks the layer.

        Args:
            corrected: corrected hits instead of hits.
        """
        column = "corrected" if corrected else "hits"
        table = self.counts.pivot(index="method", columns="source_layer", values=column)
        shown = table.round(1).map("{:g}".format).where(table.notna(), "-")
        return [" ".join([name, *shown.loc[name]]) for name in self.methods]


def compare(
    methods: Mapping[str, pd.DataFrame],
    *,
    scorer: Scorer | str | Path | None = None,
    score_on: str = "text",
    threshold: float = PAPER_THRESHOLD,
    percentile: float = 95,
    resamples: int = 10_000,
    seed: int = 0,
    one_alpha: bool = False,
) -> Comparison:
    """Count the prompts that each method reads, with and without correction for chance.

    Args:
        methods: by name, one row per generated text with the columns prompt, source_layer, alpha
            and text; the rows of one prompt and layer are its budget. The others are compared with
            the first method.
        scorer: defaults to the paper's, all-MiniLM-L6-v2.
        score_on: the whole "text", as in the paper, or its "description" alone.
        threshold: the similarity above which a text is a hit.
        percentile: of the other prompts' best scores, for a corrected hit.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        one_alpha: also count every method that has several α with one α alone, the budget of
            Patchscopes: the mean over its α, under the name "…, one alpha".

    Raises:
        ValueError: a method without rows or without one of the columns, fewer than three prompts
            at every layer, methods that share no prompt and layer, or a setting out of range.
    """
    _check_settings(score_on, threshold, percentile, resamples)
    tables = {name: _checked(name, table, score_on) for name, table in methods.items()}
    _check_overlap(tables)
    prompts = list(dict.fromkeys(p for table in tables.values() for p in table["prompt"]))
    judged = list(dict.fromkeys(t for table in tables.values() for t in table["judged"]))
    chosen = as_scorer(scorer)
    scores = pd.DataFrame(similarities(chosen, judged, prompts), index=judged, columns=prompts)

    budgets = []
    for name, table in tables.items():
        budgets.append((name, table))
        if one_alpha and table["alpha"].nunique() > 1:
            budgets += [(f"{name}, one alpha", rows) for _, rows in table.groupby("alpha")]
    cells = [_cells(name, table, scores, threshold, percentile) for name, table in budgets]
    everything = pd.concat([part for part in cells if len(part)], ignore_index=True)
    counts, differences = _tally(everything, resamples=resamples, seed=seed)
    return Comparison(
        everything.drop(columns="discovery"),
        counts,
        differences,
        tuple(_notes(tables, everything)),
        {
            "scorer": scorer_name(chosen), "score_on": score_on, "threshold": threshold,
            "percentile": percentile, "resamples": resamples, "seed": seed,
        },
    )  # fmt: skip


def _cells(
    name: str, table: pd.DataFrame, scores: pd.DataFrame, threshold: float, percentile: float
) -> pd.DataFrame:
    """Return the cells of one budget; the q-values of all layers are one family."""
    cells = []
    for layer, rows in table.groupby("source_layer"):
        groups = dict(iter(rows.groupby("prompt", sort=False)))
        if len(groups) < chance.FEWEST_PROMPTS:
            continue
        at = scores[list(groups)]
        of = [at.loc[group["judged"]].to_numpy() for group in groups.values()]
        best = np.stack([chance.best_scores(each) for each in of])
        pairs = zip(groups.values(), of, range(len(of)), strict=True)
        chosen = pd.DataFrame([_best_row(group, own[:, i]) for group, own, i in pairs])
        found = ranks.found_ranks(best)
        cells.append(
            pd.DataFrame(
                {
                    "method": name,
                    "prompt": list(groups),
                    "source_layer": layer,
                    "score": np.diagonal(best),
                    **{column: chosen[column].to_numpy() for column in ("alpha", "text")},
                    "hit": np.diagonal(best) > threshold,
                    "null": chance.other_prompt_null(best, percentile),
                    "corrected": chance.corrected_hits(best, percentile),
                    "p_value": chance.p_values(best),
                    "q_value": math.nan,  # of all layers together, below
                    "chance": chance.chance_hits(best, threshold),
                    "chance_corrected": chance.chance_corrected(best, percentile),
                    "found": found[:, 0],
                    "reciprocal_rank": found[:, 1],
                }
            )
        )
    if not cells:  # an α of few prompts, alone
        return pd.DataFrame()
    together = pd.concat(cells, ignore_index=True)
    q = chance.q_values(together["p_value"].to_numpy())
    return together.assign(q_value=q, discovery=q <= DISCOVERY)


def _best_row(group: pd.DataFrame, own: Float[np.ndarray, " text"]) -> pd.Series:
    """Return the best text; among equals that of the smallest |α|, as `SweepResult.best` does."""
    order = np.lexsort((group["alpha"].abs(), -np.nan_to_num(own, nan=-math.inf)))
    best: pd.Series = group.iloc[order[0]]
    return best


def _tally(cells: pd.DataFrame, *, resamples: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return counts and differences: sums over prompts of means over a prompt's rows."""
    means = cells.astype(dict.fromkeys(_SUMMED, float))
    means = means.groupby([*_PLACE, "prompt"], sort=False)[list(_SUMMED)].mean()
    places = {at: rows.droplevel([0, 1]) for at, rows in means.groupby(_PLACE, sort=False)}
    first = cells["method"].iloc[0]

    def summed(marks: pd.DataFrame) -> dict[str, float]:
        values = marks[list(_MARKS.values())].to_numpy()
        ends = chance.bootstrap(values, statistic=chance.total, resamples=resamples, seed=seed)
        row: dict[str, float] = {"prompts": len(marks)}
        for name, *several in zip(_MARKS, values.sum(axis=0), *ends, strict=True):
            total, low, high = np.array(several) / (len(marks) if name in ranks.FOUND else 1)
            row |= {name: total, f"{name}_low": low, f"{name}_high": high}
        return row

    counts, differences = [], []
    for (method, layer), marks in places.items():
        place = {"method": method, "source_layer": layer}
        expected = marks[["chance", "chance_corrected", "discovery"]].sum().to_numpy()
        names = ("expected_by_chance", "expected_corrected", "discoveries")
        by_chance = dict(zip(names, expected, strict=True))
        for name, value in zip(ranks.FOUND, ranks.found_by_chance(len(marks)), strict=True):
            by_chance[f"chance_{name}"] = value
        counts.append(place | summed(marks) | by_chance)
        if method != first and (first, layer) in places:
            paired = (marks - places[first, layer]).dropna()  # the prompts that both have
            if len(paired):
                differences.append(place | summed(paired))
    return pd.DataFrame(counts), pd.DataFrame(differences)


def _checked(name: str, table: pd.DataFrame, score_on: str) -> pd.DataFrame:
    """Return the rows of one method with what is scored of them in the column `judged`."""
    argument = f"methods[{name!r}]"
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing or table.empty:
        wanted = f"at least one row with the columns {', '.join(COLUMNS)}"
        got = f"no column {missing}" if missing else "an empty table"
        raise bad_value(argument, wanted, got, "pass one row per generated text")
    for column, type_ in COLUMNS.items():
        if strange := [value for value in table[column] if not isinstance(value, type_)]:
            wanted = f"{'strings' if type_ is str else 'numbers'} in the column {column}"
            fix = "pass an empty text as '' (pd.read_csv: keep_default_na=False)"
            raise bad_value(argument, wanted, strange[0], fix)
    if table.groupby("source_layer")["prompt"].nunique().max() < chance.FEWEST_PROMPTS:
        wanted = f"at least {chance.FEWEST_PROMPTS} prompts at some layer"
        got = f"{table['prompt'].nunique()} prompts"
        raise bad_value(argument, wanted, got, "add prompts: the null needs others")
    rows = table.reset_index(drop=True)
    judged = rows["text"].map(crop_description) if score_on == "description" else rows["text"]
    return rows.assign(judged=judged)


def _check_settings(score_on: str, threshold: float, percentile: float, resamples: int) -> None:
    check_choice("score_on", score_on, ("text", "description"))
    check_count("resamples", resamples, least=1, fix="10000 is the default")
    if not math.isfinite(threshold):
        raise bad_value("threshold", "a finite number", threshold, "0.3 is the paper's")
    if not 0 < percentile < 100:
        raise bad_value("percentile", "a number between 0 and 100", percentile, "95 is usual")


def _check_overlap(tables: Mapping[str, pd.DataFrame]) -> None:
    """Refuse methods that share no prompt and layer with the first one."""
    if not tables:
        raise bad_value("methods", "at least one method", {}, "pass its table by name")
    places = {
        name: set(table[["prompt", "source_layer"]].itertuples(index=False))
        for name, table in tables.items()
    }
    first = next(iter(tables))
    for name, table in tables.items():
        if not places[first] & places[name]:
            wanted = f"some prompt and source layer of {first}"
            got = f"other prompts, or layers {_some(sorted(set(table['source_layer'])))}"
            fix = "compare methods on the same prompts and layers"
            raise bad_value(f"methods[{name!r}]", wanted, got, fix)


def _notes(tables: Mapping[str, pd.DataFrame], cells: pd.DataFrame) -> Iterator[str]:
    """Yield what limits the counts."""
    for column, what in (("source_layer", "layers"), ("prompt", "prompts")):
        union = list(dict.fromkeys(v for table in tables.values() for v in table[column]))
        for name, table in tables.items():
            lacking = [value for value in union if value not in set(table[column])]
            if lacking:
                yield f"{name} lacks the {what} {_some(lacking)}: counted over what is there."
    for name, table in tables.items():
        mine = cells[cells["method"] == name]
        empty = sum(not text.strip() for text in table["judged"])
        if empty:
            silent = mine[mine["score"].isna()]
            places = [f"{row.prompt} at layer {row.source_layer}" for row in silent.itertuples()]
            where = f", so {_some(places)} is no hit" if places else ""
            yield f"{name}: {empty} of {len(table)} texts empty, without a score{where}."
        left_out = sorted(set(table["source_layer"]) - set(mine["source_layer"]))
        if left_out:
            yield f"{name}: layers {_some(left_out)} have too few prompts and are left out."
        budget = table.groupby(["prompt", "source_layer"]).size()
        if budget.nunique() > 1:
            yield (
                f"{name} has {budget.min()} to {budget.max()} texts per prompt and layer: "
                "more texts are more chances."
            )
    smallest = cells["p_value"].min()
    family = max(int(cells["method"].eq(name).sum()) for name in tables)
    if cells["q_value"].min() > DISCOVERY:
        yield (
            f"No q-value is up to {DISCOVERY}: the smallest p-value is {smallest:.3f}, and of "
            f"{family} cells {math.ceil(family * smallest / DISCOVERY)} would have to be as small."
        )


def _some(values: Sequence[object], most: int = 5) -> str:
    """Return the first few values, with control characters escaped."""
    shown = ", ".join(repr(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
