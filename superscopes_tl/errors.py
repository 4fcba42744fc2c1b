"""Errors about bad input, with one form of message: argument, expected, got, fix.

alphas: expected at least one finite number, got []. Fix: pass for example alphas=(1, 3, 6).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

Choice = TypeVar("Choice")


class UnavailableKindError(ValueError):
    """The model does not compute the requested kind of activation."""


class PlaceholderError(ValueError):
    """The placeholder of the target prompt is missing or not a token of its own."""


class ModelLoadError(ValueError):
    """The argument cannot be loaded as a model."""


class RunFileError(ValueError):
    """The file is not one that this version of the package can read."""


LONGEST_GOT = 200
"""Longest excerpt of a bad value in a message, in characters."""


def describe(argument: str, expected: str, got: object, fix: str) -> str:
    """Return `argument: expected ..., got .... Fix: ....` with `got` cut at `LONGEST_GOT`.

    A string is shown without quotes, unless it is blank or contains line breaks.
    """
    plain = isinstance(got, str) and got.isprintable() and got.strip()
    shown = str(got) if plain else repr(got)
    if len(shown) > LONGEST_GOT:
        shown = f"{shown[: LONGEST_GOT - 1]}…"
    return f"{argument}: expected {expected}, got {shown}. Fix: {fix}."


def brief(text: object, longest: int = 160) -> str:
    """Return foreign text on one line, cut at `longest` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def reason(error: Exception) -> str:
    """Return the message of an error, with its class unless it is a plain `ValueError`."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def bad_value(argument: str, expected: str, got: object, fix: str) -> ValueError:
    """Return (not raise) the `ValueError` for a bad value of `argument`."""
    return ValueError(describe(argument, expected, got, fix))


def bad_type(argument: str, expected: str, got: object, fix: str) -> TypeError:
    """Return (not raise) the `TypeError` for an `argument` of the wrong type."""
    shown = f"{type(got).__name__} {got!r}"
    return TypeError(describe(argument, expected, shown, fix))


def bad_model(argument: str, expected: str, got: object, fix: str) -> ModelLoadError:
    """Return (not raise) the `ModelLoadError` for an `argument` that leads to no model."""
    return ModelLoadError(describe(argument, expected, got, fix))


def check_choice(argument: str, value: Choice, choices: Iterable[Choice]) -> Choice:
    """Return `value` after checking that it is one of `choices`.

    Raises:
        ValueError: the message lists them and suggests the closest one.
    """
    names = list(choices)
    if value in names:
        return value
    close = difflib.get_close_matches(str(value), [str(name) for name in names], n=1, cutoff=0.5)
    fix = f"use {close[0]!r}" if close else "pass one of them"
    raise bad_value(argument, f"one of {', '.join(map(repr, names))}", value, fix)


def check_callable(argument: str, given: object, *, expected: str, fix: str) -> None:
    """Raise a `TypeError` unless `given` is callable."""
    if not callable(given):
        raise bad_type(argument, expected, given, fix)


def check_count(argument: str, value: object, *, least: int, fix: str) -> int:
    """Return `value` after checking that it is an integer of at least `least`.

    Raises:
        TypeError: not a whole number.
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(argument, "a whole number", value, f"pass {least} or more")
    if value < least:
        raise bad_value(argument, f"{least} or more", value, fix)
    return value
