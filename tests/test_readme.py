"""The README's example prints what the README says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    found = re.search(rf"^## Ten lines$.*?^```{language}\n(.*?)^```", README, re.DOTALL | re.M)
    assert found, language
    return found[1]


def test_the_ten_lines_print_what_the_readme_shows(tmp_path: Path) -> None:
    """Run as a newcomer would, in a folder of their own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _block("python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == _block("text")
    assert (tmp_path / "floyd.html").stat().st_size > 1_000_000, "plotly.js is inlined"


def test_every_file_that_the_readme_names_is_there() -> None:
    """Links and pictures point to files of the repository."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_module_has_a_line_in_the_house() -> None:
    """The file map names every module of the package."""
    house = README.split("## In the house")[1]
    for path in (ROOT / "superscopes_tl").glob("*.py"):
        if path.stem not in ("__init__", "errors"):
            assert f"`{path.stem}`" in house, path.stem
