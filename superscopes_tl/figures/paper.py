"""The paper's other two pictures of a sweep, as plotly figures.

1. `decomposition` (Figure 1): resid_mid + mlp_out = resid_post of one layer, each with what it
   reads as.
2. `best_table` (Figures 5 and 6): per layer and kind the reading at one α, or at the best.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult
from superscopes_tl.model import PAPER_KINDS


def at_target(result: SweepResult, target_layer: int | None) -> SweepResult:
    """Return the part of a result that was patched into one layer; all of it for `None`.

    Raises:
        ValueError: a target layer that the sweep does not have.
    """
    if target_layer is None:
        return result
    targets = result.table["target_layer"]
    if target_layer not in set(targets):
        raise bad_value(
            "target_layer",
            f"one of {sorted(set(targets.tolist()))}",
            target_layer,
            "choose a target layer of this sweep, or sweep over it",
        )
    return SweepResult(result.table[targets == target_layer], result.provenance)


def decomposition(
    result: SweepResult,
    layer: int,
    *,
    alpha: float | None = None,
    position: int | None = None,
    target_layer: int | None = None,
) -> go.Figure:
    """Draw what one layer's MLP gets, adds and gives on, in words (the paper's Figure 1).

    Args:
        result: a sweep over resid_mid, mlp_out and resid_post.
        layer: the source layer.
        alpha: this α for all three; the best of each unless given.
        position: the token; the rightmost one of the sweep unless given.
        target_layer: which target layer; the best-scoring one of each kind unless given.

    Raises:
        ValueError: a layer, α, token or target layer that the sweep does not have.
    """
    readings = at_target(result, target_layer).by_layer(alpha=alpha, position=position)
    if layer not in readings.index:
        raise bad_value("layer", f"one of {list(readings.index)}", layer, "choose one of these")
    figure = go.Figure()
    for column, kind in enumerate(PAPER_KINDS):
        text = "not computed"
        if kind in readings.columns.get_level_values(0):
            cell = readings[kind].loc[layer].to_dict()
            if not math.isnan(cell["alpha"]):
                said = str(cell["description"]) or unsaid(result, kind, layer, cell)
                text = text_lines(said, 26)
                text += f"<br><br><i>α = {cell['alpha']:g}, {_score(cell, 'score ')}</i>"
        figure.add_annotation(x=column, y=0.5, text=f"<b>{kind}</b><br><br>{text}", showarrow=False)
        figure.add_shape(type="rect", x0=column - 0.4, x1=column + 0.4, y0=0, y1=1, opacity=0.5)
        if column:
            sign = {"text": "+" if column == 1 else "=", "font": {"size": 28}}
            figure.add_annotation(x=column - 0.5, y=0.5, showarrow=False, **sign)
    figure.update_layout(
        title=f"{html.escape(str(result.provenance.get('prompt', '')))} · layer {layer}",
        template="plotly_white",
        height=300,
        margin={"t": 60, "b": 20},
        xaxis={"visible": False, "range": [-0.5, 2.5]},
        yaxis={"visible": False, "range": [-0.05, 1.05]},
    )
    return figure


def best_table(
    result: SweepResult,
    *,
    alpha: float | None = None,
    position: int | None = None,
    target_layer: int | None = None,
) -> go.Figure:
    """Draw the paper's table of readings: a row per layer, a column per kind.

    Args:
        result: the sweep.
        alpha: this α for all (Figure 5 has α = 1); the best of each site unless given (Figure 6).
        position: the token; the rightmost one of the sweep unless given.
        target_layer: which target layer; the best-scoring one of each site unless given.

    Raises:
        ValueError: an α, token or target layer that the sweep does not have.
    """
    readings = at_target(result, target_layer).by_layer(alpha=alpha, position=position)
    kinds = list(readings.columns.get_level_values(0).unique())
    columns = [[str(layer) for layer in readings.index]]
    columns += [
        [
            _entry(row, unsaid(result, kind, layer, row))
            for layer, row in zip(readings.index, readings[kind].to_dict("records"), strict=True)
        ]
        for kind in kinds
    ]
    figure = go.Figure(
        go.Table(
            columnwidth=[1, *[6 for _ in kinds]],
            header={"values": ["layer", *kinds], "align": "left"},
            cells={"values": columns, "align": "left"},
        )
    )
    which = "best α of every site" if alpha is None else f"α = {alpha:g}"
    figure.update_layout(
        title=f"{html.escape(str(result.provenance.get('prompt', '')))} · {which}",
        margin={"t": 60, "b": 20},
        height=80 + table_height(columns),
    )
    return figure


def table_height(columns: list[list[str]]) -> int:
    """Return the pixels that a table takes; one line of each row may be too long for its column.

    A table that is higher than its figure hides its last rows.
    """
    rows = zip(*columns, strict=True)
    breaks: list[int] = [max(cell.count("<br>") for cell in row) for row in rows]
    return 32 + sum(12 + 18 * (2 + count) for count in breaks)


def unsaid(result: SweepResult, kind: str, layer: int, cell: Mapping[Any, Any]) -> str:
    """Return why a cell of `SweepResult.by_layer` has no description."""
    rows = result.table
    here = (rows["kind"] == kind) & (rows["source_layer"] == layer)
    here &= (rows["alpha"] == cell["alpha"]) & (rows["target_layer"] == cell["target_layer"])
    return "no description" if rows.loc[here, "written"].all() else "not written out"


def _entry(cell: dict[Any, Any], nothing: str) -> str:
    if math.isnan(cell["alpha"]):
        return "not computed"
    said = text_lines(str(cell["description"]) or nothing, 44)
    return f"{said} (α = {cell['alpha']:g}, {_score(cell)})"


def _score(cell: dict[Any, Any], name: str = "") -> str:
    score = "no score" if math.isnan(cell["score"]) else f"{name}{cell['score']:.2f}"
    return score if math.isnan(cell["recovered"]) else f"{score}, recovers {cell['recovered']:.2f}"


def text_lines(text: str, width: int) -> str:
    """Return generated text escaped, in lines of at most `width` characters; a dash for none."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, width)) or "–"
