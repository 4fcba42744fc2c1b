"""Figures of statistics.

1. `earlier_table`: readings before ℓ_c (the paper's Tables 1 to 3).
2. `selector_dots`: how often each selector chooses a correct reading.
3. `amplifier_dots`: the share of prompts that each way to amplify reads correctly.
4. `roc_curve`: how well scores separate correct readings from wrong ones.
5. `readability_curve`: the share recovered at each layer, against other names' vectors.
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
from superscopes_tl.statistics import Quality


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
    """Draw the accuracy of each selector in `selectors.rate`, a dot with its 95 % interval."""
    figure = go.Figure()
    figure.add_scatter(
        x=[finite(share) for share in rates["share"]],
        y=[escape(str(name)) for name in rates.index],
        mode="markers",
        marker={"size": 11, "color": shades(1, last=0.2)[0]},
        error_x=interval(rates["share"], rates["low"], rates["high"]),
        customdata=[_difference(row) for row in rates.to_dict("records")],
        hovertemplate="%{y}: %{x:.1%}<br>%{customdata}<extra></extra>",
    )
    return _share_axes(figure, "Accuracy of the α that each selector chooses").update_layout(
        height=160 + 40 * len(rates), xaxis_title="share of sites, mean over prompts"
    )


def amplifier_dots(found: pd.DataFrame) -> go.Figure:
    """Draw the shares of prompts in `selectors.amplifiers`, with their 95 % intervals."""
    names = [
        f"{escape(str(name))} ({readings:.3g} readings)"
        for name, readings in found["readings"].items()
    ]
    forms = (
        ("share", "", "some reading is right", "circle"),
        ("chosen", "chosen_", "the best-scoring one is right", "diamond"),
    )
    figure = go.Figure()
    for color, (column, before, label, symbol) in zip(shades(2, last=0.7), forms, strict=True):
        figure.add_scatter(
            x=[finite(share) for share in found[column]],
            y=names,
            name=label,
            mode="markers",
            orientation="h",  # the two dots of a row stand above one another, each at its share
            marker={"size": 11, "symbol": symbol, "color": color},
            error_x=interval(found[column], found[f"{before}low"], found[f"{before}high"]),
            hovertemplate=f"%{{y}}<br>{label}: %{{x:.1%}}<extra></extra>",
        )
    return _share_axes(figure, "What each way to amplify reads right").update_layout(
        height=200 + 50 * len(found),
        scattermode="group",
        xaxis_title="share of prompts",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )


def _share_axes(figure: go.Figure, title: str) -> go.Figure:
    return figure.update_layout(
        title=title,
        template="plotly_white",
        xaxis={"range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "automargin": True},
    )


def roc_curve(qualities: Mapping[str, Quality]) -> go.Figure:
    """Draw ROC curves by name, each with a ring at its threshold.

    A quality without a curve (only right or only wrong readings) appears in the legend alone.
    """
    figure = go.Figure()
    for color, (name, found) in zip(shades(len(qualities)), qualities.items(), strict=True):
        label = "no curve" if np.isnan(found.auc) else f"AUC {found.auc:.2f}"
        figure.add_scatter(
            x=found.fpr,
            y=found.tpr,
            name=f"{escape(name)} ({label})",
            mode="lines",
            line={"color": color},
            legendgroup=name,
            showlegend=True,
            customdata=[f"threshold {threshold:.2f}" for threshold in found.thresholds],
            hovertemplate="%{customdata}: %{x:.2f}, %{y:.2f}<extra></extra>",
        )
        figure.add_scatter(
            x=[finite(found.false_positive_rate)],
            y=[finite(found.recall)],
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": color, "line": {"width": 2}},
            legendgroup=name,
            showlegend=False,
            hovertemplate=f"threshold {found.threshold:g}: %{{x:.2f}}, %{{y:.2f}}<extra></extra>",
        )
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "#999"}, layer="below"
    )
    return figure.update_layout(
        title="Right readings above the threshold, against wrong ones",
        template="plotly_white",
        xaxis={"title": "false positive rate", "range": [-0.02, 1.02]},
        yaxis={"title": "recall", "range": [-0.02, 1.02]},
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
    return "{:+.1%} to by_similarity ({:+.1%} to {:+.1%})".format(*values)
