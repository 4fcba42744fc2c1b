"""The paper's figures by number, from a sweep and from an evaluation."""

from __future__ import annotations

from typing import Any

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

PROMPTS = ("Red Hot Chili Peppers", "Pearl Jam", "Will Smith", "Titanic")
SETTINGS: dict[str, Any] = {
    "layers": (5, 2),
    "alphas": (1, 3, 9),
    "kinds": ("resid_mid", "mlp_out", "resid_post"),
    "max_new_tokens": 16,
    "target_layer": 0,
    "progress": False,
}


@pytest.fixture(scope="module")
def swept(mini: LanguageModel, word_overlap: Any) -> SweepResult:
    """One prompt."""
    return sweep(mini, PROMPTS[0], scorer=word_overlap, **SETTINGS)


@pytest.fixture(scope="module")
def evaluated(mini: LanguageModel, word_overlap: Any) -> SweepResult:
    """Four prompts."""
    return evaluate(mini, PROMPTS, draws=1, scorer=word_overlap, score_on="description", **SETTINGS)


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


def test_each_figure_draws_what_the_paper_s_does(swept: SweepResult) -> None:
    """1 is the decomposition, 5 the table at α = 1, 6 the table at the best α."""
    assert figure_1(swept, 2, alpha=3).to_json() == decomposition(swept, 2, alpha=3).to_json()
    assert figure_5(swept).to_json() == best_table(swept, alpha=1).to_json()
    assert figure_6(swept).to_json() == best_table(swept).to_json()


def test_the_ladder_has_a_rung_per_alpha_with_its_text(swept: SweepResult) -> None:
    """Bars are scores, texts the readings, from the smallest α upwards."""
    bars, texts = alpha_ladder(swept, 5, kind="mlp_out").data
    rows = swept.table[(swept.table["kind"] == "mlp_out") & (swept.table["source_layer"] == 5)]
    assert list(bars.y) == ["1", "3", "9"]
    for text, score, row in zip(texts.text, bars.x, rows.to_dict("records"), strict=True):
        assert text.replace("<br>", " ").strip() == (row["description"] or "–")
        assert score == pytest.approx(row["score"])


def test_figure_3_compares_an_evaluation_of_one_kind(evaluated: SweepResult) -> None:
    """One line per method in both panels; with several kinds one has to be chosen."""
    with pytest.raises(ValueError, match="counted: expected an evaluation.*word_overlap"):
        figure_3(evaluated)
    config = {**evaluated.provenance["config"], "scorer": PAPER_SCORER}
    every = SweepResult(evaluated.table, {**evaluated.provenance, "config": config})
    with pytest.raises(ValueError, match="kind: expected one of"):
        figure_3(every)
    mlp = SweepResult(every.table[every.table["kind"] == "mlp_out"], every.provenance)
    figure = figure_3(mlp)
    same = figure_3(compare(methods(mlp), score_on="description"), title="mini")
    assert figure.to_json() == same.to_json()
    names = {trace.name for trace in figure.data if trace.mode == "lines+markers"}
    assert names == {"Patchscopes", "Superscopes", "Patchscopes, equal budget"}


def test_a_prompt_that_is_not_there_is_refused(swept: SweepResult, evaluated: SweepResult) -> None:
    """An evaluation wants a choice, a sweep takes only its own."""
    with pytest.raises(ValueError, match="^prompt: "):
        figure_5(evaluated)
    with pytest.raises(ValueError, match="^prompt: "):
        figure_6(evaluated, prompt="Queen")
    with pytest.raises(ValueError, match="^prompt: "):
        figure_1(swept, 5, prompt="Queen")


def test_an_evaluation_gives_a_prompt_s_sweep(evaluated: SweepResult) -> None:
    """Greedy readings of one mapping, with the experiment's provenance and the prompt."""
    own = evaluated.of("Titanic")
    assert set(own.table["prompt"]) == {"Titanic"}
    assert len(own) == 18
    assert own.provenance["prompt"] == "Titanic"
    assert len(evaluated.of("Titanic", draw=1)) == 6
    with pytest.raises(ValueError, match="^mapping: "):
        evaluated.of("Titanic", mapping="cube")
