"""Pictures over layers, as objects: what is drawn, where, and what the mouse shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from superscopes_tl import SweepResult
from superscopes_tl.figures import layer_grid, next_token_curve, next_token_grid
from superscopes_tl.neighbours import LOGIT_LENS, PATCHED, NextTokens
from tests.figures.test_plots import heatmaps, marks, reading, result_of, rows_of

GRID = result_of(
    reading(5, 1, 0.2, target_layer=4),
    reading(5, 3, 0.9, target_layer=4),
    reading(2, 1, 0.4, target_layer=4, description="<b>bold</b>"),
    reading(5, 1, 0.3, target_layer=1),
    reading(5, 3, 0.1, target_layer=1),
    reading(5, 1, 0.7, kind="mlp_out", target_layer=1),
)


def test_a_grid_shows_source_layer_by_target_layer() -> None:
    """One kind and α; what was not computed is None and carries a cross."""
    figure = layer_grid(GRID, kind="resid_post", alpha=1)
    (panel,) = heatmaps(figure)
    assert (list(panel.x), list(panel.y)) == (["1", "4"], ["2", "5"])
    assert rows_of(panel.z) == [[None, 0.4], [0.3, 0.2]]
    assert [place[1:] for place in marks(figure, "not computed")] == [("1", "2")]
    assert figure.layout.title.text.endswith("α = 1")
    assert figure.layout.xaxis.title.text == "target layer"


def test_without_an_alpha_the_best_one_counts() -> None:
    """The best-scoring α of each pair of layers, a panel per kind."""
    figure = layer_grid(GRID)
    post, mlp = heatmaps(figure)
    assert rows_of(post.z) == [[None, 0.4], [0.3, 0.9]]
    assert rows_of(mlp.z) == [[None, None], [0.7, None]]
    assert figure.layout.title.text.endswith("best α")


def test_a_grid_may_show_another_column_and_escapes_what_was_written() -> None:
    """Any numeric column; generated text is no markup under the mouse."""
    figure = layer_grid(GRID, kind="resid_post", alpha=1, value="norm_ratio")
    (panel,) = heatmaps(figure)
    assert rows_of(panel.z)[0] == [None, pytest.approx(0.3)]
    hover = rows_of(panel.customdata)[0][1]
    assert "&lt;b&gt;bold&lt;/b&gt;" in hover
    assert "<b>bold</b>" not in hover


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "resid_mid"}, r"kind: expected one of \['mlp_out', 'resid_post'\]"),
        ({"alpha": 2}, r"alpha: expected one of \[1.0, 3.0\], got 2"),
        ({"value": "text"}, "value: expected one of the numeric columns"),
        ({"position": 3}, r"position: expected one of \[6\]"),
    ],
)
def test_what_was_not_computed_is_refused(arguments: dict[str, Any], message: str) -> None:
    """With what there is to choose from."""
    with pytest.raises(ValueError, match=message):
        layer_grid(GRID, **arguments)


def test_an_empty_sweep_has_no_grid() -> None:
    """Nothing to draw is an error, not an empty picture."""
    with pytest.raises(ValueError, match="result: expected at least one cell"):
        layer_grid(SweepResult(GRID.table.iloc[:0], {}))


def found(
    targets: dict[int, tuple[int, ...]], *, texts: int = 3, alphas: tuple[float, ...] = (1.0,),
    kinds: tuple[str, ...] = ("resid_post",),
) -> NextTokens:  # fmt: skip
    """Return an evaluation; a patched cell hits at `text < source layer − target layer`."""
    rows = [
        {"text": f"text {text}", "position": 1, "token": "t", "method": method, "kind": kind,
         "source_layer": layer, "target_layer": target, "alpha": alpha, "own": "a",
         "predicted": "b", "hit": method == PATCHED and text < layer - target,
         "surprisal": float(layer + target)}
        for method in (PATCHED, "random_direction")
        for kind in kinds
        for layer, into in targets.items()
        for target in into
        for alpha in alphas
        for text in range(texts)
    ]  # fmt: skip
    rows += [
        {**row, "method": LOGIT_LENS, "target_layer": pd.NA, "alpha": np.nan, "hit": True}
        for row in rows
        if row["method"] == PATCHED
    ]
    return NextTokens(
        pd.DataFrame(rows).astype({"target_layer": "Int64"}), {"model": {"name": "<i>m</i>"}}
    )


def test_a_curve_has_a_line_and_intervals_per_method() -> None:
    """Precision@1 over source layers, and the distance of each end of its interval."""
    evaluation = found({5: (4,), 2: (1,)})
    figure = next_token_curve(evaluation)
    lines = {line.name: line for line in figure.data}
    assert list(lines) == ["patched", "random direction", "logit lens"]
    assert list(lines["patched"].y) == pytest.approx([1 / 3, 1 / 3])
    assert list(lines["random direction"].y) == [0, 0]
    assert list(lines["logit lens"].y) == [1, 1]
    row = evaluation.summary().iloc[0]
    assert lines["patched"].error_y.array[0] == row["precision_high"] - row["precision"]
    assert lines["patched"].error_y.arrayminus[0] == row["precision"] - row["precision_low"]
    assert "resid_post of layer 2 → layer 1, α = 1" in lines["patched"].customdata[0]
    assert "→" not in lines["logit lens"].customdata[0]
    assert "&lt;i&gt;m&lt;/i&gt;" in figure.layout.title.text
    assert list(next_token_curve(evaluation, value="surprisal").data[0].y) == [3, 9]


def test_a_curve_draws_layers_in_order() -> None:
    """Source layers were given as 5, 2; the line runs from 2 to 5."""
    assert list(next_token_curve(found({5: (4,), 2: (1,)})).data[0].x) == [2, 5]


def test_one_text_has_no_interval() -> None:
    """None where there is no number: plotly cannot send NaN."""
    line = next_token_curve(found({5: (4,)}, texts=1)).data[0]
    assert list(line.error_y.array) == [None]
    assert "[" not in line.customdata[0]


def test_a_curve_of_several_target_layers_asks_for_one() -> None:
    """As it does for α and kind."""
    evaluation = found({5: (4, 1), 2: (4, 1)})
    with pytest.raises(ValueError, match=r"target_layer: expected one of \[1, 4\]"):
        next_token_curve(evaluation)
    assert list(next_token_curve(evaluation, target_layer=1).data[0].y) == pytest.approx([1 / 3, 1])
    with pytest.raises(ValueError, match=r"alpha: expected one of \[1.0, 3.0\]"):
        next_token_curve(found({5: (4,)}, alphas=(1.0, 3.0)))
    with pytest.raises(ValueError, match=r"kind: expected one of \['mlp_out', 'resid_post'\]"):
        next_token_curve(found({5: (4,)}, kinds=("mlp_out", "resid_post")))
    with pytest.raises(ValueError, match="value: expected 'precision' or 'surprisal'"):
        next_token_curve(evaluation, value="score")  # type: ignore[arg-type]


def test_a_grid_of_next_tokens_leaves_out_what_was_not_computed() -> None:
    """Source layer x target layer of one method, None where there is no cell."""
    evaluation = found({5: (4, 1), 2: (1,)})
    (panel,) = next_token_grid(evaluation).data
    assert (list(panel.x), list(panel.y)) == (["1", "4"], ["2", "5"])
    assert rows_of(panel.z) == [[pytest.approx(1 / 3), None], [1.0, pytest.approx(1 / 3)]]
    assert panel.customdata[0][1] == "not computed"
    (panel,) = next_token_grid(evaluation, value="surprisal", method="random_direction").data
    assert rows_of(panel.z) == [[3.0, None], [6.0, 9.0]]
    with pytest.raises(ValueError, match=r"method: expected one of \['patched', 'random_d"):
        next_token_grid(evaluation, method=LOGIT_LENS)
