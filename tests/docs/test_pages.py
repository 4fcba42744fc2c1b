"""The built pages, opened from the file system in a browser; `make docstest` looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import browser, browser_path, new_page

SITE = Path(__file__).parent.parent.parent / "output" / "site"

pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(browser_path() is None, reason="no Chromium"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="make docs"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    """A page that notes what it asks other hosts for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, browser(playwright) as running, new_page(running) as page:
        page.remote = []
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else page.remote.append(request.url)
            ),
        )
        yield page
        assert page.remote == []
        assert page.failures == []


def test_search_finds_a_question_without_a_server(page: Any) -> None:
    """The index is a file beside the pages, and a result leads to its answer."""
    page.goto((SITE / "index.html").as_uri())
    page.locator("input[name=query]").click()
    page.keyboard.type("steering vector")
    page.wait_for_selector(".md-search-result__link")
    links = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
    assert any("questions/vectors.html" in link for link in links)


def test_a_notebook_draws_its_figures_and_keeps_its_pictures(page: Any) -> None:
    """plotly.js comes from beside the page; a figure that is out of sight is still a picture."""
    page.goto((SITE / "notebooks" / "02_paper_figures.html").as_uri())
    figures = page.locator(".figure[data-plotly]")
    assert figures.count() >= 5
    figures.first.scroll_into_view_if_needed()
    page.wait_for_selector(".figure .js-plotly-plot .main-svg")
    assert page.locator(".figure > img").count() >= 1


def test_the_gallery_shows_exported_pages(page: Any) -> None:
    """Each frame is a page of its own, drawn by the same plotly.js."""
    page.goto((SITE / "gallery.html").as_uri())
    frame = page.frame_locator("iframe.exported").first
    frame.locator(".js-plotly-plot .main-svg").first.wait_for()


@pytest.mark.parametrize(
    "name", ["index", "models", "reference/vectors", "notebooks/05_neighbours"]
)
def test_pages_fit_a_narrow_screen(page: Any, name: str) -> None:
    """Tables, code and figures scroll by themselves; the page does not."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto((SITE / f"{name}.html").as_uri())
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
