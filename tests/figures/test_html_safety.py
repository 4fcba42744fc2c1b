"""Generated text in a real browser: no page that shows it runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest

from superscopes_tl import Explorer, SweepResult, alpha_curve, heatmap, write_html
from superscopes_tl.figures import best_table, decomposition, save_as
from tests.experiment.test_results import reading
from tests.support.browser import browser_path, chromium

MISSING = [
    *([] if browser_path() else ["a Chromium"]),
    *([] if importlib.util.find_spec("playwright") else ["playwright"]),
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

ATTACKS = (
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "'\"><svg onload=window.hacked=1>",
    "<!--<script>window.hacked=1//",
    '<a href="javascript:window.hacked=1">x</a>',
)


def hostile(attack: str) -> SweepResult:
    """Return a result whose every text is an attack: all of them in the cells, one elsewhere."""
    places = product(("resid_mid", "mlp_out", "resid_post"), (5, 2), (1, 3))
    cells = [
        replace(
            reading(layer, alpha, alpha / 10, kind=kind, target_layer=layer),
            prompt=attack, token=attack, text=text, description=text,
        )
        for (kind, layer, alpha), text in zip(places, cycle(ATTACKS))
    ]  # fmt: skip
    provenance = {
        "prompt": attack,
        "model": {"name": attack},
        "tokens": {"labels": [attack] * 9},
        "config": {"mapping": attack, "scorer": attack, "target_layer": "same"},
        "target_prompt": {"text": attack, "placeholder": attack, "answer": attack},
    }
    return SweepResult.from_readings(cells, provenance)


def pages(result: SweepResult, folder: Path) -> Iterator[Path]:
    """Yield every page that shows a result: figures, exports, the Explorer's panel, a notebook."""
    attack = str(result.provenance["prompt"])
    for draw in (heatmap, alpha_curve, best_table, lambda found: decomposition(found, 5)):
        yield write_html(draw(result), folder / "figure.html", title=attack)
    yield save_as(result, folder / "all.html")
    explorer = Explorer(result=result)
    explorer.select(kind="mlp_out", layer=5, alpha=3)
    explorer.pin()
    yield explorer.export(folder / "export.html")
    view = explorer.view
    shown = [view.caption, view.detail, view.ladder, view.pins, view.code, view.status]
    parts = [widget.value for widget in shown]
    for name in ("best", "parts"):
        view.show.value = name
        parts.append(view.stage.children[-1].value)
    (folder / "panel.html").write_text(
        f"<!doctype html><meta charset='utf-8'>{''.join(parts)}{result._repr_html_()}",
        encoding="utf-8",
    )
    yield folder / "panel.html"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running, chromium(running) as opened:
        yield opened


@pytest.mark.parametrize("attack", ATTACKS[1:3])
def test_no_page_runs_what_a_model_wrote(attack: str, page: Any, tmp_path: Path) -> None:
    """Figures, exports and the panel show it as text; no tag of it is in the page."""
    for path in pages(hostile(attack), tmp_path):
        page.goto(path.as_uri())
        if path.name != "panel.html":
            page.wait_for_selector(".js-plotly-plot .main-svg")
            box = page.locator(".js-plotly-plot").first.bounding_box()
            for share in (0.3, 0.32):  # hovering shows the text, too
                page.mouse.move(box["width"] * share, box["y"] + box["height"] / 2)
        for element in ("img[onerror]", "svg[onload]", "a[href^='javascript']"):
            assert page.locator(element).count() == 0, (path.name, element)
        assert page.evaluate("() => window.hacked") is None, path.name
        assert not page.failures
    assert "window.hacked" in page.locator("body").inner_text()


def test_the_attacks_would_work(page: Any, tmp_path: Path) -> None:
    """Unescaped, the first four do run here: the test above has something to find."""
    for attack in ATTACKS[:4]:
        (tmp_path / "open.html").write_text(f"<!doctype html><p title='{attack}</p>")
        if not attack.startswith("'"):
            (tmp_path / "open.html").write_text(f"<!doctype html><p>{attack}</p>")
        page.goto((tmp_path / "open.html").as_uri())
        page.wait_for_function("() => window.hacked === 1")
