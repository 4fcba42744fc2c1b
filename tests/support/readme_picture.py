"""Draw the README's pictures: a map of SmolLM2, and the Explorer in two themes.

python -m tests.support.readme_picture        (needs a Chromium or Chrome on the PATH)
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from superscopes_tl import heatmap, load_model, sweep
from superscopes_tl.model import DEFAULT_MODEL
from superscopes_tl.weights import PACKAGED
from tests.support.browser import (
    BROWSERS,
    browser_path,
    chromium,
    lab,
    open_notebook,
    run_all,
    wait_for_state,
)
from tests.support.pictures import IMAGES, record

PROMPT = "Albert Einstein"
SHOW = f"""\
from superscopes_tl import Explorer, load_model
explorer = Explorer(load_model(backend="bridge"), {PROMPT!r}, generate="best")
explorer"""
RUN = """\
explorer.run().wait()
explorer.select(kind="resid_post", layer=explorer.model.n_layers // 2, alpha=1)"""
EXPLORERS = (
    ("JupyterLab Light", 1200, "explorer_light"),
    ("JupyterLab Dark", 800, "explorer_dark"),
)


def main() -> None:
    """Take the screenshots."""
    from playwright.sync_api import sync_playwright

    if browser_path() is None:
        sys.exit(f"browser: expected one of {BROWSERS} on the PATH, got none. Fix: install one.")
    with sync_playwright() as playwright:
        _drawn("heatmap", partial(draw_heatmap, playwright))
        for theme, width, name in EXPLORERS:
            _drawn(name, partial(draw_explorer, playwright, theme, width))


def _drawn(name: str, draw: Callable[[Path], None]) -> None:
    started, path = time.monotonic(), IMAGES / f"{name}.png"
    draw(path)
    model = f"{DEFAULT_MODEL} {PACKAGED[DEFAULT_MODEL].sha256[:16]}"
    seconds, source = time.monotonic() - started, f"{model} reads {PROMPT!r}"
    record(path, command="make picture", seconds=seconds, source=source)


def draw_heatmap(playwright: Any, path: Path) -> None:
    """The figure that `heatmap` returns."""
    result = sweep(
        load_model(backend="bridge", device="cpu"),
        PROMPT,
        kinds=("mlp_out", "resid_post"),
        alphas=(1, 2, 3, 6, 9, 15),
        source_template="Tell me about {}",
        chat=True,
        target_layer=0,
        max_new_tokens=16,
        generate="none",
    )
    figure = heatmap(result, value="recovered")
    width, height = int(figure.layout.width), int(figure.layout.height)
    with (
        tempfile.TemporaryDirectory() as folder,
        chromium(playwright, width=width + 20, height=height + 20) as page,
    ):
        target = Path(folder) / "heatmap.html"
        figure.write_html(target, config={"displayModeBar": False})
        page.goto(target.as_uri())
        page.wait_for_selector(".heatmaplayer image")
        page.screenshot(path=path)


def draw_explorer(playwright: Any, theme: str, width: int, target: Path) -> None:
    """The Explorer in JupyterLab, after a run, with a cell chosen."""
    with lab(theme) as server, chromium(playwright, width=width, height=2400) as page:
        server.write("explorer.ipynb", [SHOW, RUN])
        open_notebook(page, server, "explorer.ipynb")
        run_all(page)
        wait_for_state(page, "done", 1)
        page.wait_for_selector(".ssx-probe [data-probe='done']")
        page.mouse.move(2, 2)
        page.wait_for_timeout(1500)  # a picture, not a test: let transitions end
        page.locator(".ssx").screenshot(path=target)


if __name__ == "__main__":
    main()
