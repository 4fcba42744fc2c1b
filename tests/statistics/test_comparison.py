"""Methods side by side: which cells count, the notes, and Figure 3."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from superscopes_tl import compare
from superscopes_tl.figures import figure_3
from superscopes_tl.scores import SentenceEmbeddingScorer, similarities
from superscopes_tl.statistics import Comparison

PROMPTS = ("red apple", "blue sky", "green tree", "old stone")
COLUMNS = ["prompt", "source_layer", "alpha", "text"]


def table(*rows: tuple[str, int, float, str]) -> pd.DataFrame:
    """Return a method's texts."""
    return pd.DataFrame(rows, columns=COLUMNS)


PLAIN = table(
    ("red apple", 1, 1, "apple"), ("blue sky", 1, 1, "red apple"),
    ("green tree", 1, 1, "nothing"), ("old stone", 1, 1, " "),
    ("red apple", 2, 1, "nothing"), ("blue sky", 2, 1, "nothing"),
    ("green tree", 2, 1, "a big green tree"), ("old stone", 2, 1, "nothing"),
)  # fmt: skip
SCALED = table(
    ("red apple", 1, 3, "red"), ("red apple", 1, 9, "red apple"), ("red apple", 1, 6, "red apple"),
    ("blue sky", 1, 3, "sky blue"), ("blue sky", 1, 9, "stone"), ("blue sky", 1, 6, "stone"),
    ("green tree", 1, 3, "nothing"), ("green tree", 1, 9, "apple"), ("green tree", 1, 6, ""),
    ("old stone", 1, 3, "stone"), ("old stone", 1, 9, "a stone"), ("old stone", 1, 6, "x y z"),
)  # fmt: skip


def cell(comparison: Comparison, method: str, prompt: str, layer: int = 1) -> dict[str, Any]:
    """Return the one cell of a method."""
    cells = comparison.cells
    rows = cells[
        (cells["method"] == method) & (cells["prompt"] == prompt) & (cells["source_layer"] == layer)
    ]
    (found,) = rows.to_dict("records")
    return found


@pytest.fixture
def both(word_overlap: Any) -> Comparison:
    """Two methods on the same four prompts."""
    return compare({"A": PLAIN, "B": SCALED}, scorer=word_overlap, one_alpha=True)


def test_a_cell_is_the_best_text_of_its_budget(both: Comparison) -> None:
    """Score, text and α of the best; among equals the smallest α."""
    best = [cell(both, "B", prompt) for prompt in ("red apple", "old stone")]
    assert [(row["score"], row["alpha"]) for row in best] == [(1, 6), (0.5, 3)]
    assert [row["text"] for row in best] == ["red apple", "stone"]


def test_cells_are_judged_twice(both: Comparison) -> None:
    """By the threshold and by the other prompts, worked out by hand."""
    apple = cell(both, "A", "red apple")  # "apple" scores 1/2; the others' texts 1 and 0
    assert apple["hit"]
    assert apple["null"] == pytest.approx(0.95)
    assert not apple["corrected"]
    assert apple["p_value"] == pytest.approx(2 / 3)  # the blank text of "old stone" is no other
    tree = cell(both, "A", "green tree", 2)
    assert (tree["hit"], tree["null"], tree["corrected"], tree["p_value"]) == (True, 0, True, 0.25)
    assert not cell(both, "B", "green tree")["hit"]


def test_an_empty_text_has_no_score_and_is_named(both: Comparison) -> None:
    """NaN, not 0: no hit, no p-value, and a note."""
    silent = cell(both, "A", "old stone")
    assert all(math.isnan(silent[name]) for name in ("score", "p_value", "q_value"))
    assert not silent["hit"]
    assert not silent["corrected"]
    note = "A: 1 of 8 texts empty, without a score, so 'old stone at layer 1' is no hit."
    assert note in both.notes
    assert "B: 1 of 12 texts empty, without a score." in both.notes


def test_counts_are_lines_of_plain_text(both: Comparison) -> None:
    """The name, then the layers; a layer that a method lacks is a dash, a mean has a decimal."""
    assert both.lines() == ["A 1 1", "B 3 -", "B, one alpha 2 -"]
    assert both.lines(corrected=True) == ["A 0 1", "B 3 -", "B, one alpha 1.7 -"]
    assert "B lacks the layers 2: counted over what is there." in both.notes


def test_one_alpha_is_the_mean_over_alphas_each_judged_alone(
    both: Comparison, word_overlap: Any
) -> None:
    """The same as comparing every α by itself and averaging."""
    alone = [
        compare({"B": rows}, scorer=word_overlap).counts.iloc[0]
        for _, rows in SCALED.groupby("alpha")
    ]
    mean = both.counts.set_index("method").loc["B, one alpha"]
    for column in (
        "hits", "corrected", "expected_by_chance", "expected_corrected", "discoveries",
    ):  # fmt: skip
        assert mean[column] == pytest.approx(np.mean([row[column] for row in alone]))


def test_unequal_budgets_and_missing_prompts_are_named(word_overlap: Any) -> None:
    """Too few prompts make no null, of a layer or of one α; more texts are more chances."""
    found = compare({"B": SCALED.drop(index=1)}, scorer=word_overlap)
    assert any(note.startswith("B has 2 to 3 texts per prompt and layer") for note in found.notes)
    found = compare({"A": PLAIN.head(6)}, scorer=word_overlap)
    assert found.layers == [1]
    assert "A: layers 2 have too few prompts and are left out." in found.notes
    more = pd.concat([SCALED, SCALED.head(4).assign(alpha=20)])
    found = compare({"B": more}, scorer=word_overlap, one_alpha=True)
    alone = found.cells[found.cells["method"] == "B, one alpha"]
    assert sorted(alone["alpha"].unique()) == [3, 6, 9]


def test_the_counts_stand_between_their_ends_and_beside_chance(both: Comparison) -> None:
    """Every column is there; by chance is the sum over prompts of the others' share."""
    assert list(both.counts.columns) == [
        "method", "source_layer", "prompts", "hits", "hits_low", "hits_high", "corrected",
        "corrected_low", "corrected_high", "recall_at_1", "recall_at_1_low", "recall_at_1_high",
        "mrr", "mrr_low", "mrr_high", "expected_by_chance", "expected_corrected", "discoveries",
        "chance_recall_at_1", "chance_mrr",
    ]  # fmt: skip
    for form in ("hits", "corrected"):
        assert (both.counts[f"{form}_low"] <= both.counts[form]).all()
        assert (both.counts[form] <= both.counts[f"{form}_high"]).all()
    first = both.counts.iloc[0]
    # Against "red apple" one of two others is above 0.3; against "blue sky", "green tree" none.
    assert first["expected_by_chance"] == pytest.approx(0.5)
    assert first["prompts"] == 4


def test_differences_are_paired_over_the_prompts_that_both_have(word_overlap: Any) -> None:
    """A prompt that one method lacks is in its counts alone."""
    fewer = PLAIN[(PLAIN["prompt"] != "blue sky") & (PLAIN["source_layer"] == 1)]
    found = compare({"A": fewer, "B": SCALED}, scorer=word_overlap)
    (row,) = found.differences.to_dict("records")
    assert (row["method"], row["source_layer"], row["prompts"]) == ("B", 1, 3)
    assert row["hits"] == 2 - 1  # of red apple, green tree and old stone
    assert row["hits_low"] <= row["hits"] <= row["hits_high"]
    assert "A lacks the prompts 'blue sky': counted over what is there." in found.notes
    assert found.counts.set_index("method").loc["B", "hits"] == 3


def test_the_description_alone_can_be_scored(word_overlap: Any) -> None:
    """What the model writes about the next entry is not about this one."""
    rows = [(p, 1, 1, f": nothing, {p}: {p}") for p in PROMPTS]
    whole = compare({"A": table(*rows)}, scorer=word_overlap)
    part = compare({"A": table(*rows)}, scorer=word_overlap, score_on="description")
    assert whole.counts["hits"].tolist() == [4]
    assert part.counts["hits"].tolist() == [0]
    assert part.settings["score_on"] == "description"


def test_similarities_are_those_of_the_scorer_pair_by_pair() -> None:
    """The paper's scorer embeds each text once; the numbers are those of its pairs."""
    scorer = SentenceEmbeddingScorer()
    texts, references = ["British rock band", "  ", "apple"], ["Pink Floyd", "fruit"]
    found = similarities(scorer, texts, references)
    assert found.shape == (3, 2)
    assert np.isnan(found[1]).all()
    for row in (0, 2):
        assert found[row] == pytest.approx(scorer(references, [texts[row]] * 2), abs=1e-6)


@pytest.mark.parametrize(
    ("methods", "options", "argument"),
    [
        ({}, {}, "methods"),
        ({"A": PLAIN.drop(columns="text")}, {}, "methods['A']"),
        ({"A": PLAIN.head(0)}, {}, "methods['A']"),
        ({"A": PLAIN.assign(text=None)}, {}, "methods['A']"),
        ({"A": PLAIN.assign(alpha="1")}, {}, "methods['A']"),
        ({"A": PLAIN[PLAIN["prompt"] == "blue sky"]}, {}, "methods['A']"),
        ({"A": PLAIN, "B": SCALED.assign(source_layer=7)}, {}, "methods['B']"),
        ({"A": PLAIN}, {"score_on": "words"}, "score_on"),
        ({"A": PLAIN}, {"threshold": math.nan}, "threshold"),
        ({"A": PLAIN}, {"percentile": 100}, "percentile"),
        ({"A": PLAIN}, {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input_is_named(
    methods: dict[str, pd.DataFrame], options: dict[str, Any], argument: str, word_overlap: Any
) -> None:
    """Which method or setting it is."""
    with pytest.raises(ValueError, match=f"^{re.escape(argument)}: "):
        compare(methods, **({"scorer": word_overlap} | options))


def test_figure_3_shows_both_counts_with_intervals_and_chance(both: Comparison) -> None:
    """Per form and method a line with error bars and a dashed one of the same colour."""
    figure = figure_3(both, title="<b>m")
    assert figure.layout.title.text == "&lt;b&gt;m<br>4 prompts, word_overlap on the text"
    assert figure_3(both).layout.title.text == "4 prompts, word_overlap on the text"
    assert [note.text for note in figure.layout.annotations] == [
        "similarity > 0.3",
        "above the 95th percentile of the other prompts",
    ]
    assert len(figure.data) == 2 * 3 * 2
    line, chance = figure.data[:2]
    assert (line.name, list(line.x), list(line.y)) == ("A", [1, 2], [1, 1])
    rows = both.counts[both.counts["method"] == "A"]
    assert list(line.error_y.array) == (rows["hits_high"] - rows["hits"]).tolist()
    assert list(line.error_y.arrayminus) == (rows["hits"] - rows["hits_low"]).tolist()
    assert (chance.line.dash, chance.line.color) == ("dash", line.line.color)
    assert list(chance.y) == rows["expected_by_chance"].tolist()
    assert len({trace.line.color for trace in figure.data}) == 3
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    right = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert list(right[0].y) == rows["corrected"].tolist()
    assert list(right[1].y) == rows["expected_corrected"].tolist()
