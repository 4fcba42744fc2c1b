"""Draw the README's short film of the Explorer: choose a model, run, click a cell, read.

python -m tests.support.film        (needs a Chromium or Chrome on the PATH, and SmolLM2)

1. A notebook in a browser does what its captions say; a screenshot of every step is a frame.
2. While the map fills, frames are taken as fast as they come, and `FILLING` of them are kept.
3. All frames share one palette, so that a GIF stores of each what has changed.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from superscopes_tl.model import DEFAULT_MODEL
from superscopes_tl.weights import PACKAGED
from tests.support.browser import (
    BROWSERS,
    browser_path,
    chromium,
    click_cell,
    lab,
    open_notebook,
    place_of,
    run_all,
    wait_for_state,
)
from tests.support.pictures import IMAGES, record

TARGET = IMAGES / "explorer.gif"
WIDTH, CAPTION, COLOURS = 900, 40, 128
KEPT = ("#e05a00", "#4caf50", "#1a5fb4", "#ffffff", "#000000")  # too rare to be chosen
FILLING = 7
LARGEST = 3_000_000  # bytes
CODE = """\
from superscopes_tl import Explorer, load_model

model = load_model("smollm2", backend="bridge")
Explorer(
    model, "Albert Einstein", source_template="Tell me about {}", chat=True, target_layer=0,
    kinds=("mlp_out", "resid_post"), layers=range(0, 30, 2), max_new_tokens=16, generate="none",
    batch_size=20,
)"""
CELL = (1, 0, 5)  # block outputs, α = 1, layer 10
SCROLL = """e => {
  e.scrollIntoView({ block: 'start' });
  for (let p = e; p; p = p.parentElement) p.scrollLeft = 0;
}"""
POINTER = """() => {
  const pointer = document.createElement('div');
  pointer.innerHTML = `<svg width="22" height="30"><path d="M1 1v23l6-6 4 10 4-2-4-9h8z"
    fill="#000" stroke="#fff" stroke-width="1.5"/></svg>`;
  pointer.style = 'position:fixed;z-index:9999;pointer-events:none;left:-40px;top:0';
  document.body.append(pointer);
  document.addEventListener('mousemove', (event) => {
    pointer.style.left = `${event.clientX}px`;
    pointer.style.top = `${event.clientY}px`;
  }, true);
}"""

Frame = tuple[bytes, str, int]
"""A screenshot, its caption, and for how many milliseconds it is shown."""


def main() -> None:
    """Make the film."""
    from playwright.sync_api import sync_playwright

    if browser_path() is None:
        sys.exit(f"browser: expected one of {BROWSERS} on the PATH, got none. Fix: install one.")
    started = time.monotonic()
    with (
        sync_playwright() as playwright,
        lab() as server,
        chromium(playwright, width=1180, height=800) as page,
    ):
        server.write("explorer.ipynb", [CODE])
        frames = list(_scenes(page, server))
    _assemble(frames)
    print(f"{len(frames)} frames, {TARGET.stat().st_size / 1e6:.2f} MB")
    assert TARGET.stat().st_size < LARGEST
    source = f"{DEFAULT_MODEL} {PACKAGED[DEFAULT_MODEL].sha256[:16]} reads 'Albert Einstein'"
    record(TARGET, command="make film", seconds=time.monotonic() - started, source=source)


def _scenes(page: Any, server: Any) -> Iterator[Frame]:
    """Do what a reader does; yield a frame for every step."""

    def shot() -> bytes:
        picture: bytes = page.locator(".jp-NotebookPanel-notebook").screenshot()
        return picture

    open_notebook(page, server, "explorer.ipynb")
    page.evaluate(POINTER)
    yield shot(), "1 · Choose a model and a name", 2500
    run_all(page)
    page.wait_for_selector(".ssx-estimate .ssx-note")
    page.locator(".ssx").evaluate(SCROLL)
    page.wait_for_timeout(1500)
    yield shot(), "2 · Choose a token, layers, kinds of activation, amplifiers", 2500
    page.locator(".ssx-run").hover()
    yield shot(), "3 · Run", 800
    page.locator(".ssx-run").click()
    page.wait_for_selector(".ssx-map .js-plotly-plot")
    page.locator(".ssx-bar").evaluate(SCROLL)
    filling = []
    while page.locator(".ssx-status [data-state='done'][data-run='1']").count() == 0:
        filling.append(shot())
        page.wait_for_timeout(150)
    step = max(1, len(filling) // FILLING)
    for picture in filling[::step]:
        yield picture, "3 · Run: the share of the model's own words that each cell recovers", 400
    wait_for_state(page, "done", 1)
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    page.locator(".ssx-bar").evaluate(SCROLL)
    page.wait_for_timeout(800)
    yield shot(), "3 · Run: the share of the model's own words that each cell recovers", 1800
    page.mouse.move(*place_of(page, *CELL))
    page.wait_for_timeout(500)
    yield shot(), "4 · Click a cell", 1000
    click_cell(page, *CELL)
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    page.wait_for_timeout(500)
    yield shot(), "4 · Click a cell", 1200
    page.mouse.move(40, 700)
    page.wait_for_timeout(800)
    yield shot(), "4 · Click a cell: what the model says of that activation", 3500
    page.locator(".ssx-below").evaluate(SCROLL)
    page.mouse.move(2, 2)
    page.wait_for_timeout(800)
    yield shot(), "5 · Compare: every amplifier, no patch, a random vector, the logit lens", 3500


def _assemble(frames: list[Frame]) -> None:
    """Write the frames with their captions as one GIF."""
    several = [_captioned(picture, caption) for picture, caption, _ in frames]
    width, height = several[0].size
    strip = Image.new("RGB", (width, height * 3 + 40 * len(KEPT)))
    for place, frame in enumerate((several[0], several[-2], several[-1])):
        strip.paste(frame, (0, place * height))
    for place, colour in enumerate(KEPT):
        strip.paste(colour, (0, 3 * height + 40 * place, width, 3 * height + 40 * (place + 1)))
    palette = strip.quantize(COLOURS)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in several]
    durations = [milliseconds for _, _, milliseconds in frames]
    first.save(TARGET, save_all=True, append_images=rest, duration=durations, loop=0)


def _captioned(picture: bytes, caption: str) -> Image.Image:
    """Return a screenshot in the film's width, with its caption below."""
    shown = Image.open(io.BytesIO(picture)).convert("RGB")
    height = round(WIDTH * shown.height / shown.width)
    frame = Image.new("RGB", (WIDTH, height + CAPTION), "#1f2328")
    frame.paste(shown.resize((WIDTH, height), Image.Resampling.LANCZOS))
    place = (16, height + CAPTION // 2)
    font = ImageFont.load_default(20)
    ImageDraw.Draw(frame).text(place, caption, fill="#ffffff", font=font, anchor="lm")
    return frame


if __name__ == "__main__":
    main()
