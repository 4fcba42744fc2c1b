"""Figures of statistics.

1. `earlier_table`: readings before ℓ_c (the paper's Tables 1 to 3).
2. `selector_dots`: what the α that each selector chooses is worth.
3. `readability_curve`: the share recovered at each layer, against other names' vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation import Readability
from superscopes_tl.figures.grid import draw_table, escape, finite, interval, shades, text_lines


def earlier_table(found: pd.DataFrame) -> go.Figure:
    """Draw the paper's Tables 1 to 3 from `reveals_earlier`: the layers before ℓ_c, then ℓ_c.

    Raises:
        ValueError: readings of several kinds.
    """
    kinds = found["kind"].unique().tolist()
    if len(kinds) > 1:
        raise bad_value("found", "readings of one kind", kinds, "draw a table for each kind")
    kind = kinds[0] if kinds else "resid_post"
    unamplified = [kind] if kind != "resid_post" else []
    head = ["prompt", "token", "layer", "resid_post", *unamplified, f"amplified {kind}"]
    rows = []
    for prompt, layers in found.groupby("prompt", sort=False):
        for row in layers.to_dict("records"):
            cells = [prompt, row["token"], row["source_layer"], row["hidden_state"]]
            cells += [row["at_alpha_1"]] if unamplified else []
            amplified = f"{_lines(row['reading'])} (α = {row['alpha']:g})"
            rows.append([*map(_lines, cells), amplified])
        layer = f"{row['contextualization_layer']} = ℓ_c"
        cells = [prompt, row["token"], layer, row["at_contextualization"]]
        rows.append([*map(_lines, cells), *[""] * (len(head) - 4)])
    columns = {name: [row[column] for row in rows] for column, name in enumerate(head)}
    title = f"{escape(kind)} read before the contextualization layer ℓ_c"
    return draw_table(
        columns, [130, 80, 70, *[220] * (len(head) - 3)], title if rows else f"{title}: no layer"
    )


def _lines(text: object) -> str:
    return "not computed" if pd.isna(text) else text_lines(text, 30)  # type: ignore[call-overload]


def selector_dots(rates: pd.DataFrame) -> go.Figure:
    """Draw what each selector's choice is worth (`selectors.rate`), with 95 % intervals."""
    figure = go.Figure()
    figure.add_scatter(
        x=[finite(value) for value in rates["value"]],
        y=[escape(str(name)) for name in rates.index],
        mode="markers",
        marker={"size": 11, "color": shades(1, last=0.2)[0]},
        error_x=interval(rates["value"], rates["low"], rates["high"]),
        customdata=[_difference(row) for row in rates.to_dict("records")],
        hovertemplate="%{y}: %{x:.2f}<br>%{customdata}<extra></extra>",
    )
    return figure.update_layout(
        title="Worth of the α that each selector chooses",
        template="plotly_white",
        height=160 + 30 * len(rates),
        xaxis_title="mean over prompts",
        yaxis={"autorange": "reversed", "automargin": True},
    )


def readability_curve(found: Readability) -> go.Figure:
    """Draw the recovered share of the model's own descriptions over layers, in the best setting.

    The band is the bootstrap interval over names of own minus other names, around the own share:
    a layer is readable where the band is above the line of the other names.
    """
    rows = found.layers
    layers = rows["source_layer"].tolist()
    low, high = (rows["others"] + rows[end] for end in ("specific_low", "specific_high"))
    figure = go.Figure()
    figure.add_scatter(
        x=[*layers, *layers[::-1]],
        y=[*low, *high[::-1]],
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor="rgba(0, 80, 160, 0.15)",
        hoverinfo="skip",
        name="95 % interval over names, all layers together",
    )
    for column, name, color in (
        ("recovered", "its own vector", "#00509f"),
        ("others", "other names' vectors", "#8a8a8a"),
    ):
        figure.add_scatter(
            x=layers, y=rows[column], mode="lines+markers", name=name, line_color=color
        )
    return figure.update_layout(
        title={"text": text_lines(found.verdict, 110), "font": {"size": 13}},
        template="plotly_white",
        xaxis_title="source layer",
        yaxis_title="share of the model's own words recovered (α = 1)",
        margin={"t": 110},
    )


def _difference(row: Mapping[Any, Any]) -> str:
    values = (row["difference"], row["difference_low"], row["difference_high"])
    if np.isnan(values).any():
        return "one prompt: no interval"
    return "difference {:+.2f} ({:+.2f} to {:+.2f})".format(*values)
