"""The quality of a score as a sign that a reading is right."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from superscopes_tl.statistics import quality, quality_intervals

NAN = math.nan
LABELS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([NAN, -0.2, 0.1, 0.3, 0.31, 0.9])),
    min_size=2,
    max_size=12,
)


def test_quality_by_hand() -> None:
    """Two of three right readings and one of two wrong ones reach 0.3."""
    found = quality([True, True, True, False, False], [0.9, 0.3, 0.1, 0.5, 0.2])
    assert (found.n, found.positives, found.threshold) == (5, 3, 0.3)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.false_positive_rate == 0.5
    assert found.auc == pytest.approx((2 + 1 + 0) / 6)  # right ones above wrong ones, of 6 pairs


@given(pairs=LABELS)
@settings(max_examples=100, deadline=None)
def test_quality_agrees_with_scikit_learn(pairs: list[tuple[bool, float]]) -> None:
    """A missing score ranks below all others and is never called right."""
    labels, scores = (list(column) for column in zip(*pairs, strict=True))
    found = quality(labels, scores)
    called = [score >= 0.3 for score in scores]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = [found.precision, found.recall, found.false_positive_rate]
        theirs = [f(labels, called, zero_division=np.nan) for f in (precision_score, recall_score)]
        theirs.append(np.mean(np.array(called)[~np.array(labels)]))
    np.testing.assert_allclose(ours, theirs)
    if len(set(labels)) == 1:
        assert math.isnan(found.auc)
    else:
        filled = [-9 if math.isnan(score) else score for score in scores]
        assert found.auc == pytest.approx(roc_auc_score(labels, filled))


@pytest.mark.parametrize(("labels", "scores"), [([True], []), ([], []), ([True], [math.inf])])
def test_labels_and_scores_belong_together(labels: list[bool], scores: list[float]) -> None:
    """One finite score or NaN per label, and at least one."""
    with pytest.raises(ValueError, match="^scores: "):
        quality(labels, scores)


@given(pairs=LABELS, threshold=st.sampled_from([0.1, 0.3, 2.0]))
@settings(max_examples=30, deadline=None)
def test_an_interval_is_that_of_repeated_readings(
    pairs: list[tuple[bool, float]], threshold: float
) -> None:
    """A second implementation: write every reading as often as it was sampled, and count."""
    labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
    count = len(labels)
    found = []
    for times in np.random.default_rng(0).multinomial(count, [1 / count] * count, 5):
        one = quality(labels.repeat(times), scores.repeat(times), threshold)
        found.append([one.auc, one.precision, one.recall])
    limits = quality_intervals(labels, scores, range(count), threshold, resamples=5)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.nanquantile(found, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(limits.to_numpy().T, expected)


def test_intervals_draw_whole_prompts() -> None:
    """Two prompts that are all right or all wrong: precision is 1/2, 0 or 1 in a resample."""
    labels, scores = [True, True, False, False], [0.9, 0.4, 0.8, 0.5]
    limits = quality_intervals(labels, scores, ["P", "P", "Q", "Q"])
    assert limits.loc["precision"].tolist() == [0, 1]
    assert limits.loc["recall"].tolist() == [1, 1]
    assert limits.loc["auc"].tolist() == [0.5, 0.5]  # resamples of one prompt alone have none
    again = quality_intervals(labels, scores, ["P", "P", "Q", "Q"])
    pd.testing.assert_frame_equal(limits, again)
    assert quality_intervals(labels, scores, ["P"] * 4).isna().all(axis=None)
