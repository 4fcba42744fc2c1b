"""The paper's figures, from a sweep and from an evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from superscopes_tl import LanguageModel, SweepResult, compare, evaluate, sweep
from superscopes_tl.evaluation import methods
from superscopes_tl.figures import (
    alpha_ladder,
    best_table,
    decomposition,
    figure_1,
    figure_3,
    figure_5,
    figure_6,
)
from superscopes_tl.scores import PAPER_SCORER
from tests.support.readings import NAN, reading, result_of

PROMPTS = ("Red Hot Chili Peppers", "Pearl Jam", "Will Smith", "Titanic")
SETTINGS: dict[str, Any] = {
    "layers": (5, 2),
    "alphas": (1, 3, 9),
    "kinds": ("resid_mid", "mlp_out", "resid_post"),
    "max_new_tokens": 5,
    "target_prompt": "A band of rock is x",
    "target_layer": 0,
    "progress": False,
}
KINDS = ("resid_mid", "mlp_out", "resid_post")


@pytest.fixture
def result() -> SweepResult:
    """Two layers, three kinds, two α; α = 3 is better, and one cell has no description."""
    cells = [
        reading(layer, alpha, alpha / 10 + layer / 100, kind=kind, description="a <b>")
        for kind in KINDS
        for layer in (0, 1)
        for alpha in (1, 3)
    ]
    return result_of(*cells[:-1], replace(cells[-1], description="", score=math.nan))


def boxes(figure: go.Figure) -> list[str]:
    """Return what the boxes of a decomposition say."""
    return [note.text for note in figure.layout.annotations if note.text not in ("+", "=")]


def cells(figure: go.Figure) -> list[list[str]]:
    """Return the columns of a drawn table, below their headers."""
    return [list(column) for column in figure.data[0].cells["values"]]


def test_decomposition_shows_three_kinds_and_two_signs(result: SweepResult) -> None:
    """resid_mid + mlp_out = resid_post, each with its best reading; text is escaped."""
    figure = decomposition(result, 0)
    assert [text.split("</b>")[0] for text in boxes(figure)] == [f"<b>{kind}" for kind in KINDS]
    assert {"+", "="} < {note.text for note in figure.layout.annotations}
    assert all("a &lt;b&gt;" in text and "α = 3" in text for text in boxes(figure))
    unamplified = boxes(decomposition(result, 1, alpha=1))
    assert all("α = 1, score 0.11" in text for text in unamplified)
    with pytest.raises(ValueError, match="^layer: "):
        decomposition(result, 2)


def test_best_table_has_a_row_per_layer_and_a_column_per_kind(result: SweepResult) -> None:
    """Best α unless one is asked for; a scored text comes before one without a description."""
    figure = best_table(result)
    assert list(figure.data[0].header["values"]) == ["layer", *KINDS]
    assert cells(figure)[0] == ["0", "1"]
    assert cells(figure)[1][0] == "a &lt;b&gt;<br>α = 3, 0.30"
    assert cells(figure)[3][1] == "a &lt;b&gt;<br>α = 1, 0.11"
    assert cells(best_table(result, alpha=1))[1][0] == "a &lt;b&gt;<br>α = 1, 0.10"
    assert cells(best_table(result, alpha=3))[3][1] == "no description<br>α = 3, no score"


def test_figures_of_a_cancelled_run_say_what_is_not_computed(result: SweepResult) -> None:
    """No `nan` in place of a cell that was not reached or has nothing to score."""
    table = result.table
    done = (table["source_layer"] == 0) | ((table["kind"] == "resid_mid") & (table["alpha"] == 1))
    partial = SweepResult(table[done], result.provenance)
    assert sum("not computed" in text for text in boxes(decomposition(partial, 1))) == 2
    assert [column[1] for column in cells(best_table(partial))[2:]] == ["not computed"] * 2
    one_kind = SweepResult(table[table["kind"] == "mlp_out"], result.provenance)
    assert sum("not computed" in text for text in boxes(decomposition(one_kind, 0))) == 2
    silent = SweepResult(partial.table.assign(score=math.nan), partial.provenance)
    assert cells(best_table(silent))[1][0] == "a &lt;b&gt;<br>α = 1, no score"
    assert "nan" not in str([boxes(decomposition(silent, 1)), cells(best_table(silent))])


def test_the_chosen_target_layer_is_shown_even_if_another_reads_better(result: SweepResult) -> None:
    """Without a choice the best target layer of each site counts."""
    worse = [reading(0, 3, -0.7, kind=kind, target_layer=2, description="c") for kind in KINDS]
    rows = [*result.table.to_dict("records"), *result_of(*worse).table.to_dict("records")]
    both = SweepResult(type(result.table)(rows), result.provenance)
    assert "α = 3, 0.30" in cells(best_table(both))[1][0]
    assert cells(best_table(both, target_layer=2))[1] == ["c<br>α = 3, -0.70"]
    assert all("score -0.70" in text for text in boxes(decomposition(both, 0, target_layer=2)))
    with pytest.raises(ValueError, match="^target_layer: "):
        best_table(both, target_layer=1)


def test_every_rung_of_the_ladder_says_what_was_read() -> None:
    """Texts stand at the bars' ends, or at zero where there is no score or a negative one."""
    rungs = ((1, -0.05, "a <b>"), (3, 0.3, "c"), (9, NAN, ""))
    found = [reading(0, a, score, kind="mlp_out", description=text) for a, score, text in rungs]
    bars, texts = alpha_ladder(result_of(*found, reading(1, 1, 0.9, kind="mlp_out")), 0).data
    assert list(bars.x) == [-0.05, 0.3, 0.0]
    assert list(bars.y) == list(texts.y) == ["1", "3", "9"]
    assert list(texts.x) == [0.0, 0.3, 0.0]
    assert [text.strip() for text in texts.text] == ["a &lt;b&gt;", "c", "–"]


@pytest.fixture(scope="module")
def swept(llama: LanguageModel, word_overlap: Any) -> SweepResult:
    """One prompt."""
    return sweep(llama, PROMPTS[0], scorer=word_overlap, **SETTINGS)


@pytest.fixture(scope="module")
def evaluated(llama: LanguageModel, word_overlap: Any) -> SweepResult:
    """Four prompts."""
    return evaluate(
        llama, PROMPTS, draws=1, scorer=word_overlap, score_on="description", **SETTINGS
    )


def test_figures_of_an_evaluation_are_those_of_the_prompt_s_own_sweep(
    swept: SweepResult, evaluated: SweepResult
) -> None:
    """Figures 1, 5, 6 and the ladder show the same, wherever the readings come from."""
    prompt = PROMPTS[0]
    pairs = (
        (figure_1(swept, 5), figure_1(evaluated, 5, prompt=prompt)),
        (figure_5(swept), figure_5(evaluated, prompt=prompt)),
        (figure_6(swept), figure_6(evaluated, prompt=prompt)),
        (alpha_ladder(swept, 5), alpha_ladder(evaluated, 5, prompt=prompt)),
    )
    for ours, theirs in pairs:
        assert ours.to_json() == theirs.to_json()
    assert figure_5(swept).to_json() == best_table(swept, alpha=1).to_json()
    assert figure_6(swept).to_json() == best_table(swept).to_json()


def test_figure_3_compares_an_evaluation_of_one_kind(evaluated: SweepResult) -> None:
    """One line per method in both panels; with several kinds one has to be chosen."""
    with pytest.raises(ValueError, match="^counted: "):
        figure_3(evaluated)
    config = {**evaluated.provenance["config"], "scorer": PAPER_SCORER}
    every = SweepResult(evaluated.table, {**evaluated.provenance, "config": config})
    with pytest.raises(ValueError, match="^kind: "):
        figure_3(every)
    mlp = SweepResult(every.table[every.table["kind"] == "mlp_out"], every.provenance)
    figure = figure_3(mlp)
    same = figure_3(compare(methods(mlp), score_on="description"), title="tiny-llama")
    assert figure.to_json() == same.to_json()
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    names = {"Patchscopes", "Superscopes", "Patchscopes, equal budget"}
    assert {line.name for line in lines} == names
    assert len({line.line.color for line in lines}) == len(names)


def test_a_prompt_that_is_not_there_is_refused(swept: SweepResult, evaluated: SweepResult) -> None:
    """An evaluation wants a choice, a sweep takes only its own."""
    for draw, readings, prompt in (
        (figure_5, evaluated, None), (figure_6, evaluated, "Queen"), (figure_6, swept, "Queen"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^prompt: "):
            draw(readings, prompt=prompt)
