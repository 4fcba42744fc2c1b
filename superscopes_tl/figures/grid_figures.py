"""Pictures over layers: where to read, where to patch (Patchscopes, sections 4.1 and 4.2).

1. `layer_grid`: a sweep's value over source layer x target layer.
2. `next_token_curve`: precision@1 or surprisal over source layers, each method with its interval.
3. `next_token_grid`: the same of one method over source layer x target layer.
"""

from __future__ import annotations

import html
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.paper_figures import METHOD_COLORS
from superscopes_tl.figures.sweeps import COLOR_SCALE, LABEL_LIMIT, heatmap, or_none
from superscopes_tl.neighbours import LOGIT_LENS, PATCHED, NextTokens

Measure = Literal["precision", "surprisal"]

_TITLES = {"precision": "precision@1", "surprisal": "surprisal (nats)"}


def layer_grid(
    result: SweepResult,
    *,
    kind: str | None = None,
    alpha: float | None = None,
    value: str = "score",
    position: int | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw a value over source layer x target layer, of a sweep with several target layers.

    Args:
        result: the sweep, such as `sweep(..., target_layer=range(10))`.
        kind: which kind; a panel for each unless given.
        alpha: this α; the best-scoring one of each pair of layers unless given.
        value: the column to colour by.
        position: the token; the rightmost one of the sweep unless given.
        color_range: the values of the darkest and the lightest colour, as in `heatmap`.

    Raises:
        ValueError: a kind, α, token or column that the sweep does not have.
    """
    rows = _only(_only(result.table, "kind", kind), "alpha", alpha)
    figure = heatmap(
        SweepResult(rows, result.provenance),
        x="target_layer",
        value=value,
        position=position,
        color_range=color_range,
    )
    which = "best α" if alpha is None else f"α = {alpha:g}"
    return figure.update_layout(title=f"{figure.layout.title.text} · {which}")


def next_token_curve(
    found: NextTokens,
    *,
    value: Measure = "precision",
    kind: str | None = None,
    alpha: float | None = None,
    target_layer: int | None = None,
) -> go.Figure:
    """Draw precision@1 or surprisal over source layers, one line per method.

    Args:
        found: from `next_tokens`.
        value: "precision" or "surprisal".
        kind: which kind, if there are several.
        alpha: which α, if there are several.
        target_layer: which target layer, if there are several per source layer.

    Raises:
        ValueError: something that was not computed, or several to choose from.
    """
    rows = _chosen(found, value, kind, alpha)
    patched = rows["method"] != LOGIT_LENS
    rows = pd.concat([_only(rows[patched], "target_layer", target_layer), rows[~patched]])
    if rows.duplicated(["method", "source_layer"]).any():
        raise _several("target_layer", rows["target_layer"])
    rows = rows.sort_values("source_layer", kind="stable")
    figure = go.Figure()
    for color, (method, line) in zip(
        METHOD_COLORS, rows.groupby("method", sort=False), strict=False
    ):
        ends = {
            "array": [or_none(v) for v in line[f"{value}_high"] - line[value]],
            "arrayminus": [or_none(v) for v in line[value] - line[f"{value}_low"]],
        }
        figure.add_trace(
            go.Scatter(
                x=line["source_layer"].tolist(),
                y=[or_none(v) for v in line[value]],
                error_y={"type": "data", "symmetric": False, "thickness": 1, **ends},
                name=str(method).replace("_", " "),
                mode="lines+markers",
                line_color=color,
                customdata=[_hover(row) for row in line.to_dict("records")],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    figure.update_layout(
        title=_title(found, rows),
        template="plotly_white",
        xaxis={"title": "source layer", "dtick": 1},
        yaxis={"title": _TITLES[value], "rangemode": "tozero"},
    )
    return figure


def next_token_grid(
    found: NextTokens,
    *,
    value: Measure = "precision",
    method: str = PATCHED,
    kind: str | None = None,
    alpha: float | None = None,
) -> go.Figure:
    """Draw precision@1 or surprisal of one method over source layer x target layer.

    Args:
        found: from `next_tokens(..., target_layer=range(10))`, for example.
        value: "precision" or "surprisal".
        method: "patched", or a control.
        kind: which kind, if there are several.
        alpha: which α, if there are several.

    Raises:
        ValueError: something that was not computed, or several to choose from.
    """
    rows = _chosen(found, value, kind, alpha)
    rows = _only(rows[rows["target_layer"].notna()], "method", method)
    cells = {(row["source_layer"], row["target_layer"]): row for row in rows.to_dict("records")}
    layers, targets = sorted({s for s, _ in cells}), sorted({t for _, t in cells})
    grid = [[cells.get((layer, target)) for target in targets] for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if cell is None else or_none(cell[value]) for cell in row] for row in grid],
            x=[str(target) for target in targets],
            y=[str(layer) for layer in layers],
            customdata=[
                ["not computed" if cell is None else _hover(cell) for cell in row] for row in grid
            ],
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=COLOR_SCALE,
            colorbar={"title": _TITLES[value]},
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}" if len(targets) <= LABEL_LIMIT else None,
        )
    )
    figure.update_xaxes(title_text="target layer", type="category")
    figure.update_yaxes(title_text="source layer", type="category")
    title = f"{_title(found, rows)} · {html.escape(method)}"
    return figure.update_layout(title=title, template="plotly_white", plot_bgcolor="#e9e9e9")


def _chosen(
    found: NextTokens, value: Measure, kind: str | None, alpha: float | None
) -> pd.DataFrame:
    """Return the rows of a summary that are of one kind and α; the logit lens has no α."""
    if value not in _TITLES:
        raise bad_value("value", "'precision' or 'surprisal'", value, "leave it out")
    rows = _only(found.summary(), "kind", kind)
    lens = rows["method"] == LOGIT_LENS
    patched = _only(rows[~lens], "alpha", alpha)
    for name in ("kind", "alpha"):
        if patched[name].nunique() > 1:
            raise _several(name, patched[name])
    return pd.concat([patched, rows[lens]])


def _only(rows: pd.DataFrame, column: str, wanted: Any) -> pd.DataFrame:
    """Return the rows with the wanted value of a column; all of them for `None`."""
    if wanted is None:
        return rows
    there = sorted(rows[column].unique().tolist())
    if wanted not in there:
        raise bad_value(column, f"one of {there}", wanted, "choose one that was computed")
    kept: pd.DataFrame = rows[rows[column] == wanted]
    return kept


def _several(column: str, there: pd.Series) -> ValueError:
    return bad_value(
        column,
        f"one of {sorted(there.dropna().unique().tolist())}",
        None,
        "choose one, or draw next_token_grid for target layers",
    )


def _hover(row: dict[Any, Any]) -> str:
    """Return what a point shows under the mouse."""
    where = f"{html.escape(str(row['kind']))} of layer {row['source_layer']}"
    if not pd.isna(row["target_layer"]):
        where += f" → layer {row['target_layer']}, α = {row['alpha']:g}"
    numbers = "<br>".join(
        f"{title} {row[name]:.3f}"
        + (
            ""
            if np.isnan(row[f"{name}_low"])
            else f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
        )
        for name, title in _TITLES.items()
    )
    method = html.escape(str(row["method"]).replace("_", " "))
    return f"<b>{method}</b><br>{where}<br>{numbers}<br>{row['texts']} texts"


def _title(found: NextTokens, rows: pd.DataFrame) -> str:
    model = html.escape(str(found.provenance.get("model", {}).get("name", "unknown model")))
    return f"next token · {model} · {html.escape(str(rows['kind'].iloc[0]))}"
