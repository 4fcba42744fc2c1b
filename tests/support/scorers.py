"""Stand-in scorers: quick, exact, and importable by other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn


def half(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score every text 0.5."""
    return [0.5 for _ in candidates]


def by_length(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score a hundredth of the number of characters, so that different texts differ."""
    return [len(candidate) / 100 for candidate in candidates]


def equal(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score 1 for equal texts, else 0."""
    return [float(a == b) for a, b in zip(references, candidates, strict=True)]


def first_letters(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score 1 where both texts begin with the same letter, else 0."""
    return [float(a[:1] == b[:1]) for a, b in zip(references, candidates, strict=True)]


def letters(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score the Jaccard overlap of the two texts' letters."""
    return [_overlap(set(a), set(b)) for a, b in zip(references, candidates, strict=True)]


def word_overlap(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score the Jaccard overlap of the two texts' words."""
    pairs = zip(references, candidates, strict=True)
    return [_overlap(set(a.lower().split()), set(b.lower().split())) for a, b in pairs]


def never(references: Sequence[str], candidates: Sequence[str]) -> NoReturn:
    """Fail the test: nothing was to be scored."""
    raise AssertionError(f"scored {candidates}")


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))
