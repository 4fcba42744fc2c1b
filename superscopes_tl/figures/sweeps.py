"""Pictures of a sweep: pure functions from `SweepResult` to a plotly figure.

1. Choose the rows: one token, one value per cell of the picture.
2. Lay them out as layer x α, one panel per kind, all on one colour scale.
3. Mark what a colour cannot say: cells that were not computed or not written out, texts without a
   description, numbers that are not defined.

No function shows or writes a figure; `export.write_html` does the latter. Colours are cividis,
which reads the same with and without colour vision. Generated text is escaped wherever it enters a
figure: it is untrusted.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult

COLOR_SCALE = "cividis"
TITLES = {
    "resid_pre": "resid_pre (block input)",
    "attn_out": "attn_out",
    "resid_mid": "resid_mid (pre-MLP)",
    "mlp_out": "mlp_out",
    "resid_post": "resid_post (block output)",
}
LABEL_LIMIT = 8
"""Above this number of columns a value printed in each cell is too small to read."""

MARKS: Mapping[str, tuple[str, str]] = {
    "not computed": ("x-thin-open", "×"),
    "no description": ("circle-open", "○"),
    "not written out": ("line-ew-open", "–"),
    "not defined": ("diamond-open", "◇"),
}
"""What a cell can be that a colour does not say: plotly's symbol for it, and one for a text."""

SHARES = ("recovered", "specific")
"""Columns whose colours run from 0 to 1, as do those of every control's share."""
USUAL_SCORES = (0.0, 0.6)
"""The colours of scores span at least these: a map that reads nothing should look like it."""
_LARGEST_IN_TENTHS = 1e5

_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 0.01, "yref": "container"}
"""Below the panels, at the right: above them it would meet the title or the buttons."""

Axis = Literal["alpha", "target_layer"]


def heatmap(
    result: SweepResult,
    *,
    x: Axis = "alpha",
    value: str = "score",
    minus: str | None = None,
    position: int | None = None,
    target_layer: int | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw a value over source layer x α, one panel per kind (the map of section 5.1).

    Hovering over a cell shows what the model wrote there. Cells that were not computed carry a
    cross, cells whose text says nothing about the placeholder a ring; the legend names every mark.

    Args:
        result: the sweep.
        x: what runs along the horizontal axis; `"target_layer"` shows the best α of each source
            layer and target layer.
        value: the column to colour by, `score` or any other numeric column.
        minus: a column to take off, such as a control: what is left owes nothing to it.
        position: the token; the rightmost one of the sweep unless given.
        target_layer: which target layer, where there are several per source layer.
        color_range: the values of the darkest and the lightest colour. Unless given, those of
            `value_range`: 0 to 1 for a share, at least 0 to 0.6 for the score, else of this
            result. Give the same to figures that are to be compared, as with a control.

    Raises:
        ValueError: a token, column or target layer that the sweep does not have, or several
            target layers to choose from.
    """
    rows = _rows(result, position=position, value=value)
    shades = color_range or value_range(rows, value)
    if minus is not None:
        shades = color_range or ()
        rows = _less(rows, value, minus)
        value = f"{value} − {minus}"
    if x not in ("alpha", "target_layer"):
        raise bad_value("x", "'alpha' or 'target_layer'", x, "leave it out")
    if x == "alpha":
        rows = _one_target_layer(rows, target_layer)
    else:
        by = "score" if value != "recovered" and rows["written"].all() else "recovered"
        rows = rows.sort_values(by, ascending=False, na_position="last", kind="stable")
        rows = rows.drop_duplicates(["kind", "source_layer", "target_layer"])
    kinds = list(dict.fromkeys(result.table["kind"]))
    layers, columns = sorted(rows["source_layer"].unique()), sorted(rows[x].unique())
    figure = make_subplots(
        cols=len(kinds),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[TITLES.get(kind, kind) for kind in kinds],
    )
    explained: set[str] = set()  # the legend names each mark once
    for column, kind in enumerate(kinds, start=1):
        panel = _Panel(rows[rows["kind"] == kind], layers, columns, x, value)
        figure.add_trace(panel.cells(), row=1, col=column)
        for marks in panel.marks():
            marks.showlegend = marks.name not in explained
            explained.add(marks.name)
            figure.add_trace(marks, row=1, col=column)
    figure.update_xaxes(title_text="α" if x == "alpha" else "target layer", type="category")
    figure.update_yaxes(title_text="source layer", type="category", col=1)
    token = html.escape(str(rows["token"].iloc[0]))
    figure.update_layout(
        title=f"{_title(result)} · token <b>{token}</b>",
        template="plotly_white",
        coloraxis={
            "colorscale": COLOR_SCALE,
            "colorbar": {"title": value},
            **dict(zip(("cmin", "cmax"), shades, strict=False)),
        },
        height=220 + 26 * len(layers),
        width=180 + 300 * len(kinds),
        plot_bgcolor="#e9e9e9",
        showlegend=True,
        legend=_LEGEND,
    )
    return figure


def alpha_curve(
    result: SweepResult,
    *,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    value: str = "score",
    position: int | None = None,
    target_layer: int | None = None,
) -> go.Figure:
    """Draw a value against α, one line per layer (the α ladder of section 3.5).

    Args:
        result: the sweep.
        kind: which kind; the first of the sweep unless given.
        layers: which source layers; all of the sweep unless given.
        value: the column to draw.
        position: the token; the rightmost one of the sweep unless given.
        target_layer: which target layer, where there are several per source layer.

    Raises:
        ValueError: a kind, layer, token, column or target layer that the sweep does not have.
    """
    rows = _one_target_layer(_rows(result, position=position, value=value), target_layer)
    chosen_kind = rows["kind"].iloc[0] if kind is None else kind
    rows = having(rows, "kind", [chosen_kind])
    if layers is not None:
        rows = having(rows, "source_layer", list(layers))
    numbers = sorted(rows["source_layer"].unique())
    figure = go.Figure()
    for rank, layer in enumerate(numbers):
        line = rows[rows["source_layer"] == layer].sort_values("alpha")
        figure.add_trace(
            go.Scatter(
                x=line["alpha"],
                y=[or_none(v) for v in line[value]],
                name=f"layer {layer}",
                mode="lines+markers",
                line_color=_shade(rank, len(numbers)),
                customdata=[hover_text(row) for _, row in line.iterrows()],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    token = html.escape(str(rows["token"].iloc[0]))
    figure.update_layout(
        title=f"{_title(result)} · {chosen_kind} of token <b>{token}</b>",
        template="plotly_white",
        xaxis_title="α",
        yaxis_title=value,
    )
    return figure


class _Panel:
    """One heatmap: a grid of layers x columns, with the rows that fall on it."""

    def __init__(
        self, rows: pd.DataFrame, layers: list[int], columns: list[float], x: Axis, value: str
    ) -> None:
        self._grid = {(row["source_layer"], row[x]): row for _, row in rows.iterrows()}
        self._layers, self._columns, self._value = layers, columns, value

    def cells(self) -> go.Heatmap:
        """Return the coloured cells."""
        values = [
            [
                or_none(self._grid[layer, c][self._value]) if (layer, c) in self._grid else None
                for c in self._columns
            ]
            for layer in self._layers
        ]
        hover = [
            [
                hover_text(self._grid[layer, c]) if (layer, c) in self._grid else "not computed"
                for c in self._columns
            ]
            for layer in self._layers
        ]
        labels = len(self._columns) <= LABEL_LIMIT
        return go.Heatmap(
            z=values,
            x=[f"{c:.10g}" for c in self._columns],
            y=[str(i) for i in self._layers],
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            texttemplate="%{z:.2f}" if labels else None,
        )

    def marks(self) -> list[go.Scatter]:
        """Return a trace for every mark that some cell carries."""
        found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in MARKS}
        for layer in self._layers:
            for c in self._columns:
                row = self._grid.get((layer, c))
                hover = "not computed" if row is None else hover_text(row)
                if name := mark_of(row, self._value):
                    found[name].append((f"{c:.10g}", str(layer), hover))
        return [_marker(name, places) for name, places in found.items() if places]


def _marker(name: str, places: Sequence[tuple[str, str, str]]) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _, _ in places],
        y=[y for _, y, _ in places],
        mode="markers",
        name=name,
        marker={"symbol": MARKS[name][0], "color": "#666", "size": 9, "line": {"color": "#666"}},
        customdata=[hover for _, _, hover in places],
        hovertemplate="%{customdata}<extra></extra>",
    )


def mark_of(row: Any, value: str) -> str:
    """Return which of `MARKS` a cell carries where its colour is `value`; nothing for most.

    Args:
        row: a row of `SweepResult.table`; `None` of a cell that was not computed.
        value: the column of the colours.
    """
    if row is None:
        return "not computed"
    if row["written"] and not row["description"]:
        return "no description"
    if math.isfinite(row[value]):
        return ""
    return "not defined" if row["written"] or value in SHARES else "not written out"


def value_range(table: pd.DataFrame, value: str) -> tuple[float, float] | tuple[()]:
    """Return the values of the darkest and the lightest colour; nothing for those of the data.

    Scores go in steps of a tenth, so that the colours do not move with every batch.
    """
    if value in SHARES or value.endswith("_recovered"):
        return 0.0, 1.0
    return score_range(table) if value == "score" else ()


def score_range(table: pd.DataFrame) -> tuple[float, float]:
    """Return the scores of the darkest and the lightest colour: at least `USUAL_SCORES`."""
    given: Any = table["score"].dropna() if len(table) else []
    scores = [*USUAL_SCORES, *(float(score) for score in given if math.isfinite(score))]
    low, high = min(scores), max(scores)
    if max(abs(low), abs(high)) > _LARGEST_IN_TENTHS:  # a tenth is lost in the rounding
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
        """Return the shades of a table's score, or of a share in it."""
        return cls(column, *(value_range(table, column) or score_range(table)))


def usual_value(table: pd.DataFrame) -> Literal["recovered", "score"]:
    """Return the column to colour some cells by: what is recovered, where that is defined.

    Where nothing is written out either, there is no score to show instead.
    """
    if table.empty or not (table["recovered"].notna().any() or not table["written"].any()):
        return "score"
    return "recovered"


def _rows(result: SweepResult, *, position: int | None, value: str) -> pd.DataFrame:
    """Return the rows of one token after checking that the wanted column is there."""
    table = result.table
    if table.empty:
        raise bad_value(
            "result", "at least one cell", "an empty table", "let the sweep finish a batch"
        )
    numeric = list(table.select_dtypes("number").columns)
    if value not in numeric:
        raise bad_value(
            "value",
            f"one of the numeric columns {numeric}",
            value,
            "value='score' is the similarity",
        )
    chosen = max(table["position"]) if position is None else position
    return having(table, "position", [chosen])


def _less(rows: pd.DataFrame, value: str, minus: str) -> pd.DataFrame:
    """Return the rows with the difference of two columns as a column of its own."""
    numeric = list(rows.select_dtypes("number").columns)
    if minus not in numeric:
        raise bad_value(
            "minus",
            f"one of the numeric columns {numeric}",
            minus,
            "sweep with controls=('random_direction',), for example",
        )
    return rows.assign(**{f"{value} − {minus}": rows[value] - rows[minus]})


def having(rows: pd.DataFrame, column: str, wanted: Sequence[Any]) -> pd.DataFrame:
    """Return the rows whose `column` is one of `wanted`.

    Raises:
        ValueError: there is no row for one of them.
    """
    there = sorted(rows[column].unique().tolist())
    for item in wanted:
        if item not in there:
            raise bad_value(column, f"one of {there}", item, "choose one of these")
    return rows[rows[column].isin(list(wanted))]


def _one_target_layer(rows: pd.DataFrame, target_layer: int | None) -> pd.DataFrame:
    if target_layer is not None:
        rows = having(rows, "target_layer", [target_layer])
    if rows["mapping"].nunique() > 1:
        raise bad_value(
            "result",
            "readings of one mapping",
            rows["mapping"].unique().tolist(),
            "draw a figure for each of them",
        )
    if rows.duplicated(["kind", "source_layer", "alpha"]).any():
        there = sorted(rows["target_layer"].unique().tolist())
        raise bad_value(
            "target_layer",
            f"one of {there}",
            target_layer,
            "choose one, or draw the grid with heatmap(result, x='target_layer')",
        )
    return rows


def or_none(value: float) -> float | None:
    """Return `None` for NaN: plotly in a notebook cannot send NaN."""
    return None if pd.isna(value) else float(value)


def hover_text(row: pd.Series | dict[str, Any]) -> str:
    """Return what a cell shows under the mouse: reading, place, numbers, the whole text."""
    parts = [] if math.isnan(row["recovered"]) else [f"recovers {row['recovered']:.2f}"]
    if row["written"]:
        score = "no description" if pd.isna(row["score"]) else f"{row['score']:.3f}"
        parts.append(f"score {score}")
    parts.append(f"norm ratio {row['norm_ratio']:.2f}")
    nothing = "(no description)" if row["written"] else "(not written out)"
    echo = " · repeats the name" if row["echo"] else ""
    close = " · a close call (margin)" if row["margin"] < NEAR_TIE else ""
    copied = " · repeats a name of the target prompt" if row["few_shot_copy"] else ""
    return (
        f"<b>{_wrapped(row['description']) or nothing}</b><br>"
        f"{html.escape(row['kind'])} of layer {row['source_layer']} → layer "
        f"{row['target_layer']}, α = {row['alpha']:g}<br>"
        f"{' · '.join(parts)}{echo}{copied}{close}<br>"
        f"<i>{_wrapped(row['text'])}</i>"
    )


def _wrapped(text: str, width: int = 60) -> str:
    """Return the text escaped, in lines of at most `width` characters."""
    shown = " ".join(text.split())
    lines = [shown[i : i + width] for i in range(0, len(shown), width)]
    return "<br>".join(html.escape(line) for line in lines)


def _title(result: SweepResult) -> str:
    model = result.provenance.get("model", {}).get("name", "unknown model")
    prompt = textwrap.shorten(str(result.provenance.get("prompt", "")), 60, placeholder=" …")
    return f"{html.escape(prompt)} · {html.escape(str(model))}"


def _shade(rank: int, count: int) -> str:
    from plotly.colors import sample_colorscale

    # Up to 0.85: the last, pale yellow of the scale is hard to see on white.
    shade: str = sample_colorscale(COLOR_SCALE, [0.85 * rank / max(1, count - 1)])[0]
    return shade
