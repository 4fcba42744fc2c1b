"""Choose α without, and with, a look at the source prompt (the paper's future work).

1. A selector is a plain callable from a table to one rank per row: higher is better, NaN says
   that it cannot tell.
2. `choose` keeps the highest-ranked greedy row of every site.
3. `rate` asks, where the truth is known, how often the chosen row is right, beside two bounds: an
   oracle that finds a right α wherever there is one, and an α chosen blindly.
4. `amplifiers` asks it of ways to amplify: how many prompts can be read, how many are.

`by_similarity` is the paper's automatic amplifier. It scores a description against the source
prompt, so it knows what it looks for. The others see only what the model wrote and how surely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SITE
from superscopes_tl.scores import Scorer, as_scorer

Selector: TypeAlias = Callable[[pd.DataFrame], "pd.Series[float]"]

ORACLE = "any alpha (oracle)"
BLIND = "random alpha"


def choose(table: pd.DataFrame, selector: Selector) -> pd.DataFrame:
    """Return the row of every site that the selector ranks highest, among greedy rows.

    Among equal ranks the smallest |α| wins; a site without any rank keeps its smallest |α|. With
    `by_similarity` this is `SweepResult.best`.

    Args:
        table: cells of one prompt or of many.
        selector: ranks every row of the table.

    Returns:
        One row per site, with the table's columns, in the table's order.

    Raises:
        ValueError: the selector's ranks are not one per row.
    """
    rows = table.reset_index(drop=True)
    return rows.loc[_chosen(rows, selector)].reset_index(drop=True)


def by_similarity(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by the score: the paper's automatic amplifier (section 5.1)."""
    return table["score"]


def lowest_entropy(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by how sure the model was of each token of its description; needs no prompt.

    Raises:
        ValueError: the table has no column `entropy`.
    """
    entropy = _column(table, "entropy", "sweep again: this run file is older than the column")
    return -entropy.where(_says_something(table))


def largest_lift(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by how much the patch raised the text's log-probability per token, in nats.

    A text that the target prompt would bring forth anyway owes nothing to the vector.

    Raises:
        ValueError: the table has no column `unpatched_log_probability`.
    """
    fix = 'ask the sweep for the opt-in control "unpatched_log_probability"'
    unpatched = _column(table, "unpatched_log_probability", fix)
    lift = _column(table, "log_probability", fix) - unpatched
    return lift.where(_says_something(table))


def neighbour_agreement(scorer: Scorer | None = None) -> Selector:
    """Return a selector that trusts a description which the neighbouring α repeat.

    The rank is the mean similarity to the greedy descriptions of the same site at the next
    smaller and the next larger α. An empty description has no rank, and is no neighbour.

    Args:
        scorer: how alike two descriptions are; the paper's sentence embeddings unless given.
    """

    def agreement(table: pd.DataFrame) -> pd.Series[float]:
        ladder = table[(table["draw"] == 0)].sort_values([*SITE, "alpha"], kind="stable")
        site = dict(ladder.groupby(SITE, sort=False).ngroup())
        words = table["description"].where(_says_something(table), "")
        pairs = [
            (a, b)
            for a, b in pairwise(ladder.index)
            if site[a] == site[b] and words[a] and words[b]
        ]
        if not pairs:
            return pd.Series(np.nan, index=table.index)
        left, right = zip(*pairs, strict=True)
        alike = list(as_scorer(scorer)([words[i] for i in left], [words[i] for i in right]))
        both = pd.Series([*alike, *alike], index=[*left, *right], dtype=float)
        return both.groupby(level=0).mean().reindex(table.index)

    return agreement


def fixed_alpha(alpha: float) -> Selector:
    """Return the baseline that takes the same α everywhere.

    A site that lacks this α keeps its smallest |α|, as wherever a selector cannot tell.

    Raises:
        ValueError: when called, if no row has this α.
    """

    def fixed(table: pd.DataFrame) -> pd.Series[float]:
        if not (table["alpha"] == alpha).any():
            raise bad_value(
                "alpha",
                f"one of {sorted(table['alpha'].unique().tolist())}",
                alpha,
                "choose an α of this sweep, or sweep over it",
            )
        return (table["alpha"] == alpha).astype(float).where(table["alpha"] == alpha)

    return fixed


def rate(
    table: pd.DataFrame,
    selectors: Mapping[str, Selector],
    right: Callable[[pd.DataFrame], pd.Series[bool]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Say how often each selector chooses a right reading.

    A prompt's share is the share of its sites whose chosen row is right; a selector's share is
    the mean over prompts, so that every prompt weighs the same. Sites of one prompt are not
    independent, so the bootstrap draws whole prompts.

    Args:
        table: cells of many prompts; sites of one α alone leave nothing to choose.
        selectors: what to compare, by name.
        right: says of every row whether its description is right.
        resamples: draws of the bootstrap.
        seed: its seed.

    Returns:
        A row per selector, then `any alpha (oracle)`, the share of sites at which some α is
        right, and `random alpha`, the share expected when α is drawn evenly. Columns: `share`,
        `low` and `high` (95 % percentile interval), and the same three of the paired difference
        to `by_similarity`: `difference`, `difference_low`, `difference_high`. With one prompt
        there is no interval: NaN.

    Raises:
        ValueError: no greedy rows.
    """
    rows = table.reset_index(drop=True)
    greedy = rows[rows["draw"] == 0]
    if greedy.empty:
        raise bad_value("table", "greedy rows (draw 0)", "none", "pass a finished sweep")
    correct = right(greedy).astype(float)
    site = correct.groupby([greedy[column] for column in SITE])
    shares = {
        name: _per_prompt(correct.loc[_chosen(rows, selector)], rows)
        for name, selector in {**selectors, "": by_similarity}.items()
    }
    baseline = shares.pop("")
    shares[ORACLE] = site.max().groupby("prompt").mean()
    shares[BLIND] = site.mean().groupby("prompt").mean()
    draws = np.random.default_rng(seed).integers(len(baseline), size=(resamples, len(baseline)))
    found = {
        name: [*_mean_and_interval(share, draws), *_mean_and_interval(share - baseline, draws)]
        for name, share in shares.items()
    }
    columns = ["share", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("selector")


def amplifiers(
    ways: Mapping[str, pd.DataFrame],
    right: Callable[[pd.DataFrame], pd.Series[bool]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Say at how many prompts each way to amplify reads right.

    A prompt counts when any of its greedy rows is right, so a way with more readings has more
    chances: `readings` says how many. `chosen` counts the prompts whose best-scoring row is right:
    what is left when the score has to find it.

    Args:
        ways: a table of the same prompts for each way to amplify, by name.
        right: says of every row whether its description is right.
        resamples: draws of the bootstrap over prompts.
        seed: its seed.

    Returns:
        A row per way. Columns: `readings`, the mean number of rows per prompt; `share` with `low`
        and `high` (95 % percentile interval), `chosen` with `chosen_low` and `chosen_high`; and
        the paired `difference` of the shares to the first way with its ends. With one prompt
        there is no interval: NaN.

    Raises:
        ValueError: no ways, or ways of different prompts.
    """
    first: pd.Series[float] | None = None
    found = {}
    for name, table in ways.items():
        rows = table[table["draw"] == 0].reset_index(drop=True)
        correct = right(rows).astype(float)
        best = rows.sort_values("score", ascending=False, na_position="last", kind="stable")
        picked = correct.loc[best.drop_duplicates("prompt").index]
        share, chosen = (part.groupby(rows["prompt"]).max() for part in (correct, picked))
        first = share if first is None else first
        if rows.empty or not share.index.equals(first.index):
            raise bad_value(
                f"ways[{name!r}]",
                f"greedy rows of the prompts {first.index.tolist()}",
                share.index.tolist(),
                "evaluate every way on the same prompts",
            )
        draws = np.random.default_rng(seed).integers(len(share), size=(resamples, len(share)))
        parts = (share, chosen, share - first)
        found[name] = [len(rows) / len(share)]
        found[name] += [value for part in parts for value in _mean_and_interval(part, draws)]
    if not found:
        raise bad_value("ways", "at least one way", {}, "give its table by name")
    columns = ["readings"]
    for what, before in (("share", ""), ("chosen", "chosen_"), ("difference", "difference_")):
        columns += [what, f"{before}low", f"{before}high"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("amplifier")


def _chosen(rows: pd.DataFrame, selector: Selector) -> pd.Index[int]:
    """Return the labels of the chosen rows, in order; `rows` are numbered from 0."""
    ranks = selector(rows)
    if not isinstance(ranks, pd.Series) or not ranks.index.equals(rows.index):
        raise bad_value(
            "selector",
            f"a Series of {len(rows)} ranks with the table's index",
            ranks,
            "return one rank per row, NaN where there is none",
        )
    order = rows.assign(_rank=ranks, _size=rows["alpha"].abs())[rows["draw"] == 0].sort_values(
        ["_rank", "_size"], ascending=[False, True], na_position="last", kind="stable"
    )
    return order.drop_duplicates(SITE).index.sort_values()


def _per_prompt(correct: pd.Series[float], rows: pd.DataFrame) -> pd.Series[float]:
    return correct.groupby(rows["prompt"]).mean()


def _mean_and_interval(share: pd.Series[float], draws: np.ndarray) -> tuple[float, float, float]:
    values = share.to_numpy()
    if len(values) < 2:
        return float(values.mean()), np.nan, np.nan
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _says_something(table: pd.DataFrame) -> pd.Series[bool]:
    return table["description"].str.strip() != ""


def _column(table: pd.DataFrame, name: str, fix: str) -> pd.Series[float]:
    if name not in table.columns:
        raise bad_value("table", f"a column {name!r}", list(table.columns), fix)
    return table[name]
