"""Figures of one site by all methods, and of the tokens that a patch raises."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.experiment import SITE
from superscopes_tl.figures.paper import text_lines

LINE = 28
"""Pixels of a line of the drawn table."""


def cells_of(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of what `side_by_side` returned as text, by their headers."""

    def numbers(column: str, form: str) -> list[str]:
        return ["" if pd.isna(cell) else format(cell, form) for cell in table[column]]

    return {
        "method": [str(cell) for cell in table["method"]],
        "reading": [str(cell) for cell in table["reading"]],
        "α": numbers("alpha", "g"),
        "into": numbers("target_layer", "d"),
        "tries": numbers("tries", "d"),
        "score": numbers("score", ".2f"),
        "random": numbers("control", ".2f"),
    }


def side_by_side_figure(table: pd.DataFrame, *, title: str = "One site, all methods") -> go.Figure:
    """Draw what `side_by_side` returned as a table."""
    columns = cells_of(table)
    values = [[text_lines(c, 60) if c else "" for c in cells] for cells in columns.values()]
    figure = go.Figure(
        go.Table(
            columnwidth=[4, 7, 1, 1, 1, 1, 1.5],
            header={"values": list(columns), "align": "left"},
            cells={"values": values, "align": "left", "height": LINE},
        )
    )
    figure.update_layout(
        title=html.escape(title),
        margin={"t": 60, "b": 20},
        height=140 + sum(LINE + 16 * text.count("<br>") for text in values[1]),
    )
    return figure


def relevancy_figure(table: pd.DataFrame, *, tokens: int = 16) -> go.Figure:
    """Return the tokens of some readings, coloured by their relevancy.

    Args:
        table: from `relevancy`; a line per cell, so choose a few.
        tokens: how many tokens of each text to draw; more than some 20 are hard to read.

    Raises:
        ValueError: no token.
    """
    check_count("tokens", tokens, least=1, fix="16 is the default")
    table = table[table["step"] < tokens]
    if table.empty:
        raise bad_value("table", "tokens", "none", "pass cells that wrote a text")
    cells = [*SITE, "alpha"]
    lines = [group.set_index("step") for _, group in table.groupby(cells, sort=False)]
    steps = range(int(table["step"].max()) + 1)
    heads = [line.iloc[0] for line in lines]
    figure = go.Figure(
        go.Heatmap(
            z=[_at(line["relevancy"], steps, None) for line in lines],
            text=[_at(line["written"].map(html.escape), steps, "") for line in lines],
            texttemplate="%{text}",
            hovertemplate="%{text}<br>%{z:.2f}<extra></extra>",
            x=list(steps),
            y=[
                f"{i}: {html.escape(str(head['kind']))} of layer {head['source_layer']} → layer "
                f"{head['target_layer']}, α = {head['alpha']:g}"
                for i, head in enumerate(heads)
            ],
            zmin=-1,
            zmax=1,
            colorscale="RdBu",
            colorbar={"title": "relevancy"},
            textfont={"size": 11},
            xgap=1,
            ygap=1,
        )
    )
    prompts = ", ".join(dict.fromkeys(table["prompt"]))
    figure.update_layout(
        title=f"{html.escape(prompts)} · p(token | injected) − p(token | not)",
        xaxis_title="token of the text",
        height=180 + 34 * len(lines),
        width=380 + 50 * len(steps),
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def _at(column: pd.Series, steps: range, missing: Any) -> list[Any]:
    return [column[step] if step in column.index else missing for step in steps]
