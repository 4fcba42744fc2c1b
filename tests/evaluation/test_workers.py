"""An experiment over many processes: the same table, whatever happens to the workers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superscopes_tl import LanguageModel, SweepConfig, SweepResult, evaluate, load_model
from superscopes_tl.evaluation import local_workers
from superscopes_tl.evaluation.workers import RemoteReader, Share, as_loader, kept_under, portions
from superscopes_tl.experiment import Cell, EvaluationFile
from tests.support import workers
from tests.support.same import assert_same_readings
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

PROMPTS = ("Red Hot Chili Peppers", "Pearl Jam", "Will Smith")
KEY = ["prompt", "position", "kind", "source_layer", "target_layer", "mapping", "alpha", "draw"]


@pytest.fixture(scope="module")
def folder(llama_folder: Path) -> str:
    """A directory with a random model."""
    return str(llama_folder)


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """Two processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    """Two processes of a Dask cluster on this machine."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture
def settings() -> dict[str, Any]:
    """A small experiment."""
    return {
        "layers": [5, 2], "alphas": (1, 3, 9), "max_new_tokens": 6, "scorer": workers.letters,
        "target_prompt": "A band of rock is x", "progress": False,
    }  # fmt: skip


def in_order(evaluation: SweepResult) -> pd.DataFrame:
    """Return the rows in an order that does not depend on who was finished first."""
    assert not evaluation.table.duplicated(KEY).any()
    return evaluation.table.sort_values(KEY, ignore_index=True)


def same(one: SweepResult, other: SweepResult) -> None:
    """Check that two tables hold the same rows."""
    assert_same_readings(in_order(one), in_order(other))


class Here(ThreadPoolExecutor):
    """A thread in the place of a process, which notes what it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.futures: list[Future[Any]] = []

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(function, *arguments, **named)
        self.futures.append(future)
        return future


@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_the_table_is_that_of_one_process(
    kind: str, folder: str, settings: dict[str, Any], tmp_path: Path, request: Any
) -> None:
    """Draws, controls, a file that holds a part: every row once, and one load per worker."""
    path, log = tmp_path / "run.sqlite", tmp_path / "loads"
    asked = {**settings, "controls": ("random_direction",), "batch_size": 4}
    model = load_model(folder, backend="bridge", device="cpu")
    evaluate(model, PROMPTS[:2], path, **{**asked, "alphas": (1, 3), "draws": 1})
    partly = SweepResult.load(path)
    executor = request.getfixturevalue(kind)
    load = partial(workers.loaded, folder, str(log))
    found = evaluate(load, PROMPTS, path, executor=executor, **asked)
    one = evaluate(model, PROMPTS, **asked)
    same(found, one)
    assert (one.table["draw"] == 1).sum() == 6
    pd.testing.assert_frame_equal(found.table.head(len(partly)), partly.table)
    evaluate(load, PROMPTS, executor=executor, **asked)
    loads = log.read_text(encoding="utf-8").split()
    assert len(loads) == len(set(loads)) <= 2
    assert str(os.getpid()) not in loads


def test_a_killed_process_ends_the_run_and_the_next_one_resumes(
    folder: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Completed cells are in the file; the second run reads the others."""
    load = partial(load_model, folder, backend="bridge", device="cpu")
    path = tmp_path / "run.sqlite"
    deadly = workers.Deadly(str(tmp_path), "Will Smith", times=1)
    asked = {**settings, "draws": 0, "batch_size": 2}
    with pytest.raises(ChildProcessError, match="^executor: "):
        evaluate(load, PROMPTS, path, executor=local_workers(1), **{**asked, "scorer": deadly})
    assert 0 < len(SweepResult.load(path)) < 18
    found = evaluate(load, PROMPTS, path, **{**asked, "scorer": deadly})
    same(found, evaluate(load, PROMPTS, **asked))


def test_an_error_in_a_worker_reaches_the_caller(
    pool: Any, folder: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With its type and message; completed cells are in the file, and the pool still works."""
    path = tmp_path / "run.sqlite"
    asked = {**settings, "draws": 0, "batch_size": 6}
    with pytest.raises(ValueError, match="^vectors: "):
        evaluate(folder, PROMPTS, path, executor=pool, **asked, vectors=workers.short)
    assert not set(SweepResult.load(path).table["prompt"]) & {"Will Smith"}
    assert len(evaluate(folder, PROMPTS[:1], path, executor=pool, **asked).prompts) >= 1
    with pytest.raises(ValueError, match="^layers: "):
        evaluate(folder, PROMPTS, executor=pool, **{**asked, "layers": [9]})


def test_what_waits_is_cancelled_when_the_parent_stops(
    folder: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl+C at the third task: two are in the file, few others begin, the next run ends it."""
    path, plain, calls = tmp_path / "run.sqlite", EvaluationFile.add, iter(range(99))

    def stopped(self: EvaluationFile, readings: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        plain(self, readings)

    asked = {**settings, "draws": 0, "batch_size": 1}
    with Here() as here, monkeypatch.context() as patch:
        patch.setattr(EvaluationFile, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, PROMPTS, path, executor=here, **asked)
        assert len(SweepResult.load(path)) == 2
        cancelled = sum(future.cancelled() for future in here.futures)
        assert len(here.futures) == 1 + 18
        assert cancelled >= 10
    with Here() as here:
        found = evaluate(folder, PROMPTS, path, executor=here, **asked)
        assert len(here.futures) == 1 + 16
    same(found, evaluate(folder, PROMPTS, **asked))


class Breaking(Here):
    """An executor that breaks at its n-th task; `None` for never."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self._at = at

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        if self._at is not None and len(self.futures) >= self._at:
            raise BrokenProcessPool("terminated abruptly")
        return super().submit(function, *arguments, **named)


def test_a_notebook_s_function_is_asked_again_for_every_run() -> None:
    """It may be another one by now; what is imported from a module stays."""

    def load() -> Any:
        raise NotImplementedError

    load.__module__, load.__qualname__ = "__main__", "load"
    assert kept_under(load, "one") != kept_under(load, "two")
    assert kept_under(partial(load, 3), "one") != kept_under(partial(load, 3), "two")
    fixed = partial(load_model, "smollm2")
    assert kept_under(fixed, "one") == kept_under(fixed, "two")


def test_a_directory_with_new_weights_is_loaded_anew(folder: str, tmp_path: Path) -> None:
    """A worker keeps a model as long as the files that it came from."""
    path = shutil.copytree(folder, tmp_path / "model")
    for load in (as_loader(path), partial(load_model, model=str(path))):
        first = kept_under(load, "one")
        assert kept_under(load, "two") == first
        later = 1 + path.joinpath("model.safetensors").stat().st_mtime
        os.utime(path / "model.safetensors", (later, later))
        assert kept_under(load, "one") != first


def test_an_executor_that_breaks_is_named(folder: str, settings: dict[str, Any]) -> None:
    """Whether it was broken before or a task was lost; and what is no executor at all."""

    class Fickle(Here):
        def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
            future = super().submit(*arguments, **named)
            if len(self.futures) == 4:
                future = Future()
                future.cancel()
                future.set_running_or_notify_cancel()
            return future

    for start in (lambda: Breaking(0), lambda: Breaking(3), Fickle):
        with pytest.raises(ChildProcessError, match="^executor: "):
            evaluate(folder, PROMPTS, executor=start, **settings)
    with pytest.raises(TypeError, match="^executor: "):
        evaluate(folder, PROMPTS, executor=2, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^workers: "):
        local_workers(0)


def test_a_model_of_this_process_alone_is_refused(folder: str, settings: dict[str, Any]) -> None:
    """The message says what every worker could load."""
    mine = load_model(tiny_hf("llama"), tiny_tokenizer(), backend="bridge")
    for model in (mine, tiny_hf("llama"), lambda: mine, 3):
        with Here() as here, pytest.raises(ValueError, match="^model: "):
            evaluate(model, PROMPTS, executor=here, **settings)
    with Here() as here, pytest.raises(ValueError, match="^target_model: "):
        evaluate(folder, PROMPTS, executor=here, **settings, target_model=mine)


def test_a_model_knows_how_it_is_loaded_again(
    folder: str, smollm2: LanguageModel, monkeypatch: Any
) -> None:
    """A directory by its full path, with the options; a name as it is; nothing of one's own."""
    monkeypatch.chdir(Path(folder).parent)
    model = load_model(Path(folder).name, backend="bridge", device="cpu", dtype="bfloat16")
    monkeypatch.chdir("/")
    again = as_loader(model)()
    assert again is not model
    assert again.provenance() == model.provenance()
    assert smollm2.origin is not None
    assert smollm2.origin.args == ("smollm2",)
    assert load_model(folder, tiny_tokenizer(), backend="bridge").origin is None


def test_another_target_model_is_loaded_by_the_workers_too(
    folder: str, settings: dict[str, Any]
) -> None:
    """It is sent as a name, too, and may be the same one as the model that is read."""
    asked = {**settings, "draws": 0, "target_model": folder}
    with Here() as here:
        found = evaluate(folder, PROMPTS, executor=here, **asked)
    same(found, evaluate(folder, PROMPTS, **settings, draws=0))


def test_other_weights_in_a_worker_are_refused(folder: str, settings: dict[str, Any]) -> None:
    """As where a machine has an older revision of the same name."""
    config = SweepConfig(**{k: v for k, v in settings.items() if k != "progress"})
    with Here() as here, RemoteReader(here, folder, PROMPTS[0], config) as reader:
        outline = reader.outline(PROMPTS)
        outline.provenance["model"]["fingerprint"] = "other"
        with pytest.raises(ValueError, match="^model: "):
            next(reader.read(list(outline.shares(0))))


def test_what_a_process_pool_cannot_send_is_named(
    folder: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any process is started: which setting, and what to do."""
    for name, value in (
        ("mapping", lambda alpha: lambda v: alpha * v),
        ("scorer", lambda references, candidates: [0.5 for _ in candidates]),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            evaluate(folder, PROMPTS, executor=local_workers(1), **{**settings, name: value})
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(workers.letters, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "letters", workers.letters, raising=False)
    with pytest.raises(ValueError, match="^scorer: "):
        evaluate(folder, PROMPTS, executor=local_workers(1), **settings)


def test_an_executor_that_sends_functions_whole_takes_lambdas(
    folder: str, dask: Any, settings: dict[str, Any]
) -> None:
    """Dask does."""
    mapping = {"mapping": lambda alpha: lambda v: alpha * v}
    found = evaluate(folder, PROMPTS, executor=dask, **settings, **mapping)  # type: ignore[arg-type]
    assert len(found) == 18


def test_portions_are_full_and_hold_every_cell_once() -> None:
    """Whatever the size: several prompts in one, or one prompt in several."""
    cells = tuple(Cell(3, "mlp_out", layer, 0, 1.0) for layer in range(5))
    shares = [Share("a", 0, cells), Share("b", 1, ()), Share("c", 2, cells[:3])]
    every = [(s.prompt, s.draw, cell) for s in shares for cell in s.cells]
    for size in range(1, 10):
        cut = list(portions(shares, size))
        assert [(s.prompt, s.draw, cell) for p in cut for s in p for cell in s.cells] == every
        sizes = [sum(len(s.cells) for s in portion) for portion in cut]
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= size


def test_a_run_of_few_batches_is_cut_into_more_tasks(folder: str, settings: dict[str, Any]) -> None:
    """One prompt whose 24 cells fit into one batch makes eight tasks, and the outline's."""
    with Here() as here:
        evaluate(
            folder, PROMPTS[:1], executor=here, **{**settings, "alphas": range(1, 13)}, draws=0
        )
        assert len(here.futures) == 1 + 8
