"""The documentation is made from the package, the notebooks and the stored results."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("griffe", reason="the extra `docs`")

from notebooks.docs import check_site, notebook_pages, records, reference
from tests.support.pictures import IMAGES, MADE
from tests.support.questions import BLOCK, PAGES

FACES = reference.faces()


@pytest.mark.parametrize("folder", FACES)
def test_every_public_name_has_an_entry_with_a_sentence(folder: str) -> None:
    """The page of a folder lists what its `__all__` does, with what each name is."""
    names = importlib.import_module(f"{reference.PACKAGE}.{folder}").__all__
    page = reference.pages()[f"reference/{folder}.md"]
    assert sorted(FACES[folder]) == sorted(names)
    for name in names:
        assert f"::: {reference.PACKAGE}.{folder}.{name}\n" in page + "\n"
        assert re.search(rf"^\| \[`{name}`\]\(.*?\) \| \S", page, re.MULTILINE), name


def test_every_folder_has_a_page_and_the_command_its_options() -> None:
    """No folder of the package is left out."""
    there = {
        path.parent.name for path in (reference.ROOT / reference.PACKAGE).glob("*/__init__.py")
    }
    assert set(FACES) == there
    command = reference.pages()["reference/cli.md"]
    assert "## superscopes sweep" in command
    assert "`--source-template` | `{}` |" in command


def test_a_notebook_becomes_a_page_with_its_stored_outputs(tmp_path: Path) -> None:
    """Text, code, printed text, tables and figures, each in its place, and none can break out."""
    new = nbformat.v4.new_output
    figure = {"data": [{"name": "</script><b>"}], "layout": {}}
    outputs = [
        new("stream", name="stdout", text="a < b\n\nc\n"),
        new("display_data", {notebook_pages.PLOTLY: figure, notebook_pages.PNG: "aGk="}),
        new("execute_result", {"text/html": "<table></table>", "text/plain": "t"}),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# Title\ntext:\n- one\n- two\n\n<details>\n**x**</details>"),
        nbformat.v4.new_code_cell("print(1)", outputs=outputs, execution_count=1),
    ]
    path = tmp_path / "01_first.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    page = notebook_pages.page_of(path)
    assert "text:\n\n- one\n- two\n" in page.markdown
    assert '<details markdown="1">' in page.markdown
    assert "````python\nprint(1)\n````\n\n@output 0@" in page.markdown
    filled = page.filled("<p>@output 0@</p><p>@output 1@</p><p>@output 2@</p>")
    assert "<pre>a &lt; b\n\nc\n</pre>" in filled
    assert '<img src="01_first_01.png"' in filled
    assert page.pictures == {"01_first_01.png": b"hi"}
    assert filled.count("</script>") == 1
    assert "<table></table>" in filled


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site of two pages in which all is well."""
    monkeypatch.setattr(reference, "faces", lambda: {"model": ["Site"]})
    for name in ("search", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="reference/model.html#superscopes_tl.model.Site">x</a> <a href="https://x.org">y</a>'
    )
    (tmp_path / "reference" / "model.html").write_text(
        '<h2 id="superscopes_tl.model.Site">Site</h2><a href="../index.html">up</a>'
    )
    entries = [{"location": ""}, {"location": "reference/model.html#superscopes_tl.model.Site"}]
    (tmp_path / "search" / "search_index.json").write_text(json.dumps({"docs": entries}))
    (tmp_path / "search" / "search_index.js").write_text("var __index = {}")
    return tmp_path


def test_a_whole_site_has_no_problems(site: Path) -> None:
    """Links to other hosts may be followed, and are not."""
    assert check_site.problems(site) == []


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        ('<a href="gone.html">x</a>', "index.html: links to gone.html, which is not there"),
        ('<a href="#gone">x</a>', "index.html: links to #gone, whose page has no such part"),
        ('<a href="/index.html">x</a>', "index.html: links to /index.html, which is absolute"),
        (
            '<script src="https://x.org/a.js"></script>',
            "index.html: loads https://x.org/a.js, which another host holds",
        ),
        ('<img src="gone.png">', "index.html: loads gone.png, which is not there"),
        (
            '<link rel="stylesheet" href="//x.org/a.css">',
            "index.html: loads //x.org/a.css, which another host holds",
        ),
    ],
)
def test_what_is_not_whole_is_found(site: Path, added: str, problem: str) -> None:
    """Broken links and parts, absolute ones, and files of other hosts."""
    page = site / "index.html"
    page.write_text(page.read_text() + added)
    assert check_site.problems(site) == [problem]


def test_a_missing_name_index_or_remote_font_is_found(site: Path) -> None:
    """The reference knows every name, search every page, and styles load nothing from elsewhere."""
    (site / "reference" / "model.html").write_text('<a href="../index.html">up</a>')
    (site / "more.html").write_text("")
    (site / "a.css").write_text("@font-face { src: url(https://x.org/a.woff) }")
    found = "\n".join(check_site.problems(site))
    assert "reference/model.html has no entry of Site" in found
    assert "search does not know more.html" in found
    assert "a.css: loads from another host" in found
    (site / "search" / "search_index.js").unlink()
    assert "the search index is missing" in check_site.problems(site)


def test_every_question_has_an_address_and_code() -> None:
    """The index of questions is made of the headings of all pages, and each answer has code."""
    index = records.questions()
    pages = sorted(path.name for path in PAGES.glob("*.md") if path.stem != "index")
    assert sorted(records.QUESTION_PAGES) == pages
    for name in pages:
        text = (PAGES / name).read_text("utf-8")
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            heading = re.match(r"(.+\?|.+) \{#([\w-]+)\}\n", part)
            assert heading, part[:60]
            assert f"({name}#{heading[2]})" in index
            assert re.search(r"^```(python|py|bash)$", part, re.MULTILINE), heading[1]
        assert BLOCK.search(text)


def test_pictures_are_what_their_scripts_drew() -> None:
    """A picture with a record of what drew it has not been changed since."""
    for name, made in json.loads(MADE.read_text("utf-8")).items():
        content = (IMAGES / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == made["sha256"], f"draw {name} again"


def test_the_tables_say_what_the_files_say() -> None:
    """Every stored result with its model's hash, every notebook, every picture."""
    table, shown = records.results(), records.pictures()
    for path in records.RESULTS.glob("*.zip"):
        assert f"| `{path.name}` |" in table
        assert f"make results RESULTS={path.stem}" in table
    assert all(f"images/{path.name}" in shown for path in IMAGES.glob("*.png"))
    assert all(path.stem in records.stored_notebooks() for path in records.notebooks())
    assert "52 s" in records.numbers() or "time not recorded" not in records.numbers()
    assert "```text\nown words" in records.ten_lines()


def test_checked_models_are_told_apart_from_random_weights() -> None:
    """The table of models has what the stored check found; that of architectures has no share."""
    kept: dict[str, Any] = json.loads((records.RESULTS / "smollm2_check.json").read_text("utf-8"))
    models = records.models()
    assert kept["check"]["verdict"].removeprefix("smollm2: ") in models
    assert kept["model"]["source"]["sha256"] in models
    random = records.architectures()
    assert "`LlamaForCausalLM`" in random
    assert "recover" not in random
