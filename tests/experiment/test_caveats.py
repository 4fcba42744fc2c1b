"""Which rows of a table are meant, and what makes a result misleading."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from superscopes_tl.experiment import SweepResult, rows_at
from superscopes_tl.experiment.results import MOST_CAVEATS, caveats
from tests.support.long_tables import cell, table_of

CONFIG = {"config": {"target_layer": 0}}


def _map(shares: list[float], **changes: Any) -> pd.DataFrame:
    """Return unamplified block outputs of several layers, distinct and without caveats."""
    usual = {
        "about": "Pink Floyd", "own_words": "British rock band", "plain_nats": -9.0,
        "unpatched_nats": -25.0, "norm_ratio": 1.0, "vector_norm": 40.0,
    }  # fmt: skip
    return table_of(
        *(
            {**cell("Pink Floyd", layer, 1, 0.4, f"band {layer}"), **usual, "recovered": share}
            | changes
            for layer, share in enumerate(shares)
        )
    )


def test_a_map_that_reads_its_name_has_no_caveats() -> None:
    """A good map has no caveats."""
    assert caveats(_map([0.2, 0.6, 0.9, 0.1]), CONFIG) == ()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"position": 0}, "attention sink"),  # of an older file the norm is not known
        ({"norm_outlier": 312.0}, "attention sink"),
        ({"unchanged": True}, "4 of 4 patches change nothing"),
        ({"recovered": 0.05}, "no unamplified block output recovers"),
        ({"plain_nats": -24.5, "recovered": float("nan")}, "recovered is not defined"),
        ({"own_words": "Pink Floyd, Pink Floyd"}, "repeat the name"),
        ({"norm_ratio": 170.0}, "170 times as long"),
        ({"description": "British actor"}, "read as 'British actor'"),
        ({"echo": True}, "repeat the name"),
    ],
)
def test_each_caveat_suggests_a_setting(changes: dict[str, Any], part: str) -> None:
    """One line, which ends with a setting."""
    lines = caveats(_map([0.2, 0.6, 0.9, 0.1], **changes), CONFIG)
    assert len(lines) == 1
    assert part in lines[0]
    assert "Try " in lines[0]


def test_a_contextualization_layer_without_a_shared_word_is_named() -> None:
    """Its text, the own words, and the first later layer whose text shares one; none without."""
    table = _map([0.6, 0.6, 0.9, 0.9])
    texts = ["American actor", "with the singer", "a Rock BAND", "band"]
    (line,) = caveats(table.assign(description=texts), CONFIG)
    for part in ("layer 0 ('American actor')", "'British rock band'", "at layer 2", "'band' in"):
        assert part in line
    (line,) = caveats(table.assign(description=["a", "b", "c", "d"]), CONFIG)
    assert "nor does any later one" in line
    assert caveats(table.assign(description="", written=False), CONFIG) == ()


def test_there_are_at_most_three() -> None:
    """The gravest first."""
    table = _map([0.0, 0.0, 0.0, 0.0], position=0, norm_ratio=900.0, description="x", echo=True)
    lines = caveats(table, CONFIG)
    assert len(lines) == MOST_CAVEATS == 3
    assert "attention sink" in lines[0]


def test_a_first_token_with_a_usual_norm_is_no_sink() -> None:
    """The norm tells, where it is known."""
    assert caveats(_map([0.2, 0.6, 0.9, 0.1], position=0, norm_outlier=1.2), CONFIG) == ()


def test_vectors_and_mlp_outputs_are_not_judged_as_block_outputs() -> None:
    """A vector's number is no position, and an MLP output no block output."""
    assert caveats(_map([0.2, 0.6, 0.9], position=0, kind="vector"), CONFIG) == ()
    assert caveats(_map([0.0, 0.0, 0.0], kind="mlp_out"), CONFIG) == ()


GRID = table_of(
    cell("Red", 0, 1, position=3), cell("Red", 0, 1, position=5), cell("Red", 0, 9, position=5),
    cell("Red", 1, 1, position=5, target_layer=1), cell("Blue", 0, 1, position=4),
    cell("Blue", 0, 1, position=4, kind="mlp_out"),
)  # fmt: skip


def test_the_rightmost_token_of_each_prompt_is_selected() -> None:
    """Prompts end at different positions; kind, α and target layer narrow the choice."""
    assert rows_at(GRID).index.tolist() == [1, 2, 3, 4, 5]
    assert rows_at(GRID, kind="mlp_out").index.tolist() == [5]
    assert rows_at(GRID, alpha=9).index.tolist() == [2]
    assert rows_at(GRID, target_layer="same").index.tolist() == [1, 2, 3, 4, 5]
    assert rows_at(GRID, target_layer=1).index.tolist() == [3]
    assert SweepResult(GRID.head(4), {"prompt": "Red"}).at(position=3).table.index.tolist() == [0]
    assert rows_at(GRID[["position", "source_layer"]]).index.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "asked", [{"position": 5}, {"kind": "resid_mid"}, {"alpha": 2}, {"target_layer": 7}]
)
def test_rows_that_are_not_there_are_refused(asked: dict[str, Any]) -> None:
    """The column is named: "Blue" has no token 5, and nothing was patched into layer 7."""
    with pytest.raises(ValueError, match=f"^{next(iter(asked))}: "):
        rows_at(GRID, **asked)


def test_one_of_several_target_layers_has_to_be_chosen() -> None:
    """Two would be two tries; "all" keeps both."""
    grid = pd.concat([GRID, GRID.assign(target_layer=2)])
    with pytest.raises(ValueError, match="^target_layer: "):
        rows_at(grid)
    assert len(rows_at(grid, target_layer="all")) == 10
    with pytest.raises(ValueError, match="^table: "):
        rows_at(GRID.head(0))
