"""A notebook as a page: its text, its code, and the outputs that it is stored with.

1. Cells of text are Markdown already; lists get the blank line that Python's Markdown wants.
2. Cells of code become code blocks, each followed by the places of its outputs.
3. Outputs go into those places after Markdown is done: printed text and tables as they are, and a
   figure as its picture with its plotly JSON beside it, which `assets/figures.js` draws.

Nothing is run.
"""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
_ITEM = re.compile(r"\s*([-*+]|\d+\.) ")


@dataclass
class Page:
    """A page before Markdown, and what goes into it afterwards."""

    markdown: str = ""
    outputs: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def filled(self, content: str) -> str:
        """Return the page's HTML with its outputs in their places."""
        return re.sub(r"<p>@output (\d+)@</p>", lambda m: self.outputs[int(m[1])], content)

    def place(self, output: str) -> str:
        """Keep an output, and return what stands for it in Markdown."""
        self.outputs.append(output)
        return f"@output {len(self.outputs) - 1}@"


def page_of(path: Path) -> Page:
    """Return the page of a notebook that was stored with its outputs."""
    page, parts = Page(), []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(_spaced(cell.source.replace("<details>", '<details markdown="1">')))
        elif cell.cell_type == "code":
            parts.append(f"````python\n{cell.source}\n````")
            parts += filter(None, (_shown(output, page, path.stem) for output in cell.outputs))
    page.markdown = "\n\n".join(parts) + "\n"
    return page


def figure(data: dict[str, Any], picture: str = "") -> str:
    """Return a figure: its JSON, and a picture that stands there until it is drawn."""
    kept = json.dumps({key: data[key] for key in ("data", "layout")}).replace("</", r"<\/")
    title = re.sub(r"<.*?>", " ", str((data["layout"].get("title") or {}).get("text") or "figure"))
    image = f'<img src="{picture}" alt="{html.escape(title)}" loading="lazy">' if picture else ""
    script = f'<script type="application/json">{kept}</script>'
    return f'<div class="figure" data-plotly data-search-exclude>{image}{script}</div>'


def _spaced(text: str) -> str:
    """Put a blank line between a paragraph and the list that follows it, outside of code."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if not fenced and _ITEM.match(line) and before.strip():
            inside = _ITEM.match(before) or before.startswith("  ")
            lines += [] if inside else [""]
        lines.append(line)
    return "\n".join(lines)


def _shown(output: Any, page: Page, stem: str) -> str:
    """Return the place of an output, or nothing."""
    if output.output_type == "stream":
        return page.place(f'<div class="output"><pre>{html.escape(output.text)}</pre></div>')
    data = output.get("data", {})
    picture = ""
    if PNG in data:
        picture = f"{stem}_{len(page.pictures) + 1:02d}.png"
        page.pictures[picture] = base64.b64decode(data[PNG])
    if PLOTLY in data:
        return page.place(figure(data[PLOTLY], picture))
    if picture:
        return page.place(f'<div class="figure"><img src="{picture}" alt="figure"></div>')
    if table := data.get("text/html"):
        return page.place(f'<div class="output" data-search-exclude>{table}</div>')
    plain = data.get("text/plain", "")
    return page.place(f'<div class="output"><pre>{html.escape(plain)}</pre></div>') if plain else ""
