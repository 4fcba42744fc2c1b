"""The quality of a score as a sign that a reading is right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from superscopes_tl.figures import roc_curve
from superscopes_tl.scores import packaged_scorer
from superscopes_tl.statistics import (
    ceiling,
    compared_scores,
    exact,
    metric_table,
    quality,
    quality_intervals,
    token_overlap,
    word_vectors_scorer,
)
from tests.support.long_tables import cell, table_of

NAN = math.nan
FACTS = {"Pink Floyd": "rock band", "Top Gun": "action film"}
TABLE = table_of(
    cell("Pink Floyd", 0, description="pink flower"),
    cell("Pink Floyd", 1, description="rock band, quiet one"),
    cell("Top Gun", 0, description="gun"),
    cell("Top Gun", 1, description="action film"),
    cell("Top Gun", 2, description=""),
)
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
    assert found.fpr[[0, -1]].tolist() == found.tpr[[0, -1]].tolist() == [0, 1]
    assert found.thresholds[0] == math.inf
    assert found.thresholds[-1] == 0.1


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
        assert found.fpr.size == found.tpr.size == found.thresholds.size == 0
    else:
        filled = [-9 if math.isnan(score) else score for score in scores]
        assert found.auc == pytest.approx(roc_auc_score(labels, filled))
        assert found.auc == pytest.approx(np.trapezoid(found.tpr, found.fpr))
        assert (found.thresholds[-1] == -math.inf) == any(map(math.isnan, scores))


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


def test_exact_is_the_fact_word_for_word() -> None:
    """What follows a comma belongs to the next entry; and nothing else is taken off."""
    assert exact(TABLE, FACTS).tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match="^facts: "):
        exact(TABLE, {"Pink Floyd": "rock band"})


def test_token_overlap_is_f1_of_words() -> None:
    """Shared words twice over all words; case, order, repetition and punctuation do not count."""
    pairs = [("Pink Floyd", "pink, like a rose"), ("a b", "B a! b"), ("a", "b"), ("!", "?")]
    references, candidates = zip(*pairs, strict=True)
    assert token_overlap(references, candidates) == pytest.approx([2 / 6, 1, 0, 0])


def test_word_vectors_are_means_without_order() -> None:
    """The mean of the rows of MiniLM's word table, to unit length; the order does not count."""
    folder = packaged_scorer()
    assert folder is not None
    table = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    mean = np.mean([table[vocabulary.index(word)] for word in ("rock", "band")], axis=0)
    scorer = word_vectors_scorer()
    np.testing.assert_allclose(
        scorer.embed(["Band rock"])[0], mean / np.linalg.norm(mean), atol=1e-5
    )
    alike = scorer(["rock band"] * 3, ["band rock", "rock group", "tax form"])
    assert alike[0] == pytest.approx(1, abs=1e-5)
    assert alike[0] > alike[1] > alike[2]
    assert scorer.name == "mean word vector of all-MiniLM-L6-v2"


def test_scores_of_every_way() -> None:
    """Raw text or description, against prompt or truth; each distinct pair is scored once."""
    seen: list[tuple[str, str]] = []

    def lengths(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        seen.extend(zip(references, candidates, strict=True))
        return [len(a) + len(b) / 100 for a, b in zip(references, candidates, strict=True)]

    twice = pd.concat([TABLE, TABLE])
    scores = compared_scores(twice, FACTS, {"n": lengths})
    assert list(scores.columns) == [
        ("n", "text", "prompt"), ("n", "description", "prompt"), ("n", "description", "truth"),
    ]  # fmt: skip
    assert list(scores.index) == [*range(5), *range(5)]
    truth = scores["n", "description", "truth"].to_numpy()
    np.testing.assert_allclose(truth[:5], [9.11, 9.20, 11.03, 11.11, NAN])
    text = ": pink flower, Adele: singer"
    assert scores["n", "text", "prompt"].iloc[0] == len("Pink Floyd") + len(text) / 100
    assert len(seen) == len(set(seen))


def test_the_table_compares_scores() -> None:
    """A row per scorer, way and threshold; against the truth the ranking is perfect."""
    found = metric_table(TABLE, FACTS, {"words": token_overlap}, (0.3, 0.9), resamples=20)
    assert found[["judged", "against", "threshold"]].to_numpy().tolist() == [
        [judged, against, threshold]
        for judged, against in (
            ("text", "prompt"),
            ("description", "prompt"),
            ("description", "truth"),
        )
        for threshold in (0.3, 0.9)
    ]
    assert (found[["n", "positives"]] == [5, 2]).all(axis=None)
    truth = found[found["against"] == "truth"]
    assert truth["auc"].tolist() == [1, 1]
    assert truth["recall"].tolist() == [1, 0.5]  # "rock band, quiet one" overlaps 2/3
    prompt = found.iloc[2]  # "pink flower" and "gun" share a word with their prompts
    assert (prompt["precision"], prompt["recall"]) == (0, 0)
    assert prompt["false_positive_rate"] == pytest.approx(2 / 3)
    softer = metric_table(
        TABLE, FACTS, {"words": token_overlap}, labels=TABLE["description"] != "", resamples=20
    )
    assert softer["positives"].tolist() == [4] * 3


def test_the_ceiling_is_the_truth_against_the_prompt() -> None:
    """The paper's criterion asked about the facts themselves."""
    facts = {"rock band": "band", "Top Gun": "film"}
    assert ceiling(facts, token_overlap).to_dict() == {"rock band": 2 / 3, "Top Gun": 0}
    similarity = ceiling({"Pink Floyd": "Pink Floyd", "Top Gun": "country in Asia"})
    assert similarity["Pink Floyd"] == pytest.approx(1, abs=1e-5)
    assert similarity["Top Gun"] < 0.3


def test_the_figure_draws_curves_and_thresholds() -> None:
    """A curve and a ring per score; without a curve the name stays in the legend."""
    good = quality([True, False, True], [0.9, 0.1, NAN])
    figure = roc_curve({"<i>": good, "one": quality([True], [0.5])})
    curve, ring, none, no_ring, *rest = figure.data
    assert not rest
    assert curve.name == f"&lt;i&gt; (AUC {good.auc:.2f})"
    assert list(curve.x) == good.fpr.tolist()
    assert list(curve.y) == good.tpr.tolist()
    assert curve.customdata[-1] == "threshold -inf"
    assert (list(ring.x), list(ring.y)) == ([0.0], [0.5])
    assert none.name == "one (no curve)"
    assert list(none.x) == []
    assert list(no_ring.x) == [None]
