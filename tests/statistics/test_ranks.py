"""Recall@1 and MRR: a matrix by hand, what chance gives, and the engine's own scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from superscopes_tl import LanguageModel, compare, sweep
from superscopes_tl.experiment import make_patches, plan_sweep
from superscopes_tl.scores import no_scores
from superscopes_tl.statistics import bootstrap, found_by_chance, found_ranks, retrieval
from superscopes_tl.statistics.ranks import summary
from tests.support import plain_hf
from tests.support.tiny_models import sharp_llama

BY_HAND = np.array(
    [
        [0.9, 0.1, 0.2, 0.0],  # first
        [0.5, 0.4, 0.1, 0.0],  # second
        [0.3, 0.3, 0.3, 0.1],  # one of the first three
        [np.nan, 0.2, 0.1, np.nan],  # no score: never found
    ]
)


def test_ranks_by_hand() -> None:
    """A tie is shared, a missing own score never found, and other missing ones not in the way."""
    found = found_ranks(BY_HAND)
    expected = [[1, 1], [0, 1 / 2], [1 / 3, (1 + 1 / 2 + 1 / 3) / 3], [0, 0]]
    np.testing.assert_allclose(found, expected)
    row = summary(BY_HAND)
    assert row["recall_at_1"] == pytest.approx((1 + 1 / 3) / 4)
    assert row["mrr"] == pytest.approx(found[:, 1].mean())
    low, high = bootstrap(found)
    for number, name in enumerate(("recall_at_1", "mrr")):
        assert (row[f"{name}_low"], row[f"{name}_high"]) == (low[number], high[number])
    assert row["chance_recall_at_1"] == 0.25
    assert row["chance_mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


square = st.integers(2, 6).flatmap(
    lambda n: arrays(float, (n, n), elements=st.integers(0, 4).map(float))
)


@given(scores=square, data=st.data())
def test_the_order_of_the_prompts_changes_nothing(scores: np.ndarray, data: Any) -> None:
    """Nor does any rising function of the scores of a row."""
    order = data.draw(st.permutations(range(len(scores))))
    moved = found_ranks(scores[np.ix_(order, order)])
    np.testing.assert_allclose(moved, found_ranks(scores)[order])
    rescaled = scores * np.arange(1, len(scores) + 1)[:, None] + 3
    np.testing.assert_allclose(found_ranks(rescaled), found_ranks(scores))


@given(scores=square)
def test_readings_of_prompts_at_random_are_found_by_chance(scores: np.ndarray) -> None:
    """Over all cyclic assignments of rows to prompts the mean is 1/n and H(n)/n, ties included."""
    turned = [found_ranks(np.roll(scores, k, axis=0)).mean(axis=0) for k in range(len(scores))]
    np.testing.assert_allclose(np.mean(turned, axis=0), found_by_chance(len(scores)), atol=1e-12)


def test_prompts_that_read_as_themselves_are_all_found() -> None:
    """1 for both measures; the reverse finds none, at the last rank."""
    np.testing.assert_array_equal(found_ranks(np.eye(5)), np.ones((5, 2)))
    last = found_ranks(1 - np.eye(5))
    np.testing.assert_allclose(last, [[0, 1 / 5]] * 5)
    with pytest.raises(ValueError, match="scores: "):
        found_ranks(np.zeros((2, 3)))


def test_compare_counts_what_is_found(word_overlap: Any) -> None:
    """By the best text against each prompt; differences are paired."""
    names = ("red apple", "blue sky", "green tree")
    texts = {"A": ("apple", "red apple", "nothing"), "B": ("red", "sky", "green tree")}
    tables = {
        method: pd.DataFrame(
            {"prompt": names, "source_layer": 1, "alpha": 1.0, "text": several}
        )
        for method, several in texts.items()
    }  # fmt: skip
    found = compare(tables, scorer=word_overlap)
    counts = found.counts.set_index("method")
    assert counts["recall_at_1"].tolist() == pytest.approx([(1 + 0 + 1 / 3) / 3, 1])
    ties = (1 + 1 / 2 + 1 / 3) / 3  # "nothing" resembles all as much
    assert counts["mrr"].tolist() == pytest.approx([(1 + (1 / 2 + 1 / 3) / 2 + ties) / 3, 1])
    assert counts["chance_recall_at_1"].tolist() == pytest.approx([1 / 3, 1 / 3])
    gain = found.differences.iloc[0]
    assert gain["recall_at_1"] == pytest.approx(1 - (1 + 1 / 3) / 3)
    assert gain["recall_at_1_low"] <= gain["recall_at_1"] <= gain["recall_at_1_high"]
    assert (counts["recall_at_1_high"] <= 1).all()


PROMPTS = ("Red Hot Chili Peppers", "Alexander the Great", "Syria")
SETTINGS: dict[str, Any] = {
    "layers": 5, "kinds": "resid_post", "target_layer": 2, "alphas": (1, 3), "max_new_tokens": 4,
}  # fmt: skip


def test_every_vector_is_scored_against_everyones_own_words(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """The diagonal is the sweep's recovered; beside it, plain Hugging Face."""
    found = retrieval(llama, PROMPTS, scorer=word_overlap, **SETTINGS)
    assert found.scores["recovered"].shape == (2, 3, 3)
    assert found.left_out == ()
    hf = sharp_llama()
    plan = plan_sweep(llama, PROMPTS[0], scorer=no_scores, **SETTINGS)
    plans = [plan, *map(plan.at_prompt, PROMPTS[1:])]
    words = [next(iter(one.own_words([one.cells[0].position]).values())) for one in plans]
    target, ids = plan.generator.target, list(plan.generator.target.tokens.ids)
    rows = sweep(llama, PROMPTS[1], scorer=word_overlap, progress=False, **SETTINGS).table
    own = {by: found.scores[by][:, 1, 1] for by in found.scores}
    np.testing.assert_allclose(own["recovered"], rows["recovered"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(own["similarity"], rows["score"])
    for r, name in enumerate(PROMPTS):  # of what the second vector says to every name
        alike = word_overlap([name] * len(rows), list(rows["description"]))
        np.testing.assert_allclose(found.scores["similarity"][:, 1, r], alike)
    for s, one in enumerate(plans):
        patch = (target.positions, make_patches(one)[0].vector, 2)
        for r, said in enumerate(words):
            nats = plain_hf.log_probability(hf, ids, list(said.token_ids), patch)
            expected = said.recovered(nats)
            assert found.scores["recovered"][0, s, r] == pytest.approx(expected, rel=1e-2, abs=1e-2)
    for row in found.table.to_dict("records"):
        cell = 0 if row["alpha"] == 1 else 1
        ranks = found_ranks(found.scores[row["by"]][cell])
        assert (row["recall_at_1"], row["mrr"]) == pytest.approx(tuple(ranks.mean(axis=0)))
    bare = retrieval(llama, PROMPTS, generate="none", scorer=no_scores, **SETTINGS)
    assert set(bare.table["by"]) == {"recovered"}
    assert not any(math.isnan(value) for value in bare.table["mrr"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "Syria"}, "prompts: "),
        ({"prompts": ["Syria", "Syria"]}, "prompts: "),
        ({"positions": slice(None)}, "positions: "),
        ({"reference": " the"}, "prompts: "),
    ],
)
def test_bad_input_is_named(settings: dict[str, Any], message: str, llama: LanguageModel) -> None:
    """Several tokens, no prompts, or no text that any prompt makes likelier."""
    asked: dict[str, Any] = {"prompts": PROMPTS, "scorer": no_scores, **SETTINGS, **settings}
    with pytest.raises(ValueError, match=message):
        retrieval(llama, asked.pop("prompts"), **asked)
