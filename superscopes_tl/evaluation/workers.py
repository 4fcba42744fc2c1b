"""Where an evaluation is computed: in this process, or spread over others.

1. A `Share` is some cells of one source prompt: plain data that another process can be sent.
2. A `Reader` plans each prompt once, says what there is to read (`Outline`), and reads shares.
3. A `RemoteReader` has no model. It sends each worker how to load the model (not its weights), the
   settings and some shares, at most `IN_FLIGHT` tasks at a time, and yields readings as tasks
   complete. A task is one batch, filled across prompts as in one process; a run of fewer than
   `LEAST_TASKS` batches is cut into that many tasks.
4. A worker keeps its `Reader` until another evaluation comes, and does one task at a time.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import torch

from superscopes_tl.errors import bad_type, bad_value, check_count, describe
from superscopes_tl.experiment import Cell, Reading, SweepConfig, SweepPlan, plan_sweep, run_plans
from superscopes_tl.model import LanguageModel, load_model
from superscopes_tl.scores import scorer_name
from superscopes_tl.weights import absolute

IN_FLIGHT = 256
"""How many tasks are submitted at most before one of them has completed."""

LEAST_TASKS = 8
"""Into how many tasks a run is cut that has fewer batches."""

Loader: TypeAlias = Callable[[], Any]
"""Returns a model, or anything that `load_model` takes, in whatever process it is called."""


class Executor(Protocol):
    """Calls functions elsewhere: any `concurrent.futures.Executor`, or one of its kind."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Return the future of one call."""


Executors: TypeAlias = Executor | Callable[[], Executor]
"""An executor, or a function that starts one."""


@dataclass(frozen=True)
class Share:
    """Some cells of one source prompt; `draw` is 0 for the greedy texts, k for the k-th samples."""

    prompt: str
    draw: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Outline:
    """What an evaluation reads, without a model.

    Attributes:
        provenance: what every plan of the evaluation has in common.
        mapping: how α acts, as the table's column `mapping` has it.
        scorer: the scorer's name.
        alphas: the amplifiers.
        batch_size: rows per batch.
        cells: what to read, by source prompt.
    """

    provenance: dict[str, Any]
    mapping: str
    scorer: str
    alphas: tuple[float, ...]
    batch_size: int
    cells: Mapping[str, tuple[Cell, ...]]

    def shares(self, draws: int) -> Iterator[Share]:
        """Yield what is to be read of each prompt: the sweep, and the samples at α = 1."""
        for prompt, cells in self.cells.items():
            yield Share(prompt, 0, cells)
            plain = tuple(dict.fromkeys(replace(cell, alpha=1.0) for cell in cells))
            for draw in range(1, draws + 1):
                yield Share(prompt, draw, plain)


_COMMON = ("superscopes_tl", "python", "created", "model", "target_model", "target_prompt")
_COMMON_SETTINGS = ("max_new_tokens", "scorer", "scorer_weights", "score_on", "score_against",
                    "controls", "chat", "source_template", "others", "precision",
                    "reference", "about")  # fmt: skip


class Reader:
    """The plans of an evaluation's prompts, each made once; `first` is that of any of them."""

    def __init__(self, first: SweepPlan) -> None:
        self.first = first
        self._plans = {first.source.text: first}

    def _plan(self, prompt: str) -> SweepPlan:
        if prompt not in self._plans:
            self._plans[prompt] = self.first.at_prompt(prompt)
        return self._plans[prompt]

    def outline(self, prompts: Sequence[str]) -> Outline:
        """Return what the evaluation reads; raise a `ValueError` if it does not fit into memory."""
        first, provenance = self.first, self.first.provenance()
        settings = {name: provenance["config"][name] for name in _COMMON_SETTINGS}
        for prompt in prompts:
            self._plan(prompt).check_memory()
        return Outline(
            provenance={name: provenance[name] for name in _COMMON} | {"config": settings},
            mapping=first.mapping_name,
            scorer=scorer_name(first.scorer),
            alphas=first.alphas,
            batch_size=first.generator.batch_size,
            cells={prompt: self._plan(prompt).all_cells for prompt in prompts},
        )

    def read(self, shares: Iterable[Share]) -> Generator[list[Reading], None, None]:
        """Yield the readings of some shares, batch by batch, filled across prompts."""
        yield from run_plans(map(self._part, shares))

    def _part(self, share: Share) -> SweepPlan:
        plan = self._plan(share.prompt)
        if share.draw:
            plan = plan.with_settings(alphas=1, draw=share.draw)
        return plan.only(share.cells)


def portions(shares: Iterable[Share], size: int) -> Iterator[tuple[Share, ...]]:
    """Yield the shares in portions of `size` cells: several prompts, or a part of one."""
    waiting: list[Share] = []
    room = size
    for share in shares:
        cells = share.cells
        while cells:
            waiting.append(replace(share, cells=cells[:room]))
            cells, room = cells[room:], room - len(cells[:room])
            if not room:
                yield tuple(waiting)
                waiting, room = [], size
    if waiting:
        yield tuple(waiting)


def local_workers(count: int) -> Callable[[], ProcessPoolExecutor]:
    """Return what starts `count` processes on this machine, each with its share of the threads.

    Each holds the model, so memory sets the limit.

    Example:
        >>> evaluate(load_model(), executor=local_workers(2))  # doctest: +SKIP
    """
    check_count("workers", count, least=1, fix="as many models as memory holds")
    return partial(
        ProcessPoolExecutor,
        count,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would share torch's locks
        initializer=_use_threads,
        initargs=(max(1, (os.cpu_count() or 1) // count),),
    )


def _use_threads(count: int) -> None:
    """Leave the other threads to the other workers; a lower setting stays."""
    torch.set_num_threads(min(count, torch.get_num_threads()))


@dataclass(frozen=True)
class Experiment:
    """What a worker is sent.

    Attributes:
        run: tells this evaluation from every other one.
        prompt: one of the source prompts.
        config: the settings, without a target model.
        load: returns the model.
        load_target: returns the target model, where it is another one.
    """

    run: str
    prompt: str
    config: SweepConfig
    load: Loader
    load_target: Loader | None


class RemoteReader:
    """A reader whose shares other processes read; a context manager.

    Args:
        executor: an executor, which is left running, or a function that starts one.
        model: as in `as_loader`.
        prompt: one of the source prompts.
        config: the settings.
    """

    def __init__(self, executor: Executors, model: Any, prompt: str, config: SweepConfig) -> None:
        target = config.target_model
        self._experiment = Experiment(
            run=uuid.uuid4().hex,
            prompt=prompt,
            config=replace(config, target_model=None),
            load=as_loader(model),
            load_target=None if target is None else as_loader(target, "target_model"),
        )
        self._own: Any = None
        self._pool: Any = executor
        if not hasattr(executor, "submit") or isinstance(executor, type):
            if not callable(executor):
                raise bad_type(
                    "executor", "an executor, or a function that starts one", executor,
                    "pass local_workers(2), or client.get_executor() of a Dask client",
                )  # fmt: skip
            self._own = self._pool = executor()

    def __enter__(self) -> Self:
        try:
            _check_sendable(self._pool, self._experiment)
        except ValueError:
            self.__exit__(None)
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._own:  # after an error, a batch that runs is not waited for
            self._own.shutdown(wait=kind is None, cancel_futures=True)

    def outline(self, prompts: Sequence[str]) -> Outline:
        """Return what the evaluation reads, as a worker finds it."""
        found: Outline
        (found,) = self._run(_remote_outline, [(prompts,)])
        self._outline = found
        return found

    def read(self, shares: Sequence[Share]) -> Generator[list[Reading], None, None]:
        """Yield the readings of some shares of the outline as tasks complete.

        Closing the iterator cancels the tasks that wait. An error in a worker is raised here, and
        a `ChildProcessError` where the workers died.
        """
        there = self._outline
        left = sum(len(share.cells) for share in shares)
        size = min(there.batch_size, max(1, math.ceil(left / LEAST_TASKS)))
        if self._experiment.config.generate == "best":  # the α of a site are compared in one task
            size = math.ceil(size / len(there.alphas)) * len(there.alphas)
        model = there.provenance["model"]
        target = there.provenance["target_model"] or model
        weights = model["fingerprint"], target["fingerprint"]
        return self._run(_remote_read, ((portion, weights) for portion in portions(shares, size)))

    def _run(
        self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
    ) -> Generator[Any, None, None]:
        waiting, flying = iter(tasks), set[Future[Any]]()
        try:
            while True:
                while len(flying) < IN_FLIGHT and (task := next(waiting, None)) is not None:
                    flying.add(self._pool.submit(function, self._experiment, *task))
                if not flying:
                    return
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                failed = {future for future in done if future.cancelled() or future.exception()}
                for future in [*(done - failed), *failed]:
                    yield future.result()
        except (BrokenExecutor, CancelledError) as error:
            wanted = "workers that live until their task has completed"
            fix = (
                "read the workers' last output (memory? a script without if __name__ == "
                "'__main__'?) and run again: completed cells are in the file"
            )
            got = f"{type(error).__name__} ({error})"
            raise ChildProcessError(describe("executor", wanted, got, fix)) from error
        finally:
            for future in flying:
                future.cancel()


def as_loader(model: Any, argument: str = "model") -> Loader:
    """Return how another process gets the same model.

    Raises:
        ValueError: an object that only this process has.
    """
    if isinstance(model, str | Path):
        return partial(load_model, absolute(model))
    found = model.origin if isinstance(model, LanguageModel) else model
    key = _key(found)
    if found is None or any(part in key for part in ("<locals>", "<lambda>", " at 0x")):
        fix = (
            "pass a name, a directory, or a function of a module that returns the loaded model, "
            "such as functools.partial(load_model, 'smollm2', backend='bridge')"
        )
        got = " ".join(repr(model).split())
        raise bad_value(argument, "a model that every worker can load for itself", got, fix)
    loader: Loader = found
    return loader


def _key(load: Any) -> str:
    """Return what tells loaders apart: the function's name and its arguments."""
    if isinstance(load, partial):
        return f"{_key(load.func)} {load.args!r} {sorted(load.keywords.items())!r}"
    name = getattr(load, "__qualname__", None)
    return f"{load.__module__}.{name}" if callable(load) and name else object.__repr__(load)


def kept_under(load: Loader, run: str) -> str:
    """Return the key under which a worker keeps a model.

    By the next run a notebook's function may have changed, and so may the files of a directory.
    """
    key = _key(load)
    named = (*load.args, *load.keywords.values()) if isinstance(load, partial) else ()
    for folder in (Path(part) for part in named if isinstance(part, str | Path)):
        if folder.is_dir():
            key += f" {max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)}"
    return f"{key} {run}" if "__main__." in key else key


def _check_sendable(pool: object, experiment: Experiment) -> None:
    """Name the setting that a process pool could not send; Dask and Ray also send functions."""
    if not isinstance(pool, ProcessPoolExecutor):
        return
    config = experiment.config
    parts = {"model": experiment.load, "target_model": experiment.load_target}
    parts |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in parts}
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    for name, part in parts.items():
        try:
            ForkingPickler.dumps(part)
            function = getattr(part, "func", part)
            if interactive and getattr(function, "__module__", None) == "__main__":
                raise TypeError("a new process lacks what a notebook defined")
        except Exception as error:
            fix = "define the function with def at the top of a module, and import it from there"
            got = f"{part!r} ({error})"
            raise bad_value(name, "something that other processes can get", got, fix) from error


# In a worker.

_TURN = threading.Lock()
_MODELS: dict[str, LanguageModel] = {}
_READERS: dict[str, Reader] = {}


def _reader(experiment: Experiment) -> Reader:
    """Return this worker's reader of an evaluation, made at its first task."""
    if experiment.run not in _READERS:
        _READERS.clear()  # it holds a model: that of the last evaluation has to go first
        loaders = [load for load in (experiment.load, experiment.load_target) if load]
        keys = [kept_under(load, experiment.run) for load in loaders]
        for key in set(_MODELS).difference(keys):
            del _MODELS[key]
        for key, load in zip(keys, loaders, strict=True):
            if key not in _MODELS:
                _MODELS[key] = load_model(load())
        target = _MODELS[keys[1]] if experiment.load_target else None
        config = replace(experiment.config, target_model=target)
        first = plan_sweep(_MODELS[keys[0]], experiment.prompt, config)
        _READERS[experiment.run] = Reader(first)
    return _READERS[experiment.run]


def _remote_outline(experiment: Experiment, prompts: Sequence[str]) -> Outline:
    with _TURN:
        return _reader(experiment).outline(prompts)


def _remote_read(
    experiment: Experiment, shares: Sequence[Share], fingerprints: tuple[str, str]
) -> list[Reading]:
    with _TURN:
        reader = _reader(experiment)
        found = reader.first.model.fingerprint, reader.first.generator.model.fingerprint
        if found != fingerprints:
            wanted = f"weights with the fingerprints {fingerprints} in every worker"
            fix = "give all machines the same files, or name a revision"
            raise bad_value("model", wanted, found, fix)
        return [reading for batch in reader.read(shares) for reading in batch]
