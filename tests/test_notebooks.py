"""The notebooks run from top to bottom and show what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from superscopes_tl.explorer.explorer import NO_WIDGETS
from tests.support.notebooks import FOLDER, LARGEST_NOTEBOOK, PLOTLY, PNG, WIDGET, execute, tidy

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLER = {
    "01_quickstart": {
        "range(0, model.n_layers, 4)": "range(0, 10, 4)",
        "alphas=(1, 3, 6),": "alphas=(1,),",
        "alphas=(1, 3, 6, 9)": "alphas=(1,)",
        "layers=(0, 1, 2, 3, 4, 5, 6, 8, 10, 12)": "layers=(0, 8)",
        "layers=(7, 8, 9)": "layers=(8,)",
        "others=2": "others=1",
    },
    "02_paper_figures": {
        '("Diana, Princess of Wales", "Red Hot Chili Peppers")': '("Pink Floyd",) * 2',
        "LAYERS = range(12)": "LAYERS = range(2)",
        "COUNTED = range(1, 8)": "COUNTED = (3,)",
        "SHOWN = 5": "SHOWN = 1",
        "MODELS = tuple(name for name in PANELS if name in results)": 'MODELS = ("smollm2_paper",)',
    },
    "03_why_amplification_works": {
        "NAMES_BY_KIND.values()]": "NAMES_BY_KIND.values()][:2]",
        "NAMES[::2]": "NAMES[:1]",
        "NAMES[::4]": "NAMES[:1]",
        "NAMES[::5]": "NAMES[:1]",
        "== 1][:6]": "== 1][:1]",
        "max_new_tokens=12": "max_new_tokens=5",
        '"max_new_tokens": 10': '"max_new_tokens": 5',
        "(1, 3, ALPHA, 15, 100, 1000)": "(1, ALPHA)",
        "(1, ALPHA, 1000)": "(1, ALPHA)",
        "range(LAYER - 4, LAYER + 5, 2)": "(LAYER - 2, LAYER)",
        "range(0, 17, 4)": "(0, 8)",
        "[0, LAYER // 2, LAYER, LAYER + 4]": "[0, LAYER]",
        "(1, 100, 1000, 10000)": "(1, 1000)",
        "(0, 1, 2, 4, 8, 12)": "(0, 4)",
    },
    "04_is_it_real": {
        "(4, 8, 12), alphas=(1, 3, 6, 12)": "(8,), alphas=(1, 6)",
        "300, replace": "40, replace",
        "(ALL_NAMES, 20, replace": "(ALL_NAMES, 2, replace",
        "ALL_NAMES[::15]": "ALL_NAMES[::60]",
        "in ways.items()": "in list(ways.items())[4:5]",
        "PAPER_PROMPTS[::2])": "PAPER_PROMPTS[::24])",
        "CHAT, alphas=(1, 3, 6, 12)": "CHAT, alphas=(1, 6)",
        "(0.5, 1, 2, 4)": "(1,)",
        "(1, 2, 4)": "(2,)",
        ', ("Marie Curie", "Violin"))': ",)",
        "(0, 0.25, 0.5, 0.75, 1)": "(0, 0.5, 1)",
        "sample[:8], alphas=(1, ALPHA)": "sample[:2], alphas=(ALPHA,)",
        "ALL_NAMES[:2])": "ALL_NAMES[:1])",
    },
    "05_neighbours": {
        'PROMPT, "Albert Einstein", "Pink Floyd")': 'PROMPT, "Albert Einstein")',
        'layer=MIDDLE, kind="mlp_out",': (
            'layer=MIDDLE, kind="mlp_out", methods={"Patchscopes": {"alphas": 1}},'
        ),
        "SECOND_LIST]": "SECOND_LIST[:12]]",
        "< 400][:20]": "< 400][:4]",
        "manual[:17], manual[17:19]": "manual[:3], manual[3:]",
        "range(0, model.n_layers, 5)": "(0, 10)",
        "range(4, model.n_layers, 5)": "(4, 9)",
        "(model, BEGINNINGS,": "(model, BEGINNINGS[:2],",
        "countries.items()": "list(countries.items())[:1]",
        "layers=(0, 8, 16)": "layers=8",
        "in ways.items()": "in list(ways.items())[-2:]",
        "steps=100, batch_size=64": "steps=1, batch_size=2",
        "layers=(0, 8, 16, 24)": "layers=8",
        "model, facts.prompts,": "model, facts.prompts[:1],",
        '{**PRESETS, "into': '{"into',
        '"layers": (0, 4, 12)': '"layers": 12',
        "alphas=(1, 3, 6, 12), progress": "alphas=6, progress",
        '("Wheat", "Nile", "Pablo Picasso")': '("Nile",)',
        "FITTED = (20, 23, 26)": "FITTED = (26,)",
        "max_tokens=20": "max_tokens=8",
        "NAMES_BY_KIND.values()][:12]": "NAMES_BY_KIND.values()][:2]",
        "for layer in (4, 8, 12):": "for layer in (8,):",
        "range(6)": "range(1)",
        "layers=(8, 16, 29)": "layers=29",
        "LATE = (12, 24)": "LATE = (12,)",
        "alphas=(3, 6)),": "alphas=3),",
        "for alpha in (1, 3, 6)}": "for alpha in (1,)}",
        "[:8], alphas=1": "[:2], alphas=1",
        "draws=2": "draws=1",
    },
    "06_scale": {
        "CELLS = 32": "CELLS = 8",
        "(1, 4, 16, 32)": "(1, 8)",
        "(8, 32, 128)": "(8, 16)",
        "for entries in (1, 2, 4, 8)": "for entries in (1, 2)",
        "NEW = 10": "NEW = 4",
        "rounds=2": "rounds=1",
        "range(0, model.n_layers, 2)": "range(0, 8, 4)",
        "alphas=(1, 2, 3, 6, 9, 12), generate": "alphas=1, generate",
        "ALL_NAMES[:4]": "ALL_NAMES[:2]",
        '"scorer": no_scores}': '"scorer": no_scores, "max_new_tokens": 5}',
        "for n in (2, 4, 8, 16)": "for n in (1, 2)",
        "for n in (4, 8, 16)": "for n in (1, 2)",
        "for n in (1, 2, 4)": "for n in (1, 2)",
        '"Marie Curie", "Diana, Princess of Wales")': '"Marie Curie")',
        "(1, 4, 16)": "(1, 16)",
    },
}
"""What the tests run with smaller settings, so that they end soon; `make notebooks` runs it all."""


def _mime_types(notebook: Any) -> set[str]:
    return {
        mime
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for mime in output.get("data", {})
    }


def _solutions(cell: Any) -> list[Any]:
    """Return the code of the solutions that a cell of text hides."""
    hidden = re.findall(r"(?s)<details>.*?</details>", cell.source)
    code = [block for text in hidden for block in re.findall(r"(?s)```python\n(.*?)```", text)]
    return [nbformat.v4.new_code_cell(block) for block in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|traitlets)")
def test_notebooks_run(path: Path) -> None:
    """Every cell and hidden solution runs, with smaller settings, and figures come out."""
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for setting in SMALLER[path.stem]:
        assert setting in code, "the notebook has another setting now: correct SMALLER"
    notebook.cells = [part for cell in notebook.cells for part in (cell, *_solutions(cell))]
    for cell in notebook.cells:
        for setting, value in SMALLER[path.stem].items():
            cell.source = cell.source.replace(setting, value)
    execute(notebook, timeout=300)
    assert PLOTLY in _mime_types(notebook)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|traitlets)")
def test_the_explorer_leaves_a_picture_in_the_notebook(llama_folder: Path) -> None:
    """Beside the widget stand advice and a PNG, up to date when the sweep ends; no warnings."""
    cells = [
        "from pathlib import Path\n"
        "from superscopes_tl import Explorer, load_model, SweepConfig\n"
        "config = SweepConfig(layers=(0, 1), alphas=(1, 3), max_new_tokens=4)\n"
        f"model = load_model(Path({str(llama_folder)!r}), backend='bridge')\n"
        "explorer = Explorer(model, 'Will Smith', config)\n"
        "explorer",
        "assert explorer.run().wait(240) and explorer.state == 'done', explorer.error",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    widget, advice, picture = notebook.cells[0].outputs
    assert advice["data"] == {"text/plain": NO_WIDGETS}
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
def test_committed_notebooks_show_their_outputs(path: Path) -> None:
    """Every cell has run in order and without an error, and each figure has a picture beside it."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    figures = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    assert all(PNG in data for data in figures)
    assert PNG in _mime_types(notebook)
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < LARGEST_NOTEBOOK


def test_tidying_keeps_what_is_shown_and_drops_what_only_differs() -> None:
    """A picture beside the figure; no progress, addresses, random ids, times or widget states."""
    new = nbformat.v4.new_output
    figure = {"data": [], "layout": {}}
    outputs = [
        new("stream", name="stderr", text="Caveat: one name.\n100%|####| 9/9\n"),
        new("stream", name="stderr", text="/somewhere/library.py: UserWarning\n"),
        new("display_data", {WIDGET: {}, "text/plain": "  0%|   | 0/9"}),
        new("display_data", {WIDGET: {}, "text/plain": "<Explorer at 0x7f00>"}),
        new("display_data", {PLOTLY: figure}),
        new("display_data", {PLOTLY: {**figure, "data": ["x" * 200_000]}}),
        new("display_data", {"text/html": "<td id=T_0a1b2_row0>"}),
    ]
    cell = nbformat.v4.new_code_cell(outputs=outputs, metadata={"execution": {"at": "noon"}})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}})
    tidy(notebook, lambda figure: "a picture")
    caveat, explorer, small, large, table = notebook.cells[0].outputs
    assert caveat.text == "Caveat: one name.\n"
    assert explorer.data == {"text/plain": "<Explorer>"}
    assert small.data == {PLOTLY: figure, PNG: "a picture"}
    assert large.data == {PNG: "a picture"}
    assert table.data == {"text/html": "<td id=T_00_row0>"}
    assert not notebook.cells[0].metadata
    assert "widgets" not in notebook.metadata
