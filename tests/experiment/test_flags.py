"""Columns that warn: a norm far from that of its layer, and patches that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superscopes_tl import (
    DESCRIPTION_PROMPT,
    LanguageModel,
    PatchedGenerator,
    SweepResult,
    TargetPrompt,
    evaluate,
    sweep,
)
from superscopes_tl.engine import usual_norms
from superscopes_tl.experiment import Cell, flags, read_vector
from superscopes_tl.experiment.store import LATER, EvaluationFile, write_run
from superscopes_tl.explorer.markup import detail
from superscopes_tl.figures import Shades
from superscopes_tl.figures.sweeps import hover_text
from superscopes_tl.vectors import PlaceholderState
from tests.support import plain_hf
from tests.support.readings import reading
from tests.support.tiny_models import tiny_hf

NAME = "Red Hot Chili Peppers"
FIRST = TargetPrompt("x: American rock band")


def swept(model: LanguageModel, scorer: Any, **settings: Any) -> pd.DataFrame:
    """Return the table of a small sweep into the last block and the first."""
    usual: dict[str, Any] = {
        "layers": [5, 2], "kinds": "resid_post", "alphas": 3, "target_layer": (5, 0),
        "target_prompt": FIRST, "max_new_tokens": 3, "scorer": scorer, "progress": False,
    }  # fmt: skip
    return sweep(model, NAME, **(usual | settings)).table


def test_norms_are_those_of_the_layer(
    tiny: Callable[[str, str], LanguageModel], word_overlap: Any
) -> None:
    """Against plain Hugging Face: a norm over the median of a usual text's other tokens."""
    model, hf = tiny("llama", "bridge"), tiny_hf("llama")
    table = swept(model, word_overlap, positions=[0, 1, 4], kinds=("mlp_out", "resid_post"))
    texts = (NAME, DESCRIPTION_PROMPT.text)
    source, usual = ([0, *model.tokenizer.encode(t, add_special_tokens=False)] for t in texts)
    for row in table.to_dict("records"):
        place = (row["kind"], row["source_layer"])
        norms = plain_hf.source_vectors(hf, usual, *place).norm(dim=-1)[1:]
        norm = plain_hf.source_vectors(hf, source, *place)[row["position"]].norm()
        assert row["norm_outlier"] == pytest.approx(float(norm / norms.median()), rel=1e-3)
    small = replace(model, n_ctx=8)
    assert usual_norms(small, ("resid_post",)) == {}
    (given,) = read_vector(
        model, [1.0] * 32, target_prompt=FIRST, alphas=1, target_layer=0, max_new_tokens=2,
        scorer=word_overlap, progress=False,
    ).table["norm_outlier"]  # fmt: skip
    assert pd.isna(given)


def test_a_patch_that_no_token_sees_changes_nothing(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """In the last block it does not reach the tokens that follow; in the first it does.

    Own words are not defined here: the texts tell.
    """
    table = swept(llama, word_overlap)
    assert table["recovered"].isna().all()
    assert table["unchanged"].tolist() == [True, False] * 2
    sampled = swept(llama, word_overlap, draw=1)
    assert not sampled["unchanged"].any()


def llama_text(model: LanguageModel) -> str:
    """Return what a model writes after the paper's target prompt."""
    return PatchedGenerator(model, max_new_tokens=3).unpatched().text


@pytest.mark.parametrize("settings", [{"generate": "none"}, {"generate": "best"}, {}, {"draw": 1}])
def test_own_words_tell_without_a_text(
    settings: dict[str, Any], llama: LanguageModel, word_overlap: Any
) -> None:
    """The unpatched state of the placeholder itself, written over it, and three times of it.

    The second changes the own words' likelihood, and not always the greedy text.
    """
    table = swept(
        llama, word_overlap, layers=[3, 2], alphas=(1, 3), target_layer="same",
        target_prompt=DESCRIPTION_PROMPT, vectors=PlaceholderState(), **settings,
    )  # fmt: skip
    assert table["recovered"].notna().all()
    plain = table["alpha"] == 1
    assert table.loc[plain, "unchanged"].all()
    same = table["text"] == llama_text(llama)
    assert table.loc[~plain, "unchanged"].equals(same[~plain] & table.loc[~plain, "draw"].eq(0))
    assert table["norm_outlier"].isna().all()


def test_files_keep_the_columns_and_older_ones_are_read(
    llama: LanguageModel, word_overlap: Any, tmp_path: Path
) -> None:
    """Sweeps and evaluations keep both; a file without them is read as not known."""
    path = tmp_path / "evaluation.sqlite"
    settings: dict[str, Any] = {
        "layers": 2, "kinds": "resid_post", "alphas": (1, 3), "target_layer": 5, "draws": 0,
        "target_prompt": FIRST, "max_new_tokens": 2, "scorer": word_overlap,
    }  # fmt: skip
    found = evaluate(llama, [NAME], path, progress=False, **settings).table
    columns = list(LATER)
    assert found["unchanged"].all()
    assert found["norm_outlier"].gt(0).all()
    pd.testing.assert_frame_equal(SweepResult.load(path).table[columns], found[columns])
    saved = SweepResult(found, {}).save(tmp_path / "run.zip")
    pd.testing.assert_frame_equal(SweepResult.load(saved).table, found, check_dtype=False)
    write_run(saved, found.drop(columns=columns), {})
    older = SweepResult.load(saved).table
    assert older["norm_outlier"].isna().all()
    assert older["unchanged"].tolist() == [False, False]
    assert list(older.columns) == list(found.columns)


def test_an_evaluation_of_before_is_resumed(tmp_path: Path) -> None:
    """Its rows have neither column among their controls."""
    file = EvaluationFile(tmp_path / "older.sqlite", {})
    file.add([reading(alpha=1)])
    with file._database:
        file._database.execute("UPDATE readings SET controls = '{}'")
    file.add([reading(alpha=3, norm_outlier=40.0, unchanged=True)])
    table, _ = file.content()
    file.close()
    assert table["norm_outlier"].tolist()[1] == 40
    assert pd.isna(table["norm_outlier"].iloc[0])
    assert table["unchanged"].tolist() == [False, True]


def test_flags_are_shown() -> None:
    """In words, in the Explorer and in the hover text of a cell."""
    assert flags(3.9, False) == flags(float("nan"), False) == ()
    sink = reading(norm_outlier=312.4, unchanged=True)
    words = flags(sink.norm_outlier, sink.unchanged)
    assert words == ("312 times the usual norm of its layer", "changes nothing")
    (row,) = SweepResult.from_readings([sink], {}).table.to_dict("records")
    shown = detail(sink, Cell.of(sink), Shades("recovered"))
    for word in words:
        assert word in hover_text(row)
        assert word in shown
