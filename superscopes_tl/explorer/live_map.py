"""Plotly figures inside widgets: the map of a running sweep and the α curve of one site.

1. A `LiveMap` lays out one panel per kind for a sweep that is about to fill it, all on one
   colour scale; `draw` puts in what is finished, `mark` outlines the selected cell.
2. A `LiveCurve` shows one site's numbers against α.
3. `_keep` writes a figure's present state to the widget state that a page reads when it is
   reloaded: plotly itself does so at construction alone, and a reload would show an empty figure.
4. Plotly's `FigureWidget` sends its script of 5 MB with every figure, and a page imports it for
   every figure: seconds each on a slow machine, and anywidget gives up a widget that takes longer
   than two to start. `SharedFigureWidget` sends it compressed, beside a short script that starts
   at once and imports the long one, once per page (`static/plotly.js`).

Backgrounds are transparent and text takes the theme's colour from the style sheet.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import pandas as pd
import plotly
import plotly.graph_objects as go
import traitlets

from superscopes_tl.experiment import Cell, SweepPlan, SweepResult
from superscopes_tl.explorer.view import STATIC
from superscopes_tl.figures import (
    MARKS,
    NO_CELL,
    Grid,
    Shades,
    axis_label,
    cell_texts,
    draw,
    hover_text,
    mark_of,
    value_range,
)
from superscopes_tl.model import EMBED

MARKED = "#e05a00"
GREY = "#8a8a8a"
_TRACES = 1 + len(MARKS)  # of a panel: the colours, and one for each kind of mark


@dataclass(frozen=True)
class Axes:
    """What the cells of a sweep range over; a target is a layer, or "same" as the source layer."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    alphas: tuple[float, ...]
    positions: tuple[int, ...]
    targets: tuple[int | str, ...]

    @classmethod
    def of(cls, result: SweepResult) -> Axes:
        """Return the axes of a finished sweep."""
        same = result.provenance.get("config", {}).get("target_layer") == "same"
        return cls._of(map(Cell.of, result.table.itertuples()), same=same)

    @classmethod
    def of_plan(cls, plan: SweepPlan) -> Axes:
        """Return the axes of a sweep that is about to run."""
        return cls._of(plan.all_cells, same=plan.target_layer == "same")

    @classmethod
    def _of(cls, cells: Iterable[Cell], *, same: bool) -> Axes:
        several = list(cells)
        return cls(
            kinds=tuple(dict.fromkeys(cell.kind for cell in several)),
            layers=tuple(sorted({cell.source_layer for cell in several})),
            alphas=tuple(sorted({cell.alpha for cell in several})),
            positions=tuple(sorted({cell.position for cell in several})),
            targets=("same",) if same else tuple(sorted({cell.target_layer for cell in several})),
        )

    def cell(self, kind: str, layer: int, alpha: float, position: int, target: int | str) -> Cell:
        """Return the cell at the given values of the axes."""
        into = {"same": layer, "embed": EMBED}.get(str(target), target)
        return Cell(position, kind, layer, int(into), alpha)

    def target_of(self, cell: Cell) -> int | str:
        """Return the target of a cell."""
        same = self.targets == ("same",) and cell.target_layer == cell.source_layer
        return "same" if same else cell.target_layer

    def have(self, cell: Cell) -> bool:
        """Return whether a cell lies on the axes."""
        place = (cell.kind, cell.source_layer, cell.alpha, cell.position, self.target_of(cell))
        return all(value in axis for value, axis in zip(place, astuple(self), strict=True))


@cache
def _packed_script() -> bytes:
    """Return plotly's script for widgets, compressed; the same bytes every time."""
    script = files("plotly").joinpath("package_data", "widgetbundle.js").read_bytes()
    return gzip.compress(script, compresslevel=6, mtime=0)


class SharedFigureWidget(go.FigureWidget):  # type: ignore[misc]  # plotly's widgets are untyped
    """A plotly figure as a widget that starts quickly."""

    _esm = STATIC / "plotly.js"
    _version = traitlets.Unicode(plotly.__version__).tag(sync=True)
    _script = traitlets.Bytes().tag(sync=True)

    @traitlets.default("_script")  # type: ignore[untyped-decorator]  # traitlets is untyped
    def _packed(self) -> bytes:
        return _packed_script()


class LiveMap:
    """The heatmaps of a sweep, side by side.

    Attributes:
        axes: what the cells range over.
        widget: the plotly widget.
        marks: the names of the marks (`figures.MARKS`) that some cell carries.

    Args:
        axes: what the cells range over.
        on_click: called with kind, layer and α of a clicked cell.
    """

    def __init__(self, axes: Axes, on_click: Callable[[str, int, float], None]) -> None:
        self.axes, self._on_click = axes, on_click
        self.marks: tuple[str, ...] = ()
        self._x = [axis_label(alpha) for alpha in axes.alphas]
        self._y = [str(layer) for layer in axes.layers]
        empty = draw(
            self._grid(pd.DataFrame()), "score", hover_text, title="", x_title="α", every_mark=True,
            mark=lambda row: mark_of(row, "score"),
        )  # fmt: skip
        self.widget = SharedFigureWidget(empty)
        for index, trace in enumerate(self.widget.data):
            trace.meta = axes.kinds[index // _TRACES]
            trace.on_click(partial(self._clicked, str(trace.meta)))
        self._lay_out()
        self.draw(pd.DataFrame(), None, "same", "score")

    def draw(
        self, table: pd.DataFrame, position: int | None, target: int | str, value: str
    ) -> None:
        """Show the finished cells of one token and target, coloured by a column."""
        if len(table):
            into = table["source_layer"] if target == "same" else target
            table = table[(table["position"] == position) & (table["target_layer"] == into)]
        grid, shown = self._grid(table), value_range(table, value)
        with self.widget.batch_update():
            for index, kind in enumerate(self.axes.kinds):
                cells, *marks = self.widget.data[_TRACES * index : _TRACES * (index + 1)]
                cells.z = grid.numbers(kind, value)
                cells.text = cell_texts(grid, kind, value, shown)
                cells.customdata = grid.each(kind, hover_text, NO_CELL)
                marked = grid.marked(kind, lambda row: mark_of(row, value))
                for trace in marks:
                    trace.x = [axis_label(x) for _, x in marked[trace.name]]
                    trace.y = [axis_label(y) for y, _ in marked[trace.name]]
            scale = self.widget.layout.coloraxis
            scale.cmin, scale.cmax = shown
            scale.colorbar.title.text = value
        there = {trace.name for trace in self.widget.data if trace.name in MARKS and trace.x}
        self.marks = tuple(name for name in MARKS if name in there)
        _keep(self.widget)

    def mark(self, selection: Cell | None) -> None:
        """Outline the selected cell."""
        self.widget.layout.shapes = () if selection is None else (self._outline(selection),)
        _keep(self.widget, data=False)

    def _outline(self, selection: Cell) -> dict[str, Any]:
        panel = self.axes.kinds.index(selection.kind)
        axis = "" if panel == 0 else str(panel + 1)
        column = self.axes.alphas.index(selection.alpha)
        row = self.axes.layers.index(selection.source_layer)
        return {
            "type": "rect", "line": {"color": MARKED, "width": 3},
            "xref": f"x{axis}", "x0": column - 0.5, "x1": column + 0.5,
            "yref": f"y{axis}", "y0": row - 0.5, "y1": row + 0.5,
        }  # fmt: skip

    def _grid(self, table: pd.DataFrame) -> Grid:
        """Lay out some rows on the axes of the whole sweep."""
        kinds, layers, alphas = self.axes.kinds, self.axes.layers, self.axes.alphas
        return Grid.of(table, x="alpha", panel="kind", panels=kinds, ys=layers, xs=alphas)

    def _lay_out(self) -> None:
        figure = self.widget
        figure.update_traces(textfont={"size": 10}, selector={"type": "heatmap"})
        for name in MARKS:
            size = 5 if name == "not computed" else 8  # most cells, while a sweep runs
            figure.update_traces(
                marker={"color": GREY, "line_color": GREY, "size": size}, showlegend=False,
                hoverinfo="skip", hovertemplate=None, selector={"name": name},
            )  # fmt: skip
        for update, names in ((figure.update_xaxes, self._x), (figure.update_yaxes, self._y)):
            update(categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
        figure.update_annotations(font_size=13)  # the panels' titles
        _plain(figure, height=min(720, 130 + 22 * max(6, len(self._y))))
        figure.update_layout(
            title=None, width=None, margin={"l": 46, "r": 10, "t": 28, "b": 42},
            coloraxis_colorbar={"title": {"text": "score"}, "thickness": 10, "x": 1.01},
        )  # fmt: skip

    def _clicked(self, kind: str, trace: Any, points: Any, state: Any) -> None:
        """Report a click; plotly gives the trace's own x and y."""
        if points.xs and points.ys:
            column, row = self._x.index(str(points.xs[0])), self._y.index(str(points.ys[0]))
            self._on_click(kind, self.axes.layers[row], self.axes.alphas[column])


class LiveCurve:
    """A plotly `widget` of what one site scores, or recovers, against α."""

    def __init__(self) -> None:
        line, marker = {"color": GREY, "width": 2}, {"size": 8, "color": GREY}
        self.widget = SharedFigureWidget(go.Scatter(mode="lines+markers", line=line, marker=marker))
        _plain(self.widget, height=150)
        self.widget.update_layout(margin={"l": 40, "r": 8, "t": 8, "b": 36}, xaxis_title_text="α")
        _keep(self.widget)

    def draw(
        self, alphas: Sequence[float], numbers: Sequence[float], selected: float, shades: Shades
    ) -> None:
        """Show a site's numbers; the selected α has the colour of the map's outline.

        The axis spans at least what the colours do: a flat line should look flat.
        """
        with self.widget.batch_update():
            line, axis = self.widget.data[0], self.widget.layout.yaxis
            line.x = list(alphas)
            line.y = [float(number) if math.isfinite(number) else None for number in numbers]
            line.hovertemplate = f"α = %{{x}}<br>{shades.column} %{{y:.3f}}<extra></extra>"
            line.marker.color = [MARKED if alpha == selected else GREY for alpha in alphas]
            there = [shades.low, shades.high, *filter(math.isfinite, numbers)]
            room = 0.05 * (max(there) - min(there))
            axis.title.text, axis.range = shades.column, [min(there) - room, max(there) + room]
        _keep(self.widget)


def _keep(figure: Any, *, data: bool = True) -> None:
    """Make a reloaded page show the figure as it is now, or its layout alone."""
    with figure.hold_sync():
        figure._widget_layout = deepcopy(figure._layout_obj._props)
        if data:
            figure._widget_data = deepcopy(figure._data)


def _plain(figure: Any, *, height: int) -> None:
    figure.update_layout(
        template="plotly_white", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12}, height=height, autosize=True, dragmode=False, uirevision="keep",
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#1f2328"}, "align": "left"},
    )  # fmt: skip
    figure.update_xaxes(fixedrange=True, showgrid=False, zeroline=False)
    figure.update_yaxes(fixedrange=True, showgrid=False, zeroline=False)
    figure._config = {**figure._config, "displayModeBar": False, "responsive": True}
