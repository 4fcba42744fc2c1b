"""Pictures of what amplification reads early, of selectors, and of scores, as plotly figures.

1. `earlier_table`: what is read before ℓ_c (the paper's Tables 1 to 3).
2. `selector_figure`: how often each selector chooses a right reading, with its interval.
3. `amplifier_figure`: how many prompts each way to amplify reads right.
4. `roc_figure`: how well scores tell right readings from wrong ones.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from superscopes_tl.errors import bad_value
from superscopes_tl.figures.paper import table_height, text_lines
from superscopes_tl.figures.sweeps import COLOR_SCALE, or_none
from superscopes_tl.statistics import Quality


def earlier_table(found: pd.DataFrame) -> go.Figure:
    """Draw the paper's Tables 1 to 3: the layers before ℓ_c, then ℓ_c itself, per prompt.

    Args:
        found: what `contextualization.reveals_earlier` returned; of one kind.

    Raises:
        ValueError: readings of several kinds.
    """
    kinds = found["kind"].unique().tolist()
    if len(kinds) > 1:
        raise bad_value("found", "readings of one kind", kinds, "draw a table for each kind")
    kind = kinds[0] if kinds else "resid_post"
    head = ["prompt", "token", "layer", "resid_post"]
    head += [f"amplified {kind}"] if kind == "resid_post" else [kind, f"amplified {kind}"]
    rows = []
    for prompt, layers in found.groupby("prompt", sort=False):
        for row in layers.to_dict("records"):
            said = [row["hidden_state"]] if kind == "resid_post" else []
            said = said or [row["hidden_state"], row["at_alpha_1"]]
            amplified = f"{_lines(row['reading'])} (α = {row['alpha']:g})"
            place = [prompt, row["token"], str(row["source_layer"])]
            rows.append([*map(_lines, [*place, *said]), amplified])
        at = [prompt, row["token"], f"{row['contextualization_layer']} = ℓ_c"]
        blank = [""] * (len(head) - 4)
        rows.append([*map(_lines, [*at, row["at_contextualization"]]), *blank])
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in head]
    figure = go.Figure(
        go.Table(
            columnwidth=[3, 2, 1.5, *[5] * (len(head) - 3)],
            header={"values": [html.escape(name) for name in head], "align": "left"},
            cells={"values": columns, "align": "left"},
        )
    )
    title = f"{html.escape(kind)} read before the contextualization layer ℓ_c"
    figure.update_layout(
        title=title if rows else f"{title}: no layer",
        margin={"t": 60, "b": 20},
        height=80 + table_height(columns),
    )
    return figure


def selector_figure(rates: pd.DataFrame) -> go.Figure:
    """Draw the share of right readings per selector, a dot with its 95 % interval.

    Args:
        rates: what `selectors.rate` returned.
    """
    figure = go.Figure(
        go.Scatter(
            x=_plain(rates["share"]),
            y=[html.escape(str(name)) for name in rates.index],
            mode="markers",
            marker={"size": 11, "color": sample_colorscale(COLOR_SCALE, [0.2])[0]},
            error_x={
                "type": "data",
                "array": _plain(rates["high"] - rates["share"]),
                "arrayminus": _plain(rates["share"] - rates["low"]),
            },
            customdata=[_difference(row) for row in rates.to_dict("records")],
            hovertemplate="%{y}: %{x:.1%}<br>%{customdata}<extra></extra>",
        )
    )
    figure.update_layout(
        title="How often the chosen α reads right",
        template="plotly_white",
        height=160 + 40 * len(rates),
        xaxis={"title": "share of sites, mean over prompts", "range": [0, 1], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return figure


def amplifier_figure(found: pd.DataFrame) -> go.Figure:
    """Draw at how many prompts each way to amplify reads right, dots with 95 % intervals.

    Args:
        found: what `selectors.amplifiers` returned.
    """
    names = [
        f"{html.escape(str(name))} ({readings:.3g} readings)"
        for name, readings in found["readings"].items()
    ]
    forms = (
        ("share", "", "some reading is right", 0.2, "circle"),
        ("chosen", "chosen_", "the best-scoring one is right", 0.7, "diamond"),
    )
    figure = go.Figure()
    for column, before, label, shade, symbol in forms:
        figure.add_scatter(
            x=_plain(found[column]),
            y=names,
            name=label,
            mode="markers",
            orientation="h",  # the two dots of a way stand above one another, each at its share
            marker={
                "size": 11,
                "symbol": symbol,
                "color": sample_colorscale(COLOR_SCALE, [shade])[0],
            },
            error_x={
                "type": "data",
                "array": _plain(found[f"{before}high"] - found[column]),
                "arrayminus": _plain(found[column] - found[f"{before}low"]),
            },
            hovertemplate=f"%{{y}}<br>{label}: %{{x:.1%}}<extra></extra>",
        )
    figure.update_layout(
        title="What each way to amplify reads right",
        template="plotly_white",
        height=200 + 50 * len(found),
        scattermode="group",
        xaxis={"title": "share of prompts", "range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "automargin": True},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def roc_figure(qualities: Mapping[str, Quality]) -> go.Figure:
    """Draw ROC curves, each with a ring at its threshold.

    Args:
        qualities: what to compare, by name; one without a curve (only right or only wrong
            readings) is named in the legend alone.
    """
    figure = go.Figure()
    for rank, (name, found) in enumerate(qualities.items()):
        shade = sample_colorscale(COLOR_SCALE, [0.85 * rank / max(1, len(qualities) - 1)])[0]
        label = "no curve" if np.isnan(found.auc) else f"AUC {found.auc:.2f}"
        figure.add_scatter(
            x=found.fpr,
            y=found.tpr,
            name=f"{html.escape(name)} ({label})",
            mode="lines",
            line={"color": shade},
            legendgroup=name,
            showlegend=True,
            customdata=[f"threshold {threshold:.2f}" for threshold in found.thresholds],
            hovertemplate="%{customdata}: %{x:.2f}, %{y:.2f}<extra></extra>",
        )
        figure.add_scatter(
            x=_plain([found.false_positive_rate]),
            y=_plain([found.recall]),
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": shade, "line": {"width": 2}},
            legendgroup=name,
            showlegend=False,
            hovertemplate=f"threshold {found.threshold:g}: %{{x:.2f}}, %{{y:.2f}}<extra></extra>",
        )
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "#999"}, layer="below"
    )
    figure.update_layout(
        title="Right readings called right, against wrong ones called right",
        template="plotly_white",
        xaxis={"title": "false positive rate", "range": [-0.02, 1.02]},
        yaxis={"title": "recall", "range": [-0.02, 1.02]},
    )
    return figure


def _difference(row: dict[Any, Any]) -> str:
    values = (row["difference"], row["difference_low"], row["difference_high"])
    if np.isnan(values).any():
        return "one prompt: no interval"
    return "{:+.1%} to by_similarity ({:+.1%} to {:+.1%})".format(*values)


def _plain(values: Any) -> list[float | None]:
    return [or_none(value) for value in values]


def _lines(text: object) -> str:
    if pd.isna(text):  # type: ignore[call-overload]
        return "not computed"
    return text_lines(str(text), 30)
