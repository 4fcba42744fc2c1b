"""Measure the ways beside each other.

1. Compute every way's cells once: nothing is timed that was not compared, and nothing is timed
   cold. Ways that share a cell must write the same tokens, unless its nearest call was a near tie.
2. Time the jobs in turns, round by round, so that a busy moment of the machine meets all of them.
   Between two jobs the speed of a matrix product is measured: the clock of a machine wanders.
3. A job's rate over another's, and over what arithmetic alone would allow, are taken within a
   round; the median of the rounds counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from tests.benchmarks.ways import Run, Tokens
from tests.benchmarks.work import Cell

WATCHED = 0.01
"""Seconds between two looks at how much memory is taken."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way and the cells that it computes per round."""

    name: str
    run: Run
    cells: Sequence[Cell]


@dataclass(frozen=True, eq=False)
class Job:
    """What is timed.

    Attributes:
        name: of its row.
        work: computes all of it.
        count: how many cells it computes; of the best readings, how many sites.
        flop: floating-point operations of one of them.
        against: the name of the job that it is held against.
        dtype: of its matrix products.
        unit: what is counted.
    """

    name: str
    work: Callable[[], object]
    count: int
    flop: float
    against: str
    dtype: torch.dtype
    unit: str = "cells"


@dataclass(frozen=True)
class Row:
    """What was measured of a job.

    Attributes:
        name: of the job.
        rate: cells per second; of the best readings, sites.
        ratio: to the rate of the job that it is held against.
        share: of what arithmetic alone would allow.
        against: the name of that other job.
        unit: what is counted.
    """

    name: str
    rate: float
    ratio: float
    share: float
    against: str
    unit: str = "cells"


Texts = Mapping[str, Mapping[Cell, Tokens]]


def write_all(ways: Sequence[Way]) -> Texts:
    """Return what each way writes for its cells."""
    return {way.name: dict(zip(way.cells, way.run(way.cells), strict=True)) for way in ways}


def differing(texts: Texts) -> list[tuple[Cell, str, str]]:
    """Return the cells that two ways write differently: each way beside the first with the cell."""
    first: dict[Cell, str] = {}
    found = []
    for name, written in texts.items():
        for cell, tokens in written.items():
            other = first.setdefault(cell, name)
            if texts[other][cell] != tokens:
                found.append((cell, other, name))
    return found


def check_equal(texts: Texts, margin: Callable[[Cell], float], near_tie: float) -> None:
    """Raise if two ways write different tokens for a cell that is no near tie.

    Raises:
        RuntimeError: one of them computes something else.
    """
    for cell, one, other in differing(texts):
        distance = margin(cell)
        if distance >= near_tie:
            raise RuntimeError(
                f"{other} does not write what {one} does for {cell.prompt!r}, layer {cell.layer}, "
                f"α = {cell.alpha:g} (nearest call {distance:.1e}): {texts[one][cell]} and "
                f"{texts[other][cell]}"
            )


def share_equal(texts: Texts) -> float:
    """Return how many of the comparisons of two ways' tokens found them equal."""
    pairs = sum(map(len, texts.values())) - len({cell for one in texts.values() for cell in one})
    return 1 - len(differing(texts)) / pairs if pairs else 1.0


def in_rounds(
    jobs: Sequence[Job], rounds: int, speed: Callable[[torch.dtype], float]
) -> tuple[list[Row], float]:
    """Return a row per job, and the median speed of a matrix product in the first job's dtype.

    Args:
        jobs: in the order in which they take turns; what one is held against is among them.
        rounds: of which the median counts.
        speed: measures the speed of a matrix product, in operations per second.
    """
    dtypes = {job.dtype for job in jobs}
    rates: dict[str, list[float]] = {job.name: [] for job in jobs}
    shares: dict[str, list[float]] = {job.name: [] for job in jobs}
    speeds: list[float] = []
    for _ in range(rounds):
        before = {dtype: speed(dtype) for dtype in dtypes}
        for job in jobs:
            started = time.perf_counter()
            job.work()  # hands over numbers, so it has waited for the device
            rate = job.count / (time.perf_counter() - started)
            after = {dtype: speed(dtype) for dtype in dtypes}
            product = (before[job.dtype] + after[job.dtype]) / 2
            rates[job.name].append(rate)
            shares[job.name].append(rate * job.flop / product)
            speeds.append(after[jobs[0].dtype])
            before = after
    rows = []
    for job in jobs:
        pairs = zip(rates[job.name], rates[job.against], strict=True)
        ratio = statistics.median(rate / other for rate, other in pairs)
        rate, share = (statistics.median(found[job.name]) for found in (rates, shares))
        rows.append(Row(job.name, rate, ratio, share, job.against, job.unit))
    return rows, statistics.median(speeds)


def memory_above(device: torch.device, work: Callable[[], object]) -> int:
    """Return the most memory that some work takes above what is taken already, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        # What was freed but not given back would hide as much of what is taken.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(WATCHED):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - seen[0]


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was ever taken, in bytes: the device's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
