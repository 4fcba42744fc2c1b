"""The figure of a model's check: what each layer recovers, beside what other names' vectors do."""

from __future__ import annotations

import html
import textwrap

import plotly.graph_objects as go

from superscopes_tl.evaluation import Readability


def readability_figure(found: Readability) -> go.Figure:
    """Draw the shares of the model's own words over source layers, in the best setting found.

    The band is the bootstrap interval over names of own minus other names, around the own
    share: where it clears the line of the other names, the layer is read.
    """
    rows = found.layers
    layers = rows["source_layer"].tolist()
    ends = [rows["others"] + rows[end] for end in ("specific_low", "specific_high")]
    figure = go.Figure(
        [
            go.Scatter(
                x=[*layers, *layers[::-1]],
                y=[*ends[0], *ends[1][::-1]],
                fill="toself",
                mode="lines",
                line={"width": 0},
                fillcolor="rgba(0, 80, 160, 0.15)",
                hoverinfo="skip",
                name="95 % interval over names, all layers together",
            ),
            go.Scatter(x=layers, y=rows["recovered"], mode="lines+markers", name="its own vector",
                       line={"color": "#00509f"}),
            go.Scatter(x=layers, y=rows["others"], mode="lines+markers",
                       name="other names' vectors", line={"color": "#8a8a8a"}),
        ]
    )  # fmt: skip
    verdict = "<br>".join(html.escape(line) for line in textwrap.wrap(found.verdict, 110))
    figure.update_layout(
        title={"text": verdict, "font": {"size": 13}},
        template="plotly_white",
        xaxis_title="source layer",
        yaxis_title="share of the model's own words recovered (α = 1)",
        margin={"t": 110},
    )
    return figure
