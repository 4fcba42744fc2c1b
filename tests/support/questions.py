"""Run the code of the documentation's pages, and keep what it prints beside it.

python -m tests.support.questions [first real ...]     writes the outputs that are not there

Delete an output to have it written anew; models are needed.

1. Every block of `python` of a page runs by itself, in a folder of its own, as a reader would run
   it, but for models, which are loaded once.
2. The block of `text` that follows it is what it prints. Blocks of `py` are not run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import superscopes_tl
from superscopes_tl.model import load_model

PAGES = Path(__file__).parent.parent.parent / "notebooks" / "docs" / "pages" / "questions"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d+\.\d+")


@cache
def _loaded(name: str = "smollm2", backend: str = "auto") -> Any:
    return load_model(name, backend=backend, device="cpu")  # type: ignore[arg-type]


def printed(code: str) -> str:
    """Return what a block prints, without spaces at the ends of lines."""
    out = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        _inside(folder),
        contextlib.redirect_stdout(out),
        mock.patch.object(superscopes_tl, "load_model", _loaded, create=True),
    ):
        exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def numbers(text: str) -> list[float]:
    """Return the decimal numbers of a text."""
    return [float(number) for number in _NUMBER.findall(text)]


def words(text: str) -> list[str]:
    """Return a text's words, a decimal number as `#`."""
    return _NUMBER.sub("#", text).split()


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _rerun(match: re.Match[str]) -> str:
    if match[2] is not None:
        return match[0]
    started = time.monotonic()
    shown = printed(match[1])
    print(f"{time.monotonic() - started:.1f} s\n{shown}", flush=True)
    return f"```python\n{match[1]}```\n" + (f"\n```text\n{shown}```\n" if shown else "")


def main() -> None:
    """Write the outputs that are missing from the pages that are named, or from all."""
    for path in sorted(PAGES.glob("*.md")):
        if len(sys.argv) < 2 or path.stem in sys.argv[1:]:
            print(path.stem, flush=True)
            path.write_text(BLOCK.sub(_rerun, path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
