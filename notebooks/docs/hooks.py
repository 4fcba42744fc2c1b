"""What MkDocs calls while it builds the site: pages that are made from the repository's own files.

1. Notebooks, the reference, the gallery and the changelog become pages; `nav` gets their names.
2. A line `@table NAME@` of a page becomes the table or figure that `records.TABLES` makes.
3. A public name in `code` becomes a link to its entry in the reference.
4. After the build, plotly.js is laid beside the pages, and every link is checked.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import plotly
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

from notebooks.docs import check_site, gallery, notebook_pages, records, reference
from superscopes_tl.experiment import COLUMNS, CONTROLS

ROOT = reference.ROOT
_NOTEBOOKS: dict[str, notebook_pages.Page] = {}
_KEPT = re.compile(r"(<(?:pre|a|h\d|script)\b.*?</(?:pre|a|h\d|script)>)", re.DOTALL)
_PLACE = re.compile(r"^@table (\w+)@$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Name the pages that are made in `nav`."""
    paths = records.notebooks()
    made = {
        "NOTEBOOKS": [f"notebooks/{path.stem}.md" for path in paths],
        "REFERENCE": [
            "reference/index.md",
            *({name: f"reference/{name}.md"} for name in reference.faces()),
        ],
    }
    for entry in config.nav:
        for title, value in entry.items():
            entry[title] = made.get(value, value) if isinstance(value, str) else value
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that are made."""
    texts: dict[str, str | bytes] = {
        **reference.pages(),
        "changes.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
    }
    for path in records.notebooks():
        page = notebook_pages.page_of(path)
        _NOTEBOOKS[f"notebooks/{path.stem}.md"] = page
        texts[f"notebooks/{path.stem}.md"] = page.markdown
        texts |= {f"notebooks/{name}": image for name, image in page.pictures.items()}
    for image in sorted((ROOT / "notebooks" / "images").iterdir()):
        if image.suffix in (".png", ".gif", ".webp"):
            texts[f"images/{image.name}"] = image.read_bytes()
    texts |= {f"gallery/{name}": page for name, page in gallery.pages().items()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in the tables, and the questions of the pages that answer them."""
    if page.file.src_uri in _NOTEBOOKS:
        return markdown
    return _PLACE.sub(lambda m: records.TABLES[m[1]](), markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Put outputs and figures in their places, and link names to the reference."""
    if made := _NOTEBOOKS.get(page.file.src_uri):
        content = made.filled(content)
    content = records.filled(content)
    return content if page.file.src_uri.startswith(("reference/", "changes")) else linked(content)


def linked(content: str) -> str:
    """Link each `name` that the reference knows, outside of code blocks, links and headings."""
    homes = {
        name: f"{reference.PACKAGE}.{folder}.{name}"
        for folder, names in reversed(reference.faces().items())
        for name in names
        if name not in (*CONTROLS, *COLUMNS)  # in code these stand for columns of a table
    }

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if name not in homes:
            return match[0]
        return f'<autoref identifier="{homes[name]}" optional><code>{name}</code></autoref>'

    parts = _KEPT.split(content)  # every second part is kept as it is
    parts[::2] = [re.sub(r"<code>(\w+)</code>", link, part) for part in parts[::2]]
    return "".join(parts)


@event_priority(-200)  # after the search index is written
def on_post_build(config: Any) -> None:
    """Lay plotly.js beside the pages, and refuse broken links and files from elsewhere."""
    site = Path(config.site_dir)
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    shutil.copyfile(script, site / "assets" / "plotly.min.js")
    if problems := check_site.problems(site):
        raise PluginError("\n".join(["the site is not whole:", *problems]))
