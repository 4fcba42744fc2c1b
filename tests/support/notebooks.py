"""Run the notebooks in full and keep them with their outputs, so that they show on GitHub.

python -m tests.support.notebooks [01_quickstart ...]     (needs a Chromium or Chrome on the PATH)

1. Every cell is executed in a fresh kernel; an error ends the run and leaves the file as it was.
2. Each plotly figure gets a PNG beside its JSON, drawn by plotly.js in the browser; JSON above
   `LARGEST_JSON` goes, the PNG remains.
3. What differs between two runs without meaning anything goes: times of cells, widget states,
   progress bars, addresses, random ids. The metadata keep the seconds of the whole run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support.browser import BROWSERS, browser, browser_path, new_page

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST_JSON = 200_000
LARGEST_NOTEBOOK = 1_800_000
TIMEOUT = 1800
"""Seconds for one cell."""
_DRAW = """([data, layout]) => Plotly.toImage(
  {data, layout, config: {staticPlot: true}},
  {format: 'png', scale: 1, width: layout.width || 900, height: layout.height || 450})"""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_STYLER_ID = re.compile(r"\bT_[0-9a-f]{5}(?![0-9a-f])")


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_quickstart; defaults to all")
    names = parser.parse_args().names
    paths = sorted(FOLDER.glob("*.ipynb"))
    if unknown := set(names) - {path.stem for path in paths}:
        parser.error(f"no notebook {', '.join(sorted(unknown))} in {FOLDER}")
    if browser_path() is None:
        sys.exit(f"browser: expected one of {BROWSERS} on the PATH, got none. Fix: install one.")
    for path in paths:
        if not names or path.stem in names:
            started = time.monotonic()
            notebook = nbformat.read(path, as_version=4)
            execute(notebook, timeout=TIMEOUT)
            with drawing() as draw:
                tidy(notebook, draw)
            seconds = time.monotonic() - started
            notebook.metadata["superscopes_tl"] = {"seconds": round(seconds)}
            nbformat.write(notebook, path)
            print(f"{path.stem}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def execute(notebook: Any, *, timeout: int) -> None:
    """Run all cells, in the notebooks' folder; figures come as JSON alone."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # the kernel inherits it
    resources = {"metadata": {"path": FOLDER}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()


@contextlib.contextmanager
def drawing() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Open a browser that turns a figure's JSON into a PNG, base64 as notebooks keep it."""
    import plotly
    from playwright.sync_api import sync_playwright

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    with sync_playwright() as playwright, browser(playwright) as running, new_page(running) as page:
        page.add_script_tag(path=script)

        def draw(figure: dict[str, Any]) -> str:
            address: str = page.evaluate(_DRAW, [figure["data"], figure["layout"]])
            return address.removeprefix("data:image/png;base64,")

        yield draw


def tidy(notebook: Any, draw: Callable[[dict[str, Any]], str]) -> None:
    """Add the PNGs and take out what only makes differences."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            tidied = (_tidied(output, draw, f"T_{number:02d}") for output in cell.outputs)
            cell.outputs = [output for output in tidied if output is not None]


def _tidied(output: Any, draw: Callable[[dict[str, Any]], str], table_id: str) -> Any:
    """Return an output as it is kept, or `None`."""
    if output.output_type == "stream":
        if output.name == "stderr":  # caveats stay; progress and libraries' warnings go
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if line.startswith("Caveat:"))
        return output if output.text else None
    data = output.get("data", {})
    output.get("metadata", {}).clear()
    if data.pop(WIDGET, None) is not None and "%|" in data.get("text/plain", ""):
        return None
    if figure := data.get(PLOTLY):
        data[PNG] = draw(figure)
        if len(json.dumps(figure)) > LARGEST_JSON:
            del data[PLOTLY]
    if plain := data.get("text/plain"):
        data["text/plain"] = _ADDRESS.sub("", plain)
    if page := data.get("text/html"):
        data["text/html"] = _STYLER_ID.sub(table_id, page)
    return output


if __name__ == "__main__":
    main()
