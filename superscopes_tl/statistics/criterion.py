"""Is a similarity of 0.3 a good criterion? Scores judged as classifiers of readings.

1. Where the truth is known, or readings were judged, each is right or wrong: the labels.
2. A score with a threshold is a classifier: `quality` returns its precision and recall, and without
   a threshold its AUROC.
3. `quality_intervals` resamples whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from superscopes_tl.errors import bad_value
from superscopes_tl.scores import PAPER_THRESHOLD
from superscopes_tl.statistics.chance import bootstrap


@dataclass(frozen=True)
class Quality:
    """How well a score with a threshold tells right readings from wrong ones.

    Attributes:
        n: how many readings were judged.
        positives: how many of them are right.
        threshold: the score from which a reading is called right.
        precision: the share of right ones among those called right; NaN where none is.
        recall: the share of right ones that are called right; NaN where none is right.
        false_positive_rate: the share of wrong ones called right; NaN where none is wrong.
        auc: the area under the ROC curve: how often a right reading outscores a wrong one, ties
            counted half. It needs no threshold. NaN where all readings are right or all wrong.
    """

    n: int
    positives: int
    threshold: float
    precision: float
    recall: float
    false_positive_rate: float
    auc: float


def quality(
    labels: Sequence[bool] | pd.Series[bool],
    scores: Sequence[float] | pd.Series[float],
    threshold: float = PAPER_THRESHOLD,
) -> Quality:
    """Judge a score as a classifier of readings.

    A reading without a score (NaN: an empty text) is never called right and ranks below all others.

    Args:
        labels: which readings are right.
        scores: their scores.
        threshold: the least score that is called right.

    Raises:
        ValueError: not one score per label, no readings, or an infinite score.
    """
    truth, numbers = _checked(labels, scores)
    auc, precision, recall = _measures(truth, numbers, threshold, np.ones((1, len(truth))))[0]
    wrong = float(_share((numbers[~truth] >= threshold).sum(), (~truth).sum()))
    measures = float(precision), float(recall), wrong, float(auc)
    return Quality(len(truth), int(truth.sum()), threshold, *measures)


def quality_intervals(
    labels: Sequence[bool] | pd.Series[bool],
    scores: Sequence[float] | pd.Series[float],
    prompts: Sequence[str] | pd.Series[str],
    threshold: float = PAPER_THRESHOLD,
    *,
    resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Return 95 % percentile intervals of auc, precision and recall.

    Readings of one prompt are not independent, so the bootstrap resamples whole prompts. Resamples
    without a right or without a wrong reading have no auc and are left out of its interval.

    Args:
        labels: as in `quality`, like scores and threshold.
        scores: one per label.
        prompts: the source prompt of each reading.
        threshold: the least score that is called right.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The rows `auc`, `precision` and `recall` with the columns `low` and `high`; NaN with one
        prompt.
    """
    truth, numbers = _checked(labels, scores)

    def measures(_: object, weights: Float[np.ndarray, "resample readings"]) -> np.ndarray:
        return _measures(truth, numbers, threshold, weights)

    ends = bootstrap(truth, prompts, measures, resamples=resamples, seed=seed)
    index = ["auc", "precision", "recall"]
    return pd.DataFrame(np.transpose(ends), index=index, columns=["low", "high"])


def _checked(
    labels: Sequence[bool] | pd.Series[bool], scores: Sequence[float] | pd.Series[float]
) -> tuple[Bool[np.ndarray, " readings"], Float[np.ndarray, " readings"]]:
    truth, numbers = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    if truth.shape != numbers.shape or not truth.size or np.isinf(numbers).any():
        wanted = f"{len(truth)} scores, one per label, finite or NaN, at least one"
        raise bad_value("scores", wanted, numbers.tolist(), "pass two columns of one table")
    return truth, numbers


def _by_rank(scores: Float[np.ndarray, " readings"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the order of the scores, NaN below all others, with where each distinct one starts."""
    filled = np.where(np.isnan(scores), -math.inf, scores)
    order = np.argsort(filled, kind="stable")
    distinct, starts = np.unique(filled[order], return_index=True)
    return order, distinct, starts


def _measures(
    truth: Bool[np.ndarray, " readings"],
    scores: Float[np.ndarray, " readings"],
    threshold: float,
    weights: Float[np.ndarray, "resample readings"],
) -> Float[np.ndarray, "resample measures"]:
    """Return auc (Mann and Whitney's), precision and recall of every weighting of the readings."""
    order, _, starts = _by_rank(scores)
    right, wrong = (
        np.add.reduceat((weights * side)[:, order], starts, axis=1) for side in (truth, ~truth)
    )
    outscored = (right * (wrong.cumsum(axis=1) - wrong / 2)).sum(axis=1)
    called = weights * (scores >= threshold)
    hits, positives = (called * truth).sum(axis=1), right.sum(axis=1)
    auc = _share(outscored, positives * wrong.sum(axis=1))
    return np.column_stack([auc, _share(hits, called.sum(axis=1)), _share(hits, positives)])


def _share(part: Any, whole: Any) -> Float[np.ndarray, "*shape"]:
    """Return the ratio, NaN of nothing."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    out = np.full(part.shape, math.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out
