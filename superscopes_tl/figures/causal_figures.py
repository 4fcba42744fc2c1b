"""Effects of ablating or restoring sites, as plotly figures: layer x kind, or layer x token.

1. Choose the rows: one token, or all of them with a panel per kind.
2. Colour by the effect; beside a reading (`causal.beside`) the hover text shows both.
"""

from __future__ import annotations

import html
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value
from superscopes_tl.figures.paper import text_lines
from superscopes_tl.figures.sweeps import COLOR_SCALE, TITLES, or_none


def effect_heatmap(
    effects: pd.DataFrame,
    *,
    x: Literal["kind", "position"] = "kind",
    value: str = "effect",
    position: int | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw how much each site matters, source layer against kind or token.

    Args:
        effects: from `causal_effects`, `causal_trace` or `beside`; one row per site.
        x: "kind" for all kinds at one token, or "position" for all tokens, one panel per kind.
        value: the numeric column to colour by, such as "control_effect" on the same colours.
        position: the token, where `x` is "kind"; the rightmost one unless given.
        color_range: the values of the darkest and the lightest colour.

    Raises:
        ValueError: another `x`, a column or token that is not there, or several rows per site.
    """
    if x not in ("kind", "position"):
        raise bad_value("x", "'kind' or 'position'", x, "leave it out")
    numeric = list(effects.select_dtypes("number").columns)
    if value not in numeric:
        raise bad_value("value", f"one of the numeric columns {numeric}", value, "leave it out")
    rows = _one_row_per_site(effects, position if x == "position" else _token(effects, position))
    panels = list(dict.fromkeys(rows["kind"])) if x == "position" else [None]
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[TITLES.get(kind, kind) for kind in panels if kind],
    )
    for column, kind in enumerate(panels, start=1):
        part = rows if kind is None else rows[rows["kind"] == kind]
        figure.add_trace(_cells(part, rows, x, value), row=1, col=column)
    columns = rows.drop_duplicates(x).sort_values("position") if x == "position" else rows
    names = columns["token"].map(lambda token: html.escape(str(token)))
    if x == "position":
        figure.update_xaxes(
            title_text="token", tickvals=columns[x].tolist(), ticktext=names.tolist()
        )
    figure.update_yaxes(title_text="source layer", col=1)
    figure.update_layout(
        title=_title(rows, x),
        template="plotly_white",
        coloraxis={
            "colorscale": COLOR_SCALE,
            "colorbar": {"title": value},
            **dict(zip(("cmin", "cmax"), color_range or (), strict=False)),
        },
        height=220 + 26 * rows["source_layer"].nunique(),
        # The title's lines are as long as `_title` makes them.
        width=max(640, 220 + (90 * rows["kind"].nunique() if x == "kind" else 320 * len(panels))),
        plot_bgcolor="#e9e9e9",
    )
    return figure


def _token(effects: pd.DataFrame, position: int | None) -> int:
    """Return the position to draw; the rightmost one unless given."""
    there = sorted(effects["position"].unique().tolist())
    if not there or (position is not None and position not in there):
        raise bad_value("position", f"one of {there}", position, "choose one of this table")
    return there[-1] if position is None else position


def _one_row_per_site(effects: pd.DataFrame, position: int | None) -> pd.DataFrame:
    rows = effects if position is None else effects[effects["position"] == position]
    if rows.empty or rows.duplicated(["kind", "source_layer", "position"]).any():
        raise bad_value(
            "effects",
            "one row per kind, layer and token",
            f"{len(rows)} rows",
            "draw one prompt, replacement and reading per site at a time",
        )
    return rows


def _cells(part: pd.DataFrame, rows: pd.DataFrame, x: str, value: str) -> go.Heatmap:
    grid = {(row["source_layer"], row[x]): row for row in part.to_dict("records")}
    layers = sorted(rows["source_layer"].unique().tolist())
    columns = list(dict.fromkeys(rows[x])) if x == "kind" else sorted(rows[x].unique().tolist())
    places = [[(layer, column) for column in columns] for layer in layers]
    return go.Heatmap(
        z=[[or_none(grid[at][value]) if at in grid else None for at in line] for line in places],
        x=columns,
        y=[str(layer) for layer in layers],
        customdata=[[_hover(grid[at]) if at in grid else "" for at in line] for line in places],
        hovertemplate="%{customdata}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        texttemplate="%{z:.2f}" if x == "kind" else None,
    )


def _hover(row: dict[Any, Any]) -> str:
    """Return what a cell shows under the mouse; what a model wrote is escaped."""
    lines = [
        f"{html.escape(str(row['kind']))} of layer {row['source_layer']} at "
        f"<b>{html.escape(str(row['token']))}</b>",
        f"effect {row['effect']:+.3f} nats (control {row['control_effect']:+.3f})",
        f"KL {row['kl']:.3f} nats (control {row['control_kl']:.3f})",
    ]
    if "top_tokens" in row:
        lines.append(f"then first: {text_lines(str(row['top_tokens']), 60)}")
    if "description" in row:
        lines.append(f"read as: {text_lines(str(row['description']), 60)} (α = {row['alpha']:g})")
    return "<br>".join(lines)


def _title(rows: pd.DataFrame, x: str) -> str:
    first = rows.iloc[0]
    done = (
        f"replaced by {first['replacement']}"
        if "replacement" in rows
        else f"put back ({first['corruption']})"
    )
    at = f" · token <b>{html.escape(str(first['token']))}</b>" if x == "kind" else ""
    asked = text_lines(f"{first['prompt']} →{first['continuation']}", 80)
    return f"{asked}{at}<br><sub>{html.escape(done)}</sub>"
