"""What lenses read, as plotly figures.

1. `lens_heatmap`: the likeliest token of every layer and token position (or kind), one panel per
   lens, coloured by its probability.
2. `lens_kl_figure`: how far each lens is from the model's final prediction, over layers.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value
from superscopes_tl.figures.sweeps import COLOR_SCALE, having, or_none
from superscopes_tl.neighbours import CONTROL

_PROBABILITY = {
    "colorscale": COLOR_SCALE,
    "colorbar": {"title": "probability"},
    "cmin": 0,
    "cmax": 1,
}
_SHOWN = 9
"""Characters of a token that fit into a cell."""


def lens_heatmap(
    table: pd.DataFrame,
    *,
    x: Literal["position", "kind"] = "position",
    kind: str | None = None,
    position: int | None = None,
    lenses: Sequence[str] | None = None,
) -> go.Figure:
    """Draw the likeliest token of every cell, coloured by its probability, one panel per lens.

    Hovering over a cell shows all tokens of the table. Cells that were not read stay grey.

    Args:
        table: what `lens_table` returned; of one prompt.
        x: what runs along the horizontal axis.
        kind: which kind, where positions run along the axis; the table's first unless given.
        position: which token, where kinds do; the table's rightmost unless given.
        lenses: which lenses, controls among them; all of the table unless given.

    Raises:
        ValueError: several prompts, or a kind, position or lens that the table does not have.
    """
    if x not in ("position", "kind"):
        raise bad_value("x", "'position' or 'kind'", x, "leave it out")
    prompt = _one_prompt(table)
    if x == "position":
        chosen: Any = table["kind"].iloc[0] if kind is None else kind
        rows = having(table, "kind", [chosen])
        what = html.escape(str(chosen))
    else:
        chosen = table["position"].max() if position is None else position
        rows = having(table, "position", [chosen])
        what = f"token <b>{html.escape(str(rows['token'].iloc[0]))}</b>"
    names = list(dict.fromkeys(table["lens"])) if lenses is None else list(lenses)
    rows = having(rows, "lens", names)
    columns = sorted(rows[x].unique()) if x == "position" else list(dict.fromkeys(rows[x]))
    layers = sorted(rows["source_layer"].unique())
    # Many tokens are wide: their panels stand one below the other.
    down, along = (len(names), 1) if x == "position" else (1, len(names))
    figure = make_subplots(
        rows=down,
        cols=along,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.12 / down,
        subplot_titles=[html.escape(name) for name in names],
    )
    for number, name in enumerate(names):
        panel = _cells(rows[rows["lens"] == name], x, columns, layers)
        figure.add_trace(panel, row=1 + number % down, col=1 + number // down)
    label = "token" if x == "position" else "kind"
    labels = rows.drop_duplicates(x).set_index(x, drop=False)[label]
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=[html.escape(str(labels[c])) for c in columns]
    )
    figure.update_xaxes(title_text=label, row=down)
    figure.update_yaxes(type="category", title_text="layer", col=1)
    figure.update_layout(
        title=f"{html.escape(prompt[:60])} · {what} · the likeliest next token",
        template="plotly_white",
        coloraxis=_PROBABILITY,
        height=180 + (40 + 26 * len(layers)) * down,
        width=180 + max(300, 64 * len(columns)) * along,
        plot_bgcolor="#e9e9e9",
    )
    return figure


def _cells(rows: pd.DataFrame, x: str, columns: Sequence[Any], layers: Sequence[int]) -> go.Heatmap:
    """Return one panel: the first token of each cell in it, all of them under the mouse."""
    found = dict(iter(rows.sort_values("rank").groupby(["source_layer", x], sort=False)))
    cells = [[found.get((layer, column)) for column in columns] for layer in layers]
    return go.Heatmap(
        z=[
            [None if c is None else or_none(c["probability"].iloc[0]) for c in line]
            for line in cells
        ],
        x=list(range(len(columns))),
        y=[str(layer) for layer in layers],
        text=[["" if c is None else _short(c) for c in line] for line in cells],
        customdata=[["not read" if c is None else _hover(c) for c in line] for line in cells],
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
    )


def _short(rows: pd.DataFrame) -> str:
    """Return a cell's first token, without the space around it, unless it is nothing else."""
    token = str(rows["top_token"].iloc[0])
    shown = token.strip() if token.strip().isprintable() and token.strip() else repr(token)
    return html.escape(shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…")


def _hover(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    place = f"{first['kind']} of layer {first['source_layer']}, token {first['token']!r}"
    tokens = "<br>".join(
        f"{row['probability']:.3f}  {html.escape(repr(row['top_token']))}"
        for row in rows.to_dict("records")
    )
    return f"{html.escape(place)}<br>{tokens}"


def lens_kl_figure(table: pd.DataFrame) -> go.Figure:
    """Draw KL(final ‖ lens) over layers, a line per lens and kind; controls are dashed.

    Args:
        table: what `lens_kl` returned.
    """
    names = list(dict.fromkeys(name.removesuffix(f", {CONTROL}") for name in table["lens"]))
    shades = [0.75 * rank / max(1, len(names) - 1) for rank in range(len(names))]
    colours = dict(zip(names, sample_colorscale(COLOR_SCALE, shades), strict=True))
    kinds = list(dict.fromkeys(table["kind"]))
    symbols = ("circle", "square", "diamond", "triangle-up", "cross")
    figure = go.Figure()
    for name, kind in table[["lens", "kind"]].drop_duplicates().itertuples(index=False):
        rows = table[(table["lens"] == name) & (table["kind"] == kind)].sort_values("source_layer")
        figure.add_scatter(
            x=rows["source_layer"].tolist(),
            y=[or_none(value) for value in rows["kl"]],
            name=html.escape(f"{name}, {kind}" if len(kinds) > 1 else name),
            mode="lines+markers",
            line={
                "color": colours[name.removesuffix(f", {CONTROL}")],
                "dash": "dash" if name.endswith(CONTROL) else "solid",
            },
            marker_symbol=symbols[kinds.index(kind) % len(symbols)],
        )
    figure.update_layout(
        title="How far a lens is from the model's final prediction",
        template="plotly_white",
        xaxis={"title": "layer", "dtick": 1},
        yaxis={"title": "KL(final ‖ lens), nats per token", "rangemode": "tozero"},
    )
    return figure


def _one_prompt(table: pd.DataFrame) -> str:
    prompts = table["prompt"].unique().tolist()
    if len(prompts) != 1:
        raise bad_value("table", "rows of one prompt", prompts, "draw one prompt at a time")
    return str(prompts[0])
