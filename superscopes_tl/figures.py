"""The paper's other pictures, as plotly figures.

1. `decomposition` (Figure 1): resid_mid + mlp_out = resid_post of one layer, each with what it
   reads as.
2. `best_table` (Figures 5 and 6): per layer and kind the reading at one α, or at the best.
3. `figure_3` (Figure 3): at how many prompts each method reads something alike, over layers, as in
   the paper and corrected for chance.
"""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from superscopes_tl.comparison import Comparison
from superscopes_tl.errors import bad_value
from superscopes_tl.results import SweepResult
from superscopes_tl.sites import PAPER_KINDS

METHOD_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, told apart with and without colour vision."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


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
            expected=f"one of {sorted(set(targets.tolist()))}",
            got=target_layer,
            fix="choose a target layer of this sweep, or sweep over it",
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
        raise bad_value(
            "layer", expected=f"one of {list(readings.index)}", got=layer, fix="choose one of these"
        )
    figure = go.Figure()
    for column, kind in enumerate(PAPER_KINDS):
        text = "not computed"
        if kind in readings.columns.get_level_values(0):
            cell = readings[kind].loc[layer].to_dict()
            if not math.isnan(cell["alpha"]):
                text = _lines(str(cell["reading"]) or "no description", 26)
                text += f"<br><br><i>α = {cell['alpha']:g}, {_score(cell, 'score ')}</i>"
        figure.add_annotation(x=column, y=0.5, text=f"<b>{kind}</b><br><br>{text}", showarrow=False)
        figure.add_shape(type="rect", x0=column - 0.4, x1=column + 0.4, y0=0, y1=1, opacity=0.5)
        if column:
            sign = {"text": "+" if column == 1 else "=", "font": {"size": 28}}
            figure.add_annotation(x=column - 0.5, y=0.5, showarrow=False, **sign)
    figure.update_layout(
        title=f"{html.escape(str(result.provenance.get('prompt', '')))} · layer {layer}",
        template="plotly_white",
        height=280,
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
    columns += [[_entry(row) for row in readings[kind].to_dict("records")] for kind in kinds]
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
        height=160 + 40 * len(readings),
    )
    return figure


def figure_3(comparison: Comparison, *, title: str = "") -> go.Figure:
    """Draw at how many prompts each method reads something alike, over source layers (Figure 3).

    Left the paper's count, similarity above the threshold; right the corrected one. Bars are 95 %
    bootstrap intervals over prompts, dashed lines what chance gives the method of their colour.

    Args:
        comparison: from `compare` or `replay`.
        title: what was compared, the model or the files; the number of prompts and the scorer
            are added.
    """
    settings = comparison.settings
    forms = (
        ("hits", "expected_by_chance", f"similarity > {settings['threshold']:g}"),
        (
            "corrected",
            "expected_corrected",
            f"above the {settings['percentile']:g}th percentile of the other prompts",
        ),
    )
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[f[2] for f in forms]
    )
    for column, (count, chance, _) in enumerate(forms, start=1):
        for rank, method in enumerate(comparison.methods):
            rows = comparison.counts[comparison.counts["method"] == method]
            lines = _count_lines(rows.sort_values("source_layer"), count, chance, rank)
            for line in lines:
                line.update(legendgroup=method, showlegend=column == 1 and line.mode != "lines")
                figure.add_trace(line, row=1, col=column)
    prompts = comparison.counts["prompts"].max()
    what = f"{prompts} prompts, {settings['scorer']} on the {settings['score_on']}"
    figure.update_xaxes(title_text="source layer", dtick=1)
    figure.update_yaxes(title_text="prompts", rangemode="tozero", col=1)
    figure.update_layout(
        title="<br>".join(html.escape(line) for line in (title, what) if line),
        template="plotly_white",
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0.01, "yref": "container"},
        margin_b=110,
        height=480,
        width=1000,
    )
    return figure


def _count_lines(rows: pd.DataFrame, count: str, chance: str, rank: int) -> list[go.Scatter]:
    """Return one method's counts with their intervals, and its dashed chance level."""
    name = html.escape(str(rows["method"].iloc[0]))
    color = METHOD_COLORS[rank % len(METHOD_COLORS)]
    layers, counts = rows["source_layer"].tolist(), rows[count]
    return [
        go.Scatter(
            x=layers,
            y=counts.tolist(),
            name=name,
            mode="lines+markers",
            line_color=color,
            marker={"symbol": _SYMBOLS[rank % len(_SYMBOLS)], "size": 8},
            error_y={
                "array": (rows[f"{count}_high"] - counts).tolist(),
                "arrayminus": (counts - rows[f"{count}_low"]).tolist(),
                "thickness": 1,
            },
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
        ),
        go.Scatter(
            x=layers,
            y=rows[chance].tolist(),
            name=f"{name}, by chance",
            mode="lines",
            line={"color": color, "dash": "dash", "width": 1},
            hovertemplate=f"{name} by chance, layer %{{x}}: %{{y:.2f}}<extra></extra>",
        ),
    ]


def _entry(cell: dict[Any, Any]) -> str:
    if math.isnan(cell["alpha"]):
        return "not computed"
    return f"{_lines(str(cell['reading']), 44)} (α = {cell['alpha']:g}, {_score(cell)})"


def _score(cell: dict[Any, Any], name: str = "") -> str:
    return "no score" if math.isnan(cell["score"]) else f"{name}{cell['score']:.2f}"


def _lines(text: str, width: int) -> str:
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, width)) or "–"
