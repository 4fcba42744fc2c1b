"""The map and the selected cell of the Explorer: redrawn when a result or a choice changes.

1. `open` lays out an empty map for the axes of a sweep; `draw` fills in a result.
2. The colours stand for one column, "recovered" or "score": the former where it is defined, until
   the reader chooses. Map, curve, ladder and chips all show it.
3. A click, or one of the cursors, selects a cell; `select` brings map, cursors and panel in line.
4. What takes the model to know about the cell is computed in a thread: its text, where the reader
   has selected a cell without one, then its controls (`cell.probe`). An answer that comes after the
   selection has changed is kept, not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ipywidgets as widgets
import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import Cell, Reading, SweepPlan, SweepResult
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.background import Latest
from superscopes_tl.explorer.cell import Probe, code_for, ladder, probe, reading_at
from superscopes_tl.explorer.live_map import Axes, LiveCurve, LiveMap
from superscopes_tl.explorer.view import BEST, View
from superscopes_tl.figures import Shades, axis_label, usual_value
from superscopes_tl.model import layer_name
from superscopes_tl.neighbours import LENSES, Lens


class Panel:
    """Shows a result and one cell of it.

    Attributes:
        result: the sweep as far as it is; `None` before the first.
        axes: what its cells range over.
        selection: the selected cell.
        plan: what computed it; `None` for a saved result, whose cells cannot be probed.
        write: generates the text of one cell of the plan.

    Args:
        view: the widgets.
        lenses: what else the selected cell's site is read by.
    """

    def __init__(self, view: View, lenses: Mapping[str, Lens] = LENSES) -> None:
        self.result: SweepResult | None = None
        self.axes: Axes | None = None
        self.selection: Cell | None = None
        self.plan: SweepPlan | None = None
        self.write: Callable[[Cell], None] | None = None
        self._view, self._lenses = view, lenses
        self._map: LiveMap | None = None
        self._curve = LiveCurve()
        self._finished = False  # whether what the result says of itself can be shown
        self._colour_chosen = False
        self._drawn: tuple[Any, Any] = (None, None)  # the token and target of the map
        self._wanted: Cell | None = None  # the cell that the reader selected
        self._probes: dict[Cell, Probe] = {}
        self._prober = Latest()
        view.on_change(self._moved, *view.cursors)
        view.on_change(self._show, view.show, view.best_alpha)
        view.on_change(self._recolour, view.colour)
        self._show_cell()
        self._show()

    def prepare(self, axes: Axes) -> None:
        """Make the map of a sweep before it is run: it takes part of a second."""
        if self.result is None and (old := self._make_map(axes)) is not None:
            old.widget.close()

    def open(
        self,
        result: SweepResult,
        axes: Axes,
        plan: SweepPlan | None,
        write: Callable[[Cell], None] | None = None,
    ) -> None:
        """Lay out the map of a sweep that is about to be shown."""
        self._prober.cancel()
        self.result, self.axes, self.plan, self.selection = result, axes, plan, None
        self.write, self._wanted = write, None
        self._probes, self._finished = {}, False
        view = self._view
        view.findings.value = ""
        alphas = [(axis_label(alpha), alpha) for alpha in axes.alphas]
        with self._view.quietly():
            view.kind.options = axes.kinds
            view.layer.options = [(str(layer), layer) for layer in axes.layers]
            view.alpha.options = alphas
            view.position.options = [(self._token(p), p) for p in axes.positions]
            view.into.options = [
                ("source layer" if t == "same" else f"layer {layer_name(int(t))}", t)
                for t in axes.targets
            ]
            view.position.value = axes.positions[-1]
            view.best_alpha.options = [(BEST, BEST), *alphas]
            view.position.layout.display = "" if len(axes.positions) > 1 else "none"
            view.into.layout.display = "" if len(axes.targets) > 1 else "none"
        old = self._make_map(axes)
        self._show_cell()
        self.draw(result)
        self._show()
        if old is not None:
            old.widget.close()

    def _make_map(self, axes: Axes) -> LiveMap | None:
        """Make a map, unless that of the same axes is there; return the one that it replaces."""
        old, view = self._map, self._view
        if old is not None and old.axes == axes:
            return None
        self._map = LiveMap(axes, lambda *place: view.guarded(self._choose, *place)())
        return old

    def draw(self, result: SweepResult) -> None:
        """Show what is finished."""
        self.result = result
        if self._map is not None:
            view = self._view
            self._drawn = (view.position.value, view.into.value)
            self._choose_colour()
            self._map.draw(result.table, *self._drawn, view.colour.value)
            self._map.mark(self.selection)
            view.caption.value = markup.caption(
                result, self._token(view.position.value), view.into.value, self._map.marks
            )
        if self._finished:
            self._show_findings()
        if self._view.show.value != "all":
            self._show()

    def finish(self, result: SweepResult) -> None:
        """Show the result of a run that has ended, and what it says of itself."""
        self._finished = True
        self.draw(result)
        if self.selection is None:
            self.select_best()

    @property
    def shades(self) -> Shades:
        """What the colours stand for."""
        column = self._view.colour.value
        return Shades(column) if self.result is None else Shades.of(self.result.table, column)

    def select(self, cell: Cell) -> None:
        """Select a cell of the sweep, as a reader does: it gets a text if it has none."""
        self._wanted = cell
        self._select(cell)

    def _select(self, cell: Cell) -> None:
        if self.axes is None or not self.axes.have(cell):
            raise bad_value("selection", f"a cell of {self.axes}", cell, "choose one of these")
        view, target = self._view, self.axes.target_of(cell)
        shown = (cell.kind, cell.source_layer, cell.alpha, cell.position, target)
        with view.quietly():
            for cursor, value in zip(view.cursors, shown, strict=True):
                cursor.value = value
        self.selection = cell
        if self._drawn != (cell.position, target) and self.result is not None:
            self.draw(self.result)
        elif self._map is not None:
            self._map.mark(cell)
        self._show_cell()
        if view.show.value == "parts":
            self._show()

    def select_best(self) -> None:
        """Select the best cell by the shown column."""
        if self.result is not None and not self.result.table.empty:
            by = self._view.colour.value
            best = self.result.best(by=by).sort_values(by, ascending=False, na_position="last")
            self._select(Cell.of(best.iloc[0]))

    def refresh(self, readings: Sequence[Reading]) -> None:
        """Show the selected cell again if it is among newly finished ones."""
        if any(Cell.of(reading) == self.selection for reading in readings):
            self._show_cell()

    def reading(self) -> Reading | None:
        """Return the reading of the selected cell, once it is computed."""
        if self.result is None or self.selection is None:
            return None
        return reading_at(self.result, self.selection)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the selected cell has been probed."""
        return self._prober.wait(timeout)

    def _token(self, position: int) -> str:
        """Return the token at a position, as the tokenizer saw it."""
        provenance = {} if self.result is None else self.result.provenance
        labels = provenance.get("tokens", {}).get("labels", [])
        return str(labels[position] if position < len(labels) else position)

    def _moved(self) -> None:
        view = self._view
        self._choose(view.kind.value, view.layer.value, view.alpha.value)

    def _choose(self, kind: str, layer: int, alpha: float) -> None:
        if self.axes is not None:
            view = self._view
            self.select(self.axes.cell(kind, layer, alpha, view.position.value, view.into.value))

    def _choose_colour(self) -> None:
        """Colour by what is defined for the shown rows, unless the reader has chosen."""
        shown = self._shown_rows()
        if not self._colour_chosen and len(shown):
            with self._view.quietly():
                self._view.colour.value = usual_value(shown)

    def _recolour(self) -> None:
        """Show the column that the reader chose, everywhere."""
        self._colour_chosen = True
        if self.result is not None:
            self.draw(self.result)
        self._show_cell()

    def _shown_rows(self) -> pd.DataFrame:
        """Return the rows of the token and target that the map shows."""
        if self.result is None:
            return pd.DataFrame()
        table, (position, into) = self.result.table, self._drawn
        rows: pd.DataFrame = table[table["position"] == position]
        return rows if into == "same" else rows[rows["target_layer"] == into]

    def _show_findings(self) -> None:
        """Show the contextualization layer of the shown token, and the result's caveats."""
        result, (position, into) = self.result, self._drawn
        if result is None:
            return
        layer, target = "", None if into == "same" else into
        if not self._shown_rows().empty:
            with contextlib.suppress(ValueError):  # no block outputs at α = 1, or no number of them
                layer = str(result.contextualization_layer(position=position, target_layer=target))
        self._view.findings.value = markup.render("findings", layer, result.caveats)

    def _show(self) -> None:
        """Show the view that the reader chose."""
        view, result = self._view, self.result
        if result is None or self._map is None:
            shown = [widgets.HTML(markup.note("No sweep yet. Press Run."))]
        elif view.show.value == "all":
            shown = [self._map.widget]
        elif view.show.value == "best":
            shown = [view.best_alpha, widgets.HTML(self._best(result))]
        elif self.selection is None:
            shown = [widgets.HTML(markup.note("Select a cell first."))]
        else:
            shown = [widgets.HTML(markup.parts(result, self.selection, self.shades))]
        view.stage.children = shown

    def _best(self, result: SweepResult) -> str:
        view, rows = self._view, self._shown_rows()
        alpha = None if view.best_alpha.value == BEST else view.best_alpha.value
        if rows.empty or (alpha is not None and alpha not in set(rows["alpha"])):
            return markup.note("Nothing finished here yet.")
        position, into = self._drawn
        shown = result.at(position=position, target_layer="all" if into == "same" else into)
        return markup.best(shown, self.shades, alpha)

    def _show_cell(self) -> None:
        view, cell, reading = self._view, self.selection, self.reading()
        shades = self.shades
        view.detail.value = markup.detail(reading, cell, shades)
        view.pin.disabled = reading is None
        view.ladder.value = view.copy.text = view.code.value = view.probe.value = ""
        self._ask(cell, reading)
        if reading is None or cell is None or self.result is None:
            view.curve.children = ()
            return
        rows = ladder(self.result, cell)
        self._curve.draw(rows["alpha"].tolist(), rows[shades.column].tolist(), cell.alpha, shades)
        view.curve.children = [self._curve.widget]  # not before: plotly measures its room then
        view.ladder.value = markup.render("ladder", rows.to_dict("records"), cell.alpha, shades)
        view.copy.text = code_for(self.result, cell, self.plan)
        view.code.value = markup.render("code", view.copy.text)

    def _ask(self, cell: Cell | None, reading: Reading | None) -> None:
        """Show what only the model can tell about a cell, or begin to find it out."""
        view, plan, write = self._view, self.plan, self.write
        if cell is None:
            return
        if plan is None:
            text = "" if reading is None or reading.written else " no text,"
            view.probe.value = markup.note(
                f"Opened without a model:{text} no controls, no token effects."
            )
        elif write and cell == self._wanted and not (reading and reading.written):
            view.probe.value = markup.note("Generating its text …")
            self._in_thread(plan, cell, partial(write, cell))
        elif cell in self._probes:
            view.probe.value = markup.render("probe", self._probes[cell], self.shades)
        elif reading is not None:
            view.probe.value = markup.note("Comparing with controls …")
            self._in_thread(plan, cell, partial(self._probe, plan, cell, reading))

    def _probe(self, plan: SweepPlan, cell: Cell, reading: Reading) -> None:
        """Probe a cell, and show the answer if it is still wanted."""
        found = probe(plan, reading, self._lenses)
        with self._view.lock:
            if plan is self.plan:
                self._probes[cell] = found
                if cell == self.selection:
                    self._view.probe.value = markup.render("probe", found, self.shades)

    def _in_thread(self, plan: SweepPlan, cell: Cell, work: Callable[[], None]) -> None:
        """Do what takes the model to know about a cell; show its failure in its place."""

        def job() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # shown in its place
                with self._view.lock:
                    if plan is self.plan and cell == self.selection:
                        self._view.probe.value = markup.alert(error)

        self._prober.submit(job)
