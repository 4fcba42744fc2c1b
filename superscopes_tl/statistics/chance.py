"""Hits per prompt, hits by chance, and bootstrap intervals.

1. `best[s, r]` is the best similarity that the texts of source prompt s reach against reference
   prompt r, for one method and one layer; the diagonal is each prompt's own score.
2. The other-prompt null of r is column r without its own entry: what texts about other prompts
   reach against r, chosen the same way from as many samples.
3. A corrected hit is a prompt whose own score exceeds the 95th percentile of its null.
4. `bootstrap` is the percentile bootstrap over prompts, of any statistic.
5. `sign_flip_test` tests whether paired gains are above zero on average.

An empty text scores NaN, never 0. A source prompt whose every text is empty has no score: it is no
hit, and it enters no null. A reference with fewer than two scored others has no null, so its own
prompt is no corrected hit either. All functions of `best` raise a `ValueError` unless it is square,
with at least three prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from superscopes_tl.errors import bad_value

Best = Float[np.ndarray, "source reference"]
Values = Float[np.ndarray, "row *columns"]
Weights = Float[np.ndarray, "resample row"]
Resampled = Float[np.ndarray, "resample *columns"]
Ends = Float[np.ndarray, "*columns"]
Statistic: TypeAlias = Callable[[Values, Weights], Resampled]
"""From the rows and how often each resample holds each row to one value per resample."""

ENUMERATED = 12
"""Up to this number of prompts `sign_flip_test` enumerates all sign patterns."""
FEWEST_PROMPTS = 3
"""The fewest prompts with a null: it needs two others."""


def best_scores(
    scores: Float[np.ndarray, "*source text reference"],
) -> Float[np.ndarray, "*source reference"]:
    """Return the best of each source prompt's texts against every reference, NaN without any."""
    best: Float[np.ndarray, "*source reference"] = np.fmax.reduce(scores, axis=-2)
    return best


def other_prompt_null(best: Best, percentile: float = 95) -> Float[np.ndarray, " reference"]:
    """Return the percentile (numpy's linear quantile) of the other prompts' scores."""
    return _each(best, lambda _, others: np.percentile(others, percentile), np.nan, scored=False)


def corrected_hits(best: Best, percentile: float = 95) -> Bool[np.ndarray, " prompt"]:
    """Return which prompts' own score is strictly above their other-prompt null.

    By chance alone this accepts a little more than 5 % of the prompts. If n others and the prompt
    itself have distinct scores from one distribution, the linear quantile lies at rank
    h = 0.95 (n - 1) among the others, counted from 0, and the own score is above it with a
    probability between

        (n - 1 - floor(h)) / (n + 1)    and    (n - floor(h)) / (n + 1),

    for evenly spread scores (n - h) / (n + 1) = (0.05 n + 0.95) / (n + 1). With 48 prompts that is
    between 6.3 % and 8.3 %, evenly spread 6.9 %, and it tends to 5 % as n grows.
    `chance_corrected` computes it exactly for given scores.
    """
    return other_prompt_null(best, percentile) < np.diagonal(best)


def p_values(best: Best) -> Float[np.ndarray, " prompt"]:
    """Return (1 + others at or above the own score) / (1 + others), NaN without score or null."""
    return _each(
        best, lambda own, others: (1 + np.count_nonzero(others >= own)) / (1 + len(others)), np.nan
    )


def q_values(p: Float[np.ndarray, "*cells"]) -> Float[np.ndarray, "*cells"]:
    """Return the Benjamini-Hochberg q-values of one family of p-values, ignoring NaN."""
    from scipy.stats import false_discovery_control  # takes a second that importing need not

    q = np.full_like(p, np.nan)
    if (there := ~np.isnan(p)).any():
        q[there] = false_discovery_control(p[there], method="bh")
    return q


def chance_hits(best: Best, threshold: float) -> Float[np.ndarray, " prompt"]:
    """Return, per prompt, the share of other prompts' best scores above the threshold.

    Their sum is the expected number of hits if texts carry no information about their prompt. A
    prompt without a score cannot be a hit: 0.
    """
    return _each(best, lambda _, others: np.mean(others > threshold), 0.0)


def chance_corrected(best: Best, percentile: float = 95) -> Float[np.ndarray, " prompt"]:
    """Return, per prompt, the probability of a corrected hit if texts are assigned at random.

    Any of a reference's n + 1 scores is then equally likely to be the own one: the result is the
    share of them that exceed the percentile of the other n (see `corrected_hits`).
    """

    def accepted(own: float, others: Float[np.ndarray, " other"]) -> Any:
        scores, count = np.append(others, own), len(others) + 1
        rest = np.broadcast_to(scores, (count, count))[~np.eye(count, dtype=bool)]
        return np.mean(scores > np.percentile(rest.reshape(count, -1), percentile, axis=1))

    return _each(best, accepted, 0.0)


def mean(values: Values, weights: Weights) -> Resampled:
    """Return the weighted mean of the rows."""
    counts = weights.sum(axis=1).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(total(values, weights) / counts)


def total(values: Values, weights: Weights) -> Resampled:
    """Return the weighted sum of the rows."""
    return np.asarray(np.tensordot(weights, values, axes=1))


def mean_defined(values: Values, weights: Weights) -> Resampled:
    """Return the weighted mean of the rows per column, each over its own defined values."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # NaN where a resample holds no defined value
        means = total(np.where(there, values, 0.0), weights) / total(there * 1.0, weights)
    return np.asarray(means)


def sign_flip_test(
    gains: Values, statistic: Statistic = total, *, flips: int = 10_000, seed: int = 0
) -> Ends:
    """Return one-sided p-values of paired gains, by flipping the signs of whole prompts.

    If there is no effect, a prompt's gains are as likely as their negatives: a permutation test of
    paired differences (Fisher 1935, "The Design of Experiments", section 21). With up to
    `ENUMERATED` prompts all sign patterns are enumerated; else `flips` are sampled, and the
    observed one counts among them (Phipson and Smyth 2010, "Permutation P-values Should Never Be
    Zero").

    Args:
        gains: a row per prompt; NaN, where a prompt has none, counts as no gain.
        statistic: of the gains and of one sign per row; large ones are evidence. A choice that was
            made by the gains belongs into it. Defaults to the sum, which tests the mean.
        flips: how many sign patterns are sampled.
        seed: of the patterns, which all columns share.

    Returns:
        A p-value per value of the statistic.
    """
    values = np.nan_to_num(gains)
    count = len(values)
    exact = count <= ENUMERATED
    if exact:
        ups = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        ups = np.random.default_rng(seed).integers(2, size=(flips, count))
    # Values that are equal but for rounding are ties.
    least = statistic(values, np.ones((1, count)))[0] - 1e-9 * np.abs(values).sum()
    extreme = (statistic(values, 2.0 * ups - 1) >= least).sum(axis=0)
    return np.asarray(extreme / len(ups) if exact else (1 + extreme) / (1 + flips))


def bootstrap(
    values: Values,
    groups: Sequence[Any] | pd.Series[Any] | None = None,
    statistic: Statistic = mean,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Ends, Ends]:
    """Return the percentile bootstrap interval of a statistic, resampling whole groups.

    For a paired difference pass the difference of the values. All columns are resampled together.

    Args:
        values: one row per reading or prompt.
        groups: the group of each row, such as its prompt, where rows are not independent.
        statistic: the statistic of every resample.
        resamples: how many.
        seed: of the sampling.
        level: of the interval.

    Returns:
        Lower and upper ends, one per column: NaN with a single group. Resamples in which the
        statistic is undefined (NaN) are ignored.

    Raises:
        ValueError: no rows, no resamples, or a level that is not between 0 and 1.
    """
    rows = np.asarray(values, dtype=float)
    if not len(rows) or resamples < 1 or not 0 < level < 1:
        raise bad_value(
            "bootstrap",
            "at least one row and one resample, and a level between 0 and 1",
            f"{len(rows)} rows, {resamples} resamples, level {level}",
            "10000 resamples and level 0.95 are the defaults",
        )
    codes = np.arange(len(rows)) if groups is None else pd.factorize(pd.Series(groups))[0]
    count = codes.max() + 1
    times = np.random.default_rng(seed).multinomial(count, [1 / count] * count, resamples)
    found = statistic(rows, times[:, codes].astype(float))
    if count < 2:
        return np.full(found.shape[1:], np.nan), np.full(found.shape[1:], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN where no resample defines it
        low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _each(
    best: Best,
    function: Callable[[float, Float[np.ndarray, " other"]], Any],
    otherwise: float,
    *,
    scored: bool = True,
) -> Float[np.ndarray, " prompt"]:
    """Apply a function to each reference's own score and those of the other prompts.

    A prompt without a null or, if `scored`, without an own score gets `otherwise`.
    """
    if best.ndim != 2 or best.shape[0] != best.shape[1] or len(best) < FEWEST_PROMPTS:
        wanted = f"one row and one column for each of at least {FEWEST_PROMPTS} prompts"
        raise bad_value("best", wanted, f"shape {best.shape}", "add prompts: the null needs others")
    found = np.full(len(best), otherwise, dtype=float)
    for prompt, column in enumerate(best.T):
        others = np.delete(column, prompt)
        others = others[~np.isnan(others)]
        if len(others) > 1 and not (scored and np.isnan(column[prompt])):
            found[prompt] = function(float(column[prompt]), others)
    return found
