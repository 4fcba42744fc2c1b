"""Run a sweep in the background, so that a notebook stays usable meanwhile.

1. One daemon thread makes the plan (bad settings end there) and runs it, batch by batch.
2. Cells that a `CellStore` has from earlier runs of the same models, prompts and amplification are
   reused, rescored if the scorer has changed; only the others are computed. Unless every cell is
   generated, the map of what they recover comes first, and no scorer is loaded before it.
3. Finished readings are handed over at most every 150 ms, under a lock that the receiver shares:
   notebook kernels run callbacks on different threads.
4. `cancel` sets an event that the thread checks after every batch. What is finished is kept.
5. `write` generates the text of one cell, during a run or after it, in the caller's thread. A run
   gives way to it (`give_way`) before the next batch: the model's lock alone would be a matter of
   luck. Batches of texts are small, so that nobody waits long.
6. When Python exits, running threads are asked to stop and waited for: a thread that is killed
   inside the model's arithmetic would take the process down with an error.

No widget is known here. A run ends in exactly one of the states done, cancelled and failed.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakSet

from pandas.api.types import is_hashable

from superscopes_tl.engine import PatchedGenerator
from superscopes_tl.experiment import (
    Cell,
    Generate,
    Reading,
    SweepConfig,
    SweepPlan,
    SweepResult,
    best_cells,
    finished_cells,
    plan_sweep,
    rescored,
    run_map,
    run_plans,
    write_cell,
)
from superscopes_tl.model import LanguageModel, state_of
from superscopes_tl.scores import Scorer, as_scorer, no_scores
from superscopes_tl.vectors import Scale

State = Literal["new", "running", "done", "cancelled", "failed"]

FLUSH_SECONDS = 0.15  # the least time between two hand-overs, so that a browser can draw
EXIT_SECONDS = 10.0  # how long Python's exit waits for the last batches
MAP_ROWS = 256  # larger batches are faster, but fill in the map less often
TEXT_ROWS = 48  # of texts at a time: about a second for a small model on two cores

_ALIVE: WeakSet[Any] = WeakSet()


def watched_plan(
    model: LanguageModel, prompt: str, config: SweepConfig, before: PatchedGenerator | None = None
) -> SweepPlan:
    """Return the plan of a sweep, in batches that a reader can wait for; loads no scorer.

    The generator of an earlier plan is kept where the target prompt is the same: it knows the KV
    cache of the prompt's beginning, and own words.
    """
    plan = plan_sweep(model, prompt, replace(config, scorer=no_scores))
    plan = plan.with_settings(scorer=as_scorer(config.scorer))
    generator = plan.generator
    if config.batch_size is None:
        most = TEXT_ROWS if config.generate == "all" else MAP_ROWS
        generator.batch_size = min(generator.batch_size, most)
    if before is None or _generator_key(before) != _generator_key(generator):
        return plan
    return replace(plan, generator=before)


def _generator_key(generator: PatchedGenerator) -> tuple[Any, ...]:
    """Return what decides the texts and own words of a generator."""
    return (
        generator.model.tl,
        state_of(generator.model.tl),
        (generator.target, generator.chat, generator.batch_size),
        (generator.max_new_tokens, generator.until, generator.precision),
    )


def cost(plan: SweepPlan, seconds: float | None = None) -> str:
    """Return what a run would take: cells, texts, and seconds if they are known."""
    texts, finished = plan.n_texts, len(plan.all_cells) - len(plan.cells)
    kept = f", {finished} of them from earlier runs" if finished else ""
    some = "" if plan.config.generate == "all" else f", {texts} to generate"
    duration = "" if seconds is None or not texts else f" · {_about(seconds)}"
    return f"A run: {len(plan.all_cells)} cells{kept}{some}{duration}"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: finished cells, the reused ones included.
        total: cells of the sweep.
        reused: cells from earlier runs.
        seconds: time spent on the computed cells.
        written: sites with a text, where only the best cell of each gets one.
        to_write: number of these sites.
    """

    done: int = 0
    total: int = 0
    reused: int = 0
    seconds: float = 0.0
    written: int = 0
    to_write: int = 0

    @property
    def rate(self) -> float:
        """Computed cells per second; 0 before the first ones."""
        return (self.done - self.reused) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if self.to_write and self.done == self.total:
            return f"Map ready · generating texts: {self.written} of {self.to_write}"
        text = f"{self.done} of {self.total} cells"
        if self.rate:
            text += f" · {self.rate:.0f} cells/s"
            if not self.to_write:
                text += f" · {_about((self.total - self.done) / self.rate)} left"
        return text

    def summary(self, state: str) -> str:
        """Return how a run ended."""
        reused = f", {self.reused} from earlier runs" if self.reused else ""
        texts = f", {self.written} texts" if self.to_write else ""
        cells = f"{self.done} of {self.total} cells{texts}"
        return f"{state.capitalize()}: {cells} in {self.seconds:.1f} s{reused}"


def _about(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


class CellStore:
    """Finished cells, by everything that determines their texts.

    Each cell remembers its scorer, and on which part of the text: runs with different scorers may
    overlap in any way.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], dict[Cell, tuple[Reading, tuple[Scorer, str, str]]]] = {}
        self._lock = threading.Lock()  # a text that somebody asked for comes from another thread

    def known(self, plan: SweepPlan) -> dict[Cell, Reading]:
        """Return what is known of the cells of `plan`, scored by its scorer.

        Where all cells are to be generated, those without a text are left out.
        """
        kept, scored = self._of(plan), _scored(plan)
        cells = [cell for cell in plan.all_cells if cell in kept]
        if plan.config.generate == "all":
            cells = [cell for cell in cells if kept[cell][0].written]
        others = [kept[cell][0] for cell in cells if kept[cell][1] != scored]
        if others:
            self.add(plan, rescored(plan, others))
        return {cell: kept[cell][0] for cell in cells}

    def cells(self, plan: SweepPlan) -> frozenset[Cell]:
        """Return which cells of `plan` are finished, whatever scored them."""
        kept = self._of(plan)
        known = {cell: kept[cell][0] for cell in plan.all_cells if cell in kept}
        return _finished(known, plan.config.generate)

    def add(self, plan: SweepPlan, readings: Iterable[Reading]) -> None:
        """Keep readings of `plan`."""
        kept, scored = self._of(plan), _scored(plan)
        with self._lock:
            for reading in readings:
                cell = Cell.of(reading)
                if reading.written or cell not in kept or not kept[cell][0].written:
                    kept[cell] = (reading, scored)

    def _of(self, plan: SweepPlan) -> dict[Cell, tuple[Reading, tuple[Scorer, str, str]]]:
        return self._kept.setdefault(_text_key(plan), {})


def _scored(plan: SweepPlan) -> tuple[Scorer, str, str]:
    """Return what determines the score of a text."""
    return plan.scorer, plan.config.score_on, plan.config.score_against


def _finished(readings: Mapping[Cell, Reading], generate: Generate) -> frozenset[Cell]:
    """Return the cells that need no more work, out of all that are known.

    A text that somebody asked for does not finish a site whose best cell has none.
    """
    finished = finished_cells({c: reading.written for c, reading in readings.items()}, generate)
    if generate != "best":
        return finished
    best = best_cells(readings.values())
    missing = {cell.place for cell in best if not readings[cell].written}
    return frozenset(cell for cell in finished if cell.place not in missing)


def _text_key(plan: SweepPlan) -> tuple[Any, ...]:
    """Return what determines the text of a cell, besides the cell."""
    config, generator = plan.config, plan.generator
    by_itself = config.mapping == Scale() and config.base is None and config.vectors is None
    return (
        (plan.model.tl, generator.model.tl),
        (state_of(plan.model.tl), state_of(generator.model.tl)),
        (plan.source.ids, plan.source.text),
        (tuple(plan.abouts.items()), config.reference_of(plan.source.text)),
        (generator.target, generator.max_new_tokens, generator.until),
        tuple(map(_key, (config.mapping, config.vectors, config.base, config.write))),
        (config.unit, config.guide, config.draw),
        (config.controls, config.others),
        # Whatever is not α·v may depend on which sites it is given together.
        None if by_itself else plan.sites,
    )


def _key(setting: object) -> object:
    """Return a setting, or what equals nothing else if it cannot be a key."""
    return setting if is_hashable(setting) else object()


class BackgroundSweep:
    """One run of one plan in a thread of its own.

    Attributes:
        plan: what is run; `None` until the thread has made it.
        state: new, running, and then one of done, cancelled and failed.
        error: why it failed.

    Args:
        make_plan: returns the plan; called in the thread.
        store: finished cells of earlier runs; this run's are added.
        on_plan: called once, with the plan.
        on_batch: called with newly finished readings.
        on_end: called when the run has ended.
        give_way: called before the next batch; returns when the model is free for it.
        lock: held during these calls; reentrant.
    """

    def __init__(
        self,
        make_plan: Callable[[], SweepPlan],
        *,
        store: CellStore | None = None,
        on_plan: Callable[[SweepPlan], None] = lambda plan: None,
        on_batch: Callable[[list[Reading]], None] = lambda readings: None,
        on_end: Callable[[], None] = lambda: None,
        give_way: Callable[[], object] = lambda: None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.plan: SweepPlan | None = None
        self.state: State = "new"
        self.error: Exception | None = None
        self._make_plan, self._store = make_plan, store or CellStore()
        self._on_plan, self._on_batch, self._on_end = on_plan, on_batch, on_end
        self._give_way = give_way
        self._lock = lock or threading.RLock()
        self._stop = threading.Event()
        self._readings: dict[Cell, Reading] = {}
        self._reused, self._seconds = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="superscopes-sweep", daemon=True)

    def start(self) -> BackgroundSweep:
        """Start the thread; return this run."""
        self.state = "running"
        _ALIVE.add(self)
        self._thread.start()
        return self

    def cancel(self) -> None:
        """Stop after the batch that is being computed."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; return whether the run has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        if self.plan is None:
            return Progress()
        cells = self.plan.all_cells
        progress = Progress(len(self._readings), len(cells), self._reused, self._seconds)
        if self.plan.config.generate != "best":
            return progress
        written = len({c.place for c, reading in self._readings.items() if reading.written})
        return replace(progress, written=written, to_write=len({c.place for c in cells}))

    def result(self) -> SweepResult:
        """Return the finished cells, in the order of the plan."""
        if self.plan is None:
            return SweepResult.from_readings([], {})
        with self._lock:
            found = [self._readings[c] for c in self.plan.all_cells if c in self._readings]
        how = {"complete": self._complete(), "seconds": round(self._seconds, 3)}
        return SweepResult.from_readings(found, {**self.plan.provenance(), **how})

    def write(self, cell: Cell) -> None:
        """Generate the text of one cell of the plan, unless it is there; it joins the result."""
        assert self.plan is not None
        known = self._readings.get(cell)
        if known is None or not known.written:
            written = write_cell(self.plan, cell, known)
            self._store.add(self.plan, [written])
            self._hand_over([written])

    def _work(self) -> None:
        state: State = "failed"
        try:
            self._run()
            state = "done" if self._complete() else "cancelled"
        except Exception as error:  # noqa: BLE001  # shown by the receiver
            self.error = error
        with self._lock:
            self.state = state
            self._on_end()

    def _run(self) -> None:
        full = self._make_plan()
        known = self._store.known(full)
        with self._lock:
            self.plan, self._reused = full, len(known)
            self._on_plan(full)
        self._hand_over(list(known.values()))
        fresh: list[Reading] = []
        mapped = len(known)
        started = flushed = time.monotonic()
        try:
            for batch in self._batches(full, known):
                self._store.add(full, batch)
                fresh += batch
                mapped += len(batch)
                self._seconds = time.monotonic() - started
                # What completes the map does not wait for the first texts.
                complete = mapped == len(full.all_cells)
                if complete or time.monotonic() - flushed >= FLUSH_SECONDS:
                    self._hand_over(fresh)
                    fresh, flushed = [], time.monotonic()
                self._give_way()
                if self._stop.is_set():
                    break
        finally:  # what was finished before an error counts too
            self._hand_over(fresh)

    def _batches(self, plan: SweepPlan, known: Mapping[Cell, Reading]) -> Iterable[list[Reading]]:
        """Return the batches of what is left to do."""
        if self._stop.is_set() or self._complete():
            return ()
        if plan.config.generate == "all":
            return run_plans([replace(plan, finished=frozenset(known))])
        return run_map(plan, known, texts=TEXT_ROWS)

    def _complete(self) -> bool:
        """Return whether nothing is left to do."""
        assert self.plan is not None
        with self._lock:
            finished = _finished(self._readings, self.plan.config.generate)
        return len(finished) == len(self.plan.all_cells)

    def _hand_over(self, readings: list[Reading]) -> None:
        if readings:
            with self._lock:
                for reading in readings:
                    cell = Cell.of(reading)
                    known = self._readings.get(cell)
                    # A share that comes after a text that somebody asked for has no text.
                    if reading.written or known is None or not known.written:
                        self._readings[cell] = reading
                self._on_batch(readings)


class Latest:
    """Runs the newest of the jobs it is given in one daemon thread; skips those in between."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` after the current one, unless a newer one comes before that."""
        _ALIVE.add(self)
        with self._lock:
            self._job = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def cancel(self) -> None:
        """Drop the waiting job; the running one continues to its end."""
        self._job = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; return whether that is so."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._job = self._job, None
                if job is None:
                    self._thread = None
                    return
            try:
                job()
            except Exception:  # noqa: BLE001  # later jobs must still run
                failure = (*sys.exc_info(), threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(failure))


def wait_for_all(
    waits: Iterable[Callable[[float | None], bool]], timeout: float | None = None
) -> bool:
    """Wait for one after the other, together no longer than `timeout`."""
    if timeout is None:
        return all(wait(None) for wait in waits)
    until = time.monotonic() + timeout
    return all(wait(max(0.0, until - time.monotonic())) for wait in waits)


@atexit.register
def _stop_all() -> None:
    """Stop what runs, and wait a while for it."""
    running = list(_ALIVE)
    for work in running:
        work.cancel()
    wait_for_all((work.wait for work in running), EXIT_SECONDS)
