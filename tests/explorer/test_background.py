"""Sweeps in the background: states, reuse, cancelling, failures. No widget, no browser."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from superscopes_tl import LanguageModel, SweepConfig, plan_sweep, sweep
from superscopes_tl.experiment import Cell, Reading
from superscopes_tl.explorer import background as background_module
from superscopes_tl.explorer.background import (
    BackgroundSweep,
    CellStore,
    Latest,
    Progress,
    wait_for_all,
    watched_plan,
)
from superscopes_tl.vectors import RandomDirection
from tests.explorer.conftest import PROMPT, WAIT
from tests.support.hooks import hooks_on
from tests.support.same import assert_same_readings

SMALL: dict[str, Any] = {"layers": (0, 2), "alphas": (1, 3), "max_new_tokens": 3}


class Constant:
    """A scorer that keeps what it was given."""

    def __init__(self, score: float) -> None:
        self.score = score
        self.judged: list[str] = []

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """Give every candidate the same score."""
        self.judged.extend(candidates)
        return [self.score for _ in candidates]


def run(model: LanguageModel, *, store: CellStore | None = None, **settings: Any) -> Any:
    """Run to the end and return the finished run."""
    given = {"scorer": Constant(0.5), **SMALL, **settings}
    background = BackgroundSweep(lambda: plan_sweep(model, PROMPT, **given), store=store)
    assert background.start().wait(WAIT)
    return background


def test_a_run_gives_what_sweep_gives(model: LanguageModel) -> None:
    """The same table, row by row, and a provenance that says it is complete."""
    background = run(model)
    assert (background.state, background.error) == ("done", None)
    expected = sweep(model, PROMPT, scorer=Constant(0.5), progress=False, **SMALL)
    assert_same_readings(background.result().table, expected.table)
    assert background.result().provenance["complete"]


def test_finished_cells_are_reused(model: LanguageModel) -> None:
    """A second run over more layers computes and scores the new ones alone."""
    store, scorer = CellStore(), Constant(0.5)
    first = run(model, store=store, scorer=scorer)
    before = len(scorer.judged)
    more = {**SMALL, "layers": (0, 1, 2), "scorer": scorer}
    second = run(model, store=store, **more)
    cells = len(second.plan.all_cells)
    assert second.progress == Progress(cells, cells, len(first.result()), second.progress.seconds)
    assert len(scorer.judged) - before <= cells - len(first.result())
    expected = sweep(model, PROMPT, progress=False, **more)
    assert_same_readings(second.result().table, expected.table)


def test_cells_of_several_scorers_are_never_mixed(model: LanguageModel) -> None:
    """Runs that overlap in any way: each result has one scorer's numbers, none scored twice."""
    first, second, store = Constant(0.1), Constant(0.2), CellStore()
    run(model, store=store, layers=(0, 1), scorer=first)
    run(model, store=store, layers=(2, 3), scorer=second)
    before = len(second.judged)
    both = run(model, store=store, layers=(0, 1, 2, 3), scorer=second)
    assert both.progress.reused == both.progress.total
    table = both.result().table
    described = table[table["description"].str.strip() != ""]
    assert set(described["score"]) == {0.2}
    assert len(second.judged) - before == (described["source_layer"] < 2).sum()
    inner = run(model, store=store, layers=(1, 2), scorer=first)
    assert set(inner.result().table["score"].dropna()) == {0.1}
    again = run(model, store=store, layers=(0, 1, 2, 3), scorer=second, score_on="text")
    assert set(again.result().table["score"].dropna()) == {0.2}


def test_a_mapping_of_ones_own_is_reused_for_the_same_sites_alone(model: LanguageModel) -> None:
    """Only the paper's α·v is known to treat each site by itself, whatever another is called."""

    def scale(alpha: float) -> Any:
        return lambda v: alpha * (v - v.mean(dim=0))

    store = CellStore()
    run(model, store=store, mapping=scale)
    assert run(model, store=store, mapping=scale, layers=(0, 1, 2)).progress.reused == 0
    again = run(model, store=store, mapping=scale)
    assert again.progress.reused == again.progress.total


@pytest.mark.parametrize(
    "changed",
    [{"max_new_tokens": 2}, {"target_prompt": "x is"}, {"mapping": RandomDirection(0)}],
    ids=lambda changed: next(iter(changed)),
)
def test_cells_of_other_texts_are_not_reused(model: LanguageModel, changed: Any) -> None:
    """What changes a text makes it another cell; an equal setting does not."""
    store = CellStore()
    run(model, store=store)
    assert run(model, store=store, **changed).progress.reused == 0
    again = run(model, store=store, **changed)
    assert again.progress.reused == again.progress.total


def test_cancel_stops_after_the_batch_and_keeps_it(model: LanguageModel) -> None:
    """Cancelled in the first batch, no second one begins."""
    began, resume = threading.Event(), threading.Event()
    batches: list[int] = []

    def slow(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        batches.append(len(candidates))
        began.set()
        assert resume.wait(WAIT)
        return [0.5 for _ in candidates]

    background = BackgroundSweep(
        lambda: plan_sweep(model, PROMPT, scorer=slow, batch_size=2, **SMALL)
    ).start()
    assert began.wait(WAIT)
    assert background.state == "running"
    background.cancel()
    resume.set()
    assert background.wait(WAIT)
    assert background.state == "cancelled"
    assert (len(background.result()), len(batches)) == (2, 1)
    assert not background.result().provenance["complete"]
    assert hooks_on(model) == 0


class Gate:
    """A scorer that stops at its first texts until it may go on."""

    def __init__(self) -> None:
        self.began, self.resume = threading.Event(), threading.Event()

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """Give every candidate the same score."""
        self.began.set()
        assert self.resume.wait(WAIT)
        return [0.5 for _ in candidates]


BEST: dict[str, Any] = {
    "layers": (2, 3, 5), "kinds": "resid_post", "alphas": (1, 3, 6), "generate": "best",
    "max_new_tokens": 3,
}  # fmt: skip


def begun(
    model: LanguageModel, store: CellStore, gate: Gate, give_way: Any = lambda: None
) -> tuple[BackgroundSweep, list[list[Reading]]]:
    """Start a run that stops at its first text; return it, and the batches as they come."""
    batches: list[list[Reading]] = []
    background = BackgroundSweep(
        lambda: watched_plan(model, PROMPT, SweepConfig(**BEST, batch_size=4, scorer=gate)),
        store=store, on_batch=lambda readings: batches.append(list(readings)), give_way=give_way,
    ).start()  # fmt: skip
    assert gate.began.wait(WAIT)
    return background, batches


def other_cell(background: BackgroundSweep) -> Cell:
    """Return a cell whose text the run does not generate, of a site whose turn comes late."""
    table = background.result().table
    last = background.result().best(by="recovered").sort_values("recovered").iloc[0]
    beside = table[table["source_layer"] == last["source_layer"]]
    return Cell.of(beside.sort_values("recovered").iloc[0])


def test_the_map_is_complete_before_the_first_text(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shares are handed over before a text is scored; texts of the best cells come first."""
    monkeypatch.setattr(background_module, "TEXT_ROWS", 1)
    gate = Gate()
    background, batches = begun(llama, CellStore(), gate)
    shares = [reading for batch in batches for reading in batch]
    assert len(shares) == len(background.result()) == 9
    assert not any(reading.written for reading in shares)
    assert str(background.progress) == "Map ready · generating texts: 0 of 3"
    gate.resume.set()
    assert background.wait(WAIT)
    texts = [reading for batch in batches for reading in batch][9:]
    assert all(reading.written for reading in texts)
    assert [r.recovered for r in texts] == sorted((r.recovered for r in texts), reverse=True)
    expected = sweep(llama, PROMPT, **BEST, scorer=Constant(0.5), progress=False).table
    assert_same_readings(background.result().table, expected)


def test_no_scorer_is_loaded_before_the_map(llama: LanguageModel) -> None:
    """A scorer that cannot be loaded fails the run after its map."""
    config = SweepConfig(**BEST, scorer="no/such-scorer")
    background = BackgroundSweep(lambda: watched_plan(llama, PROMPT, config)).start()
    assert background.wait(WAIT)
    assert background.state == "failed"
    assert str(background.error).startswith("scorer:")
    assert len(background.result()) == 9


def test_a_text_that_is_asked_for_does_not_wait_for_the_others(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the batch that is being computed, and its shares are those of the map."""
    monkeypatch.setattr(background_module, "TEXT_ROWS", 1)
    gate, writer = Gate(), Latest()
    background, batches = begun(llama, CellStore(), gate, writer.wait)
    cell = other_cell(background)
    writer.submit(lambda: background.write(cell))
    gate.resume.set()
    assert background.wait(WAIT)
    texts = [Cell.of(r) for batch in batches for r in batch if r.written]
    assert texts.index(cell) < 2
    assert len(texts) == 4
    table = background.result().table
    assert table["written"].sum() == 4
    share = next(r.recovered for batch in batches for r in batch if Cell.of(r) == cell)
    (row,) = [r for r in table.itertuples() if Cell.of(r) == cell]
    assert (row.recovered, row.score) == (share, 0.5)
    (alone,) = sweep(
        llama, PROMPT, layers=cell.source_layer, kinds=cell.kind, alphas=cell.alpha,
        max_new_tokens=3, scorer=Constant(0.5), progress=False,
    ).table.itertuples()  # fmt: skip
    assert (row.text, row.about) == (alone.text, alone.about)


def test_a_cancelled_run_is_written_on_and_run_on(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that was asked for stays; the next run computes no share again, only best texts."""
    monkeypatch.setattr(background_module, "TEXT_ROWS", 1)
    store, gate = CellStore(), Gate()
    background, _ = begun(llama, store, gate)
    cell = other_cell(background)
    background.cancel()
    gate.resume.set()
    assert background.wait(WAIT)
    assert (background.state, background.progress.written) == ("cancelled", 1)
    background.write(cell)
    background.write(cell)  # it is there
    assert background.progress.written == 2
    assert background.plan is not None
    assert len(store.cells(background.plan)) == 3, "the site of that text has no best one yet"
    again, batches = begun(llama, store, gate)
    assert again.wait(WAIT)
    assert again.state == "done"
    assert len(batches[0]) == again.progress.reused == 9
    assert all(reading.written for batch in batches[1:] for reading in batch)
    assert again.result().table["written"].sum() == 4
    assert cell in {Cell.of(r) for r in batches[0] if r.written}


def test_a_generator_is_kept_for_the_same_target_prompt(llama: LanguageModel) -> None:
    """What it knows serves the next prompt; another target prompt or length has its own."""
    first = watched_plan(llama, PROMPT, SweepConfig(**BEST)).generator
    same = watched_plan(llama, "Top Gun", SweepConfig(**BEST, scorer=Constant(1)), first)
    assert same.generator is first
    assert same.scorer("", ["x"]) == [1]
    for changed in ({"target_prompt": "x is"}, {"max_new_tokens": 2}, {"score_on": "text"}):
        other = watched_plan(llama, PROMPT, SweepConfig(**{**BEST, **changed}), first)
        assert other.generator is not first


def test_an_error_fails_the_run(model: LanguageModel) -> None:
    """The error is kept, the batches before it too, and no hook stays."""
    calls: list[int] = []

    def breaks(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the scorer is out of order")
        return [0.5 for _ in candidates]

    background = run(model, alphas=())  # refused when the plan is made, in the thread
    assert background.state == "failed"
    assert str(background.error).startswith("alphas:")
    background = run(model, scorer=breaks, batch_size=3)
    assert background.state == "failed"
    assert "out of order" in str(background.error)
    assert len(background.result()) == 3
    assert hooks_on(model) == 0


def test_everything_is_handed_over_once_and_the_end_comes_last(model: LanguageModel) -> None:
    """The batches make up the result; nothing comes after the end."""
    seen: list[Reading] = []
    events: list[str] = []

    def on_batch(readings: list[Reading]) -> None:
        seen.extend(readings)
        events.append("batch")

    background = BackgroundSweep(
        lambda: plan_sweep(model, PROMPT, scorer=Constant(0.5), batch_size=2, **SMALL),
        on_plan=lambda plan: events.append("plan"),
        on_batch=on_batch,
        on_end=lambda: events.append("end"),
    ).start()
    assert background.wait(WAIT)
    assert len(seen) == len(set(seen)) == len(background.result())
    assert (events[0], events[-1], events.count("end")) == ("plan", "end", 1)


def test_progress_counts_texts_separately(llama: LanguageModel) -> None:
    """With the best α of each site, cells and texts have counts of their own."""
    best = {"layers": (3, 5), "kinds": "resid_post", "alphas": (1, 6), "generate": "best"}
    progress = run(llama, **best, max_new_tokens=2).progress
    assert (progress.done, progress.total, progress.written, progress.to_write) == (4, 4, 2, 2)
    progress = Progress(done=60, total=100, reused=20, seconds=4.0)
    assert str(progress) == "60 of 100 cells · 10 cells/s · about 4 s left"
    assert str(Progress(0, 100)) == "0 of 100 cells"


def test_latest_skips_the_jobs_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one job runs, only the newest that comes is kept; an error is reported as any other."""
    reported: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(str(args.exc_value)))
    gate, first, done = threading.Event(), threading.Event(), []
    latest = Latest()

    def breaks_at_the_gate() -> None:
        first.set()
        gate.wait(WAIT)
        raise RuntimeError("out of order")

    latest.submit(breaks_at_the_gate)
    assert first.wait(WAIT)
    for number in (1, 2, 3):
        latest.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    gate.set()
    assert latest.wait(WAIT)
    assert (done, reported) == ([3], ["out of order"])


def test_several_waits_share_one_timeout() -> None:
    """What the first wait uses up, the second does not get; one that fails is the last."""
    given: list[Any] = []

    def slow(timeout: float | None) -> bool:
        given.append(timeout)
        time.sleep(0.05)
        return True

    for timeout in (None, 60, 0.01):
        assert wait_for_all([slow, slow], timeout)
    assert given[:2] == [None, None]
    assert given[3] <= given[2] - 0.05
    assert given[5] == 0
    assert not wait_for_all([slow, lambda timeout: False, slow])
    assert len(given) == 7


def test_python_exits_after_the_running_job() -> None:
    """A thread that is killed inside the model's arithmetic would be a crash."""
    code = (
        "import threading, time\n"
        "from superscopes_tl.explorer.background import Latest\n"
        "began = threading.Event()\n"
        "Latest().submit(lambda: (began.set(), time.sleep(0.2), print('ended')))\n"
        "began.wait()"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["ended"]


def test_a_sweep_in_another_cell_does_not_disturb_it(model: LanguageModel) -> None:
    """Hooks are on the model during a batch; two threads take turns and both read right."""
    settings: dict[str, Any] = {"scorer": Constant(0.5), "batch_size": 2, **SMALL}
    expected = sweep(model, PROMPT, progress=False, **settings)
    background = BackgroundSweep(lambda: plan_sweep(model, PROMPT, **settings)).start()
    beside = sweep(model, PROMPT, progress=False, **settings)
    assert background.wait(WAIT)
    for result in (background.result(), beside):
        assert result.table["text"].tolist() == expected.table["text"].tolist()
