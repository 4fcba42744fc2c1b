"""Choosing α: which row is taken, and how often it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import SweepResult
from superscopes_tl.figures import amplifier_dots, selector_dots
from superscopes_tl.statistics import (
    amplifiers,
    by_similarity,
    choose,
    fixed_alpha,
    largest_lift,
    lowest_entropy,
    neighbour_agreement,
    rate,
)
from superscopes_tl.statistics.selectors import BLIND, ORACLE
from tests.support.long_tables import cell, table_of

NAN = math.nan
SCORES = st.one_of(st.just(NAN), st.sampled_from([-0.5, 0.0, 0.5, 1.0]))
CELLS = st.dictionaries(
    st.tuples(st.sampled_from([5, 2]), st.sampled_from([-3.0, 1.0, 3.0, 9.0])), SCORES, min_size=1
)


def alphas(table: pd.DataFrame, selector: Callable[[pd.DataFrame], Any]) -> list[float]:
    """Return the chosen α of every site."""
    return choose(table, selector)["alpha"].tolist()


def ranks(*values: float) -> Callable[[pd.DataFrame], pd.Series[float]]:
    """Return a selector with these ranks."""
    return lambda table: pd.Series(values, index=table.index)


@given(cells=CELLS)
@settings(max_examples=60, deadline=None)
def test_by_similarity_is_the_best_of_a_sweep(cells: dict[tuple[int, float], float]) -> None:
    """The paper's automatic amplifier is one selector among others."""
    table = table_of(*(cell("P", layer, alpha, s) for (layer, alpha), s in cells.items()))
    pd.testing.assert_frame_equal(choose(table, by_similarity), SweepResult(table, {}).best())


def test_the_highest_rank_wins_and_ties_go_to_the_smallest_amplifier() -> None:
    """Per site: highest rank, then smallest |α|, of greedy rows; without ranks the smallest |α|."""
    sampled = table_of(cell(alpha=1), cell(alpha=3, draw=1), cell(alpha=9))
    assert alphas(sampled, ranks(0, 5, 1)) == [9]
    table = table_of(
        cell("P", 0, 9), cell("P", 0, 3), cell("P", 0, 1),
        cell("P", 1, 9), cell("P", 1, -3),
        cell("Q", 0, 6), cell("Q", 0, 1),
    )  # fmt: skip
    assert alphas(table, ranks(2, 2, 1, NAN, NAN, NAN, -7)) == [3, -3, 1]
    chosen = choose(table, ranks(2, 2, 1, NAN, NAN, NAN, -7))
    assert list(chosen.columns) == list(table.columns)
    assert chosen["prompt"].tolist() == ["P", "P", "Q"]
    assert list(chosen.index) == [0, 1, 2]


def test_tables_that_were_put_together_may_repeat_row_labels() -> None:
    """`pd.concat` without new labels is no trap."""
    one = table_of(cell("P", 0, 1, 0.1), cell("P", 0, 3, 0.9))
    two = table_of(cell("Q", 0, 1, 0.9), cell("Q", 0, 3, 0.1))
    assert alphas(pd.concat([one, two]), by_similarity) == [3, 1]
    assert alphas(pd.concat([one, two]), neighbour_agreement(same_words)) == [1, 1]


@pytest.mark.parametrize("bad", [lambda t: t["score"].head(1), lambda t: t["score"].tolist()])
def test_a_selector_ranks_every_row(bad: Callable[[pd.DataFrame], Any]) -> None:
    """Anything else than one rank per row is refused."""
    with pytest.raises(ValueError, match="^selector: "):
        choose(table_of(cell(), cell(alpha=3)), bad)


def test_lowest_entropy_is_the_surest_text() -> None:
    """Lowest entropy wins; a text that says nothing is not sure of anything."""
    table = table_of(
        cell(alpha=1, entropy=2.0),
        cell(alpha=3, entropy=0.5),
        cell(alpha=9, entropy=0.1, description=" "),
    )
    assert alphas(table, lowest_entropy) == [3]
    assert lowest_entropy(table).tolist()[:2] == [-2.0, -0.5]
    assert math.isnan(lowest_entropy(table)[2])


def test_largest_lift_is_what_the_patch_made_likelier() -> None:
    """-1 above -2 is a lift of 1, -0.5 above -0.6 one of 0.1."""
    table = table_of(
        cell(alpha=1, log_probability=-0.5, unpatched_log_probability=-0.6),
        cell(alpha=3, log_probability=-1.0, unpatched_log_probability=-2.0),
        cell(alpha=9, log_probability=0.0, unpatched_log_probability=-9.0, description=""),
    )
    assert largest_lift(table).tolist()[:2] == pytest.approx([0.1, 1.0])
    assert alphas(table, largest_lift) == [3]
    with pytest.raises(ValueError, match="^table: "):
        largest_lift(table.drop(columns="unpatched_log_probability"))


def same_words(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score 1 for equal texts, else 0."""
    return [float(a == b) for a, b in zip(references, candidates, strict=True)]


def test_neighbour_agreement_trusts_what_neighbours_repeat() -> None:
    """Mean over the next smaller and the next larger α of the same site, in order of α."""
    table = table_of(
        cell("P", 0, 9, description="band"),
        cell("P", 0, 1, description="fruit"),
        cell("P", 0, 3, description="band"),
        cell("P", 0, 12, description="band"),
        cell("P", 0, 15, description=""),
        cell("Q", 0, 1, description="band"),  # another site: no neighbour
        cell("P", 0, 6, description="fruit", draw=1),  # sampled: no neighbour
    )
    rank = neighbour_agreement(same_words)(table)
    expected = [1.0, 0.0, 0.5, 1.0, NAN, NAN, NAN]
    np.testing.assert_array_equal(rank.to_numpy(), expected)
    assert alphas(table, neighbour_agreement(same_words)) == [9, 1]
    lonely = neighbour_agreement(same_words)(table.tail(2))
    assert lonely.isna().all()
    assert list(lonely.index) == [5, 6]


def test_a_fixed_alpha_is_a_baseline() -> None:
    """The same α everywhere; a site that lacks it keeps its smallest, an unknown α is refused."""
    table = table_of(cell("P", 0, 1), cell("P", 0, 9), cell("P", 1, 6), cell("P", 1, 3))
    assert alphas(table, fixed_alpha(9)) == [9, 3]
    with pytest.raises(ValueError, match="^alpha: "):
        choose(table, fixed_alpha(2))


def is_right(table: pd.DataFrame) -> pd.Series[bool]:
    """A description is right when it says so."""
    return table["description"] == "right"


def prompts_of(*patterns: str) -> pd.DataFrame:
    """Return a prompt per pattern, a site per word and an α per letter.

    `r` is right and `w` wrong; a capital letter has the higher score.
    """
    rows = []
    for number, pattern in enumerate(patterns):
        for layer, word in enumerate(pattern.split()):
            for step, letter in enumerate(word):
                text = "right" if letter.lower() == "r" else "wrong"
                score = 1.0 if letter.isupper() else 0.0
                rows.append(cell(f"P{number}", layer, 1 + step, score, text))
    return table_of(*rows)


def test_rate_compares_selectors_by_hand() -> None:
    """Three prompts: similarity (capital letters) is right at 1/2, 1 and 0 of their sites."""
    table = prompts_of("wR Wr", "Rw", "rW Ww Ww Ww")
    found = rate(table, {"similarity": by_similarity, "α = 1": fixed_alpha(1)}, is_right)
    assert list(found.index) == ["similarity", "α = 1", ORACLE, BLIND]
    assert found["share"].tolist() == pytest.approx(
        [(1 / 2 + 1 + 0) / 3, (0 + 1 + 1 / 4) / 3, (1 + 1 + 1 / 4) / 3, (1 / 2 + 1 / 2 + 1 / 8) / 3]
    )
    assert found["difference"].tolist() == pytest.approx(found["share"] - 0.5)
    assert found.loc["similarity", ["difference_low", "difference_high"]].tolist() == [0, 0]
    drawn = pd.concat([table, table.assign(draw=1, description="right")])
    pd.testing.assert_frame_equal(
        rate(drawn, {"similarity": by_similarity, "α = 1": fixed_alpha(1)}, is_right), found
    )


@given(patterns=st.lists(st.text("rwR", min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_nothing_beats_the_oracle(patterns: list[str]) -> None:
    """No selector is right where no α is, and the random α is between none and all."""
    selectors = {"s": by_similarity, "n": neighbour_agreement(same_words)}
    found = rate(prompts_of(*patterns), selectors, is_right, resamples=20)
    assert (found["share"] <= found.loc[ORACLE, "share"] + 1e-12).all()
    assert (found["share"] >= 0).all()
    within = (found["low"] <= found["high"]) | found["low"].isna()
    assert within.all()


def test_the_figure_shows_shares_with_intervals() -> None:
    """A dot per selector with asymmetric bars, escaped names; one prompt has no interval."""
    rates = rate(prompts_of("wR Wr", "Rw"), {"<b>": by_similarity}, is_right)
    dots = selector_dots(rates).data[0]
    assert list(dots.x) == pytest.approx(rates["share"])
    assert list(dots.y) == ["&lt;b&gt;", ORACLE, BLIND]
    assert list(dots.error_x.array) == pytest.approx(rates["high"] - rates["share"])
    assert list(dots.error_x.arrayminus) == pytest.approx(rates["share"] - rates["low"])
    assert dots.customdata[0] == "+0.0% to by_similarity (+0.0% to +0.0%)"
    one = selector_dots(rate(prompts_of("Rw"), {}, is_right)).data[0]
    with pytest.raises(ValueError, match="^table: "):
        rate(prompts_of("Rw").assign(draw=1), {}, is_right)
    assert list(one.error_x.array) == [None, None]
    assert one.customdata[0] == "one prompt: no interval"


def test_amplifiers_count_prompts_by_hand() -> None:
    """Three prompts: any reading right, the best-scoring one right, and the difference."""
    ways = {"scale": prompts_of("wR", "rW", "wW"), "guided": prompts_of("R", "w", "R")}
    found = amplifiers(ways, is_right)
    assert list(found.index) == ["scale", "guided"]
    assert found["readings"].tolist() == [2, 1]
    assert found["share"].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert found["chosen"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found["difference"].tolist() == [0, 0]
    assert found.loc["scale", ["difference_low", "difference_high"]].tolist() == [0, 0]
    assert found.loc["guided", "difference_low"] < 0 < found.loc["guided", "difference_high"]
    drawn = {
        name: pd.concat([t, t.assign(draw=1, description="right")]) for name, t in ways.items()
    }
    pd.testing.assert_frame_equal(amplifiers(drawn, is_right), found)


def test_the_oracle_of_one_site_per_prompt_is_the_share_of_amplifiers() -> None:
    """Where every prompt has one site, `rate` and `amplifiers` count the same, intervals too."""
    table = prompts_of("wR", "rW", "wW", "Rr")
    rated, found = rate(table, {"s": by_similarity}, is_right), amplifiers({"": table}, is_right)
    for column, before in (("share", ""), ("chosen", "chosen_")):
        row = rated.loc[ORACLE if column == "share" else "s"]
        ours = found.loc["", [column, f"{before}low", f"{before}high"]]
        assert ours.tolist() == row[["share", "low", "high"]].tolist()


def test_amplifiers_need_the_same_prompts() -> None:
    """A paired difference over different prompts would be none."""
    with pytest.raises(ValueError, match=r"^ways\['b'\]: "):
        amplifiers({"a": prompts_of("R", "W"), "b": prompts_of("R")}, is_right)
    with pytest.raises(ValueError, match="^ways: "):
        amplifiers({}, is_right)


def test_the_amplifier_figure_shows_both_counts() -> None:
    """Dots for what can be read and for what the score finds; names escaped, NaN not sent."""
    found = amplifiers({"<b>": prompts_of("wR", "rW")}, is_right)
    can, chosen = amplifier_dots(found).data
    assert list(can.y) == ["&lt;b&gt; (2 readings)"]
    assert (list(can.x), list(chosen.x)) == ([1.0], [0.5])
    assert can.orientation == chosen.orientation == "h"  # else plotly moves the dots sideways
    assert list(chosen.error_x.array) == list(chosen.error_x.arrayminus) == [0.5]
    one = amplifier_dots(amplifiers({"one": prompts_of("R")}, is_right)).data[0]
    assert list(one.error_x.array) == [None]
