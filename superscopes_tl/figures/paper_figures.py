"""The paper's figures, one function each, from a sweep or from an evaluation.

1. `figure_1`: one layer's decomposition, resid_mid + mlp_out = resid_post, in words.
2. `figure_3`: at how many prompts each method reads something alike, over layers, as in the paper
   and corrected for chance.
3. `figure_5` and `figure_6`: the readings of every layer at α = 1, and at the best α.
4. `alpha_ladder`: what one site reads as α grows (section 3.5).

An evaluation holds several prompts: say which one with `prompt`. Figures 2 and 4 (a diffusion
model, a screenshot) show nothing to compute.
"""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation import methods
from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.paper import at_target, best_table, decomposition, text_lines
from superscopes_tl.figures.sweeps import alpha_curve
from superscopes_tl.scores import PAPER_SCORER
from superscopes_tl.statistics import Comparison, compare

METHOD_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, told apart with and without colour vision."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


def figure_1(
    readings: SweepResult,
    layer: int,
    *,
    alpha: float | None = None,
    prompt: str | None = None,
    position: int | None = None,
) -> go.Figure:
    """Draw what one layer's MLP gets, adds and gives on, in words (Figure 1).

    Args:
        readings: a sweep or an evaluation over resid_mid, mlp_out and resid_post.
        layer: the source layer.
        alpha: this α for all three; the best of each unless given.
        prompt: which source prompt, if there are several.
        position: the token; the rightmost one unless given.

    Raises:
        ValueError: a prompt, layer, α or token that is not there.
    """
    return decomposition(readings.of(prompt), layer, alpha=alpha, position=position)


def figure_3(counted: Comparison | SweepResult, *, title: str = "") -> go.Figure:
    """Draw at how many prompts each method reads something alike, over source layers (Figure 3).

    Left the paper's count, similarity above the threshold; right the corrected one. Bars are 95 %
    bootstrap intervals over prompts, dashed lines what chance gives the method of their colour.

    Args:
        counted: from `compare` or `replay`, or an evaluation of one kind, which is compared first.
        title: what was compared, the model or the files; the number of prompts and the scorer
            are added.
    """
    if isinstance(counted, Comparison):
        comparison = counted
    else:
        config = counted.provenance["config"]
        if config["scorer"] != PAPER_SCORER:
            raise bad_value(
                "counted", f"an evaluation scored by {PAPER_SCORER}",
                config["scorer"], "figure_3(compare(methods(evaluation), scorer=...))",
            )  # fmt: skip
        comparison = compare(methods(counted), score_on=config["score_on"])
        title = title or str(counted.provenance["model"]["name"])
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


def figure_5(
    readings: SweepResult, *, prompt: str | None = None, position: int | None = None
) -> go.Figure:
    """Draw what every layer reads as at α = 1, which is Patchscopes (Figure 5).

    Args:
        readings: a sweep or an evaluation with α = 1.
        prompt: which source prompt, if there are several.
        position: the token; the rightmost one unless given.

    Raises:
        ValueError: a prompt or token that is not there, or no α = 1.
    """
    return best_table(readings.of(prompt), alpha=1, position=position)


def figure_6(
    readings: SweepResult, *, prompt: str | None = None, position: int | None = None
) -> go.Figure:
    """Draw what every layer reads as at its best α, "Show Best Results" (Figure 6).

    Args:
        readings: a sweep or an evaluation.
        prompt: which source prompt, if there are several.
        position: the token; the rightmost one unless given.

    Raises:
        ValueError: a prompt or token that is not there.
    """
    return best_table(readings.of(prompt), position=position)


def alpha_ladder(
    readings: SweepResult,
    layer: int,
    *,
    kind: str = "mlp_out",
    prompt: str | None = None,
    position: int | None = None,
    target_layer: int | None = None,
) -> go.Figure:
    """Draw the score of one site over α, with what it reads as beside each point (section 3.5).

    Args:
        readings: a sweep or an evaluation.
        layer: the source layer.
        kind: the kind of activation.
        prompt: which source prompt, if there are several.
        position: the token; the rightmost one unless given.
        target_layer: which target layer, where there are several.

    Raises:
        ValueError: a prompt, layer, kind, token or target layer that is not there.
    """
    result = at_target(readings.of(prompt), target_layer)
    curve = alpha_curve(result, kind=kind, layers=[layer], position=position)
    line = curve.data[0]
    table = result.table
    at = table["position"].max() if position is None else position
    site = (table["kind"] == kind) & (table["source_layer"] == layer) & (table["position"] == at)
    said = table[site].sort_values("alpha")["description"]
    scores = [0.0 if score is None else score for score in line.y]
    rungs = [f"{alpha:g}" for alpha in line.x]
    figure = go.Figure(
        go.Bar(
            x=scores,
            y=rungs,
            orientation="h",
            customdata=line.customdata,
            hovertemplate=line.hovertemplate,
            marker_color="#6b7a99",
        )
    )
    figure.add_scatter(  # a bar's own text would stand left of it where the score is negative
        x=[max(score, 0.0) for score in scores],
        y=rungs,
        mode="text",
        text=[f" {text_lines(text, 70)}" for text in said],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure.update_layout(
        title=f"{curve.layout.title.text} · layer {layer}",
        template="plotly_white",
        showlegend=False,
        # Room for the texts: α climbs upwards, and each rung says what was read there.
        xaxis={"title": "score", "range": [min(0.0, *scores), max(3 * max(scores), 0.1)]},
        yaxis={"title": "α", "type": "category"},
        height=150 + 44 * len(line.x),
        width=900,
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
