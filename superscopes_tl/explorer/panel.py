"""The map and the selected cell of the Explorer: what is drawn when a result or a choice changes.

1. `open` lays out an empty map for the axes of a sweep; `draw` fills in a result.
2. The colours stand for one column, "recovered" or "score": the former where it is defined, until
   the reader chooses. Map, curve, ladder and chips all show it.
3. A click, or one of the cursors, chooses a cell; `select` brings map, cursors and panel in line.
4. What only the model can say of the cell (`details.probe`) is asked for in a thread; an answer
   that comes after the choice has changed is kept, not shown.
"""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import Cell, Reading, SweepPlan, SweepResult
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.background import Latest
from superscopes_tl.explorer.cell import Probe, code_for, ladder, probe, reading_at
from superscopes_tl.explorer.live_map import Axes, LiveCurve, LiveMap, axis_label, keep
from superscopes_tl.explorer.view import BEST, View
from superscopes_tl.figures import Shades, usual_value
from superscopes_tl.neighbours import LENSES, Lens


class Guard:
    """Wraps callbacks: one at a time, and an exception becomes a message that can be read.

    Attributes:
        lock: shared by callbacks and threads, because notebook kernels mix their threads.
        run: the number of the latest run, for scripts that wait on the message.

    Args:
        status: the widget for the message.
    """

    def __init__(self, status: Any) -> None:
        self.lock = threading.RLock()
        self.run = 0
        self._status = status

    def __call__(self, action: Callable[[], object]) -> Callable[..., None]:
        """Return a callback that does `action`, whatever arguments it is called with."""

        def callback(*_: object) -> None:
            try:
                with self.lock:
                    action()
            except Exception as error:  # noqa: BLE001  # a notebook shows no callback's exception
                self.show(error)

        return callback

    def show(self, error: Exception) -> None:
        """Show why something failed."""
        self._status.value = markup.alert(error, run=self.run)


class Panel:
    """Shows a result and one cell of it.

    Attributes:
        result: the sweep as far as it is; `None` before the first.
        axes: what its cells range over.
        selection: the chosen cell.
        plan: what computed it; `None` for a saved result, whose cells cannot be probed.
        over: whether the run has ended, so that what the result says of itself can be shown.

    Args:
        view: the widgets.
        guard: wraps the callbacks.
        lenses: what else the selected cell's site is read by.
    """

    def __init__(self, view: View, guard: Guard, lenses: Mapping[str, Lens] = LENSES) -> None:
        self.result: SweepResult | None = None
        self.axes: Axes | None = None
        self.selection: Cell | None = None
        self.plan: SweepPlan | None = None
        self.over = False
        self._chosen_colour = False
        self._view, self._guard, self._lenses = view, guard, lenses
        self._map: LiveMap | None = None
        self._curve = LiveCurve()
        self._quiet = False
        self._drawn: tuple[Any, Any] = (None, None)
        self._probes: dict[Cell, Probe] = {}
        self._prober = Latest()
        for cursor in (view.kind, view.layer, view.alpha, view.position, view.into):
            cursor.observe(guard(self._moved), "value")
        for choice in (view.show, view.best_alpha):
            choice.observe(guard(self._show), "value")
        view.colour.observe(guard(self._recolour), "value")
        self._show_cell()
        self._show()

    def open(self, result: SweepResult, axes: Axes, plan: SweepPlan | None) -> None:
        """Lay out the map of a sweep that is about to be shown."""
        self.result, self.axes, self.plan, self.selection = result, axes, plan, None
        self._probes, self.over = {}, False
        view = self._view
        view.findings.value = ""
        self._quiet = True
        try:
            view.kind.options = axes.kinds
            view.layer.options = [(str(layer), layer) for layer in axes.layers]
            view.alpha.options = [(axis_label(alpha), alpha) for alpha in axes.alphas]
            view.position.options = [(self._token(p), p) for p in axes.positions]
            view.into.options = [
                ("same layer" if t == "same" else f"layer {t}", t) for t in axes.targets
            ]
            view.position.value = axes.positions[-1]
            view.best_alpha.options = [
                (BEST, BEST),
                *((axis_label(alpha), alpha) for alpha in axes.alphas),
            ]
            view.position.layout.display = "" if len(axes.positions) > 1 else "none"
            view.into.layout.display = "" if len(axes.targets) > 1 else "none"
        finally:
            self._quiet = False
        old, self._map = self._map, LiveMap(axes, self._clicked)
        self._show_cell()
        self.draw(result)
        self._show()
        if old is not None:
            old.widget.close()

    def draw(self, result: SweepResult) -> None:
        """Show what is finished."""
        self.result = result
        if self._map is not None:
            view = self._view
            self._drawn = (view.position.value, view.into.value)
            self._choose_colour()
            self._map.draw(result.table, *self._drawn, view.colour.value)
            self._map.mark(self.selection)
            keep(self._map.widget)
            view.caption.value = markup.caption(
                result, self._token(view.position.value), view.into.value, self._map.marks
            )
        if self.over:
            self._say_findings()
        if self._view.show.value != "all":
            self._show()

    def finish(self, result: SweepResult) -> None:
        """Show the result of a run that has ended, and what it says of itself."""
        self.over = True
        self.draw(result)

    @property
    def shades(self) -> Shades:
        """What the colours stand for."""
        column = self._view.colour.value
        return Shades(column) if self.result is None else Shades.of(self.result.table, column)

    def select(self, selection: Cell) -> None:
        """Choose a cell.

        Raises:
            ValueError: the sweep does not have it.
        """
        axes = self.axes
        found = None
        if axes is not None:
            found = next((t for t in axes.targets if self._leads_to(selection, t)), None)
        if (
            axes is None
            or found is None
            or selection.kind not in axes.kinds
            or selection.source_layer not in axes.layers
            or selection.alpha not in axes.alphas
            or selection.position not in axes.positions
        ):
            raise bad_value("selection", f"a cell of {axes}", selection, "choose one of these")
        view = self._view
        self._quiet = True
        try:
            view.kind.value = selection.kind
            view.layer.value = selection.source_layer
            view.alpha.value = selection.alpha
            view.position.value = selection.position
            view.into.value = found
        finally:
            self._quiet = False
        self.selection = selection
        if self._drawn != (selection.position, found) and self.result is not None:
            self.draw(self.result)
        elif self._map is not None:
            self._map.mark(selection)
            keep(self._map.widget, data=False)
        self._show_cell()
        if view.show.value == "parts":
            self._show()

    def select_best(self) -> None:
        """Choose the best cell by the shown column."""
        if self.result is not None and not self.result.table.empty:
            by = self._view.colour.value
            best = self.result.best(by=by).sort_values(by, ascending=False, na_position="last")
            self.select(Cell.of(best.iloc[0]))

    def refresh(self, readings: Sequence[Reading]) -> None:
        """Show the chosen cell anew if it is among newly finished ones."""
        if any(Cell.of(reading) == self.selection for reading in readings):
            self._show_cell()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the selected cell has been probed."""
        return self._prober.wait(timeout)

    def probed(self) -> Probe | None:
        """Return what the model said of the selected cell, once it has."""
        return self._probes.get(self.selection) if self.selection else None

    @staticmethod
    def _leads_to(selection: Cell, target: int | str) -> bool:
        into = selection.source_layer if target == "same" else target
        return selection.target_layer == into

    def _token(self, position: int) -> str:
        """Return the token at a position, as the tokenizer saw it."""
        if self.result is None:
            return str(position)
        labels = self.result.provenance.get("tokens", {}).get("labels", [])
        return str(labels[position]) if position < len(labels) else str(position)

    def _clicked(self, kind: str, layer: int, alpha: float) -> None:
        self._guard(lambda: self._choose(kind, layer, alpha))()

    def _moved(self) -> None:
        if not self._quiet and self.axes is not None:
            view = self._view
            self._choose(view.kind.value, view.layer.value, view.alpha.value)

    def _choose(self, kind: str, layer: int, alpha: float) -> None:
        if self.axes is not None:
            view = self._view
            into = view.into.value
            self.select(self.axes.selection(kind, layer, alpha, view.position.value, into))

    def _choose_colour(self) -> None:
        """Colour by what is defined for the shown rows, unless the reader has chosen."""
        shown = self._shown_rows()
        if not self._chosen_colour and len(shown):
            self._quiet = True
            try:
                self._view.colour.value = usual_value(shown)
            finally:
                self._quiet = False

    def _recolour(self) -> None:
        """Show the column that the reader chose, everywhere."""
        if self._quiet:
            return
        self._chosen_colour = True
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

    def _say_findings(self) -> None:
        """Show the contextualization layer of the shown token, and what is doubtful."""
        result, (position, into) = self.result, self._drawn
        if result is None:
            return
        layer = ""
        if not self._shown_rows().empty:
            target = None if into == "same" else into
            with contextlib.suppress(ValueError):  # no block outputs at α = 1, or no number of them
                found = result.contextualization_layer(position=position, target_layer=target)
                layer = str(found)
        self._view.findings.value = markup.findings(layer, result.caveats)

    def _show(self) -> None:
        """Put on the stage what the reader asked for."""
        view, result = self._view, self.result
        if result is None or self._map is None:
            view.stage.children = (widgets.HTML(markup.note("No sweep yet. Press Run.")),)
        elif view.show.value == "all":
            view.stage.children = (self._map.widget,)
        elif view.show.value == "best":
            view.stage.children = (view.best_alpha, widgets.HTML(self._best(result)))
        elif self.selection is None:
            view.stage.children = (widgets.HTML(markup.note("Choose a cell first.")),)
        else:
            view.stage.children = (widgets.HTML(markup.parts(result, self.selection, self.shades)),)

    def _best(self, result: SweepResult) -> str:
        view, table = self._view, result.table
        alpha = None if view.best_alpha.value == BEST else view.best_alpha.value
        position, into = view.position.value, view.into.value
        here = table[table["position"] == position]
        if into != "same":
            here = here[here["target_layer"] == into]
        if here.empty or (alpha is not None and alpha not in set(here["alpha"])):
            return markup.note("Nothing finished here yet.")
        return markup.best(
            result,
            self.shades,
            alpha=alpha,
            position=position,
            target_layer=None if into == "same" else into,
        )

    def _show_cell(self) -> None:
        view, selection = self._view, self.selection
        reading = None
        if selection is not None and self.result is not None:
            reading = reading_at(self.result, selection)
        shades = self.shades
        view.detail.value = markup.detail(reading, selection, shades)
        view.pin.disabled = reading is None
        view.ladder.value = view.copy.text = view.code.value = view.probe.value = ""
        if reading is None:
            view.curve.children = ()
        if reading is None or selection is None or self.result is None:
            return
        rows = ladder(self.result, selection)
        numbers = rows[shades.column].tolist()
        self._curve.draw(rows["alpha"].tolist(), numbers, selection.alpha, shades)
        view.curve.children = (
            self._curve.widget,
        )  # now: plotly measures the room when it is shown
        view.ladder.value = markup.ladder(rows, selection.alpha, shades)
        code = code_for(self.result, selection, self.plan)
        view.copy.text = code
        view.code.value = (
            f"<details><summary>the code</summary><pre>{html.escape(code)}</pre></details>"
        )
        if self.plan is None:
            view.probe.value = markup.note("Opened without a model: no controls, no token effects.")
        elif selection in self._probes:
            view.probe.value = markup.probe(self._probes[selection], shades)
        else:
            view.probe.value = markup.note("Comparing with controls …")
            self._ask(self.plan, selection)

    def _ask(self, plan: SweepPlan, selection: Cell) -> None:
        """Probe the cell in a thread and show the answer if it is still wanted."""
        reading = reading_at(self.result, selection) if self.result is not None else None
        if reading is None or self.result is None:
            return

        def work() -> None:
            found, failed = None, ""
            try:
                found = probe(plan, reading, self._lenses)
            except Exception as error:  # noqa: BLE001  # a thread has nobody to raise to
                failed = markup.alert(error)
            with self._guard.lock:
                if plan is not self.plan:
                    return
                if found is not None:
                    self._probes[selection] = found
                if selection == self.selection:
                    shown = failed if found is None else markup.probe(found, self.shades)
                    self._view.probe.value = shown

        self._prober.submit(work)
