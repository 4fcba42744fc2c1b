"""The notebooks run from top to bottom and show what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def _mime_types(notebook: Any) -> set[str]:
    return {
        mime
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for mime in output.get("data", {})
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|traitlets)")
def test_notebooks_run(path: Path) -> None:
    """Every cell of every notebook runs on the bundled model, and figures come out."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    client.execute()
    errors = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert not errors
    assert "application/vnd.plotly.v1+json" in _mime_types(notebook)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|traitlets)")
def test_the_explorer_leaves_a_picture_in_the_notebook() -> None:
    """Beside the widget stands a PNG, brought up to date when the sweep ends; no warnings."""
    cells = [
        "from superscopes_tl import Explorer, load_model, SweepConfig\n"
        "config = SweepConfig(layers=(0, 1), alphas=(1, 3), max_new_tokens=4)\n"
        "explorer = Explorer(load_model('mini', backend='bridge'), 'Will Smith', config)\n"
        "explorer",
        "assert explorer.run().wait(240) and explorer.state == 'done', explorer.error",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    widget, picture = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in widget["data"]
    assert "Explorer of LanguageModel" in widget["data"]["text/plain"]
    assert "image/png" in picture["data"]
    assert not notebook.cells[1].outputs
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    assert any("Done: 12 of 12" in str(s["state"].get("value", "")) for s in states.values())


def test_there_is_a_quickstart() -> None:
    """The first notebook is the one to start with."""
    assert NOTEBOOKS[0].name == "01_quickstart.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    """Stale outputs would be numbers that no run of today printed."""
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells)
