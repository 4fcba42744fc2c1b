"""Counts against chance: by hand, against second implementations, and under a true null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from superscopes_tl.statistics import best_scores, bootstrap, corrected_hits
from superscopes_tl.statistics.chance import (
    chance_corrected,
    chance_hits,
    other_prompt_null,
    p_values,
    q_values,
    total,
)

# Rows are source prompts, columns references; the diagonal is each prompt's own score.
BEST = np.array(
    [[0.9, 0.4, 0.5, 0.1], [0.2, 0.4, 0.5, 0.3], [0.4, 0.4, 0.1, 0.2], [0.0, 0.1, 0.9, 0.3]]
)
MANY = 48


def _tables(seed: int, count: int, prompts: int = MANY) -> np.ndarray:
    """Return tables whose scores all come from one distribution: a true null."""
    return np.random.default_rng(seed).random((count, prompts, prompts))


def test_hits_nulls_and_p_values_by_hand() -> None:
    """Linear quantiles of three others, ties against the prompt, a strict threshold."""
    expected = [0.2 + 0.9 * 0.2, 0.4, 0.5 + 0.9 * 0.4, 0.2 + 0.9 * 0.1]
    assert other_prompt_null(BEST) == pytest.approx(expected)
    assert other_prompt_null(BEST, 50) == pytest.approx([0.2, 0.4, 0.5, 0.2])
    assert corrected_hits(BEST).tolist() == [True, False, False, True]
    assert p_values(BEST).tolist() == [1 / 4, 3 / 4, 1.0, 2 / 4]
    assert chance_hits(BEST, 0.3) == pytest.approx([1 / 3, 2 / 3, 1, 0])


@given(arrays(float, (5, 5), elements=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.8, np.nan])))
@settings(max_examples=100, deadline=None)
def test_the_corrected_chance_level_is_that_of_every_score_as_the_own_one(best: np.ndarray) -> None:
    """A second implementation: put each score of a column in the own place and count."""
    expected = []
    for prompt, column in enumerate(best.T):
        scores = column[~np.isnan(column)]
        if np.isnan(column[prompt]) or len(scores) < 3:
            expected.append(0.0)
            continue
        tried = []
        for own in range(len(scores)):
            swapped = np.zeros((len(scores), len(scores)))
            swapped[:, own] = scores
            tried.append(corrected_hits(swapped)[own])
        expected.append(np.mean(tried))
    assert chance_corrected(best) == pytest.approx(expected)


def test_under_a_true_null_about_five_percent_are_accepted() -> None:
    """With 48 prompts and evenly spread scores the docstring's (0.05 n + 0.95) / (n + 1)."""
    accepted = np.concatenate([corrected_hits(best) for best in _tables(0, 200)])
    rate = (0.05 * (MANY - 1) + 0.95) / MANY
    assert rate == pytest.approx(0.06875)
    assert accepted.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate / len(accepted)))
    expected = np.mean([chance_corrected(best).mean() for best in _tables(1, 20)])
    assert expected == pytest.approx(rate, abs=0.003)


@given(st.integers(3, 30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_discrete_rate_lies_between_its_bounds(prompts: int, seed: int) -> None:
    """For distinct scores: between (n - 1 - floor(h)) and (n - floor(h)) of n + 1."""
    others = prompts - 1
    rank = int(np.floor(0.95 * (others - 1)))
    rates = chance_corrected(_tables(seed, 1, prompts)[0])
    low, high = (others - 1 - rank) / prompts, (others - rank) / prompts
    assert np.all((rates >= low - 1e-12) & (rates <= high + 1e-12))


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    """Against the definition: the smallest p·m/rank at or above each rank; NaN stays out."""
    p = np.append(np.random.default_rng(0).random(40) ** 3, np.nan)
    there = np.sort(p[:-1])
    for value, q in zip(p[:-1], q_values(p), strict=False):
        ranks = np.arange(1, 41)
        assert q == pytest.approx(min(1, np.min((there * 40 / ranks)[there >= value])))
    assert np.isnan(q_values(p)[-1])
    assert np.isnan(q_values(np.array([np.nan]))).all()


def test_a_prompt_without_a_score_is_no_hit_and_in_no_null() -> None:
    """For the others the table is as if the prompt had not been read."""
    best = np.vstack([np.hstack([BEST, np.ones((4, 1))]), np.full((1, 5), np.nan)])
    assert other_prompt_null(best)[:4] == pytest.approx(other_prompt_null(BEST))
    assert corrected_hits(best).tolist() == [*corrected_hits(BEST), False]
    assert p_values(best)[:4] == pytest.approx(p_values(BEST))
    assert np.isnan(p_values(best)[4])
    assert chance_hits(best, 0.3) == pytest.approx([*chance_hits(BEST, 0.3), 0])
    assert chance_corrected(best) == pytest.approx([*chance_corrected(BEST), 0])
    two = BEST[:3, :3].copy()
    two[2] = np.nan  # each prompt has one scored other: no null
    assert np.isnan([*other_prompt_null(two)[:2], *p_values(two)]).all()
    assert not corrected_hits(two).any()


# Exponentials: an integer may lie exactly on a quantile, as 31 = 19 + 0.8 * (34 - 19), and
# then rounding decides.
@given(
    arrays(float, (6, 6), elements=st.integers(0, 50).map(lambda n: math.exp(n / 10))),
    st.permutations(range(6)),
)
@settings(max_examples=60, deadline=None)
def test_neither_the_order_of_prompts_nor_the_scale_matters(
    best: np.ndarray, order: list[int]
) -> None:
    """Another order of prompts, or other units, change no count."""
    moved = best[np.ix_(order, order)]
    for judge in (corrected_hits, p_values, chance_corrected):
        assert judge(moved) == pytest.approx(judge(best)[order])
        assert judge(4 * best + 16) == pytest.approx(judge(best))


def test_the_best_of_a_budget_ignores_empty_texts() -> None:
    """The maximum over texts, NaN only where every text is empty; layers may come first."""
    scores = np.array([[[0.1, 0.5], [0.3, np.nan]], [[np.nan, np.nan], [np.nan, np.nan]]])
    expected = np.array([[0.3, 0.5], [np.nan, np.nan]])
    np.testing.assert_array_equal(best_scores(scores), expected)
    np.testing.assert_array_equal(best_scores(scores[None]), expected[None])


@pytest.mark.parametrize("hits", [0, 13, 48])
def test_the_interval_of_a_count_is_the_binomial_one(hits: int) -> None:
    """Resampled prompts make a count binomial: its quantiles are known exactly."""
    ends = bootstrap(np.arange(MANY) < hits, statistic=total, resamples=20_000)
    assert ends == pytest.approx(stats.binom(MANY, hits / MANY).ppf([0.025, 0.975]), abs=1)
    means = bootstrap(np.arange(MANY) < hits, resamples=20_000)
    assert ends == pytest.approx(np.multiply(means, MANY))


def test_a_paired_difference_is_surer_than_its_parts() -> None:
    """Prompts that both methods read cancel; the rest is resampled as by hand."""
    difference = (np.arange(MANY) < 25) - 1.0 * (np.arange(MANY) < 20)
    rows = np.random.default_rng(1).integers(MANY, size=(20_000, MANY))
    by_hand = np.percentile(difference[rows].sum(axis=1), [2.5, 97.5])
    both = np.stack([0 * difference, difference], axis=1)
    lows, highs = bootstrap(both, statistic=total, resamples=20_000)
    assert (lows[0], highs[0]) == (0, 0)
    assert [lows[1], highs[1]] == pytest.approx(by_hand, abs=1)


def test_too_few_prompts_rows_and_resamples_are_refused() -> None:
    """A null needs two others for every prompt, an interval a level between 0 and 1."""
    for shape in ((2, 2), (3, 4), (3,)):
        with pytest.raises(ValueError, match="^best: "):
            corrected_hits(np.zeros(shape))
    for values, options in ((np.ones(3), {"resamples": 0}), (np.ones(3), {"level": 1}), ([], {})):
        with pytest.raises(ValueError, match="^bootstrap: "):
            bootstrap(np.array(values), **options)  # type: ignore[arg-type]


def test_whole_groups_are_resampled() -> None:
    """With one group there is no interval; resamples without a statistic are left out of it."""
    values = [0.0, 0.0, 1.0, 1.0]
    assert bootstrap(values, ["a", "a", "b", "b"]) == (0, 1)
    low, high = bootstrap(values, range(4))
    assert 0 <= low <= high <= 1
    assert np.isnan(bootstrap(values, ["a"] * 4)).all()

    def sometimes(_: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.where(weights[:, 0] > 0, 7.0, np.nan)

    assert bootstrap(np.ones(2), statistic=sometimes) == (7, 7)
