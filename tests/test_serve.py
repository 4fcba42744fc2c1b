"""`superscopes app` without a browser: what is served, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from superscopes_tl.cli import app
from superscopes_tl.serve import explorer_cell, notebook, serve


class Recorded:
    """Stands in for the Voilà process: keeps how it was started."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        Recorded.command = command
        folder = Path(env["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0])
        Recorded.settings = json.loads((folder / "voila.json").read_text())
        Recorded.mode = stat.S_IMODE(folder.stat().st_mode)
        Recorded.cell = json.loads(Path(command[-1]).read_text())["cells"][0]["source"]

    def wait(self) -> int:
        return 0

    def poll(self) -> int:
        return 0


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("superscopes_tl.serve.subprocess.Popen", Recorded)
    monkeypatch.setattr("superscopes_tl.serve.importlib.util.find_spec", lambda name: True)
    return Recorded


def test_the_default_is_loopback_with_a_random_token(recorded: Any) -> None:
    """The token is in the address that is printed, and in no command line."""
    said: list[str] = []
    for _ in range(2):
        assert serve("1", announce=said.append) == 0
        assert recorded.settings["Voila"]["ip"] == "127.0.0.1"
        token = recorded.settings["Voila"]["token"]
        assert len(token) >= 24
        assert said[-1] == f"http://127.0.0.1:8866/?token={token}"
        assert token not in " ".join(recorded.command)
        assert recorded.mode == 0o700
    assert said[0] != said[1]


def test_the_command_passes_its_options_on(recorded: Any) -> None:
    """Model, prompt, address and token reach the page and its server."""
    run = CliRunner().invoke(
        app,
        ["app", "--model", "gpt2", "--prompt", "It's", "--port", "9", "--token", "t",
         "--no-browser"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Open http://127.0.0.1:9/?token=t" in run.output
    assert recorded.settings["Voila"]["open_browser"] is False
    assert "model='gpt2'" in recorded.cell
    assert '"It\'s"' in recorded.cell
    compile(recorded.cell, "cell", "exec")


def test_a_run_file_is_checked_before_it_is_served(recorded: Any, tmp_path: Path) -> None:
    """A bad file ends with a message and exit code 2, not with a page that fails."""
    bad = tmp_path / "bad.zip"
    bad.write_text("no zip")
    run = CliRunner().invoke(app, ["app", "--result", str(bad)])
    assert run.exit_code == 2
    assert "Explorer.from_result" in explorer_cell(result="run.zip")


def test_without_voila_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setattr("superscopes_tl.serve.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"app: expected Voilà.*superscopes-tl\[app\]"):
        serve("1")
    assert importlib.util.find_spec is not None


def test_an_empty_token_is_refused(recorded: Any) -> None:
    """It would let anyone in."""
    with pytest.raises(ValueError, match="token: expected a secret"):
        serve("1", token=" ")


def test_the_notebook_is_valid() -> None:
    """Nbformat agrees."""
    import nbformat

    nbformat.validate(nbformat.from_dict(notebook("1")))
