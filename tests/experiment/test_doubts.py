"""What a sweep says makes its result doubtful."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from superscopes_tl.experiment.caveats import MOST_LINES, doubts
from tests.support.long_tables import cell, table_of

CONFIG = {"config": {"target_layer": 0}}


def _map(shares: list[float], **changes: Any) -> pd.DataFrame:
    """Return unamplified block outputs of several layers, all told apart, in no way doubtful."""
    usual = {
        "about": "Pink Floyd", "own_words": "British rock band", "plain_nats": -9.0,
        "unpatched_nats": -25.0, "norm_ratio": 1.0, "vector_norm": 40.0,
    }  # fmt: skip
    return table_of(
        *(
            {**cell("Pink Floyd", layer, 1, 0.4, f"text {layer}"), **usual, "recovered": share}
            | changes
            for layer, share in enumerate(shares)
        )
    )


def test_a_map_that_reads_its_name_is_not_doubted() -> None:
    """Nothing is said where nothing misleads."""
    assert doubts(_map([0.2, 0.6, 0.9, 0.1]), CONFIG) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position": 0}, "attention sinks"),
        ({"recovered": 0.05}, "no unamplified block output recovers"),
        ({"plain_nats": -24.5, "recovered": float("nan")}, "recovered is not defined"),
        ({"own_words": "Pink Floyd, Pink Floyd"}, "repeat the name"),
        ({"norm_ratio": 170.0}, "170 times as long"),
        ({"description": "American actor"}, "read as 'American actor'"),
        ({"echo": True}, "texts that score best repeat the name"),
    ],
)
def test_each_doubt_is_said_with_something_to_try(changes: dict[str, Any], said: str) -> None:
    """One line, which ends with a setting."""
    lines = doubts(_map([0.2, 0.6, 0.9, 0.1], **changes), CONFIG)
    assert len(lines) == 1
    assert said in lines[0]
    assert "Try " in lines[0]


def test_no_more_than_three_are_said() -> None:
    """The gravest first."""
    table = _map([0.0, 0.0, 0.0, 0.0], position=0, norm_ratio=900.0, description="x", echo=True)
    lines = doubts(table, CONFIG)
    assert len(lines) == MOST_LINES == 3
    assert "attention sinks" in lines[0]


def test_vectors_and_single_kinds_are_not_doubted_for_what_they_are_not() -> None:
    """A vector's number is no position, and an MLP output no block output."""
    assert doubts(_map([0.2, 0.6, 0.9], position=0, kind="vector"), CONFIG) == ()
    assert doubts(_map([0.0, 0.0, 0.0], kind="mlp_out"), CONFIG) == ()
