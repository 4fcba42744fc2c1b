"""Choose α with and without knowledge of the source prompt (the paper's future work).

1. A selector is a callable from a table to one rank per row: higher is better, NaN is no rank.
2. `choose` keeps the highest-ranked greedy row of every site.
3. `rate` returns what the rows that each selector chooses are worth, between two bounds: an oracle
   that finds the best α of every site, and an α chosen at random.

By what they look at, from the most to the least:

- the answer: `by_similarity`, the paper's automatic amplifier, and `by_recovered`;
- the answers of other prompts: `by_other_prompts`;
- the generated text: `lowest_entropy`, `largest_lift`, `neighbour_agreement`, `mode_frequency`;
- one forward pass, without a text (`alpha_signals`): `self_explaining`, `equal_dose`.
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
from superscopes_tl.statistics.shares import cross_fitted

Selector: TypeAlias = Callable[[pd.DataFrame], "pd.Series[float]"]

ORACLE = "best alpha (oracle)"
BLIND = "random alpha"
SIMILAR, SURE = 0.4, 0.6
"""The weights of self-similarity and entropy in `self_explaining`."""
LEAST_SIMILARITY = 0.01
"""A site whose self-similarity does not exceed this at any α explains nothing."""


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


def by_recovered(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by the share of the model's own words: the number by which a reading is also judged."""
    return table["recovered"]


def by_other_prompts(table: pd.DataFrame) -> pd.Series[float]:
    """Rank the α that gains most for the prompts of other folds (`cross_fitted`); no other ranks.

    Raises:
        ValueError: as `cross_fitted`.
    """
    chosen = cross_fitted(table.assign(_row=range(len(table))), target_layer="all")["_row"]
    return pd.Series(np.where(np.isin(range(len(table)), chosen), 1.0, np.nan), index=table.index)


def self_explaining(table: pd.DataFrame) -> pd.Series[float]:
    """Rank by 0.4·S - 0.6·H, each from 0 to 1 over the α of its site.

    S and H are the self-similarity and the first entropy of `alpha_signals`; the formula and the
    failure flag are those of self-explaining SAE features (Kharlapenko et al. 2024). A site that
    `explains_nothing` has no rank.

    Raises:
        ValueError: a table without the signals.
    """
    similar, sure = (
        _from_0_to_1(_signal(table, name), table) for name in ("self_similarity", "first_entropy")
    )
    return (SIMILAR * similar - SURE * sure).mask(explains_nothing(table))


def explains_nothing(table: pd.DataFrame) -> pd.Series[bool]:
    """Return for each row whether its site's self-similarity is at most 0.01 at every α.

    The authors leave such vectors out: the model does not take up what was patched. Where it was
    not measured (NaN) that is not known, and so False.

    Raises:
        ValueError: a table without the signal.
    """
    similar = _signal(table, "self_similarity")
    return similar.groupby(_sites(table)).transform("max") <= LEAST_SIMILARITY


def equal_dose(nats: float = 1.0) -> Selector:
    """Return a selector of the smallest |α| that changes the model's predictions by so much.

    That is the first whose `kl_unpatched` (see `alpha_signals`) reaches `nats`. Where none does, it
    is the α that comes nearest. One nat is the dose of iso-KL steering calibration.
    """

    def dose(table: pd.DataFrame) -> pd.Series[float]:
        given = _signal(table, "kl_unpatched")
        # Above 0 for what reaches the dose, below for what does not; NaN is no rank.
        return (given - nats).mask(given >= nats, 1 / (1 + table["alpha"].abs()))

    return dose


def mode_frequency(words: int | None = None) -> Selector:
    """Return a selector of the α whose sampled descriptions agree most.

    The rank of a cell is the share of its draws (rows with `draw` above 0) that have its most
    frequent description; of several equally frequent ones any. An empty description agrees with
    none. Confidence by draws: https://arxiv.org/abs/2605.26045.

    Args:
        words: compare only so many first words; defaults to all.
    """

    def frequency(table: pd.DataFrame) -> pd.Series[float]:
        drawn = table[table["draw"] > 0]
        if drawn.empty:
            fix = "sweep with draw=1, 2, ... and put the tables together"
            raise bad_value("table", "sampled rows (draw above 0)", "none", fix)
        texts = drawn["description"].str.casefold().str.split().str[:words].str.join(" ")
        cells = [drawn[column] for column in (*SITE, "alpha")]
        most = (
            texts[texts != ""]
            .groupby([c[texts != ""] for c in cells])
            .agg(lambda several: several.value_counts().iloc[0])
        )
        share = (most / texts.groupby(cells).size()).fillna(0.0)
        places = pd.MultiIndex.from_frame(table[[*SITE, "alpha"]])
        return share.reindex(places).set_axis(table.index)

    return frequency


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
    worth: Callable[[pd.DataFrame], pd.Series[Any]],
    *,
    against: Selector = by_similarity,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what each selector's choice is worth, with bootstrap intervals.

    A prompt's value is the mean worth of the rows that are chosen at its sites; a selector's value
    is the mean over prompts. Sites of one prompt are not independent, so the bootstrap resamples
    whole prompts. Rows without a worth (NaN) are left out.

    Args:
        table: readings of many prompts; a site with a single α leaves nothing to choose.
        selectors: what to compare, by name.
        worth: of greedy rows: whether they are right, or a number such as the column `recovered`.
        against: the selector to whose choice the others are compared.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row per selector, then `best alpha (oracle)`, the highest worth at each site, and
        `random alpha`, that expected of a uniformly random α. Columns: `value`, `low` and `high`
        (95 % percentile interval, NaN with one prompt), and the paired `difference` to `against`
        with `difference_low` and `difference_high`.

    Raises:
        ValueError: no greedy rows with a worth.
    """
    rows = table.reset_index(drop=True)
    judged = worth(rows[rows["draw"] == 0]).astype(float)
    if judged.isna().all():
        fix = "pass a finished sweep"
        raise bad_value("table", "greedy rows (draw 0) with a worth", "none", fix)
    rows = rows.drop(index=judged.index[judged.isna()])
    judged = judged.dropna()
    site = judged.groupby(_sites(rows.loc[judged.index]))
    values = pd.DataFrame(
        {
            name: judged.loc[_chosen(rows, selector)].groupby(rows["prompt"]).mean()
            for name, selector in {**selectors, "": against}.items()
        }
    )
    baseline = values.pop("")
    values[ORACLE] = site.max().groupby("prompt").mean()
    values[BLIND] = site.mean().groupby("prompt").mean()
    found: dict[str, Any] = {}
    parts = {"": values, "difference": values.sub(baseline, axis=0)}
    for name, numbers in parts.items():
        low, high = bootstrap(numbers.to_numpy(), resamples=resamples, seed=seed)
        before = f"{name}_" if name else ""
        found |= {name or "value": numbers.mean(), f"{before}low": low, f"{before}high": high}
    return pd.DataFrame(found, index=values.columns).rename_axis("selector")


def _chosen(rows: pd.DataFrame, selector: Selector) -> pd.Index[int]:
    """Return the labels of the chosen rows, in order; the labels of `rows` are distinct."""
    ranks = selector(rows)
    if not isinstance(ranks, pd.Series) or not ranks.index.equals(rows.index):
        wanted = f"a Series of {len(rows)} ranks with the table's index"
        raise bad_value("selector", wanted, ranks, "return one rank per row, NaN for no rank")
    order = rows.assign(_rank=ranks, _size=rows["alpha"].abs())[rows["draw"] == 0].sort_values(
        ["_rank", "_size"], ascending=[False, True], na_position="last", kind="stable"
    )
    return order.drop_duplicates(SITE).index.sort_values()


def _sites(table: pd.DataFrame) -> list[pd.Series[Any]]:
    return [table[column] for column in SITE]


def _signal(table: pd.DataFrame, name: str) -> pd.Series[float]:
    if name not in table:
        fix = "table.merge(alpha_signals(plan))"
        raise bad_value("table", f"a column {name!r}", list(table.columns), fix)
    return table[name]


def _from_0_to_1(values: pd.Series[float], table: pd.DataFrame) -> pd.Series[float]:
    """Return values scaled from the lowest to the highest of each site; 0 where all are equal."""
    site = values.groupby(_sites(table))
    low, high = site.transform("min"), site.transform("max")
    return (values - low) / (high - low).where(high > low, 1.0)


def _has_description(table: pd.DataFrame) -> pd.Series[bool]:
    return table["description"].str.strip() != ""
