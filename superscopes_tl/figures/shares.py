"""What each layer recovers, over source layers, with 95 % intervals.

1. `share_curves` draws one kind of `layer_shares`: at α = 1, amplified, and at the same α other
   prompts' vectors and a random direction. A star marks a layer where amplification beats α = 1,
   and specifically (`holds`).
2. `share_panels` draws several models side by side, on one vertical axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value
from superscopes_tl.figures.grid import METHOD_COLORS, escape, finite, only

CURVES: Mapping[str, tuple[str, str, str]] = {
    "plain": ("unamplified (α = 1)", METHOD_COLORS[0], "solid"),
    "amplified": ("amplified, α chosen on other prompts", METHOD_COLORS[1], "solid"),
    "other_prompt": ("other prompts' vectors at the same α", "#666666", "dash"),
    "random_direction": ("random directions at the same α", METHOD_COLORS[3], "dot"),
}
"""The curves by column: name, colour and dash."""
LOWEST, HIGHEST = -0.5, 1.5
"""The vertical axis shows at most this range: random directions may recover -6."""


def share_curves(shares: pd.DataFrame, kind: str | None = None, *, title: str = "") -> go.Figure:
    """Draw what the layers of one kind recover, plain and amplified, beside the controls.

    Args:
        shares: from `layer_shares`, with one target layer per source layer.
        kind: which kind of activation; defaults to the only one.
        title: what was read, such as the model's name.

    Raises:
        ValueError: several kinds of which none was chosen, one that is not there, several target
            layers per source layer, or no row.
    """
    return share_panels({title: shares}, kind).update_layout(width=860)


def share_panels(
    shares: Mapping[str, pd.DataFrame], kind: str | None = None, *, title: str = ""
) -> go.Figure:
    """Draw `share_curves` of several models or settings side by side.

    Args:
        shares: from `layer_shares`, by the title of the panel.
        kind: as in `share_curves`, for all panels.
        title: of the whole figure.

    Raises:
        ValueError: as `share_curves`, or no panel.
    """
    if not shares:
        raise bad_value("shares", "at least one table", {}, "pass layer_shares(table) by name")
    parts = {name: _rows(table, kind) for name, table in shares.items()}
    low, high = _range(parts.values())
    heads = [
        "<br>".join([*([escape(name)] if name else []), *_notes(rows, low)])
        for name, rows in parts.items()
    ]
    figure = make_subplots(
        cols=len(parts), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=heads
    )
    explained: set[str | None] = {None}  # the legend names each curve once, and no band
    for column, rows in enumerate(parts.values(), start=1):
        drawn = [name for name in CURVES if rows[name].notna().any()]
        traces = [
            trace
            for name in drawn
            for trace in _curve(rows, name, _label(rows, name), *CURVES[name][1:])
        ]
        for trace in (*traces, _stars(rows)):
            trace.showlegend = trace.name not in explained
            explained.add(trace.name)
            figure.add_trace(trace, row=1, col=column)
    figure.add_hline(y=0, line={"color": "#999", "width": 1})
    figure.update_xaxes(title_text="source layer", dtick=2)
    figure.update_yaxes(range=[low, high])
    figure.update_yaxes(title_text="share of the model's own words recovered", col=1)
    return figure.update_layout(
        title=escape(title),
        template="plotly_white",
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0.01, "yref": "container"},
        margin={"t": 140 if title else 95, "b": 120},
        height=570,
        width=560 * len(parts),
    )


def _rows(shares: pd.DataFrame, kind: str | None) -> pd.DataFrame:
    """Return the layers of one kind, in order."""
    kinds = shares["kind"].unique().tolist()
    if kind is None and len(kinds) > 1:
        raise bad_value("kind", f"one of {kinds}", None, "choose one")
    rows = only(shares, "kind", kind).sort_values("source_layer")
    if rows.empty or rows["source_layer"].duplicated().any():
        got = f"target layers {shares['target_layer'].unique().tolist()}"
        fix = "call layer_shares with target_layer="
        raise bad_value("shares", "one row per source layer", got, fix)
    return rows


def _notes(rows: pd.DataFrame, low: float) -> list[str]:
    """Return what was measured, and how far the lowest curve is below the picture."""
    least, most = rows["prompts"].min(), rows["prompts"].max()
    count = f"{most}" if least == most else f"{least} to {most}"
    lines = [f"{rows['kind'].iloc[0]}, {count} prompts, 95 % intervals"]
    below = {_label(rows, name): rows[name].min() for name in CURVES}
    label, share = min(below.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    if share < low:
        lines.append(f"below the picture: {label}, down to \N{MINUS SIGN}{-share:.1f}")
    return [f"<sup>{escape(line)}</sup>" for line in lines]


def _label(rows: pd.DataFrame, name: str) -> str:
    """Return the name of a curve; one α for all layers is stated."""
    alphas = rows["alpha"].unique()
    if name == "amplified" and len(alphas) == 1:
        return f"amplified (α = {alphas[0]:g})"
    return CURVES[name][0]


def _curve(
    rows: pd.DataFrame, name: str, label: str, color: str, dash: str
) -> Iterator[go.Scatter]:
    """Yield the band and the line of one column."""
    layers = rows["source_layer"].tolist()
    low, high = (rows[f"{name}{end}"] for end in ("_low", "_high"))
    if low.notna().all():
        yield go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*low, *high[::-1]],
            fill="toself",
            mode="lines",
            line_width=0,
            fillcolor=f"rgba{(*hex_to_rgb(color), 0.15)}",
            hoverinfo="skip",
            legendgroup=name,
        )
    yield go.Scatter(
        x=layers,
        y=[finite(value) for value in rows[name]],
        name=label,
        mode="lines+markers",
        line={"color": color, "dash": dash},
        marker={"size": 5},
        legendgroup=name,
        customdata=[_hover(row, name, label) for row in rows.to_dict("records")],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(row: Mapping[Any, Any], name: str, label: str) -> str:
    ends = f"[{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
    lines = [f"layer {row['source_layer']}, {label}: {row[name]:.2f} {ends}"]
    if name == "amplified":
        lines += [
            f"α = {row['alpha']:g} (median)",
            f"above other prompts' vectors: {row['above_others']:.2f}",
            f"gain over α = 1: {row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}], "
            f"{row['gain_nats']:.1f} nats",
            f"p = {row['p']:.2g}, q = {row['q']:.2g}",
        ]
    return "<br>".join(map(escape, lines))


def _stars(rows: pd.DataFrame) -> go.Scatter:
    """Return a star above every layer where amplification gains; the legend shows it always."""
    found = rows[rows["holds"]]
    heights = found[["amplified_high", "amplified"]].max(axis=1).clip(LOWEST, HIGHEST)
    return go.Scatter(
        x=found["source_layer"].tolist() or [None],
        y=[height + 0.05 for height in heights] or [None],
        name="amplified beats α = 1, above others' vectors (q ≤ 0.05)",
        mode="markers",
        marker={"symbol": "star", "size": 11, "color": CURVES["amplified"][1]},
        legendgroup="stars",
        hoverinfo="skip",
    )


def _range(parts: Any) -> tuple[float, float]:
    """Return the ends of the vertical axis."""
    names = [f"{name}{end}" for name in CURVES for end in ("", "_low", "_high")]
    ends = pd.concat([rows[names] for rows in parts])
    low, high = ends.min().min(), ends.max().max()
    return max(LOWEST, min(low, 0.0)) - 0.05, min(HIGHEST, max(high, 0.5)) + 0.12
