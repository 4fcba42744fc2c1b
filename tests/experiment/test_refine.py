"""Coarse-to-fine refinement of α."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, sweep
from superscopes_tl.experiment import refine
from superscopes_tl.experiment.run import between, midpoints
from tests.support.same import assert_same_readings


def test_midpoints_by_hand() -> None:
    """Halfway from the best α to its neighbours; at the edge there is one neighbour."""
    rows = pd.DataFrame({"alpha": [1.0, 4.0, 9.0, 16.0], "score": [0.1, 0.2, 0.5, 0.4]})
    assert midpoints(rows) == [6.0, 12.0]
    assert midpoints(rows.assign(score=[0.9, 0.1, 0.1, 0.1])) == [2.0]
    assert midpoints(rows.assign(score=[math.nan, 0.3, 0.2, math.nan])) == [2.0, 6.0]
    assert midpoints(rows.assign(score=math.nan)) == []
    assert between(-2, 4) == 1.0


@given(a=st.floats(0.01, 100), b=st.floats(0.01, 100))
def test_a_midpoint_lies_between(a: float, b: float) -> None:
    """Up to rounding to four digits, in whatever order the two are given."""
    assert min(a, b) * 0.999 <= between(a, b) == between(b, a) <= max(a, b) * 1.001


def test_refinement_adds_cells_near_the_best_and_computes_none_twice(
    llama: LanguageModel, word_overlap: Any
) -> None:
    """Two rounds: no duplicate, no site reads worse, and new cells equal a direct sweep's."""
    settings: dict[str, Any] = {
        "layers": (5, 2), "kinds": "mlp_out", "alphas": (1, 3, 9), "max_new_tokens": 12,
        "scorer": word_overlap,
    }  # fmt: skip
    coarse = sweep(llama, "Pearl Jam", progress=False, **settings)
    fine = refine(coarse, progress=False)
    assert not fine.table.duplicated(["source_layer", "alpha"]).any()
    assert len(coarse) < len(fine) <= len(coarse) + 2 * 2 * 2
    assert (fine.best()["score"] >= coarse.best()["score"]).all()
    row = fine.table.iloc[-1]
    direct = sweep(
        llama, "Pearl Jam", progress=False,
        **{**settings, "layers": int(row["source_layer"]), "alphas": float(row["alpha"])},
    )  # fmt: skip
    assert_same_readings(direct.table, fine.table.tail(1), ["text"])


def test_what_cannot_be_refined(llama: LanguageModel, word_overlap: Any) -> None:
    """One α has no neighbour; a loaded result has no plan, another plan has other cells."""
    result = sweep(
        llama, "Pearl Jam", layers=5, kinds="mlp_out", alphas=3, max_new_tokens=3,
        scorer=word_overlap, progress=False,
    )  # fmt: skip
    pd.testing.assert_frame_equal(refine(result, progress=False).table, result.table)
    with pytest.raises(ValueError, match="^plan:"):
        refine(replace(result, plan=None))
    for other in (result.plan.with_settings(unit="residual"), result.plan.at_prompt("Titanic")):  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="^result:"):
            refine(result, other)
    with pytest.raises(ValueError, match="^rounds:"):
        refine(result, rounds=0)


def test_refinement_ends_where_four_digits_end(llama: LanguageModel, word_overlap: Any) -> None:
    """Many rounds add no cell twice, and the provenance names every α of the table."""
    settings: dict[str, Any] = {
        "layers": 5, "kinds": "mlp_out", "alphas": (1, 1.01), "max_new_tokens": 2,
        "scorer": word_overlap,
    }  # fmt: skip
    coarse = sweep(llama, "Pearl Jam", progress=False, **settings)
    fine = refine(coarse, rounds=12, progress=False)
    assert not fine.table["alpha"].duplicated().any()
    assert fine.provenance["config"]["alphas"] == sorted(fine.table["alpha"])
    assert fine.provenance["planned_cells"] == len(fine)
