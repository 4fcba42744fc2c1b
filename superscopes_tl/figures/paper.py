"""The paper's figures, from a sweep or from an evaluation.

1. `decomposition` (`figure_1`): resid_mid + mlp_out = resid_post of one layer, each in words.
2. `figure_3`: how many prompts each method reads, over layers, as in the paper and corrected for
   chance.
3. `best_table`: per layer and kind the reading at one α (`figure_5`: at α = 1) or at the best
   (`figure_6`).
4. `alpha_ladder`: the readings of one site as α grows (section 3.5).

An evaluation holds several prompts: choose one with `prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.evaluation import methods
from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.grid import (
    HOVER,
    draw_table,
    escape,
    finite,
    interval,
    method_style,
    only,
    text_lines,
)
from superscopes_tl.figures.sweeps import curve_rows, hover_text, site_title
from superscopes_tl.model import PAPER_KINDS, PatchedLayer
from superscopes_tl.scores import PAPER_SCORER
from superscopes_tl.statistics import Comparison, compare


def decomposition(
    readings: SweepResult,
    layer: int,
    *,
    alpha: float | None = None,
    prompt: str | None = None,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
) -> go.Figure:
    """Draw the descriptions of one layer's MLP input, output and sum (the paper's Figure 1).

    Args:
        readings: a sweep or an evaluation over resid_mid, mlp_out and resid_post.
        layer: the source layer.
        alpha: one α for all three kinds; defaults to the best of each.
        prompt: which source prompt, if there are several.
        position: the token; defaults to the rightmost one.
        target_layer: which target layer; defaults to the best one of each kind.

    Raises:
        ValueError: a prompt, layer, α, token or target layer that is not there.
    """
    title, wide = _by_layer(readings, prompt, position, target_layer, alpha)
    check_choice("layer", layer, list(wide.index))
    figure = go.Figure()
    for column, kind in enumerate(PAPER_KINDS):
        text = "not computed"
        if kind in wide.columns.get_level_values(0):
            cell = wide[kind].loc[layer].to_dict()
            if not math.isnan(cell["alpha"]):
                text = text_lines(cell["description"], 26, empty=_no_text(cell))
                text += f"<br><br><i>α = {cell['alpha']:g}, {_score(cell, 'score ')}</i>"
        figure.add_annotation(x=column, y=0.5, text=f"<b>{kind}</b><br><br>{text}", showarrow=False)
        figure.add_shape(type="rect", x0=column - 0.4, x1=column + 0.4, y0=0, y1=1, opacity=0.5)
        if column:
            sign = {"text": "+" if column == 1 else "=", "font": {"size": 28}}
            figure.add_annotation(x=column - 0.5, y=0.5, showarrow=False, **sign)
    return figure.update_layout(
        title=f"{title} · layer {layer}",
        template="plotly_white",
        height=300,
        margin={"t": 60, "b": 20},
        xaxis={"visible": False, "range": [-0.5, 2.5]},
        yaxis={"visible": False, "range": [-0.05, 1.05]},
    )


figure_1 = decomposition
"""The paper's Figure 1: `decomposition` under the paper's number."""


def best_table(
    readings: SweepResult,
    *,
    alpha: float | None = None,
    prompt: str | None = None,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
) -> go.Figure:
    """Draw the paper's table of readings: a row per layer, a column per kind.

    Arguments as in `decomposition`; without `alpha` the best of each site counts.

    Raises:
        ValueError: a prompt, α, token or target layer that is not there.
    """
    title, wide = _by_layer(readings, prompt, position, target_layer, alpha)
    columns = {"layer": [str(layer) for layer in wide.index]}
    for kind in dict.fromkeys(wide.columns.get_level_values(0)):
        columns[kind] = [_entry(cell) for cell in wide[kind].to_dict("records")]
    which = "best α of every site" if alpha is None else f"α = {alpha:g}"
    return draw_table(columns, [60, *[290] * (len(columns) - 1)], f"{title} · {which}")


def figure_5(readings: SweepResult, **chosen: Any) -> go.Figure:
    """Draw `best_table` at α = 1, which is Patchscopes (Figure 5)."""
    return best_table(readings, alpha=1, **chosen)


def figure_6(readings: SweepResult, **chosen: Any) -> go.Figure:
    """Draw `best_table` at the best α of every site, "Show Best Results" (Figure 6)."""
    return best_table(readings, **chosen)


def figure_3(counted: Comparison | SweepResult, *, title: str = "") -> go.Figure:
    """Draw how many prompts each method reads, over source layers (Figure 3).

    Left the paper's count, similarity above the threshold; right the corrected one. Bars are 95 %
    bootstrap intervals over prompts, dashed lines the count expected by chance.

    Args:
        counted: from `compare` or `replay`, or an evaluation of one kind, which is compared first.
        title: defaults to the model's name; the number of prompts and the scorer are added.
    """
    if isinstance(counted, SweepResult):
        config = counted.provenance["config"]
        if config["scorer"] != PAPER_SCORER:
            raise bad_value(
                "counted", f"an evaluation scored by {PAPER_SCORER}",
                config["scorer"], "figure_3(compare(methods(evaluation), scorer=...))",
            )  # fmt: skip
        title = title or str(counted.provenance["model"]["name"])
        counted = compare(methods(counted), score_on=config["score_on"])
    settings = counted.settings
    percentile = f"above the {settings['percentile']:g}th percentile of the other prompts"
    forms = (
        ("hits", "expected_by_chance", f"similarity > {settings['threshold']:g}"),
        ("corrected", "expected_corrected", percentile),
    )
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[f[2] for f in forms]
    )
    for column, (count, chance, _) in enumerate(forms, start=1):
        for rank, method in enumerate(counted.methods):
            rows = only(counted.counts, "method", method).sort_values("source_layer")
            for line in _count_lines(rows, count, chance, rank):
                line.update(legendgroup=method, showlegend=column == 1 and line.mode != "lines")
                figure.add_trace(line, row=1, col=column)
    prompts = counted.counts["prompts"].max()
    what = f"{prompts} prompts, {settings['scorer']} on the {settings['score_on']}"
    figure.update_xaxes(title_text="source layer", dtick=1)
    figure.update_yaxes(title_text="prompts", rangemode="tozero", col=1)
    return figure.update_layout(
        title="<br>".join(escape(line) for line in (title, what) if line),
        template="plotly_white",
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0.01, "yref": "container"},
        margin_b=110,
        height=480,
        width=1000,
    )


def _count_lines(rows: pd.DataFrame, count: str, chance: str, rank: int) -> list[go.Scatter]:
    """Return one method's counts with their intervals, and its dashed chance level."""
    name = escape(str(rows["method"].iloc[0]))
    color, symbol = method_style(rank)
    layers = rows["source_layer"].tolist()
    return [
        go.Scatter(
            x=layers,
            y=rows[count].tolist(),
            name=name,
            mode="lines+markers",
            line_color=color,
            marker={"symbol": symbol, "size": 8},
            error_y=interval(rows[count], rows[f"{count}_low"], rows[f"{count}_high"]),
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


def alpha_ladder(
    readings: SweepResult,
    layer: int,
    *,
    kind: str = "mlp_out",
    prompt: str | None = None,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
) -> go.Figure:
    """Draw the score of one site over α, with the description beside each bar (section 3.5).

    Arguments as in `decomposition`, of one kind and one target layer.

    Raises:
        ValueError: a prompt, layer, kind, token or target layer that is not there.
    """
    result = readings.of(prompt)
    rows = curve_rows(result, kind, [layer], "score", position, target_layer)
    scores = [finite(score) or 0.0 for score in rows["score"]]
    rungs = [f"{alpha:g}" for alpha in rows["alpha"]]
    figure = go.Figure()
    figure.add_bar(
        x=scores, y=rungs, orientation="h", marker_color="#6b7a99",
        customdata=[hover_text(row) for row in rows.to_dict("records")],
        hovertemplate=HOVER,
    )  # fmt: skip
    figure.add_scatter(  # a bar's own text would be left of it where the score is negative
        x=[max(score, 0.0) for score in scores],
        y=rungs,
        mode="text",
        text=[f" {text_lines(text, 70)}" for text in rows["description"]],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    return figure.update_layout(
        title=site_title(result, rows, f"{kind} of layer {layer}, "),
        template="plotly_white",
        showlegend=False,
        # Room for the texts at the right of the longest bar.
        xaxis={"title": "score", "range": [min(0.0, *scores), max(3 * max(scores), 0.1)]},
        yaxis={"title": "α", "type": "category"},
        height=150 + 44 * len(rows),
        width=900,
    )


def _by_layer(
    readings: SweepResult,
    prompt: str | None,
    position: int | None,
    target_layer: PatchedLayer | None,
    alpha: float | None,
) -> tuple[str, pd.DataFrame]:
    """Return the escaped prompt, and its `SweepResult.by_layer` at one token."""
    result = readings.of(prompt)
    into: Any = "all" if target_layer is None else target_layer
    title = escape(str(result.provenance.get("prompt", "")))
    return title, result.at(position=position, target_layer=into).by_layer(alpha=alpha)


def _no_text(cell: Mapping[Any, Any]) -> str:
    """Return why a cell of `SweepResult.by_layer` has no description."""
    return "no description" if cell["written"] else "not written out"


def _entry(cell: Mapping[Any, Any]) -> str:
    if math.isnan(cell["alpha"]):
        return "not computed"
    text = text_lines(cell["description"], 44, empty=_no_text(cell))
    return f"{text}<br>α = {cell['alpha']:g}, {_score(cell)}"


def _score(cell: Mapping[Any, Any], name: str = "") -> str:
    score = "no score" if math.isnan(cell["score"]) else f"{name}{cell['score']:.2f}"
    return score if math.isnan(cell["recovered"]) else f"{score}, recovers {cell['recovered']:.2f}"
