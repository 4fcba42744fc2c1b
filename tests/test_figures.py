"""The paper's other pictures, and the plain one for readers without JavaScript."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from superscopes_tl import SweepResult, best_table, decomposition
from superscopes_tl.results import Reading
from superscopes_tl.snapshot import heatmap_png

ONE = Reading(
    prompt="P $x$", position=1, token="t", kind="resid_mid", source_layer=0, target_layer=0,
    mapping="scale", alpha=1.0, vector_norm=1.0, norm_ratio=1.0, text=": a <b>",
    description="a <b>", score=0.1, few_shot_copy=False, n_tokens=2, margin=1.0,
)  # fmt: skip


@pytest.fixture
def result() -> SweepResult:
    """Two layers, three kinds, two α; α = 3 is better, and one cell has no description."""
    readings = [
        replace(ONE, kind=kind, source_layer=layer, alpha=alpha, score=alpha / 10 + layer / 100)
        for kind in ("resid_mid", "mlp_out", "resid_post")
        for layer in (0, 1)
        for alpha in (1.0, 3.0)
    ]
    readings[-1] = replace(readings[-1], description="", score=math.nan)
    return SweepResult.from_readings(readings, {"prompt": "P $x$", "model": {"name": "m"}})


def test_decomposition_shows_three_kinds_and_two_signs(result: SweepResult) -> None:
    """resid_mid + mlp_out = resid_post, each with its best reading; text is escaped."""
    texts = [note.text for note in decomposition(result, 0).layout.annotations]
    boxes = [text for text in texts if text not in ("+", "=")]
    assert [text.split("</b>")[0] for text in boxes] == [
        "<b>resid_mid", "<b>mlp_out", "<b>resid_post",
    ]  # fmt: skip
    assert {"+", "="} <= set(texts)
    assert all("a &lt;b&gt;" in text for text in boxes)
    assert all("α = 3" in text for text in boxes)
    unamplified = [note.text for note in decomposition(result, 1, alpha=1).layout.annotations]
    assert sum("α = 1, score 0.11" in text for text in unamplified) == 3


def test_decomposition_refuses_a_layer_that_is_not_there(result: SweepResult) -> None:
    """The message names the layers of the sweep."""
    with pytest.raises(ValueError, match=r"layer: expected one of \[0, 1\], got 2"):
        decomposition(result, 2)


def test_decomposition_says_which_kind_is_missing(result: SweepResult) -> None:
    """A sweep over one kind shows the others as not computed."""
    table = result.table[result.table["kind"] == "mlp_out"]
    texts = [
        note.text
        for note in decomposition(SweepResult(table, result.provenance), 0).layout.annotations
    ]
    assert sum("not computed" in text for text in texts) == 2


def test_best_table_has_a_row_per_layer_and_a_column_per_kind(result: SweepResult) -> None:
    """Best α unless one is asked for."""
    table = best_table(result).data[0]
    assert list(table.header["values"]) == ["layer", "resid_mid", "mlp_out", "resid_post"]
    assert list(table.cells["values"][0]) == ["0", "1"]
    assert "(α = 3, 0.30)" in table.cells["values"][1][0]
    assert "(α = 1, 0.10)" in best_table(result, alpha=1).data[0].cells["values"][1][0]


def test_the_plain_picture_is_a_png_and_takes_any_text(result: SweepResult) -> None:
    """Dollar signs are no formula; a partial and a one-cell sweep can be drawn."""
    assert heatmap_png(result).startswith(b"\x89PNG")
    for rows in (1, 5):
        part = SweepResult(result.table.head(rows), result.provenance)
        assert heatmap_png(part, position=1, target_layer=0).startswith(b"\x89PNG")
    silent = SweepResult(result.table.tail(1), result.provenance)
    assert heatmap_png(silent).startswith(b"\x89PNG")
