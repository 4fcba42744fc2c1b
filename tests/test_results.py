"""Numbers that the README and the notebooks state, recomputed from the committed result files."""

from __future__ import annotations

import re

import nbformat
import pytest

from superscopes_tl.statistics import layer_shares
from tests.support.notebooks import FOLDER
from tests.support.result_figures import MODELS, RESULTS, confirmed, table


def _shown(notebook: str) -> str:
    """Return what the cells of a committed notebook printed."""
    cells = nbformat.read(FOLDER / f"{notebook}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join(texts)


def test_the_confirming_test_is_what_the_notebook_shows() -> None:
    """The gain of the claim that was fixed beforehand, with its interval."""
    found = confirmed(table("smollm2_chat"))
    (line,) = re.findall(r"gain over α = 1.*", _shown("04_is_it_real"))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
    assert numbers == [round(found[f"gain{end}"], 2) for end in ("", "_low", "_high")]


@pytest.mark.parametrize("name", [name for name in MODELS if (RESULTS / f"{name}.zip").is_file()])
def test_figure_3_is_what_the_notebook_shows(name: str) -> None:
    """How many layers' MLP outputs amplification reads better, of each model."""
    cells = table(name)
    shares = layer_shares(cells[cells["kind"] == "mlp_out"])
    top, holds = shares.loc[shares["gain"].idxmax()], shares["holds"]
    shown = _shown("02_paper_figures")
    layers = shares.loc[holds, "source_layer"].tolist()
    first = f"{name} mlp_out: holds at {holds.sum()} of {len(shares)} layers {layers}"
    gain = f"largest gain {top['gain']:.2f} ({top['gain_low']:.2f} to {top['gain_high']:.2f})"
    assert f"{first}\n    {gain}" in shown
