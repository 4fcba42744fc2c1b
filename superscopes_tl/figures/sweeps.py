"""Figures of a sweep: its map over layers and α, its α curves, its grid of layers.

1. Choose the rows: one token, one row per cell of the figure.
2. Lay them out as source layer x α, or x target layer, one panel per kind (`grid`).
3. Mark the cells that have no colour to show.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult, flags
from superscopes_tl.figures.grid import (
    HOVER,
    NO_CELL,
    Grid,
    Row,
    check_numeric,
    draw,
    escape,
    finite,
    only,
    shades,
    text_lines,
)
from superscopes_tl.model import PatchedLayer, layer_name

SHARES = ("recovered", "specific")
"""Columns with colours from 0 to 1, like every control's share."""
USUAL_SCORES = (0.0, 0.6)
"""The colours of scores span at least these, so that a map without a reading looks empty."""


def heatmap(
    result: SweepResult,
    *,
    value: str = "score",
    minus: str | None = None,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw a value over source layer x α, one panel per kind (the map of section 5.1).

    Hovering over a cell shows the generated text. Cells that were not computed carry a cross, cells
    without a description a ring; the legend names every mark.

    Args:
        result: the sweep.
        value: the numeric column to colour by.
        minus: a column to subtract, such as a control.
        position: the token; defaults to the rightmost one of the sweep.
        target_layer: which target layer, where there are several per source layer.
        color_range: the values of the darkest and the lightest colour; defaults to `value_range`.
            Pass the same to figures that are to be compared.

    Raises:
        ValueError: a token, column or target layer that the sweep does not have.
    """
    rows = _one_mapping(result.at(position=position, target_layer=target_layer).table, value)
    return _draw(result, rows, "alpha", None, value, minus, color_range)


def layer_grid(
    result: SweepResult,
    *,
    kind: str | None = None,
    alpha: float | None = None,
    value: str = "score",
    minus: str | None = None,
    position: int | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw a value over source layer x target layer (Patchscopes, section 4.2).

    Arguments as in `heatmap`; `kind` defaults to a panel for each kind of the sweep, `alpha` to the
    best one of each pair of layers.

    Raises:
        ValueError: a kind, α, token or column that the sweep does not have.
    """
    chosen = result.at(position=position, target_layer="all", kind=kind, alpha=alpha)
    _one_mapping(chosen.table, value)
    best = chosen.best(by="recovered" if value == "recovered" else None)
    figure = _draw(result, best, "target_layer", kind, value, minus, color_range)
    which = "best α" if alpha is None else f"α = {alpha:g}"
    return figure.update_layout(title=f"{figure.layout.title.text} · {which}")


def alpha_curve(
    result: SweepResult,
    *,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    value: str = "score",
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
) -> go.Figure:
    """Draw a value against α, one line per source layer (section 3.5).

    Arguments as in `heatmap`; `kind` defaults to the first one of the sweep, `layers` to all.

    Raises:
        ValueError: a kind, layer, token, column or target layer that the sweep does not have.
    """
    rows = curve_rows(result, kind, layers, value, position, target_layer)
    figure = go.Figure()
    numbers = sorted(rows["source_layer"].unique().tolist())
    for color, layer in zip(shades(len(numbers)), numbers, strict=True):
        line = rows[rows["source_layer"] == layer]
        figure.add_scatter(
            x=line["alpha"],
            y=[finite(v) for v in line[value]],
            name=f"layer {layer}",
            mode="lines+markers",
            line_color=color,
            customdata=[hover_text(row) for row in line.to_dict("records")],
            hovertemplate=HOVER,
        )
    return figure.update_layout(
        title=site_title(result, rows, f"{kind or rows['kind'].iloc[0]} of "),
        template="plotly_white",
        xaxis_title="α",
        yaxis_title=value,
    )


def curve_rows(
    result: SweepResult,
    kind: str | None,
    layers: Sequence[int] | None,
    value: str,
    position: int | None,
    target_layer: PatchedLayer | None,
) -> pd.DataFrame:
    """Return the rows that `alpha_curve` draws, α ascending; arguments as there."""
    rows = _one_mapping(
        result.at(position=position, target_layer=target_layer, kind=kind).table, value
    )
    rows = only(rows, "kind", rows["kind"].iloc[0])
    return only(rows, "source_layer", layers, argument="layers").sort_values("alpha")


def _draw(
    result: SweepResult,
    rows: pd.DataFrame,
    x: Literal["alpha", "target_layer"],
    kind: str | None,
    value: str,
    minus: str | None,
    color_range: tuple[float, float] | None,
) -> go.Figure:
    """Draw one row per cell over source layer x `x`, for one kind or every kind of the sweep."""
    if minus is not None:
        check_numeric(rows, minus, "minus")
        shown = f"{value} − {minus}"
        rows = rows.assign(**{shown: rows[value] - rows[minus]})
        value = shown
    kinds = list(dict.fromkeys(result.table["kind"])) if kind is None else [kind]
    grid = Grid.of(rows, x=x, panel="kind", panels=kinds)
    return draw(
        grid,
        value,
        hover_text,
        title=site_title(result, rows),
        x_title="α" if x == "alpha" else "target layer",
        labels=None if x == "alpha" else [str(layer_name(layer)) for layer in grid.xs],
        color_range=color_range or value_range(rows, value),
        mark=lambda row: mark_of(row, value),
    )


def mark_of(row: Row | None, value: str) -> str:
    """Return the name in `MARKS` of a cell coloured by `value`, "" for most; `None`: no cell."""
    if row is None:
        return NO_CELL
    if row["written"] and not row["description"]:
        return "no description"
    if math.isfinite(row[value]):
        return ""
    return "not defined" if row["written"] or value in SHARES else "not written out"


def value_range(table: pd.DataFrame, value: str) -> tuple[float, float]:
    """Return the values of the darkest and the lightest colour of a column.

    A share runs from 0 to 1. Scores span at least `USUAL_SCORES`, in steps of a tenth, so that the
    colours do not move with every batch. Any other column runs over its data.
    """
    if value in SHARES or value.endswith("_recovered"):
        return 0.0, 1.0
    usual = USUAL_SCORES if value == "score" else ()
    given: Any = table[value] if len(table) else ()
    numbers = [*usual, *(number for item in given if (number := finite(item)) is not None)]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    # Above 1e5 a tenth is lost in rounding.
    if value != "score" or max(abs(low), abs(high)) > 1e5:
        return low, high
    return math.floor(low * 10) / 10, math.ceil(high * 10 - 1e-9) / 10


@dataclass(frozen=True)
class Shades:
    """Which column the colours stand for, with the values of the darkest and the lightest."""

    column: str = "score"
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, table: pd.DataFrame, column: str) -> Shades:
        """Return the shades of a table's column."""
        return cls(column, *value_range(table, column))


def usual_value(table: pd.DataFrame) -> Literal["recovered", "score"]:
    """Return the column to colour by: `recovered` where defined or where no text has a score."""
    scored = table["recovered"].isna().all() and table["written"].any()
    return "score" if table.empty or scored else "recovered"


def _one_mapping(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return the rows after checking that they are of one mapping and `value` is numeric."""
    check_numeric(rows, value)
    mappings = rows["mapping"].unique().tolist()
    if len(mappings) > 1:
        raise bad_value("result", "readings of one mapping", mappings, "draw a figure for each")
    return rows


def hover_text(row: Row) -> str:
    """Return the hover text of a cell: description, place, numbers, the whole text."""
    parts = [] if math.isnan(row["recovered"]) else [f"recovers {row['recovered']:.2f}"]
    if row["written"]:
        parts.append("no score" if math.isnan(row["score"]) else f"score {row['score']:.3f}")
    parts.append(f"norm ratio {row['norm_ratio']:.2f}")
    parts += ["repeats the name"] * bool(row["echo"])
    parts += ["repeats a name of the target prompt"] * bool(row["few_shot_copy"])
    parts += ["near tie (margin)"] * bool(row["margin"] < NEAR_TIE)
    parts += flags(row["norm_outlier"], row["unchanged"])
    nothing = "(no description)" if row["written"] else "(not written out)"
    return (
        f"<b>{text_lines(row['description'], 60, empty=nothing)}</b><br>"
        f"{escape(row['kind'])} of layer {row['source_layer']} → layer "
        f"{layer_name(row['target_layer'])}, α = {row['alpha']:g}<br>"
        f"{' · '.join(parts)}<br>"
        f"<i>{text_lines(row['text'], 60, empty='')}</i>"
    )


def site_title(result: SweepResult, rows: pd.DataFrame, what: str = "") -> str:
    """Return a title that names prompt, model and token of some rows of a result."""
    model = result.provenance.get("model", {}).get("name", "unknown model")
    prompt = textwrap.shorten(str(result.provenance.get("prompt", "")), 60, placeholder=" …")
    place = f"{escape(what)}token <b>{escape(str(rows['token'].iloc[0]))}</b>"
    return f"{escape(prompt)} · {escape(str(model))} · {place}"
