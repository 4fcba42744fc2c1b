"""Check a built site: links lead somewhere, nothing comes from another host, search is local.

1. Every internal link and picture is a file of the site, every `#part` an id of its page.
2. Scripts, styles, pictures, frames and fonts are files of the site. Links to other hosts may be
   followed by a reader; the check does not follow them.
3. The search index is a file, also as the script that pages on a file system read, and has an
   entry for every page.
4. Every public name of the package has an entry in the reference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from notebooks.docs import reference

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_REMOTE = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//")


@dataclass
class _Reader(HTMLParser):
    """Collects the ids of a page, its links, and what a browser loads with it."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names, leads to or loads."""
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get(LOADED.get(tag, "")) and given.get("rel") not in (
            "canonical",
            "next",
            "prev",
        ):
            self.loaded.append(given[LOADED[tag]])


def problems(site: Path) -> list[str]:
    """Return what is wrong with a site, a line each."""
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    found = [line for path in pages for line in _of_page(path, pages, site)]
    found += [
        f"{path.relative_to(site)}: loads from another host"
        for path in site.rglob("*.css")
        if _REMOTE.search(path.read_text("utf-8"))
    ]
    return found + _of_search(site) + _of_reference(site, pages)


def _read(path: Path) -> _Reader:
    reader = _Reader()
    reader.feed(path.read_text("utf-8"))
    return reader


def _of_page(path: Path, pages: dict[Path, _Reader], site: Path) -> list[str]:
    name = path.relative_to(site)
    loaded = [target for target in pages[path].loaded if not target.startswith("data:")]
    links = [target for target in pages[path].links if not urlsplit(target).scheme]
    return [
        f"{name}: {what} {line}"
        for what, targets in (("loads", loaded), ("links to", links))
        for target in targets
        if (line := _missing(target, path, pages, site))
    ]


def _missing(target: str, path: Path, pages: dict[Path, _Reader], site: Path) -> str:
    """Return what is wrong with a reference, or nothing."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return f"{target}, which another host holds"
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.path.startswith("/"):
        if path.name != "404.html":  # which is shown for any address, so its own are absolute
            return f"{target}, which is absolute"
        there = site / unquote(parts.path).lstrip("/")
    there = there / "index.html" if there.is_dir() else there
    if not there.is_file():
        return f"{target}, which is not there"
    if parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
        return f"{target}, whose page has no such part"
    return ""


def _of_search(site: Path) -> list[str]:
    index, script = site / "search" / "search_index.json", site / "search" / "search_index.js"
    if not index.is_file() or not script.is_file():
        return ["the search index is missing"]
    entries = {
        entry["location"].split("#")[0] for entry in json.loads(index.read_text("utf-8"))["docs"]
    }
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    exported = {page for page in pages if page.startswith("gallery/")} | {"404.html"}
    return [
        f"search does not know {page}"
        for page in sorted(pages - entries - exported - {"index.html"})
    ]


def _of_reference(site: Path, pages: dict[Path, _Reader]) -> list[str]:
    return [
        f"reference/{folder}.html has no entry of {name}"
        for folder, names in reference.faces().items()
        for name in names
        if f"{reference.PACKAGE}.{folder}.{name}"
        not in pages[site / "reference" / f"{folder}.html"].ids
    ]
