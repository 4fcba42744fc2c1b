"""The Explorer: set up, run, watch and read a sweep inside a notebook.

1. `Settings` shows a `SweepConfig` in the controls. A change of a control checks it and says what
   a run would cost: cells, those that are finished already, and seconds, from a short warm-up,
   which also prepares what every run begins with: the model's own words and an empty map.
2. `run` freezes what the controls show and hands it to a `BackgroundSweep`; later changes are for
   the next run. Batches come back under the view's lock, which every callback takes too, and the
   `Panel` fills in its map: by default what every cell recovers, then the best text of each site.
3. A selected cell (`explorer.selection`) is shown with its text, which is generated at once where
   it is missing, its site's other α, controls, and the code that reads it again
   (`explorer.code`).
4. What the buttons do are methods: `run`, `cancel`, `find`, `select`, `pin`, `export`. A bad
   setting raises from a method and is shown as a message after a click; a run that fails says why
   and leaves everything usable.

A saved notebook keeps a line of advice and a plain picture in the next two outputs, for front ends
that show no widgets; a live Explorer hides them. marimo, which shows none of these outputs, asks
for `_mime_`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from superscopes_tl.engine import PatchedGenerator
from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation import Readability, kept_readability
from superscopes_tl.experiment import Cell, Reading, SweepConfig, SweepPlan, SweepResult
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.background import (
    TEXT_ROWS,
    BackgroundSweep,
    CellStore,
    Latest,
    cost,
    wait_for_all,
    watched_plan,
)
from superscopes_tl.explorer.live_map import Axes
from superscopes_tl.explorer.panel import Panel
from superscopes_tl.explorer.settings import Settings
from superscopes_tl.explorer.view import View
from superscopes_tl.figures import heatmap_png, save_as
from superscopes_tl.model import DEFAULT_MODEL, LanguageModel, check_text, load_model
from superscopes_tl.neighbours import LENSES, Lens
from superscopes_tl.scores import PAPER_SCORER, Scorer

NO_WIDGETS = (
    "No controls here? Then this front end cannot show the Explorer's widgets. In a terminal, "
    "superscopes app serves them as a page; here, explorer.run().wait() computes a map, and "
    'explorer.export("map.html") writes it as a page that opens anywhere.'
)
LARGEST_LINK = 8 * 2**20  # bytes of a file that is offered as a download, too


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
        pins: the pinned readings.
        check: what `find` found.

    Args:
        model: from `load_model`, or anything that it takes; defaults to that of `load_model()`.
        prompt: the source prompt to begin with.
        config: the settings to begin with; defaults to `SweepConfig(generate="best")`: the map of
            what is recovered, which takes the time of a few texts, then a text for each site.
        scorers: more scorers to choose from, by label.
        lenses: what else a cell's site is read by, such as `{**LENSES, "tuned lens": tuned}`.
        result: a saved result to show; it needs no model, and cannot run a sweep.
        **settings: fields of `SweepConfig` that change it.
    """

    def __init__(
        self,
        model: LanguageModel | Any = DEFAULT_MODEL,
        prompt: str = "Red Hot Chili Peppers",
        config: SweepConfig | None = None,
        *,
        scorers: Mapping[str, Scorer] | None = None,
        lenses: Mapping[str, Lens] = LENSES,
        result: SweepResult | None = None,
        **settings: Any,
    ) -> None:
        # A bad setting should not cost a load.
        config = SweepConfig.of(config or SweepConfig(generate="best"), settings)
        labels = {"MiniLM (paper)": PAPER_SCORER, **(scorers or {})}
        self.model: LanguageModel | None = None
        if result is None:
            self.model = loaded = load_model(model)
            chat = bool(getattr(loaded.tokenizer, "chat_template", None))
            self.view = View(loaded.kinds, loaded.n_layers, labels, chat=chat)
        else:
            self.view = View([], 1, labels)
        self.pins: list[Reading] = []
        self.check: Readability | None = None
        self._panel = Panel(self.view, lenses)
        self._settings: Settings | None = None
        self._sweep: BackgroundSweep | None = None
        self._store, self._estimator, self._finder = CellStore(), Latest(), Latest()
        self._finding = False
        self._seconds: dict[tuple[object, ...], float] = {}  # of a batch, by prompt and size
        self._generator: PatchedGenerator | None = None  # of the latest plan
        self._picture: Any = None
        view = self.view
        view.colour.observe(view.guarded(self._show_pins), "value")
        for button, action in (
            (view.run, self.run), (view.cancel, self.cancel), (view.find, self.find),
            (view.pin, self.pin), (view.unpin, self.unpin), (view.save, self._save),
        ):  # fmt: skip
            button.on_click(view.guarded(action))
        if result is not None:
            self._open_saved(result)
            return
        view.say("Ready", "idle")
        self._settings = Settings(view, loaded, self._changed)
        self.prompt = prompt
        self.config = config

    # What the interface shows, as data.

    @property
    def prompt(self) -> str:
        """The source prompt; its last token is selected when it is set."""
        return self._with_model().prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        with self.view.lock:
            self._with_model().prompt = text

    @property
    def config(self) -> SweepConfig:
        """The settings that the controls show."""
        return self._with_model().config

    @config.setter
    def config(self, config: SweepConfig) -> None:
        with self.view.lock:
            self._with_model().config = config

    @property
    def result(self) -> SweepResult | None:
        """The finished cells of the latest run."""
        return self._panel.result

    @property
    def selection(self) -> Cell | None:
        """The selected cell."""
        return self._panel.selection

    @property
    def code(self) -> str:
        """Python that reads the selected cell again; empty if none is selected."""
        return str(self.view.copy.text)

    @property
    def state(self) -> str:
        """One of idle, finding, running, done, cancelled, failed; saved for a saved result."""
        if self._settings is None:
            return "saved"
        if self._finding:
            return "finding"
        return self._sweep.state if self._sweep else "idle"

    @property
    def error(self) -> Exception | None:
        """Why the latest run failed."""
        return self._sweep.error if self._sweep else None

    # What the interface does, as methods.

    def run(self) -> Self:
        """Start the sweep in the background; finished cells of earlier runs are reused.

        Raises:
            ValueError: a bad setting, or a run or search is in progress.
        """
        with self.view.lock:
            model, prompt, config, view = self.model, self.prompt, self.config, self.view
            assert model is not None
            check_text(prompt, "prompt")
            self._begin("run", "Preparing", "running")
            self._estimator.cancel()
            view.cancel.disabled = False
            view.progress.value, view.progress.bar_style = 0, "info"
            self._sweep = BackgroundSweep(
                lambda: self._plan(model, prompt, config), store=self._store, lock=view.lock,
                on_plan=self._opened, on_batch=self._filled, on_end=view.guarded(self._ended),
                give_way=self._panel.wait,
            ).start()  # fmt: skip
        return self

    def cancel(self) -> None:
        """Stop the run after the current batch; keep what is finished."""
        with self.view.lock:  # else a run that ends meanwhile would be shown as stopping
            if self._sweep is not None and self.state == "running":
                self._sweep.cancel()
                self.view.say("Stopping after this batch", "running")

    def find(self) -> Self:
        """Find out in the background how the model is read best, and set the controls to that.

        The answer is cached per model in the cache folder; `check` has it, too.

        Raises:
            ValueError: a run or search is in progress.
        """
        with self.view.lock:
            self._with_model()
            self._begin("find", "Reading a dozen names in several ways", "finding")
            self._finding = True
            self._finder.submit(self._search)
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the run and the selected cell's text and controls; tell if they are there."""
        threads = [self._finder.wait, self._estimator.wait, self._panel.wait]
        if self._sweep is not None:
            threads.insert(0, self._sweep.wait)
        return wait_for_all(threads, timeout)

    def select(self, **cell: Any) -> Cell:
        """Select a cell; what is not given stays as it is.

        A cell without a text gets one at once, also during a run: `wait` waits for it.

        Args:
            **cell: kind, layer, alpha, position, target_layer.

        Raises:
            ValueError: the sweep does not have it.
        """
        with self.view.lock:
            axes, names = self._panel.axes, ("kind", "layer", "alpha", "position", "target_layer")
            if axes is None or set(cell) - set(names):
                raise bad_value(
                    "select", f"{', '.join(names)} of a sweep", cell,
                    "run a sweep first" if axes is None else "correct the name",
                )  # fmt: skip
            shown = {name: c.value for name, c in zip(names, self.view.cursors, strict=True)}
            chosen = axes.cell(*(shown | cell).values())
            self._panel.select(chosen)
        return chosen

    def pin(self) -> None:
        """Keep the selected cell below the map, to compare it with others."""
        with self.view.lock:
            reading = self._panel.reading()
            if reading is not None:
                self.pins.append(reading)
                self._show_pins()

    def unpin(self) -> None:
        """Remove all pinned cells."""
        with self.view.lock:
            self.pins.clear()
            self._show_pins()

    def export(self, path: str | Path) -> Path:
        """Write the result as `.html`, `.png`, `.csv`, `.parquet` or `.zip` (see `save_as`).

        Raises:
            ValueError: another suffix, no such folder, or nothing to write.
        """
        with self.view.lock:
            result = self.result or SweepResult.from_readings([], {})
            layer = self.selection.source_layer if self.selection else None
            shown = self._shown() if self._panel.axes else {}
        return save_as(result, path, layer=layer, **shown)

    # Settings, costs and runs.

    def _with_model(self) -> Settings:
        """Return the controls of the sweep, unless this is a saved result."""
        if self._settings is None:
            expected, fix = "an Explorer with a model", "Explorer(model)"
            raise bad_value("explorer", expected, "a saved result", fix)
        return self._settings

    def _open_saved(self, result: SweepResult) -> None:
        if result.table.empty:
            raise bad_value("result", "at least one cell", "an empty table", "run a sweep")
        view = self.view
        view.source.layout.display = "none"
        view.run.disabled = view.find.disabled = True
        view.say("Opened without a model: look, compare, export.", "saved")
        self._panel.open(result, Axes.of(result), None)
        self._panel.finish(result)

    def _busy(self) -> bool:
        return self.state in ("running", "finding")

    def _begin(self, what: str, text: str, state: str) -> None:
        """Begin a run or a search; only one at a time."""
        if self._busy():
            raise bad_value(what, "no run or search in progress", self.state, "cancel or wait")
        self.view.run_number += what == "run"
        self.view.run.disabled = self.view.find.disabled = True
        self.view.say(text, state)

    def _plan(self, model: LanguageModel, prompt: str, config: SweepConfig) -> SweepPlan:
        plan = watched_plan(model, prompt, config, self._generator)
        self._generator = plan.generator
        return plan

    def _changed(self, obsolete: bool) -> None:
        """Say what a run with the changed settings would cost, or what is wrong with them."""
        view, model = self.view, self.model
        if obsolete and not self._busy():
            view.say("Ready", "idle")
        assert model is not None
        try:
            plan = self._plan(model, self.prompt, self.config)
        except (ValueError, TypeError) as error:
            view.estimate.value = markup.note(str(error))
            return
        plan = replace(plan, finished=self._store.cells(plan))
        view.estimate.value = markup.note(cost(plan))
        if not self._busy():  # a warm-up would slow the run down
            self._estimator.submit(lambda: self._warm_up(plan))

    def _warm_up(self, plan: SweepPlan) -> None:
        """Prepare a run; time a batch of texts, once per target prompt and size."""
        generator = plan.generator
        rows = min(TEXT_ROWS, generator.batch_size, plan.n_texts)
        key = (generator.target, generator.max_new_tokens, rows)
        try:
            with self.view.lock:
                self._panel.prepare(Axes.of_plan(plan))
            float(generator.placeholder_norms[0])
            plan.own_words(site.position for site in plan.sites)
            if self._busy():  # the rest would only slow the run down
                return
            if rows and key not in self._seconds:
                self._seconds[key] = generator.seconds_per_batch(rows)
            seconds = self._seconds.get(key, 0.0) * math.ceil(plan.n_texts / max(1, rows))
            estimate = cost(plan, seconds)
        except Exception as error:  # noqa: BLE001  # shown in its place
            estimate = f"{len(plan.cells)} cells; the warm-up failed: {error}"
        with self.view.lock:
            if self.view.estimate.value == markup.note(cost(plan)):
                self.view.estimate.value = markup.note(estimate)

    def _opened(self, plan: SweepPlan) -> None:
        assert self._sweep is not None
        progress = self._sweep.progress
        self.view.progress.max = progress.total + progress.to_write
        self._panel.open(self._sweep.result(), Axes.of_plan(plan), plan, self._sweep.write)

    def _filled(self, readings: Sequence[Reading]) -> None:
        sweep = self._sweep
        if sweep is None or sweep.plan is not self._panel.plan:  # a text of an earlier run
            return
        progress, state = sweep.progress, sweep.state
        self.view.progress.value = progress.done + progress.written
        self._panel.draw(sweep.result())
        self._panel.refresh(readings)
        text = str(progress) if state == "running" else progress.summary(state)
        self.view.say(text, state)

    def _ended(self) -> None:
        view, sweep = self.view, self._sweep
        assert sweep is not None
        view.run.disabled = view.find.disabled = False
        view.cancel.disabled = True
        styles = {"done": "success", "cancelled": "warning", "failed": "danger"}
        view.progress.bar_style = styles[sweep.state]
        if sweep.plan is not None:
            self._panel.finish(sweep.result())
        if sweep.error is not None:
            view.alert(sweep.error)
        else:
            view.say(sweep.progress.summary(sweep.state), sweep.state)
        self._show_picture()
        self._changed(False)

    def _search(self) -> None:
        """Find a setting, and adopt it or show why there is none; runs in a thread."""
        assert self.model is not None
        view, found, failure = self.view, None, None
        try:
            found = kept_readability(self.model, progress=False)
        except Exception as error:  # noqa: BLE001  # shown as a message
            failure = error
        with view.lock:
            self._finding = view.run.disabled = view.find.disabled = False
            if failure is not None:
                view.alert(failure)
            else:
                view.guarded(self._adopt, found)()

    def _adopt(self, found: Readability) -> None:
        """Set the controls to the setting that was found."""
        self.check = found
        self.view.found.value = markup.note(found.verdict, "status")
        self._with_model().adopt(found.config)
        self.view.say("Set to what reads this model best; press Run", "idle")

    # What is shown and saved.

    def _shown(self) -> dict[str, Any]:
        """Return which token, target layer and column the map shows."""
        view, into = self.view, self.view.into.value
        target = into if isinstance(into, int) else None
        return {"position": view.position.value, "target_layer": target, "value": view.colour.value}

    def _show_pins(self) -> None:
        self.view.pins.value = markup.render("pins", self.pins, self._panel.shades)

    def _save(self) -> None:
        """Write into the working folder, say where, and offer a download if it is not too large."""
        view = self.view
        stem = view.file.value.strip() or "superscopes"
        name = stem.removesuffix(view.format.value) + view.format.value
        if name != Path(name).name:  # whoever sees a served page must not write anywhere
            fix = "explorer.export(path) takes any path"
            raise bad_value("file name", "a name without folders", name, fix)
        path = self.export(name).resolve()
        small = path.stat().st_size <= LARGEST_LINK
        data = base64.b64encode(path.read_bytes()).decode() if small else ""
        view.saved.value = markup.render("saved", path, data)

    def _ipython_display_(self) -> None:
        """Show the widgets, and in outputs of their own what needs no widgets and no JavaScript."""
        from IPython.display import display

        show: Any = display
        show({**self.view.root._repr_mimebundle_(), "text/plain": repr(self)}, raw=True)
        show({"text/plain": NO_WIDGETS}, raw=True)
        self._picture = show({"text/plain": "No sweep yet."}, raw=True, display_id=True)
        self._show_picture()

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows: it has no widgets of ipywidgets."""
        still = self._still()
        picture = still.get("image/png", "")
        return "text/html", markup.render("still", still["text/plain"], NO_WIDGETS, picture)

    def _still(self) -> dict[str, str]:
        """Return what needs no widgets, by MIME type: a name, and a picture once there is a map."""
        shown = {"text/plain": repr(self)}
        if self.result is None or self.result.table.empty:
            return shown
        try:
            picture = heatmap_png(self.result, **self._shown())
            shown["image/png"] = base64.b64encode(picture).decode()
        except ImportError as missing:
            shown["text/plain"] += f"\n{missing}"
        return shown

    def _show_picture(self) -> None:
        """Bring the picture of a saved notebook up to date."""
        if self._picture is not None and self.result is not None and len(self.result.table):
            self._picture.update(self._still(), raw=True)

    def __repr__(self) -> str:
        what = self.model if self.model is not None else self.result
        return f"Explorer of {what!r}: {self.state}"
