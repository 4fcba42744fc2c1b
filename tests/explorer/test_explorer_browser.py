"""The Explorer in a real browser: JupyterLab, a saved notebook, an exported page, Voilà.

With the mouse, with the keyboard alone, and as axe-core judges it for other ways to use a page.

Waits are for states and elements, never for time.
"""

from __future__ import annotations

import html
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest

from tests.support.browser import (
    PATIENCE,
    Server,
    browser,
    browser_path,
    click_cell,
    lab,
    new_page,
    open_notebook,
    run_all,
    serve,
    slowed,
    wait_for_state,
)

MISSING = [
    *([] if browser_path() else ["a Chromium"]),
    *(
        n
        for n in ("playwright", "jupyterlab", "axe_playwright_python")
        if importlib.util.find_spec(n) is None
    ),
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SHOW = """\
import time
from pathlib import Path
from superscopes_tl import Explorer, SweepConfig, load_model
def words(references, candidates):
    return [len(candidate) / 100 for candidate in candidates]
def slow(references, candidates):
    time.sleep(0.5)
    return words(references, candidates)
explorer = Explorer(
    load_model(Path({model!r}), backend="bridge"), "Red Hot Chili Peppers",
    SweepConfig(layers=range(6), alphas=(1, 3, 9), batch_size=18, scorer=words),
    scorers=dict(slow=slow),
)
explorer"""
SCORES = """() => document.querySelector('.ssx-map .js-plotly-plot').data
  .filter(t => t.type === 'heatmap').map(t => t.z)"""
# Saves until nothing is left to save: once is not enough where the notebook still changes.
SAVED = """async () => {
  const { context } = window.jupyterapp.shell.currentWidget;
  if (context.model.dirty) await context.save();
  return !context.model.dirty;
}"""
# A page imports a script that it was sent through an address of its own for it.
COUNT_LARGE_SCRIPTS = """
  window.largeScripts = 0;
  const create = URL.createObjectURL;
  URL.createObjectURL = (part) => {
    if (part.size > 1e6) window.largeScripts += 1;
    return create(part);
  };"""
NEW_MAP_FILLS = """() => {
  const data = document.querySelector('.ssx-map .js-plotly-plot')?.data;
  return data?.[0].z?.[0]?.length === 9 && data.some(t => t.z?.flat().some(v => v !== null));
}"""
APP = """\
import sys
from superscopes_tl.explorer import serve
sys.exit(serve({cell!r}, port=int(sys.argv[1]), token=sys.argv[2], open_browser=False))"""
# What Tab has to reach, in this order.
STOPS = """[...document.querySelectorAll('.ssx :is(button, input, select, textarea, summary, '
  + 'a[href], [tabindex], [contenteditable=true])')]
  .filter(e => !e.disabled && (e.tabIndex >= 0 || e.isContentEditable) && e.checkVisibility())"""
STOP = f"""() => {{
  const e = document.activeElement, style = getComputedStyle(e);
  const seen = style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2;
  return [{STOPS}.indexOf(e), seen];
}}"""
# The least contrast of the texts around the plots (WCAG 2); those in cells are tested elsewhere.
CONTRAST = """() => {
  const light = (colour) => {
    const context = new OffscreenCanvas(1, 1).getContext('2d');
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      const c = part / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    }).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  };
  let behind = document.querySelector('.ssx');
  while (/, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const page = light(getComputedStyle(behind).backgroundColor);
  const texts = [...document.querySelectorAll('.ssx .js-plotly-plot text')]
    .filter((text) => !text.closest('.heatmap-label, .hm, .hoverlayer') && text.textContent);
  return [texts.length, Math.min(...texts.map((text) => {
    const [dark, bright] = [page, light(getComputedStyle(text).fill)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  }))];
}"""
BAD = ("serious", "critical")
SHAPES = """() => document.querySelector('.ssx-map .js-plotly-plot').layout.shapes
  .map(s => [s.xref, s.x0, s.y0])"""


@pytest.fixture(scope="module")
def show(llama_folder: Path) -> str:
    """The cell that shows an Explorer."""
    return SHOW.format(model=str(llama_folder))


@pytest.fixture(scope="module")
def server(show: str) -> Iterator[Server]:
    """JupyterLab with the notebook that most of these tests look at."""
    with lab() as running:
        running.write("explorer.ipynb", [show])
        yield running


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, browser(playwright) as running:
        yield running


@pytest.fixture(scope="module")
def page(running: Any, server: Server) -> Iterator[Any]:
    """A page whose Explorer has run once."""
    with new_page(running) as opened:
        open_notebook(opened, server, "explorer.ipynb")
        run_all(opened)
        opened.locator(".ssx-run").click()
        wait_for_state(opened, "done", 1)
        yield opened
        assert not opened.failures


def save(page: Any) -> str:
    """Save the result by the button; return where it says it is."""
    page.locator(".ssx-save").click()
    page.wait_for_selector(".ssx-saved [data-saved]")
    return str(page.locator(".ssx-saved [data-saved]").get_attribute("data-saved"))


def detail(page: Any, cell: str) -> Any:
    """Wait until the panel shows a cell; return the panel."""
    page.wait_for_selector(f".ssx-detail [data-cell='{cell}']")
    return page.locator(".ssx-detail")


@pytest.mark.transformer_lens
def test_a_click_on_a_cell_shows_its_text(page: Any) -> None:
    """The panel shows what hovering shows, then controls and coloured tokens; no warnings."""
    click_cell(page, 2, 1, 3)
    hover = page.locator(".ssx-map .hoverlayer .hovertext").text_content()
    text = detail(page, "resid_post/3/3").locator("blockquote").inner_text()
    assert text
    assert text[:40] in html.unescape(hover)
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    assert "unpatched" in page.locator(".ssx-probe").inner_text()
    assert page.locator(".ssx-text span").count() > 3
    stderr = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
    assert page.locator(stderr).count() == 0
    assert page.locator(".ssx [role='alert']").count() == 0


def test_the_keyboard_moves_the_selection(page: Any) -> None:
    """Tab reaches the cursors; an arrow key moves one layer up."""
    click_cell(page, 1, 1, 2)
    detail(page, "mlp_out/2/3")
    handle = page.locator(".ssx-panel .widget-hslider [role='slider']").first
    handle.focus()
    page.keyboard.press("ArrowRight")
    detail(page, "mlp_out/3/3")


def test_arrow_keys_move_the_selection_on_the_map(page: Any) -> None:
    """The map is a stop of Tab: arrows change layer and α, page up and down the kind."""
    click_cell(page, 1, 1, 2)
    detail(page, "mlp_out/2/3")
    page.locator(".ssx-map").focus()
    for key, cell in (
        ("ArrowUp", "mlp_out/3/3"), ("ArrowRight", "mlp_out/3/9"), ("PageDown", "resid_post/3/9"),
        ("PageDown", "resid_post/3/9"), ("ArrowLeft", "resid_post/3/3"),
        ("ArrowDown", "resid_post/2/3"),
    ):  # fmt: skip
        page.keyboard.press(key)
        detail(page, cell)
    page.wait_for_selector(".ssx-probe [data-probe='done']")


def test_enter_chooses_a_token_and_arrows_an_option(page: Any) -> None:
    """Chips are buttons and lists are lists: the keys of either work."""
    for name in ("·Chili", "·Peppers"):
        page.locator(".ssx-tokens").get_by_role("button", name=name).focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "name => document.querySelector('.ssx-tokens .mod-active').innerText === name", arg=name
        )
    click_cell(page, 1, 1, 2)
    detail(page, "mlp_out/2/3")
    page.locator(".ssx-panel select").first.focus()
    page.keyboard.press("ArrowDown")
    detail(page, "resid_post/2/3")


def test_tab_reaches_every_control_and_shows_where_it_is(page: Any) -> None:
    """In the order of the page, each with an outline; nothing holds the keyboard."""
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    page.locator(".ssx-prompt textarea").focus()
    stops = page.evaluate(f"() => {STOPS}.length")
    assert stops > 40
    for place in range(stops):
        assert page.evaluate(STOP) == [place, True]
        page.keyboard.press("Tab")
    assert page.evaluate(STOP)[0] == -1, "the next stop is JupyterLab's"


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_axe_finds_nothing_serious(page: Any, theme: str) -> None:
    """In no view and theme; and the texts around the plots, which axe skips, stand out enough."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme
    )
    page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=theme)
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    for view in ("Best α", "Decomposition", "All α"):
        page.get_by_text(view, exact=True).first.click()
        there = Axe().run(page, ".ssx", {"resultTypes": ["violations", "incomplete"]}).response
        found = [*there["violations"], *there["incomplete"]]
        bad = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in BAD]
        assert bad == []
    page.wait_for_selector(".ssx-map .js-plotly-plot .heatmaplayer image")
    count, least = page.evaluate(CONTRAST)
    assert count > 20
    assert least >= 4.5


def test_a_right_to_left_prompt_runs_that_way(page: Any) -> None:
    """In its field, and from token to token; the BOS comes first, at the right."""
    prompt = page.locator(".ssx-prompt textarea")
    for text, right_to_left in (("ירושלים", True), ("Red Hot Chili Peppers", False)):
        prompt.fill(text)
        prompt.press("Tab")
        page.wait_for_function(
            """rtl => {
              const chips = [...document.querySelectorAll('.ssx-tokens button')];
              const [bos, first] = chips.map((chip) => chip.getBoundingClientRect().x);
              return chips.length > 3 && (bos > first) === rtl;
            }""",
            arg=right_to_left,
        )


def test_every_control_has_a_name(page: Any) -> None:
    """What can be focused says what it is, to a screen reader too."""
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.ssx :is(button, input, select, textarea,'
            + '[role=slider], [contenteditable=true])')]
          .filter(e => e.offsetParent && !(e.labels && [...e.labels].some(l => l.innerText.trim()))
            && (!e.innerText.trim() || e.isContentEditable) && !e.title
            && !e.getAttribute('aria-label')?.trim())
          .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    names = [
        page.get_by_role("slider", name=name, exact=True).count()
        for name in ("Layers, first", "Layers, last", "Layer", "α")
    ]
    assert names == [1, 1, 1, 1]


def test_copy_as_python_fills_the_clipboard(page: Any) -> None:
    """The code of the chosen cell, ready to paste."""
    click_cell(page, 1, 2, 4)
    detail(page, "mlp_out/4/9")
    button = page.get_by_role("button", name="Copy as Python")
    button.click()
    page.get_by_text("copied").wait_for()
    code = page.evaluate("() => navigator.clipboard.readText()")
    assert "layers=4" in code
    assert "kinds='mlp_out'" in code


def test_a_reload_shows_the_same_picture(page: Any) -> None:
    """With a live kernel: the same scores, outline and panel, and clicks still work.

    The browser is slowed down: a figure that takes seconds to begin is given up by anywidget, and
    then it does not come or does not answer.
    """
    click_cell(page, 0, 0, 1)
    before_text = detail(page, "resid_mid/1/1").inner_text()
    page.wait_for_selector(".ssx-probe [data-probe='done']")
    before, shapes = page.evaluate(SCORES), page.evaluate(SHAPES)
    assert any(score is not None for panel in before for row in panel for score in row)
    page.wait_for_function(SAVED)
    page.add_init_script(COUNT_LARGE_SCRIPTS)
    with slowed(page, 3):
        page.reload()
        page.wait_for_selector(".ssx-map .js-plotly-plot .heatmaplayer image")
    assert page.evaluate("() => largeScripts") == 1, "map and curve share one import"
    assert page.evaluate(SCORES) == before
    assert page.evaluate(SHAPES) == shapes
    assert detail(page, "resid_mid/1/1").inner_text() == before_text
    click_cell(page, 2, 0, 5)
    detail(page, "resid_post/5/1")


def test_a_map_that_comes_back_answers(page: Any) -> None:
    """Another view takes the map off the page; when it is back, a click is outlined again."""
    page.get_by_text("Best α", exact=True).first.click()
    page.wait_for_selector(".ssx-map .js-plotly-plot", state="detached")
    page.get_by_text("All α", exact=True).first.click()
    page.wait_for_selector(".ssx-map .js-plotly-plot .heatmaplayer image")
    click_cell(page, 1, 1, 3)
    detail(page, "mlp_out/3/3")


def test_a_saved_notebook_has_a_picture_without_javascript(
    page: Any, server: Server, tmp_path: Any
) -> None:
    """GitHub and nbconvert show the PNG beside the widget, and what to do instead."""
    page.wait_for_function(SAVED)
    saved = nbformat.read(server.folder / "explorer.ipynb", as_version=4)
    outputs = [output["data"] for output in saved.cells[0].outputs]
    assert any("image/png" in data for data in outputs)
    from nbconvert import HTMLExporter

    exported, _ = HTMLExporter().from_notebook_node(saved)
    target = tmp_path / "saved.html"
    target.write_text(exported, encoding="utf-8")
    assert "data:image/png;base64" in exported
    plain = page.context.new_page()
    session = page.context.new_cdp_session(plain)
    session.send("Emulation.setScriptExecutionDisabled", {"value": True})
    plain.goto(target.as_uri())
    image = plain.locator("img[src^='data:image/png']")
    assert image.count() == 1
    assert image.is_visible()
    assert image.bounding_box()["width"] > 300
    assert plain.get_by_text("No controls here?").is_visible()
    plain.close()
    assert not page.get_by_text("No controls here?").is_visible(), "not under a live Explorer"


def test_the_exported_page_opens_offline_with_hover(
    running: Any, page: Any, server: Server
) -> None:
    """Exported by the button, opened from disk with every request refused."""
    exported = server.folder / save(page)
    assert exported.is_file()
    with new_page(running) as opened:
        requested: list[str] = []
        opened.on("request", lambda request: requested.append(request.url))
        opened.context.set_offline(True)
        opened.goto(exported.as_uri())
        opened.wait_for_selector(".js-plotly-plot .heatmaplayer image")
        box = opened.locator(".js-plotly-plot .subplot.xy").first.bounding_box()
        opened.mouse.move(box["x"] + 30, box["y"] + box["height"] / 2)
        opened.mouse.move(box["x"] + 40, box["y"] + box["height"] / 2)
        opened.wait_for_selector(".hoverlayer .hovertext")
        assert not [url for url in requested if url.startswith("http")]
        assert not opened.failures


def test_cancel_stops_a_running_sweep(page: Any) -> None:
    """The state goes from running to cancelled; some cells are there, others are not."""
    controls = page.locator(".ssx-controls")
    controls.get_by_label("Scorer", exact=True).select_option("slow")
    amplifiers = controls.get_by_label("α", exact=True)
    amplifiers.fill("1, 3, 9, 2, 4, 5, 6, 7, 8")
    amplifiers.press("Enter")
    page.locator(".ssx-run").click()
    page.wait_for_selector(".ssx-status [data-state='running'][data-run='2']")
    page.wait_for_function(NEW_MAP_FILLS)
    page.locator(".ssx-cancel").click()
    wait_for_state(page, "cancelled", 2)
    scores = [score for panel in page.evaluate(SCORES) for row in panel for score in row]
    done = [score for score in scores if score is not None]
    assert 0 < len(done) < len(scores)
    assert page.locator(".ssx-run").is_enabled()


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="not installed: voila")
def test_the_app_serves_the_same_explorer(running: Any, show: str, tmp_path: Path) -> None:
    """A login without the token; with it a sweep runs, is read and saved; nothing is left."""
    command = [sys.executable, "-c", APP.format(cell=show), "{port}", "{token}"]
    with serve(command, temporary=tmp_path) as app, new_page(running) as opened:
        opened.goto(app.url)
        assert urlsplit(opened.url).path == "/login"
        opened.goto(f"{app.url}/?token={app.token}", timeout=PATIENCE * 1000)
        opened.locator(".ssx-run").click()
        wait_for_state(opened, "done", 1)
        click_cell(opened, 1, 0, 2)
        assert detail(opened, "mlp_out/2/1").locator("blockquote").inner_text()
        assert (app.folder / Path(save(opened)).name).is_file()
        assert list(tmp_path.glob("superscopes-*/voila.json"))
    assert [*tmp_path.glob("superscopes-*"), *tmp_path.glob("voila_*")] == []
