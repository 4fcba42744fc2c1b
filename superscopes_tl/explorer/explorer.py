"""The Explorer: set up, run, watch and read a sweep inside a notebook.

1. The controls show a `SweepConfig` (`explorer.config`); Run hands it to a `BackgroundSweep`.
2. Batches come back under one lock, which every callback takes too; the map fills in.
3. A chosen cell (`explorer.selection`) is shown with its text, its site's other α, controls, and
   the code that reads it again (`explorer.code`).
4. What the buttons do are methods: `run`, `cancel`, `select`, `pin`, `export`. A bad setting
   raises from a method and is shown as a message after a click; a run that fails says why and
   leaves everything usable.

A saved notebook keeps a plain picture in the next output, for readers without JavaScript; a live
Explorer hides it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation import Readability
from superscopes_tl.experiment import Cell, Reading, SweepConfig, SweepResult, check_config
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.background import wait_for_all
from superscopes_tl.explorer.cell import code_for, reading_at
from superscopes_tl.explorer.desk import Desk
from superscopes_tl.explorer.live_map import axes_of
from superscopes_tl.explorer.panel import Guard, Panel
from superscopes_tl.explorer.view import View
from superscopes_tl.figures import heatmap_png, save_as
from superscopes_tl.model import DEFAULT_MODEL, LanguageModel, load_model
from superscopes_tl.neighbours import LENSES, Lens
from superscopes_tl.scores import PAPER_SCORER, Scorer

LARGEST_LINK = 8 * 2**20
"""A file up to this size is also offered as a download; a larger one is on the server's disk."""


class Explorer:
    """Sweeps of one model, or one saved sweep, to look at and to steer.

    Show it as the last line of a notebook cell. Everything the interface does can be done in
    Python with the attributes and methods below.

    Example:
        >>> explorer = Explorer("smollm2", "Pink Floyd", layers=range(0, 30, 3))  # doctest: +SKIP
        >>> explorer.run().wait()  # doctest: +SKIP
        >>> explorer.select(kind="mlp_out", layer=3, alpha=9)  # doctest: +SKIP

    Attributes:
        model: the model; `None` for a saved result.
        view: the widgets.
        pins: the pinned cells, as `(selection, reading, token)`.

    Args:
        model: from `load_model`, or anything that it takes; the model of `load_model()` unless
            given.
        prompt: the source prompt to begin with.
        config: the settings to begin with; or give them one by one as keyword arguments.
        scorers: more scorers to choose from, by label.
        lenses: what else a cell's site is read by, such as `{**LENSES, "tuned lens": tuned}`.
        **settings: the fields of `SweepConfig`.

    Raises:
        ValueError, TypeError: a bad setting, or one that the controls cannot show.
    """

    def __init__(
        self,
        model: LanguageModel | Any = DEFAULT_MODEL,
        prompt: str = "Red Hot Chili Peppers",
        config: SweepConfig | None = None,
        *,
        scorers: Mapping[str, Scorer] | None = None,
        lenses: Mapping[str, Lens] = LENSES,
        **settings: Any,
    ) -> None:
        if settings:  # a bad one should not cost a load
            config = check_config(config, settings)
        loaded = load_model(model)
        self.model: LanguageModel | None = loaded
        chat = bool(getattr(loaded.tokenizer, "chat_template", None))
        labels = {"MiniLM (paper)": PAPER_SCORER, **(scorers or {})}
        self._set_up(View(loaded.kinds, loaded.n_layers, labels, chat=chat), lenses)
        self._desk = Desk(loaded, self.view, self._panel, self._guard, self._show_picture)
        self.prompt = prompt
        self.config = config or SweepConfig()

    @classmethod
    def from_result(cls, result: SweepResult) -> Self:
        """Return an Explorer of a saved result; no model is needed, and none can be run.

        Raises:
            ValueError: the result has no cell.
        """
        table = result.table
        if table.empty:
            raise bad_value("result", "at least one cell", "an empty table", "run a sweep")
        self = cls.__new__(cls)
        self.model = None
        self._set_up(View([], 1, {"MiniLM (paper)": PAPER_SCORER}))
        self.view.source.layout.display = "none"
        self.view.run.disabled = True
        self.view.status.value = markup.status(
            "Opened without a model: look, compare, export.", state="saved", run=0
        )
        self._panel.open(result, axes_of(result), None)
        self._panel.finish(result)
        self._panel.select_best()
        return self

    # What the interface shows, as data.

    @property
    def prompt(self) -> str:
        """The source prompt."""
        return self._at_desk().prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        self._at_desk().set_prompt(text)

    @property
    def config(self) -> SweepConfig:
        """The settings that the controls show."""
        return self._at_desk().config

    @config.setter
    def config(self, config: SweepConfig) -> None:
        self._at_desk().set_config(config)

    @property
    def result(self) -> SweepResult | None:
        """The finished cells of the latest run."""
        return self._panel.result

    @property
    def selection(self) -> Cell | None:
        """The chosen cell."""
        return self._panel.selection

    @property
    def code(self) -> str:
        """Python that reads the chosen cell again; empty if none is chosen."""
        if self.selection is None or self.result is None:
            return ""
        return code_for(self.result, self.selection, self._panel.plan)

    @property
    def state(self) -> str:
        """One of idle, finding, running, done, cancelled, failed; saved for a saved result."""
        return "saved" if self._desk is None else self._desk.state

    @property
    def error(self) -> Exception | None:
        """Why the latest run failed."""
        return None if self._desk is None else self._desk.error

    # What the interface does, as methods.

    def run(self) -> Self:
        """Start the sweep in the background; finished cells of earlier runs are reused.

        Raises:
            ValueError: a bad setting, or a run that has not ended.
        """
        self._at_desk().run()
        return self

    def find(self) -> Self:
        """Find out in the background how the model is read best, and set the controls to that.

        The answer is kept per model in the cache folder; `check` has it, too.

        Raises:
            ValueError: a run or another search is under way.
        """
        self._at_desk().find()
        return self

    @property
    def check(self) -> Readability | None:
        """What `find` found."""
        return None if self._desk is None else self._desk.check

    def cancel(self) -> None:
        """Stop the run after the batch that is being computed; keep what is finished."""
        self._at_desk().cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the run and for the chosen cell's controls; return whether they have ended."""
        desk = [self._desk.wait] if self._desk is not None else []
        return wait_for_all([*desk, self._panel.wait], timeout)

    def select(self, **cell: Any) -> Cell:
        """Choose a cell; what is not given stays as it is.

        Args:
            **cell: kind, layer, alpha, position, target_layer.

        Raises:
            ValueError: the sweep does not have it.
        """
        with self._guard.lock:
            view, axes = self.view, self._panel.axes
            unknown = set(cell) - {"kind", "layer", "alpha", "position", "target_layer"}
            if axes is None or unknown:
                raise bad_value(
                    "select", "kind, layer, alpha, position or target_layer of a sweep",
                    cell, "run a sweep first" if axes is None else "correct the name",
                )  # fmt: skip
            chosen = axes.selection(
                cell.get("kind", view.kind.value),
                cell.get("layer", view.layer.value),
                float(cell.get("alpha", view.alpha.value)),
                cell.get("position", view.position.value),
                cell.get("target_layer", view.into.value),
            )
            self._panel.select(chosen)
        return chosen

    def pin(self) -> None:
        """Keep the chosen cell below the map, to compare it with others."""
        with self._guard.lock:
            if self.selection is None or self.result is None:
                return
            reading = reading_at(self.result, self.selection)
            if reading is not None:
                self.pins.append((self.selection, reading, reading.token))
                self._show_pins()

    def unpin(self) -> None:
        """Remove all pinned cells."""
        with self._guard.lock:
            self.pins.clear()
            self.view.pins.value = ""

    def _show_pins(self) -> None:
        self.view.pins.value = markup.pins(self.pins, self._panel.shades)

    def export(self, path: str | Path) -> Path:
        """Write the result as `.html`, `.png`, `.csv`, `.parquet` or `.zip` (see `save_as`).

        Raises:
            ValueError: another suffix, no such folder, or nothing to write.
        """
        with self._guard.lock:
            into, result = self.view.into.value, self.result or SweepResult.from_readings([], {})
            layer = self.selection.source_layer if self.selection else None
            at = self.view.position.value if self._panel.axes else None
            column = self.view.colour.value
        target = into if isinstance(into, int) else None
        return save_as(result, path, position=at, target_layer=target, layer=layer, value=column)

    # How it works.

    _desk: Desk | None

    def _set_up(self, view: View, lenses: Mapping[str, Lens] = LENSES) -> None:
        self.view = view
        self.pins: list[tuple[Cell, Reading, str]] = []
        self._guard = Guard(view.status)
        self._panel = Panel(view, self._guard, lenses)
        self._desk = None
        self._picture: Any = None
        view.colour.observe(self._guard(self._show_pins), "value")
        for button, action in (
            (view.pin, self.pin),
            (view.unpin, self.unpin),
            (view.save, self._save),
        ):
            button.on_click(self._guard(action))

    def _at_desk(self) -> Desk:
        if self._desk is None:
            raise bad_value(
                "explorer", "an Explorer with a model", "a saved result",
                "Explorer(model)",
            )  # fmt: skip
        return self._desk

    def _save(self) -> None:
        """Write into the working folder, say where, and offer a download if it is not too large."""
        view = self.view
        name = view.file.value.strip() or "superscopes"
        name = name.removesuffix(view.format.value) + view.format.value
        if name != Path(name).name:  # whoever sees a served page must not write anywhere
            raise bad_value(
                "file name", "a name without folders", name,
                "give a name alone; explorer.export(path) takes any path",
            )  # fmt: skip
        path = self.export(name).resolve()
        link = ""
        if path.stat().st_size <= LARGEST_LINK:
            data = base64.b64encode(path.read_bytes()).decode()
            link = (
                f" · <a download='{html.escape(path.name, quote=True)}' "
                f"href='data:application/octet-stream;base64,{data}'>download</a>"
            )
        shown = html.escape(str(path))
        view.saved.value = f"<span role='status' data-saved='{shown}'>Saved {shown}{link}</span>"

    def _ipython_display_(self) -> None:
        """Show the widgets, and in an output of its own the picture that needs no JavaScript."""
        from IPython.display import display

        show: Any = display

        bundle = self.view.root._repr_mimebundle_()
        show({**bundle, "text/plain": repr(self)}, raw=True)
        self._picture = show({"text/plain": "No sweep yet."}, raw=True, display_id=True)
        if self.result is not None:
            self._show_picture()

    def _show_picture(self) -> None:
        """Bring the picture of a saved notebook up to date."""
        if self._picture is None or self.result is None or self.result.table.empty:
            return
        into = self.view.into.value
        picture = heatmap_png(
            self.result,
            position=self.view.position.value,
            target_layer=into if isinstance(into, int) else None,
            value=self.view.colour.value,
        )
        bundle = {"text/plain": repr(self), "image/png": base64.b64encode(picture).decode()}
        self._picture.update(bundle, raw=True)

    def __repr__(self) -> str:
        what = self.model if self.model is not None else self.result
        return f"Explorer of {what!r}: {self.state}"
