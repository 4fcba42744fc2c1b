"""How many prompts count, how many would by chance, and how sure the count is.

1. `best[s, r]` is the best similarity that the texts of source prompt s reach against reference
   prompt r, for one method and one layer; the diagonal is each prompt's own score.
2. The other-prompt null of r is column r without its own entry: what texts about something else
   reach against r, chosen the same way from as many draws.
3. A corrected hit is a prompt whose own score exceeds the 95th percentile of its null.
4. An interval is the percentile bootstrap over prompts; that of a paired difference is the same
   function of the prompts' differences.

An empty text scores NaN, never 0. A source prompt whose every text is empty has no score: it is no
hit, and it stands in no null. A reference with fewer than two scored others has no null, so its
own prompt is no corrected hit either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from superscopes_tl.errors import bad_value

Best = Float[np.ndarray, "source reference"]

FEWEST_PROMPTS = 3
"""A null needs two other prompts."""


def best_scores(
    scores: Float[np.ndarray, "*source text reference"],
) -> Float[np.ndarray, "*source reference"]:
    """Return the best of each source prompt's texts against every reference.

    Args:
        scores: similarities, NaN for an empty text; `[layer, source, text, reference]`, say.

    Returns:
        The same without the axis `text`; NaN where every text is empty.
    """
    best: Float[np.ndarray, "*source reference"] = np.fmax.reduce(scores, axis=-2)
    return best


def other_prompt_null(best: Best, percentile: float = 95) -> Float[np.ndarray, " reference"]:
    """Return the percentile (numpy's linear quantile) of each reference's other prompts.

    Raises:
        ValueError: `best` is not square, or has fewer than three prompts.
    """
    return np.array(
        [
            np.percentile(others, percentile) if len(others) > 1 else np.nan
            for _, others in _nulls(best)
        ]
    )


def corrected_hits(best: Best, percentile: float = 95) -> Bool[np.ndarray, " prompt"]:
    """Return which prompts' own score is strictly above their other-prompt null.

    By chance alone this accepts a little more than 5 % of the prompts. Say that n others and the
    prompt itself have distinct scores from one distribution, so that each order of the n + 1 is
    equally likely. The linear quantile lies at h = 0.95 (n - 1) among the others, counted from 0,
    that is between the others of rank floor(h) and floor(h) + 1. There are n - 1 - floor(h)
    others above, so the own score is above with a probability between

        (n - 1 - floor(h)) / (n + 1)    and    (n - floor(h)) / (n + 1),

    according to where in the gap between the two it falls; evenly spread it is
    (n - h) / (n + 1) = (0.05 n + 0.95) / (n + 1). With 48 prompts (n = 47, h = 43.7) that is
    between 3/48 = 6.3 % and 4/48 = 8.3 %, evenly spread 6.9 %, and it tends to 5 % as n grows.
    `chance_corrected` computes it exactly for given scores.

    Raises:
        ValueError: `best` is not square, or has fewer than three prompts.
    """
    null = other_prompt_null(best, percentile)
    return np.diagonal(best) > null


def p_values(best: Best) -> Float[np.ndarray, " prompt"]:
    """Return (1 + number of others at or above the own score) / (1 + number of others).

    It is never below 1 / number of prompts, and NaN for a prompt without a score or a null.

    Raises:
        ValueError: `best` is not square, or has fewer than three prompts.
    """
    return np.array(
        [
            np.nan
            if np.isnan(own) or len(others) < 2
            else (1 + np.count_nonzero(others >= own)) / (1 + len(others))
            for own, others in _nulls(best)
        ]
    )


def q_values(p: Float[np.ndarray, "*cells"]) -> Float[np.ndarray, "*cells"]:
    """Return the Benjamini-Hochberg q-values of one family of p-values; NaN stays out of it."""
    from scipy.stats import false_discovery_control  # takes a second that importing need not

    q = np.full_like(p, np.nan)
    there = ~np.isnan(p)
    if there.any():
        q[there] = false_discovery_control(p[there], method="bh")
    return q


def chance_hits(best: Best, threshold: float) -> Float[np.ndarray, " prompt"]:
    """Return, per prompt, the share of other prompts' best scores above the threshold.

    Their sum is the number of hits to expect of texts that say nothing about their prompt. A
    prompt that has no score cannot be a hit, so nothing is expected of it.

    Raises:
        ValueError: `best` is not square, or has fewer than three prompts.
    """
    return np.array(
        [
            0.0 if np.isnan(own) or len(others) < 2 else np.mean(others > threshold)
            for own, others in _nulls(best)
        ]
    )


def chance_corrected(best: Best, percentile: float = 95) -> Float[np.ndarray, " prompt"]:
    """Return, per prompt, the probability that texts dealt out at random make it a corrected hit.

    For a reference any of its n + 1 scores is then equally likely to be the own one: the result
    is the share of them that exceed the percentile of the other n (see `corrected_hits`).

    Raises:
        ValueError: `best` is not square, or has fewer than three prompts.
    """
    return np.array(
        [
            0.0
            if np.isnan(own) or len(others) < 2
            else _accepted(np.append(others, own), percentile)
            for own, others in _nulls(best)
        ]
    )


def bootstrap_interval(
    values: Float[np.ndarray, "prompt ..."],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "*columns"], Float[np.ndarray, "*columns"]]:
    """Return the percentile bootstrap interval over prompts of the sums of `values`.

    For a count pass its marks; for a paired difference of two counts pass the difference of the
    marks. All columns are resampled together.

    Args:
        values: one row per prompt.
        resamples: how often the prompts are drawn anew, with replacement.
        seed: of the draws.
        level: of the interval.

    Returns:
        Lower and upper ends, one per column.

    Raises:
        ValueError: no prompts, no resamples, or a level that is not between 0 and 1.
    """
    prompts = len(values)
    if not prompts or resamples < 1 or not 0 < level < 1:
        raise bad_value(
            "bootstrap",
            "at least one prompt and one resample, and a level between 0 and 1",
            f"{prompts} prompts, {resamples} resamples, level {level}",
            "leave resamples and level out for 10000 and 0.95",
        )
    draws = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, resamples)
    sums = np.tensordot(draws.astype(float), values.astype(float), axes=1)
    low, high = np.quantile(sums, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _accepted(scores: Float[np.ndarray, " prompt"], percentile: float) -> float:
    """Return the share of scores above the percentile of all the others."""
    count = len(scores)
    rest = np.broadcast_to(scores, (count, count))[~np.eye(count, dtype=bool)]
    nulls = np.percentile(rest.reshape(count, count - 1), percentile, axis=1)
    return float(np.mean(scores > nulls))


def _nulls(best: Best) -> Iterator[tuple[float, Float[np.ndarray, " other"]]]:
    """Yield each reference's own score and the scores of the other prompts that have one."""
    if best.ndim != 2 or best.shape[0] != best.shape[1] or len(best) < FEWEST_PROMPTS:
        raise bad_value(
            "best",
            f"one row and one column for each of at least {FEWEST_PROMPTS} prompts",
            f"shape {best.shape}",
            "a null is made of other prompts: add prompts, or count hits alone",
        )
    for prompt, column in enumerate(best.T):
        others = np.delete(column, prompt)
        yield float(column[prompt]), others[~np.isnan(others)]
