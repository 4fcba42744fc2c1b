"""The code of the documentation's pages prints what the pages show; `make docstest` runs it."""

from __future__ import annotations

import re

import pytest

from superscopes_tl.weights import find_packaged
from tests.support.questions import BLOCK, PAGES, numbers, printed, words

pytestmark = [pytest.mark.docs, pytest.mark.filterwarnings("ignore")]


def _blocks() -> list[pytest.ParameterSet]:
    found = []
    for path in sorted(PAGES.glob("*.md")):
        for part in re.split(r"^## ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            anchor = re.search(r"\{#([\w-]+)\}", part)
            found += [pytest.param(*pair, id=anchor and anchor[1]) for pair in BLOCK.findall(part)]
    return found


@pytest.mark.parametrize(("code", "shown"), _blocks())
def test_a_block_prints_what_the_page_shows(code: str, shown: str) -> None:
    """The same words, and numbers that differ by no more than rounding."""
    for model in ("smollm2", *(["gemma-3-270m"] if "gemma" in code else [])):
        if find_packaged(model) is None:
            pytest.skip(f"superscopes fetch {model}")
    found = printed(code)
    assert words(found) == words(shown)
    assert numbers(found) == pytest.approx(numbers(shown), abs=0.02, rel=0.01)
