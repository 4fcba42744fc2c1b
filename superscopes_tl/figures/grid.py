"""One builder for every heatmap, with panels, marks and hover texts.

1. `Grid.of` lays a table out: a panel per value of one column, rows along y, columns along x.
2. `Grid.each` maps the cells of a panel, for plotly, a live widget or matplotlib.
3. `draw` makes the plotly figure: one colour scale for all panels, and a mark on every cell that
   has no colour to show.

Colours are cividis, which reads the same with and without colour vision, and text on them is black
or white, whichever contrasts more. Generated and typed text is untrusted: hover texts, labels and
titles are escaped where they are built.
"""

from __future__ import annotations

import html
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from superscopes_tl.errors import bad_value, check_choice

COLOR_SCALE = "cividis"
"""The colours of every map: cividis, even in lightness, with and without colour vision."""
METHOD_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours, distinguishable with and without colour vision."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
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
"""States of a cell that a colour cannot show: plotly's symbol, and one for text."""

HOVER = "%{customdata}<extra></extra>"
NO_CELL = "not computed"
"""The name of the mark of cells that were not computed."""

LABEL_SIZE = 11  # of a text in a cell, in pixels, where there is room
_LEFT_TO_RIGHT = {"L", "EN", "ES", "ET", "CS", "NSM", "BN", "B", "S", "WS", "ON"}

Row = dict[Any, Any]
T = TypeVar("T")


def escape(text: str) -> str:
    """Return any text safe in a figure, where quotation marks need no escape.

    A text with right-to-left letters, or with marks of direction, is isolated (U+2068, U+2069):
    else it would turn the words and numbers beside it round.
    """
    safe = html.escape(text, quote=False)
    if {unicodedata.bidirectional(c) for c in text} <= _LEFT_TO_RIGHT | {""}:
        return safe
    return f"\u2068{safe}\u2069"


@cache
def _steps(scale: str) -> list[tuple[str, str]]:
    """Return 256 colours of a scale, each with the colour of text on it."""
    several = []
    for colour in sample_colorscale(scale, [step / 255 for step in range(256)]):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (float(part) / 255 for part in colour[4:-1].split(","))
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        # 0.179 is where black and white contrast equally, both above 4.5 : 1 (WCAG 2, 1.4.3).
        several.append((colour, "#000" if luminance > 0.179 else "#fff"))
    return several


def on_scale(value: float, low: float, high: float, scale: str = COLOR_SCALE) -> tuple[str, str]:
    """Return a number's colour, and black or white for text on it, whichever contrasts more."""
    share = (value - low) / (high - low) if high > low else 0.5
    return _steps(scale)[round(255 * min(1.0, max(0.0, share)))]


@dataclass(frozen=True)
class Grid:
    """A table laid out as panels of rows and columns.

    Attributes:
        panels: the values that have a panel each.
        ys: the values along the vertical axis.
        xs: the values along the horizontal axis.
        cells: the row of the table at each (panel, y, x) that it covers.
    """

    panels: tuple[Any, ...]
    ys: tuple[Any, ...]
    xs: tuple[Any, ...]
    cells: Mapping[tuple[Any, Any, Any], Row]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        *,
        x: str,
        y: str = "source_layer",
        panel: str | None = None,
        panels: Iterable[Any] | None = None,
        ys: Iterable[Any] | None = None,
        xs: Iterable[Any] | None = None,
    ) -> Self:
        """Lay out a table; where several rows share a cell, the first one counts.

        Args:
            table: one row per cell.
            x: the column along the horizontal axis.
            y: the column along the vertical axis.
            panel: the column with a panel per value; a single panel if `None`.
            panels: defaults to the table's panels in its order.
            ys: defaults to the table's values, ascending.
            xs: defaults to the table's values, ascending.
        """
        cells: dict[tuple[Any, Any, Any], Row] = {}
        for row in table.to_dict("records"):
            cells.setdefault((row[panel] if panel else "", row[y], row[x]), row)
        return cls(
            tuple(dict.fromkeys(at for at, _, _ in cells) if panels is None else panels),
            tuple(_ordered(at for _, at, _ in cells) if ys is None else ys),
            tuple(_ordered(at for _, _, at in cells) if xs is None else xs),
            cells,
        )

    def each(self, panel: Any, show: Callable[[Row], T], missing: T) -> list[list[T]]:
        """Return `show` of every cell of a panel, line by line; `missing` where there is none."""
        return [
            [
                show(self.cells[panel, y, x]) if (panel, y, x) in self.cells else missing
                for x in self.xs
            ]
            for y in self.ys
        ]

    def numbers(self, panel: Any, value: str) -> list[list[float | None]]:
        """Return the finite values of a panel, `None` elsewhere."""
        return self.each(panel, lambda row: finite(row[value]), None)

    def extent(self, value: str) -> tuple[float, float]:
        """Return the least and the greatest finite value; 0 and 1 if there is none."""
        numbers = [n for row in self.cells.values() if (n := finite(row[value])) is not None]
        return (min(numbers), max(numbers)) if numbers else (0.0, 1.0)

    def marked(
        self, panel: Any, mark: Callable[[Row | None], str]
    ) -> dict[str, list[tuple[Any, Any]]]:
        """Return the (y, x) of a panel's marked cells by the name of their mark."""
        found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in MARKS}
        for y in self.ys:
            for x in self.xs:
                if name := mark(self.cells.get((panel, y, x))):
                    found[name].append((y, x))
        return found


def _ordered(values: Iterable[Any]) -> list[Any]:
    """Return distinct values: numbers from low to high, names as they come."""
    distinct = list(dict.fromkeys(values))
    return distinct if any(isinstance(value, str) for value in distinct) else sorted(distinct)


def draw(
    grid: Grid,
    value: str,
    hover: Callable[[Row], str],
    *,
    title: str,
    x_title: str,
    y_title: str = "source layer",
    name: str | None = None,
    color_range: tuple[float, float] | None = None,
    text: Callable[[Row], str] | None = None,
    mark: Callable[[Row | None], str] | None = None,
    every_mark: bool = False,
    color_scale: str = COLOR_SCALE,
    labels: Sequence[str] | None = None,
    stacked: bool = False,
    cell_width: int = 46,
) -> go.Figure:
    """Draw a grid as heatmaps on one colour scale.

    Args:
        grid: what to draw.
        value: the numeric column of the colours.
        hover: the hover text of a row, escaped.
        title: the figure's title, escaped.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        name: title of the colour bar; defaults to `value`.
        color_range: values of the darkest and the lightest colour; defaults to those of the data.
        text: text of a cell, escaped; defaults to its number, where there is room.
        mark: the name in `MARKS` of a row's mark (`None`: not computed), or "".
        every_mark: whether each panel has a trace for every mark, used or not.
        color_scale: plotly's name of the colour scale.
        labels: tick labels of the columns, escaped; default to their values.
        stacked: whether panels stand one below the other.
        cell_width: width of a cell in pixels; no panel is narrower than 300.
    """
    down, along = (len(grid.panels), 1) if stacked else (1, len(grid.panels))
    figure = make_subplots(
        rows=down,
        cols=along,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.12 / down,
        subplot_titles=[TITLES.get(panel, escape(str(panel))) for panel in grid.panels],
    )
    explained: set[str] = set()  # the legend names each mark once
    shown = color_range or grid.extent(value)
    size = _label_size(grid, text, cell_width)
    for number, panel in enumerate(grid.panels):
        at = {"row": 1 + number % down, "col": 1 + number // down}
        cells = _cells_trace(grid, panel, value, hover)
        cells.text = cell_texts(grid, panel, value, shown, text, color_scale)
        cells.update(texttemplate="%{text}" if cells.text else None, textfont_size=size)
        figure.add_trace(cells, **at)
        for marks in _mark_traces(grid, panel, mark, hover) if mark else ():
            if not (marks.x or every_mark):
                continue
            marks.showlegend = marks.name not in explained
            explained.add(marks.name)
            figure.add_trace(marks, **at)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text=x_title, row=down)
    if labels is not None:
        figure.update_xaxes(tickvals=[axis_label(x) for x in grid.xs], ticktext=list(labels))
    figure.update_yaxes(type="category")
    figure.update_yaxes(title_text=y_title, col=1)
    low, high = color_range or (None, None)
    return figure.update_layout(
        title=title,
        template="plotly_white",
        coloraxis={
            "colorscale": color_scale,
            "colorbar": {"title": name or value},
            "cmin": low,
            "cmax": high,
        },
        height=180 + (40 + 26 * len(grid.ys)) * down,
        width=180 + max(300, cell_width * len(grid.xs)) * along,
        plot_bgcolor="#e9e9e9",
        showlegend=True,
        # Below the panels, at the right: above them it would meet the title or the buttons.
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0.01, "yref": "container"},
    )


def cell_texts(
    grid: Grid,
    panel: Any,
    value: str,
    color_range: tuple[float, float],
    text: Callable[[Row], str] | None = None,
    scale: str = COLOR_SCALE,
) -> list[list[str]] | None:
    """Return the texts in the cells of one panel; `None` where there is no room for numbers.

    Plotly's own choice of their colour, #444 or white, falls below a contrast of 4.5 : 1.
    """
    if text is None and len(grid.xs) > LABEL_LIMIT:
        return None

    def show(row: Row) -> str:
        number = finite(row[value])
        shown = text(row) if text else "" if number is None else f"{number:.2f}"
        if not shown or number is None:
            return shown
        return f'<span style="color:{on_scale(number, *color_range, scale)[1]}">{shown}</span>'

    return grid.each(panel, show, "")


def _label_size(grid: Grid, text: Callable[[Row], str] | None, width: int) -> int:
    """Return the font size with which the longest text fits into a cell, if that is legible."""
    longest = max((len(text(row)) for row in grid.cells.values()), default=1) if text else 5
    return max(6, min(LABEL_SIZE, int(1.6 * width / max(1, longest))))


def _cells_trace(grid: Grid, panel: Any, value: str, hover: Callable[[Row], str]) -> go.Heatmap:
    """Return the coloured cells of one panel; arguments as in `draw`."""
    return go.Heatmap(
        z=grid.numbers(panel, value),
        x=[axis_label(x) for x in grid.xs],
        y=[axis_label(y) for y in grid.ys],
        customdata=grid.each(panel, hover, NO_CELL),
        hovertemplate=HOVER,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
    )


def _mark_traces(
    grid: Grid, panel: Any, mark: Callable[[Row | None], str], hover: Callable[[Row], str]
) -> list[go.Scatter]:
    """Return a trace for every mark, with a panel's cells of that mark."""
    return [
        go.Scatter(
            x=[axis_label(x) for _, x in places],
            y=[axis_label(y) for y, _ in places],
            mode="markers",
            name=name,
            marker={"symbol": MARKS[name][0], "color": "#666", "size": 9, "line_color": "#666"},
            customdata=[
                hover(grid.cells[panel, y, x]) if (panel, y, x) in grid.cells else NO_CELL
                for y, x in places
            ],
            hovertemplate=HOVER,
        )
        for name, places in grid.marked(panel, mark).items()
    ]


def draw_table(
    columns: Mapping[str, Sequence[str]], widths: Sequence[int], title: str
) -> go.Figure:
    """Draw a table of escaped cells by header, with column widths in pixels."""
    figure = go.Figure(
        go.Table(
            columnwidth=list(widths),
            header={"values": [escape(name) for name in columns], "align": "left"},
            cells={"values": list(columns.values()), "align": "left"},
        )
    )
    # A table that is higher than its figure hides its last rows: one line of room in every row.
    lines = [max(cell.count("<br>") for cell in row) for row in zip(*columns.values(), strict=True)]
    return figure.update_layout(
        title=title,
        margin={"t": 60, "b": 20},
        height=112 + sum(12 + 18 * (2 + breaks) for breaks in lines),
        width=160 + sum(widths),
    )


def axis_label(value: Any) -> str:
    """Return a value as the axes show it."""
    return value if isinstance(value, str) else f"{value:.10g}"


def finite(value: Any) -> float | None:
    """Return a number, or `None` if it is not finite, which JSON cannot hold."""
    return float(value) if pd.notna(value) and math.isfinite(value) else None


def interval(values: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Return plotly's error bars from `low` to `high`."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 1,
        "array": [finite(end) for end in high - values],
        "arrayminus": [finite(end) for end in values - low],
    }


def shades(count: int, *, last: float = 0.85) -> list[str]:
    """Return colours from the scale's dark end; its pale last one is hard to see on white."""
    steps = [last * rank / max(1, count - 1) for rank in range(count)]
    return list(sample_colorscale(COLOR_SCALE, steps)) if count else []


def method_style(rank: int) -> tuple[str, str]:
    """Return colour and marker symbol of the method at a rank; the first 56 pairs differ."""
    return METHOD_COLORS[rank % len(METHOD_COLORS)], SYMBOLS[rank % len(SYMBOLS)]


def text_lines(text: object, width: int, *, empty: str = "–") -> str:
    """Return text escaped, in lines of at most `width` characters."""
    return "<br>".join(map(escape, textwrap.wrap(str(text), width))) or empty


def only(rows: pd.DataFrame, column: str, wanted: Any, *, argument: str = "") -> pd.DataFrame:
    """Return the rows whose column has a value, or one of several; all for `None`."""
    if wanted is None:
        return rows
    several = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else wanted
    there = sorted(rows[column].dropna().unique().tolist())
    for item in several:
        check_choice(argument or column, item, there)
    return rows[rows[column].isin(list(several))]


def check_numeric(table: pd.DataFrame, column: str, argument: str = "value") -> None:
    """Raise unless a column of the table holds numbers."""
    numeric = list(table.select_dtypes("number").columns)
    if column not in numeric:
        raise bad_value(argument, f"one of the numeric columns {numeric}", column, "choose one")
