"""An experiment over many processes, on one machine or on many.

1. The parent has no model. It asks a worker (`workers`) for the experiment's outline, then hands
   out tasks, at most `IN_FLIGHT` at a time, and yields what comes back, whichever is finished.
2. When workers die and the executor breaks, it is started anew, and the tasks that were in flight
   are done again; a task that was there more than `MOST_BREAKAGES` times ends it with an error.

A task is one batch, filled across prompts as in one process. A run of fewer than `LEAST_TASKS`
batches is cut into that many tasks, so that a few cells, or one prompt with many, are spread too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, Protocol, Self, TypeAlias

import torch

from superscopes_tl.errors import bad_type, bad_value, check_count, describe
from superscopes_tl.evaluation.shares import Outline, Share, portions
from superscopes_tl.evaluation.workers import Experiment, as_loader, outline_there, read_there
from superscopes_tl.experiment import Reading, SweepConfig

IN_FLIGHT = 256
"""How many tasks are handed out at most before one of them is back."""

LEAST_TASKS = 8
"""Into how many tasks a run is cut that has fewer batches."""

MOST_BREAKAGES = 3
"""How often in a row an executor is started anew without one finished task."""


_GIVEN_UP = "KilledWorker"
"""Dask's error for a task that it has tried often enough; Dask need not be installed here."""


class Executor(Protocol):
    """Calls functions elsewhere: any `concurrent.futures.Executor`, or what acts like one."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Return the future of one call."""


Workers: TypeAlias = Executor | Callable[[], Executor]
"""An executor, or a function that starts one, which is called anew when its workers have died."""


def local_workers(count: int) -> Callable[[], ProcessPoolExecutor]:
    """Return what starts `count` processes on this machine, each with its share of the threads.

    Example:
        >>> evaluate(load_model(), executor=local_workers(2))  # doctest: +SKIP

    Args:
        count: how many; each holds the model, so memory sets the limit.

    Raises:
        ValueError, TypeError: less than one.
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
    """Leave the other threads to the other workers; what is set lower stays as it is."""
    torch.set_num_threads(min(count, torch.get_num_threads()))


class Spread:
    """An experiment that other processes read; a context manager.

    Args:
        executor: an executor, which is left running, or a function that starts one.
        model: as in `as_loader`.
        prompts: the source prompts.
        config: the settings.

    Raises:
        ValueError, TypeError: something that cannot be sent.
    """

    def __init__(
        self, executor: Workers, model: Any, prompts: Sequence[str], config: SweepConfig
    ) -> None:
        asked = config.target_model
        self._experiment = Experiment(
            run=uuid.uuid4().hex,
            prompt=prompts[0],
            config=replace(config, target_model=None),
            load=as_loader(model),
            load_target=None if asked is None else as_loader(asked, "target_model"),
        )
        self._prompts = prompts
        self._start = _starter(executor)
        self._pool: Any = self._start() if self._start else executor
        self._deaths: Counter[int] = Counter()  # breakages that each task saw, by its id
        try:
            _check_sendable(self._pool, self._experiment)
        except ValueError:
            self._end(wait=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end(wait=kind is None)  # what waits is cancelled; a batch that runs is not waited for

    def _end(self, *, wait: bool) -> None:
        if self._start:
            self._pool.shutdown(wait=wait)

    def outline(self) -> Outline:
        """Return what the experiment reads, as a worker finds it.

        Raises:
            ValueError, TypeError: a bad setting.
            ChildProcessError: the workers die.
        """
        found: Outline
        (found,) = self._run(outline_there, [(self._prompts,)])
        return found

    def read(self, there: Outline, shares: Sequence[Share]) -> Generator[list[Reading], None, None]:
        """Yield the readings of some shares, task by task, as they are finished.

        Closing the iterator cancels the tasks that wait.

        Args:
            there: from `outline`.
            shares: what to read.

        Raises:
            ChildProcessError: the workers die.
            Exception: what a worker raised.
        """
        left = sum(len(share.cells) for share in shares)
        size = min(there.batch_size, max(1, math.ceil(left / LEAST_TASKS)))
        if self._experiment.config.generate == "best":  # which α is best is decided in one task
            size = math.ceil(size / len(there.alphas)) * len(there.alphas)
        model = there.provenance["model"]
        asked = there.provenance["target_model"] or model
        weights = model["fingerprint"], asked["fingerprint"]
        return self._run(read_there, ((portion, weights) for portion in portions(shares, size)))

    def _run(
        self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
    ) -> Generator[Any, None, None]:
        waiting = deque(tasks)
        flying: dict[Future[Any], tuple[Any, ...]] = {}
        landed: SimpleQueue[Future[Any]] = SimpleQueue()
        broken: BaseException | None = None
        try:
            while waiting or flying:
                if broken and not flying:
                    self._replace(broken, max(self._deaths.values()))
                    broken = None
                while waiting and not broken and len(flying) < IN_FLIGHT:
                    try:
                        future = self._pool.submit(function, self._experiment, *waiting[0])
                    except BrokenExecutor as error:
                        broken = error
                        self._deaths[id(waiting[0])] += 1
                    else:
                        flying[future] = waiting.popleft()
                        future.add_done_callback(landed.put)
                if not flying:
                    continue
                future = landed.get()
                task = flying.pop(future)
                try:
                    found = future.result()
                except (BrokenExecutor, CancelledError) as error:
                    broken = error
                    self._deaths[id(task)] += 1
                    waiting.appendleft(task)
                except Exception as error:
                    if type(error).__name__ == _GIVEN_UP:
                        raise _dead(error) from error
                    raise
                else:
                    del self._deaths[id(task)]
                    yield found
        finally:
            for future in flying:
                future.cancel()

    def _replace(self, why: BaseException, deaths: int) -> None:
        """Start the executor anew, if that may help the task that saw most deaths."""
        if self._start is None:
            raise _dead(why, fix="; or pass a function that starts the executor") from why
        if deaths > MOST_BREAKAGES:
            raise _dead(why, f", {deaths} times at one task") from why
        self._pool.shutdown(wait=False)
        self._pool = self._start()


def _dead(why: BaseException, often: str = "", fix: str = "") -> ChildProcessError:
    """Return the error that ends a run whose workers die."""
    return ChildProcessError(
        describe(
            "executor",
            "workers that live until their task is done",
            f"{type(why).__name__} ({why}){often}",
            "read what the workers wrote last (memory? a script without "
            f"if __name__ == '__main__'?) and run again: a file goes on where it was{fix}",
        )
    )


def _starter(executor: Any) -> Callable[[], Any] | None:
    """Return what starts an executor; nothing of one that is started already."""
    if hasattr(executor, "submit") and not isinstance(executor, type):
        return None
    if not callable(executor):
        raise bad_type(
            "executor", "an executor, or a function that starts one", executor,
            "executor=local_workers(2), or client.get_executor() of a Dask client",
        )  # fmt: skip
    start: Callable[[], Any] = executor
    return start


def _check_sendable(pool: object, experiment: Experiment) -> None:
    """Say which setting a process pool could not send; Dask and Ray also send functions whole."""
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
                raise TypeError("a new process does not have what a notebook defined")
        except Exception as error:
            raise bad_value(
                name,
                "something that can be sent to another process",
                f"{part!r} ({error})",
                "define the function with def at the top of a module, and import it from there",
            ) from error
