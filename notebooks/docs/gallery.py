"""The gallery: pages as the Explorer and `save_as` export them, from stored sweeps.

A page that is exported holds plotly.js; here the pages share the file that lies beside the site.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superscopes_tl import SweepResult, write_html
from superscopes_tl.figures import layer_grid, save_as

RESULTS = Path(__file__).parent.parent / "results"
_LIBRARY = re.compile(r"<script[^>]*>\s*/\*\*\s*\* plotly\.js.*?</script>", re.DOTALL)


@dataclass(frozen=True)
class Exhibit:
    """A stored sweep, what its page shows, and the Python that makes the page from the sweep."""

    title: str
    about: str
    code: str = 'save_as(result, "page.html")'


EXHIBITS = {
    "gallery_pink_floyd": Exhibit(
        "A name at every layer",
        "SmolLM2 reads *Pink Floyd* in the paper's few-shot prompt. The colour is the share of the "
        "model's own words that a block output recovers; hover for the text and its controls.",
    ),
    "gallery_einstein": Exhibit(
        "MLP outputs beside block outputs",
        "The map of README's picture, with texts: SmolLM2 in its chat form. MLP outputs of layers "
        "0, 7 and 8 are read, the last two only when amplified.",
    ),
    "gallery_targets": Exhibit(
        "Which target layer?",
        "Every third source layer patched into every third target layer, α = 1.",
        'write_html(layer_grid(result, value="recovered"), "page.html")',
    ),
    "gallery_gemma": Exhibit("Another model", "Gemma 3 270M, a base model, reads *Marie Curie*."),
}
"""By the name of the file in `notebooks/results`."""


def there() -> dict[str, Exhibit]:
    """Return the exhibits whose sweeps are stored."""
    return {name: e for name, e in EXHIBITS.items() if (RESULTS / f"{name}.zip").is_file()}


def pages() -> dict[str, str]:
    """Return every exported page, by its name."""
    return {f"{name}.html": _page(name) for name in there()}


def _page(name: str) -> str:
    result: Any = SweepResult.load(RESULTS / f"{name}.zip")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        if "layer_grid" in EXHIBITS[name].code:
            write_html(layer_grid(result, value="recovered"), path)
        else:
            save_as(result, path)
        page = path.read_text("utf-8")
    shared, count = _LIBRARY.subn('<script src="../assets/plotly.min.js"></script>', page)
    if count != 1:
        raise ValueError(f"{name}: expected plotly.js once in the exported page, got {count} times")
    return shared
