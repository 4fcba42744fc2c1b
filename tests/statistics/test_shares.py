"""Shares per layer: by hand, with a planted effect, and where there is nothing to find."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl.statistics import MEASURES, cross_fitted, layer_shares, sign_flip_test
from tests.support.long_tables import cell, table_of

RESIDUAL = "Scale(), in residual norms"
LAYERS, PROMPTS = 10, 16


def row(prompt: str, alpha: float, own: float, other: float, **others: Any) -> dict[str, Any]:
    """Return a cell with its shares; the name adds ten nats."""
    shares = {"recovered": own, "other_prompt_recovered": other}
    return cell(prompt, alpha=alpha, **shares, plain_nats=-5.0, unpatched_nats=-15.0, **others)


def simulated(
    seed: int, kinds: int, levels: tuple[float, ...], effect: float = 0.0, prompts: int = PROMPTS
) -> pd.DataFrame:
    """Return shares at each α of some kinds with `LAYERS` layers: a level and equal noise.

    A prompt's own vector and the three others are exchangeable; `effect` is added to its share at
    the last α.
    """
    shape = (kinds, LAYERS, len(levels), prompts, 4)
    shares = np.random.default_rng(seed).normal(0, 0.2, shape)
    shares += np.array(levels)[:, None, None]
    shares[:, :, -1, :, 0] += effect
    places = itertools.product(*map(range, shape[:4]))
    names = ["kind", "source_layer", "alpha", "prompt"]
    return pd.DataFrame(list(places), columns=names).assign(
        kind=lambda table: table["kind"].map("kind {}".format),
        alpha=lambda table: table["alpha"] + 1.0,
        prompt=lambda table: table["prompt"].map("P{}".format),
        position=3, target_layer=0, mapping="Scale()", draw=0,
        recovered=shares[..., 0].ravel(), other_prompt_recovered=shares[..., 1:].mean(-1).ravel(),
        plain_nats=-5.0, unpatched_nats=-15.0,
    )  # fmt: skip


def rejected(found: pd.DataFrame) -> float:
    """Return the share of layers with p up to 0.05."""
    return float((found["p"] <= 0.05).mean())


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_where_vectors_are_exchangeable_about_five_percent_are_rejected(
    alpha: float | None,
) -> None:
    """Within binomial error for each layer; the correction holds it for a whole kind."""
    kinds = 60
    found = layer_shares(simulated(0, kinds, (0.6,) * 5), alpha=alpha, resamples=400)
    error = 3 * math.sqrt(0.05 * 0.95 / (kinds * LAYERS))
    assert rejected(found) == pytest.approx(0.05, abs=error)
    discovered = (found.groupby("kind")["q"].min() <= 0.05).mean()
    assert discovered <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / kinds)


@pytest.mark.parametrize("levels", [(-3.0, 0.6), (-3.0, -0.1), (0.0, 0.0), (0.6, -3.0)])
def test_a_poor_baseline_is_no_merit_of_amplification(levels: tuple[float, ...]) -> None:
    """If own and others' vectors ruin the text at α = 1 alike, nothing specific was gained."""
    found = layer_shares(simulated(1, 30, levels), resamples=400)
    assert rejected(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))
    assert found["gain"].mean() < 0.02


def test_a_planted_effect_is_found_and_measured() -> None:
    """Its α is chosen, its size is inside most intervals, and it is found in every layer."""
    found = layer_shares(simulated(2, 6, (0.6, 0.6, 0.6), effect=0.3), resamples=500)
    assert (found["q"] <= 0.05).mean() > 0.95
    assert (found["alpha"] == 3).all()
    assert found["gain"].mean() == pytest.approx(0.3, abs=0.03)
    inside = (found["gain_low"] <= 0.3) & (found["gain_high"] >= 0.3)
    assert inside.mean() > 0.85


shares_of = st.floats(-10, 10)


@given(
    st.lists(st.lists(st.tuples(shares_of, shares_of), min_size=3, max_size=3), min_size=2,
             max_size=9),
    st.lists(st.tuples(shares_of, shares_of), min_size=3, max_size=3),
    st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_no_prompt_helps_to_choose_its_own_alpha(
    numbers: list[list[tuple[float, float]]], others: list[tuple[float, float]], data: st.DataObject
) -> None:
    """Whatever its own numbers are, a prompt is reported at the same α."""
    prompt = data.draw(st.integers(0, len(numbers) - 1))
    folds = data.draw(st.integers(2, 6))

    def alpha(every: list[list[tuple[float, float]]]) -> float:
        rows = [
            row(f"P{number}", alpha, *pair)
            for number, pairs in enumerate(every)
            for alpha, pair in zip((1, 3, 9), pairs, strict=True)
        ]
        found = cross_fitted(table_of(*rows), folds=folds).set_index("prompt")["alpha"]
        return float(found[f"P{prompt}"])

    changed = [others if number == prompt else row for number, row in enumerate(numbers)]
    assert alpha(changed) == alpha(numbers)


TINY = table_of(
    # Each prompt has a fold of its own: A gets the best α of B and C, and so on.
    row("A", 1, 0.2, 0.1), row("A", 3, 0.4, 0.1), row("A", 9, 1.2, 0.1),
    row("B", 1, -0.4, -0.8), row("B", 3, 0.6, 0.1), row("B", 9, -0.1, 0.3),
    row("C", 1, 0.5, 0.2), row("C", 3, 0.55, -2.0), row("C", 9, 0.15, 0.3),
    row("D", 1, math.nan, math.nan), row("D", 3, math.nan, math.nan),
    row("D", 9, math.nan, math.nan),
)  # fmt: skip


def test_numbers_by_hand() -> None:
    """Means over the prompts whose share is defined; a plain share below 0 counts as 0."""
    # Gains at 3 and 9: A 0.2, 1.0; B 0.5, -0.4; C 0.25, -0.45.
    chosen = cross_fitted(TINY, folds=9)
    assert dict(zip(chosen["prompt"], chosen["alpha"], strict=True)) == {"A": 3, "B": 9, "C": 3}
    (found,) = layer_shares(TINY, folds=9).to_dict("records")
    assert (found["kind"], found["source_layer"], found["target_layer"]) == ("resid_post", 0, 0)
    assert (found["prompts"], found["alpha"]) == (3, 3)
    assert found["plain"] == pytest.approx((0.2 - 0.4 + 0.5) / 3)
    assert found["amplified"] == pytest.approx((0.4 - 0.1 + 0.55) / 3)
    assert found["other_prompt"] == pytest.approx((0.1 + 0.3 - 2.0) / 3)
    assert found["specific"] == pytest.approx((0.3 - 0.4 + 2.55) / 3)
    assert found["above_others"] == pytest.approx((0.3 - 0.4 + 0.55) / 3)
    assert found["plain_above_others"] == pytest.approx((0.1 - 0.4 + 0.3) / 3)
    gains = (0.2, -0.4, 0.25)  # B: nothing at α = 1, less than nothing at α = 9
    assert found["gain"] == pytest.approx(sum(gains) / 3)
    assert found["gain_nats"] == pytest.approx(10 * sum(gains) / 3)
    assert math.isnan(found["random_direction"])
    # With α chosen anew, the sign patterns +++, -++ and +-- reach the observed sum of 0.05.
    assert (found["p"], found["q"]) == (3 / 8, 3 / 8)


def test_an_alpha_fixed_beforehand() -> None:
    """It is reported for every prompt, and α = 1 has no gain over itself."""
    (found,) = layer_shares(TINY, alpha=9).to_dict("records")
    assert (found["alpha"], found["amplified"]) == (9, pytest.approx(1.25 / 3))
    (found,) = layer_shares(TINY, alpha=1).to_dict("records")
    assert (found["amplified"], found["gain"], found["p"]) == (found["plain"], 0, 1)
    with pytest.raises(ValueError, match="^alpha: "):
        layer_shares(TINY, alpha=2)


def test_intervals_bracket_their_means() -> None:
    """Every mean is between its ends; one prompt has no interval, none has no mean either."""
    found = layer_shares(simulated(3, 2, (0.2, 0.5)).assign(random_direction_recovered=-1.0))
    for name in MEASURES:
        assert (found[f"{name}_low"] <= found[name] + 1e-12).all()
        assert (found[f"{name}_high"] >= found[name] - 1e-12).all()
    (one,) = layer_shares(TINY[TINY["prompt"] == "A"]).to_dict("records")
    assert (one["prompts"], one["plain"], one["p"]) == (1, 0.2, 1.0)
    assert math.isnan(one["plain_low"])
    (none,) = layer_shares(TINY[TINY["prompt"] == "D"]).to_dict("records")
    assert none["prompts"] == 0
    assert all(math.isnan(none[name]) for name in ("plain", "gain", "alpha", "p", "q"))


def test_each_mapping_is_a_set_of_candidates_with_the_same_baseline() -> None:
    """Plain is α = 1 of the paper's mapping, also beside an α = 1 in other units."""
    scaled = TINY.assign(mapping=RESIDUAL, recovered=TINY["recovered"] + 0.1)
    both = pd.concat([TINY, scaled], ignore_index=True)
    pd.testing.assert_frame_equal(
        layer_shares(both, resamples=99), layer_shares(TINY, resamples=99)
    )
    (found,) = layer_shares(both, mapping=RESIDUAL, alpha=1).to_dict("records")
    assert found["plain"] == pytest.approx(0.1)
    assert found["amplified"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="^mapping: "):
        layer_shares(TINY, mapping=RESIDUAL)
    with pytest.raises(ValueError, match="^table: "):
        layer_shares(scaled, mapping=RESIDUAL)  # no baseline


def test_target_layers_and_unfinished_prompts() -> None:
    """Several target layers are chosen from or kept apart; a prompt that lacks an α is left out."""
    both = pd.concat([TINY, TINY.assign(target_layer=5)], ignore_index=True)
    with pytest.raises(ValueError, match="^target_layer: "):
        layer_shares(both)
    assert layer_shares(both, target_layer=5)["target_layer"].tolist() == [5]
    assert layer_shares(both, target_layer="all")["target_layer"].tolist() == [0, 5]
    assert layer_shares(TINY.drop(index=2))["prompts"].tolist() == [2]


def test_tables_without_shares_or_of_several_models_are_refused() -> None:
    """The statistics need the control, and one reading per cell."""
    for bad in (TINY.drop(columns="other_prompt_recovered"), pd.concat([TINY, TINY])):
        with pytest.raises(ValueError, match="^table: "):
            cross_fitted(bad)
    with pytest.raises(ValueError, match="^folds: "):
        cross_fitted(TINY, folds=1)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_sign_flips_are_enumerated(gains: list[int]) -> None:
    """A second implementation: the mean of every sign pattern, one by one."""
    reached = [
        sum(sign * gain for sign, gain in zip(signs, gains, strict=True)) >= sum(gains)
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    assert sign_flip_test(np.array(gains, dtype=float)) == pytest.approx(np.mean(reached))


def test_sampled_sign_flips_approximate_all_of_them() -> None:
    """With 14 prompts, and with undefined ones, which change nothing."""
    gains = np.random.default_rng(0).normal(0.3, 1, 10)
    padded = np.append(gains, [np.nan] * 4)
    assert sign_flip_test(padded) == pytest.approx(sign_flip_test(gains), abs=0.02)
    columns = sign_flip_test(np.stack([padded, np.full(14, np.nan)], axis=1))
    assert columns.tolist() == [sign_flip_test(padded), 1]
