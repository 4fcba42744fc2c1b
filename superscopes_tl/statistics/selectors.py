"""Choose α with and without knowledge of the source prompt (the paper's future work).

1. A selector is a callable from a table to one rank per row: higher is better, NaN is no rank.
2. `choose` keeps the highest-ranked greedy row of every site.
3. `rate` returns the accuracy of each selector where the truth is known, between two bounds: an
   oracle that finds a right α wherever there is one, and an α chosen at random.
4. `amplifiers` compares ways to amplify: how many prompts can be read, and how many are.

`by_similarity`, the paper's automatic amplifier, scores a description against the source prompt,
so it uses the answer. The others use only the generated text and its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.experiment import SITE
from superscopes_tl.scores import Scorer, as_scorer
from superscopes_tl.statistics.chance import bootstrap

Selector: TypeAlias = Callable[[pd.DataFrame], "pd.Series[float]"]

ORACLE = "any alpha (oracle)"
BLIND = "random alpha"


def choose(table: pd.DataFrame, selector: Selector) -> pd.DataFrame:
    """Return the greedy row of every site that the selector ranks highest, in the table's order.

    Of equal ranks the smallest |α| wins; a site without any rank keeps its smallest |α|. With
    `by_similarity` this is `SweepResult.best`.

    Raises:
        ValueError: the selector's ranks are not one per row.
    """
    rows = table.reset_index(drop=True)
    return rows.loc[_chosen(rows, selector)].reset_index(drop=True)


def by_similarity(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by the score: the paper's automatic amplifier (section 5.1)."""
    return table["score"]


def lowest_entropy(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by how certain the model was of each token of its description."""
    return -table["entropy"].where(_has_description(table))


def largest_lift(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by how much the patch raised the text's log-probability per token, in nats.

    A text that the target prompt elicits anyway owes nothing to the vector.

    Raises:
        ValueError: a sweep without the control "unpatched_log_probability".
    """
    control = "unpatched_log_probability"
    if control not in table:
        fix = f'sweep with controls="{control}"'
        raise bad_value("table", f"a column {control!r}", list(table.columns), fix)
    return (table["log_probability"] - table[control]).where(_has_description(table))


def neighbour_agreement(scorer: Scorer | None = None) -> Selector:
    """Return a selector that trusts a description that the neighbouring α repeat.

    The rank is the mean similarity (by default of the paper's sentence embeddings) to the greedy
    descriptions of the same site at the next smaller and the next larger α. An empty description
    has no rank and is no neighbour.
    """

    def agreement(table: pd.DataFrame) -> pd.Series[float]:
        ladder = table[table["draw"] == 0].sort_values([*SITE, "alpha"], kind="stable")
        site = dict(ladder.groupby(SITE, sort=False).ngroup())
        words = table["description"].where(_has_description(table), "")
        pairs = [(a, b) for a, b in pairwise(ladder.index) if site[a] == site[b]]
        pairs = [(a, b) for a, b in pairs if words[a] and words[b]]
        if not pairs:
            return pd.Series(np.nan, index=table.index)
        left, right = zip(*pairs, strict=True)
        similar = list(as_scorer(scorer)(list(words[[*left]]), list(words[[*right]])))
        both = pd.Series([*similar, *similar], index=[*left, *right], dtype=float)
        return both.groupby(level=0).mean().reindex(table.index)

    return agreement


def fixed_alpha(alpha: float) -> Selector:
    """Return the baseline of one α everywhere; a site without it keeps its smallest |α|."""

    def fixed(table: pd.DataFrame) -> pd.Series[float]:
        check_choice("alpha", alpha, sorted(table["alpha"].unique().tolist()))
        return table["alpha"].where(table["alpha"] == alpha)

    return fixed


def rate(
    table: pd.DataFrame,
    selectors: Mapping[str, Selector],
    right: Callable[[pd.DataFrame], pd.Series[bool]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the accuracy of each selector, with bootstrap intervals.

    A prompt's share is the share of its sites whose chosen row is right; a selector's share is
    the mean over prompts. Sites of one prompt are not independent, so the bootstrap resamples whole
    prompts.

    Args:
        table: readings of many prompts; a site with a single α leaves nothing to choose.
        selectors: what to compare, by name.
        right: marks the rows whose description is right.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row per selector, then `any alpha (oracle)`, the share of sites at which some α is
        right, and `random alpha`, the share expected of a uniformly random α. Columns: `share`,
        `low` and `high` (95 % percentile interval, NaN with one prompt), and the paired
        `difference` to `by_similarity` with `difference_low` and `difference_high`.

    Raises:
        ValueError: no greedy rows.
    """
    rows = table.reset_index(drop=True)
    greedy = rows[rows["draw"] == 0]
    if greedy.empty:
        raise bad_value("table", "greedy rows (draw 0)", "none", "pass a finished sweep")
    correct = right(greedy).astype(float)
    site = correct.groupby([greedy[column] for column in SITE])
    shares = pd.DataFrame(
        {
            name: correct.loc[_chosen(rows, selector)].groupby(rows["prompt"]).mean()
            for name, selector in {**selectors, "": by_similarity}.items()
        }
    )
    baseline = shares.pop("")
    shares[ORACLE] = site.max().groupby("prompt").mean()
    shares[BLIND] = site.mean().groupby("prompt").mean()
    parts = {"share": shares, "difference": shares.sub(baseline, axis=0)}
    return _estimates(parts, resamples, seed).rename_axis("selector")


def amplifiers(
    ways: Mapping[str, pd.DataFrame],
    right: Callable[[pd.DataFrame], pd.Series[bool]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the share of prompts at which each way to amplify reads right.

    A prompt counts when any of its greedy rows is right, so a way with more `readings` has more
    chances. `chosen` counts the prompts whose best-scoring row is right.

    Args:
        ways: a table of the same prompts for each way to amplify, by name.
        right: marks the rows whose description is right.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.

    Returns:
        A row per way. Columns: `readings`, the mean number of rows per prompt; `share`, `chosen`
        and the paired `difference` of the shares to the first way, each with the ends of its 95 %
        interval (NaN with one prompt).

    Raises:
        ValueError: no ways, or ways of different prompts.
    """
    if not ways:
        raise bad_value("ways", "at least one way", {}, "pass its table by name")
    readings, shares, chosen = {}, {}, {}
    for name, table in ways.items():
        rows = table[table["draw"] == 0].reset_index(drop=True)
        correct = right(rows).astype(float)
        best = rows.sort_values("score", ascending=False, na_position="last", kind="stable")
        picked = correct.loc[best.drop_duplicates("prompt").index]
        shares[name], chosen[name] = (
            part.groupby(rows["prompt"]).max() for part in (correct, picked)
        )
        first = next(iter(shares.values()))
        if rows.empty or not shares[name].index.equals(first.index):
            wanted = f"greedy rows of the prompts {first.index.tolist()}"
            got, fix = shares[name].index.tolist(), "evaluate every way on the same prompts"
            raise bad_value(f"ways[{name!r}]", wanted, got, fix)
        readings[name] = len(rows) / len(first)
    can = pd.DataFrame(shares)
    parts = {"share": can, "chosen": pd.DataFrame(chosen), "difference": can.sub(first, axis=0)}
    found = _estimates(parts, resamples, seed).rename_axis("amplifier")
    found.insert(0, "readings", pd.Series(readings))
    return found


def _chosen(rows: pd.DataFrame, selector: Selector) -> pd.Index[int]:
    """Return the labels of the chosen rows, in order; `rows` are numbered from 0."""
    ranks = selector(rows)
    if not isinstance(ranks, pd.Series) or not ranks.index.equals(rows.index):
        wanted = f"a Series of {len(rows)} ranks with the table's index"
        raise bad_value("selector", wanted, ranks, "return one rank per row, NaN for no rank")
    order = rows.assign(_rank=ranks, _size=rows["alpha"].abs())[rows["draw"] == 0].sort_values(
        ["_rank", "_size"], ascending=[False, True], na_position="last", kind="stable"
    )
    return order.drop_duplicates(SITE).index.sort_values()


def _estimates(parts: Mapping[str, pd.DataFrame], resamples: int, seed: int) -> pd.DataFrame:
    """Return the mean over prompts of every column, with the ends of its interval."""
    found: dict[str, Any] = {}
    for name, values in parts.items():
        low, high = bootstrap(values.to_numpy(), resamples=resamples, seed=seed)
        before = "" if name == "share" else f"{name}_"
        found |= {name: values.mean(), f"{before}low": low, f"{before}high": high}
    return pd.DataFrame(found, index=next(iter(parts.values())).columns)


def _has_description(table: pd.DataFrame) -> pd.Series[bool]:
    return table["description"].str.strip() != ""
