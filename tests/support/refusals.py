"""The form of an error message: one line of argument, expected, got and fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest


def refused(action: Callable[[], Any], error: type[Exception], argument: str) -> str:
    """Return the message of the error that `action` raises, after checking class and form."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert re.match(rf"{re.escape(argument)}: expected .*, got .*\. Fix: .*\.$", message), message
    assert "\n" not in message
    assert len(message) <= 600
    return message
