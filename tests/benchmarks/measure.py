"""Measure the ways beside each other.

1. Compute every way's cells once: nothing is timed that was not compared, and nothing is timed
   cold. Ways that share a cell must write the same tokens, unless its nearest call was a near tie.
2. Time the ways in turns, round by round, so that a busy moment of the machine meets all of them.
   A rate is cells per second; the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from tests.benchmarks.ways import Run, Tokens
from tests.benchmarks.work import Cell


@dataclass(frozen=True, eq=False)
class Way:
    """One way and the cells that it computes per round."""

    name: str
    run: Run
    cells: Sequence[Cell]


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


def cells_per_second(ways: Sequence[Way], rounds: int) -> dict[str, float]:
    """Return the median rate of each way over some rounds."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            started = time.perf_counter()
            way.run(way.cells)  # hands over numbers, so it has waited for the device
            rates[way.name].append(len(way.cells) / (time.perf_counter() - started))
    return {name: statistics.median(measured) for name, measured in rates.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was ever taken, in bytes: the device's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
