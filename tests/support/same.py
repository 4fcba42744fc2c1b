"""What two runs must agree on when their batches, threads, processes or classes differ.

Float32 sums depend on the order in which they are added up, and that order on the machine. Numbers
that come from logits, which are 10 to 100 in size, are compared to a thousandth, and a text only
where no token of it was a near tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from superscopes_tl.engine import NEAR_TIE, Generation

ROUNDING = 1e-3
"""How far apart margins, log-probabilities, entropies and what is made of them may lie."""


def same_text(one: Generation, other: Generation, near: float = NEAR_TIE) -> bool:
    """Tell whether two texts are equal, or one is a near tie."""
    return min(one.margin, other.margin) <= near or one.token_ids == other.token_ids


def assert_same_readings(
    one: pd.DataFrame, other: pd.DataFrame, columns: Sequence[str] | None = None, **options: bool
) -> None:
    """Check that two tables of readings are the same, in the same order, but for rounding.

    Args:
        one: a table with the column `margin`.
        other: another one.
        columns: what is compared; everything unless given.
        **options: of `pandas.testing.assert_frame_equal`.
    """
    assert len(one) == len(other)
    tie = [(table["margin"] <= NEAR_TIE).to_numpy() for table in (one, other)]
    sure = ~(tie[0] | tie[1])  # a cell that was not written out has no margin, and no tie
    assert sure.mean() > 0.8, "too many near ties to compare"
    kept = list(columns or one.columns)
    left, right = (table.loc[sure, kept].reset_index(drop=True) for table in (one, other))
    pd.testing.assert_frame_equal(left, right, rtol=ROUNDING, atol=ROUNDING, **options)
