"""The README is short, and what it says can be done can be done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from superscopes_tl.cli.main import command_of
from superscopes_tl.weights import find_packaged

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_it_is_short() -> None:
    """Long how-tos belong to the notebooks and the docstrings."""
    assert len(README.splitlines()) <= 200


@pytest.mark.skipif(find_packaged("smollm2") is None, reason="superscopes fetch smollm2")
def test_the_snippets_run_and_print_what_the_readme_shows(tmp_path: Path) -> None:
    """As a newcomer would run them, in a folder of their own."""
    code = "\nprint('---')\n".join(SNIPPETS)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ten_lines, _ = run.stdout.split("---\n")
    shown = re.search(r"^## Ten lines$.*?^```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert shown
    assert ten_lines == shown[1]
    assert (tmp_path / "floyd.html").stat().st_size > 1_000_000, "plotly.js is inlined"


def test_links_point_to_files_of_the_repository() -> None:
    """Notebooks, docstrings and pictures."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_house_has_a_line_per_folder() -> None:
    """The table lists the folders of the package, all of them and no others."""
    package = ROOT / "superscopes_tl"
    listed = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", README.split("## Layout")[1], re.M)
    names = {name.rstrip("/") for line in listed for name in re.findall(r"`([\w./]+)`", line)}
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    assert names == there | {path.name for path in package.glob("[a-z]*.py")}


def test_commands_and_targets_exist() -> None:
    """Every `superscopes` command with its options, and every `make` target."""
    commands = re.findall(r"superscopes ([a-z][a-z-]*)([^`\n|]*)", README)
    assert commands
    for command, arguments in commands:
        options = {name for option in command_of(command).params for name in option.opts}
        for option in re.findall(r"--[a-z-]+", arguments):
            assert command == "bench" or option in options, (command, option)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
