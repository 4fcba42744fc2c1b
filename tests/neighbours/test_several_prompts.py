"""Several target prompts: their agreement, by hand and against single sweeps."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, SweepConfig, TargetPrompt, sweep
from superscopes_tl.engine import crop_description
from superscopes_tl.experiment import SITE
from superscopes_tl.neighbours import agreement
from superscopes_tl.neighbours.knowledge import Agreement, similar_pairs
from tests.support import scorers

PROMPT = "Red Hot Chili Peppers"
ASK = (
    "Syria: Country in the Middle East, x",
    TargetPrompt("Syria: Country, Peppers: American rock band, _", "_"),
    "The rock band x: American",
)
SETTINGS: dict[str, Any] = {
    "layers": (5, 2), "kinds": "resid_post", "target_layer": 2, "alphas": (1, 3, 9),
    "max_new_tokens": 4, "progress": False,
}  # fmt: skip


def test_agreement_by_hand() -> None:
    """Of three prompts three pairs; an empty text agrees with nothing and counts for nothing."""
    texts = [["a", "b", "a", ""], ["a", "c", "a", "a"], ["a", "b", "", ""]]
    others = [["a", "x", "y", "z"], ["x", "x", "y", "z"], ["x", "c", "y", "z"]]
    alike, chance = similar_pairs(scorers.equal, texts, others)
    np.testing.assert_allclose(alike, [1, 1 / 3, 1, math.nan])
    np.testing.assert_allclose(chance, [2 / 6, 1 / 6, 0, 0])


words = st.lists(st.sampled_from(("red apple", "apple", "blue", "")), min_size=2, max_size=2)


@given(texts=st.lists(words, min_size=2, max_size=4), data=st.data())
def test_the_order_of_the_target_prompts_changes_nothing(texts: Any, data: Any) -> None:
    """And where the others say the same, chance is the agreement itself."""
    order = data.draw(st.permutations(range(len(texts))))
    alike, chance = similar_pairs(scorers.word_overlap, texts, texts)
    np.testing.assert_allclose(alike, chance)
    moved = [texts[i] for i in order]
    np.testing.assert_allclose(similar_pairs(scorers.word_overlap, moved, moved)[0], alike)
    assert ((alike >= 0) & (alike <= 1) | np.isnan(alike)).all()


def test_the_cells_are_those_of_a_sweep_with_each_prompt(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """Descriptions, shares and choices: from single sweeps, pair by pair."""
    found = agreement(llama, PROMPT, ASK, scorer=word_overlap, **SETTINGS)
    tables = [
        sweep(llama, PROMPT, target_prompt=one, scorer=word_overlap, controls="other_prompt",
              others=1, **SETTINGS).table
        for one in ASK
    ]  # fmt: skip
    assert len(found.readings) == 3 * len(found.table) == 3 * 2 * 3
    assert found.readings["description"].tolist() == [
        text for table in tables for text in table["description"]
    ]
    for number, row in found.table.iterrows():
        own = [table.loc[number] for table in tables]
        for reading in own:
            assert (row["source_layer"], row["alpha"]) == (
                reading["source_layer"],
                reading["alpha"],
            )
        assert row["recovered"] == pytest.approx(np.mean([r["recovered"] for r in own]), abs=1e-3)
        for column, text in (
            ("agreement", lambda r: r["description"]),
            ("chance", lambda r: crop_description(r["other_prompt_text"])),
        ):
            pairs = [(a["description"], text(b)) for a, b in permutations(own, 2)]
            scores = [word_overlap([a], [b])[0] for a, b in pairs if a and b]
            expected = np.mean(scores) if scores else math.nan
            assert row[column] == pytest.approx(expected, nan_ok=True)
    for layer, rows in found.table.groupby("source_layer"):
        assert rows["choices"].sum() == 3
        chosen = []
        for table in tables:
            mine = table[table["source_layer"] == layer]
            chosen.append(mine.loc[mine["recovered"].idxmax(), "alpha"])
        expected = [chosen.count(alpha) for alpha in rows["alpha"]]
        assert rows["choices"].tolist() == expected
    best = found.best()
    assert best["source_layer"].tolist() == [5, 2]
    for row in best.to_dict("records"):
        rivals = found.table[found.table["source_layer"] == row["source_layer"]]
        assert row["choices"] == rivals["choices"].max()


def test_the_best_of_equal_choices_agrees_most() -> None:
    """Most choices, then the highest agreement, then the smallest |α|; NaN comes last."""
    site = dict.fromkeys(SITE, 0)
    cells = [(3, 1, 0.9), (6, 2, math.nan), (9, 2, 0.1), (-12, 2, 0.4), (2, 2, 0.1), (15, 2, 0.4)]
    rows = [{**site, "alpha": a, "choices": n, "agreement": alike} for a, n, alike in cells]
    table = pd.DataFrame(rows)
    for left, alpha in ((6, -12), (3, 9), (2, 6)):
        assert Agreement(table.head(left), table).best()["alpha"].tolist() == [alpha]


def test_a_config_that_writes_nothing_is_read_out_all_the_same(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """Agreement compares texts: it asks for them whatever `config` says."""
    silent = SweepConfig(generate="none", controls="unpatched")
    cell: dict[str, Any] = {**SETTINGS, "layers": 5, "alphas": 1, "scorer": word_overlap}
    found = agreement(llama, PROMPT, ASK[:2], config=silent, **cell)
    expected = agreement(llama, PROMPT, ASK[:2], **cell)
    assert found.readings["written"].all()
    assert found.readings["description"].equals(expected.readings["description"])


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        (ASK[0], {}, "^target_prompts: "),
        (ASK[:1], {}, "^target_prompts: "),
        ([ASK[0], ASK[0]], {}, "^target_prompts: "),
        (ASK, {"controls": "unpatched"}, "^settings: "),
        (ASK, {"layers": 9}, "^layers: "),
    ],
)
def test_bad_input_is_named(
    asked: Any, settings: dict[str, Any], message: str, llama: LanguageModel, word_overlap: Any
) -> None:
    """Before anything is generated."""
    with pytest.raises((ValueError, TypeError), match=message):
        agreement(llama, PROMPT, asked, scorer=word_overlap, **{**SETTINGS, **settings})
