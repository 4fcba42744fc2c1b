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
from superscopes_tl.figures import selector_dots
from superscopes_tl.statistics import (
    by_other_prompts,
    by_recovered,
    by_similarity,
    choose,
    cross_fitted,
    equal_dose,
    explains_nothing,
    fixed_alpha,
    largest_lift,
    lowest_entropy,
    mode_frequency,
    neighbour_agreement,
    rate,
    self_explaining,
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
    assert found["value"].tolist() == pytest.approx(
        [(1 / 2 + 1 + 0) / 3, (0 + 1 + 1 / 4) / 3, (1 + 1 + 1 / 4) / 3, (1 / 2 + 1 / 2 + 1 / 8) / 3]
    )
    assert found["difference"].tolist() == pytest.approx(found["value"] - 0.5)
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
    assert (found["value"] <= found.loc[ORACLE, "value"] + 1e-12).all()
    assert (found["value"] >= 0).all()
    within = (found["low"] <= found["high"]) | found["low"].isna()
    assert within.all()


def test_rate_takes_any_number_and_any_baseline() -> None:
    """The mean worth of what is chosen, beside another selector; rows without a worth are none."""
    table = table_of(
        cell("P", 0, 1, recovered=0.2), cell("P", 0, 3, recovered=0.8),
        cell("P", 0, 9, recovered=0),
        cell("Q", 0, 1, recovered=NAN), cell("Q", 0, 3, recovered=0.4),
        cell("R", 0, 1, recovered=NAN), cell("R", 0, 3, recovered=NAN),
    )  # fmt: skip
    selectors = {"3": fixed_alpha(3), "recovered": by_recovered}
    found = rate(table, selectors, lambda rows: rows["recovered"], against=fixed_alpha(1))
    assert found["value"].tolist() == pytest.approx([0.6, 0.6, 0.6, (1 / 3 + 0.4) / 2])
    assert found["difference"].tolist() == pytest.approx([0.3, 0.3, 0.3, (1 / 3 + 0.4) / 2 - 0.3])
    assert list(found.index) == ["3", "recovered", ORACLE, BLIND]


def measured(prompt: str, signals: dict[float, tuple[float, float, float]]) -> pd.DataFrame:
    """Return a site with self-similarity, first entropy and dose by α."""
    names = ("self_similarity", "first_entropy", "kl_unpatched")
    return table_of(
        *(
            cell(prompt, 0, alpha, **dict(zip(names, s, strict=True)))
            for alpha, s in signals.items()
        )
    )


def test_self_explaining_weighs_similarity_and_entropy() -> None:
    """0.4 of the scaled similarity minus 0.6 of the scaled entropy; no rank where S stays small."""
    site = measured("P", {1: (0.0, 1.0, 0), 3: (0.1, 0.0, 0), 9: (0.2, 2.0, 0)})
    assert self_explaining(site).tolist() == pytest.approx([-0.3, 0.2, 0.4 - 0.6])
    failed = measured("Q", {1: (0.01, 0.0, 0), 3: (-0.5, -3.0, 0)})
    table = pd.concat([site, failed], ignore_index=True)
    assert explains_nothing(table).tolist() == [False] * 3 + [True] * 2
    assert self_explaining(table).isna().tolist() == [False] * 3 + [True] * 2
    assert alphas(table, self_explaining) == [3, 1]
    flat = measured("P", {1: (0.1, 1.0, 0), 3: (0.1, 1.0, 0)})
    assert self_explaining(flat).tolist() == [0, 0]
    unknown = measured("P", {1: (NAN, 1.0, 0), 3: (NAN, 0.0, 0)})
    assert self_explaining(unknown).isna().all()
    assert not explains_nothing(unknown).any()
    with pytest.raises(ValueError, match="alpha_signals"):
        self_explaining(table_of(cell()))


@given(
    doses=st.dictionaries(
        st.sampled_from([-3.0, 1.0, 3.0, 9.0, 15.0]), st.floats(0, 3), min_size=1
    ),
    nats=st.floats(0.1, 3),
)
def test_equal_dose_is_the_smallest_that_reaches_it(doses: dict[float, float], nats: float) -> None:
    """The smallest |α| whose dose reaches it, or where none does the one that comes nearest."""
    table = measured("P", {alpha: (0, 0, dose) for alpha, dose in doses.items()})
    (chosen,) = alphas(table, equal_dose(nats))
    if reached := [abs(alpha) for alpha, dose in doses.items() if dose >= nats]:
        assert abs(chosen) == min(reached)
        assert doses[chosen] >= nats
    else:
        # Two doses may differ by less than what is left of the difference to `nats`.
        assert doses[chosen] - nats == max(doses.values()) - nats
    unknown = measured("P", {0.5: (0, 0, NAN)})  # a dose that is not known reaches nothing
    assert alphas(pd.concat([unknown, table]), equal_dose(nats)) == [chosen]


def test_mode_frequency_counts_equal_draws() -> None:
    """The share of the most frequent description, of all draws; first words alone if asked."""
    draws = {1: ("band", "Band ", "", "fruit"), 3: ("a b", "a c", "a d", "e"), 9: ("", "", "", "")}
    sampled = [
        cell("P", 0, alpha, description=text, draw=n)
        for alpha, texts in draws.items()
        for n, text in enumerate(texts, start=1)
    ]
    table = table_of(*sampled, *(cell("P", 0, alpha) for alpha in (1, 3, 9, 12)))
    assert mode_frequency()(table).tolist()[-4:-1] == [0.5, 0.25, 0]
    assert math.isnan(mode_frequency()(table).iloc[-1])
    assert mode_frequency(words=1)(table).tolist()[-4:-1] == [0.5, 0.75, 0]
    assert alphas(table, mode_frequency()) == [1]
    assert alphas(table, mode_frequency(words=1)) == [3]
    with pytest.raises(ValueError, match="^table: "):
        mode_frequency()(table_of(cell()))


def test_by_other_prompts_is_the_cross_fitted_alpha() -> None:
    """It chooses the rows of `cross_fitted`, whatever labels and order the table has."""
    rng = np.random.default_rng(0)
    cells = [
        cell(f"P{n}", layer, alpha, recovered=rng.random(), other_prompt_recovered=0.0,
             plain_nats=-1.0, unpatched_nats=-9.0)
        for n in range(8) for layer in (5, 2) for alpha in (1, 3, 9)
    ]  # fmt: skip
    table = table_of(*cells).sample(frac=1, random_state=0)
    chosen = choose(table, by_other_prompts)
    columns = ["prompt", "source_layer", "alpha"]
    ours = set(chosen[columns].itertuples(index=False, name=None))
    assert ours == set(cross_fitted(table)[columns].itertuples(index=False, name=None))


def test_the_figure_shows_values_with_intervals() -> None:
    """A dot per selector with asymmetric bars, escaped names; one prompt has no interval."""
    rates = rate(prompts_of("wR Wr", "Rw"), {"<b>": by_similarity}, is_right)
    dots = selector_dots(rates).data[0]
    assert list(dots.x) == pytest.approx(rates["value"])
    assert list(dots.y) == ["&lt;b&gt;", ORACLE, BLIND]
    assert list(dots.error_x.array) == pytest.approx(rates["high"] - rates["value"])
    assert list(dots.error_x.arrayminus) == pytest.approx(rates["value"] - rates["low"])
    assert dots.customdata[0] == "difference +0.00 (+0.00 to +0.00)"
    one = selector_dots(rate(prompts_of("Rw"), {}, is_right)).data[0]
    with pytest.raises(ValueError, match="^table: "):
        rate(prompts_of("Rw").assign(draw=1), {}, is_right)
    assert list(one.error_x.array) == [None, None]
    assert one.customdata[0] == "one prompt: no interval"
