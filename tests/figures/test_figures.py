"""The paper's other pictures, and the plain one for readers without JavaScript."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from superscopes_tl import SweepResult
from superscopes_tl.experiment import Reading
from superscopes_tl.explorer import markup
from superscopes_tl.figures import (
    Shades,
    alpha_ladder,
    best_table,
    decomposition,
    heatmap_png,
    save_as,
)

ONE = Reading(
    prompt="P $x$", position=1, token="t", kind="resid_mid", source_layer=0, target_layer=0,
    mapping="Scale()", alpha=1.0, vector_norm=1.0, norm_ratio=1.0, text=": a <b>",
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


@pytest.fixture
def partial(result: SweepResult) -> SweepResult:
    """Of layer 1 only the unamplified `resid_mid` is finished: the run was cancelled."""
    table = result.table
    done = (table["source_layer"] == 0) | ((table["kind"] == "resid_mid") & (table["alpha"] == 1))
    return SweepResult(table[done], result.provenance)


def test_figures_of_a_cancelled_run_say_what_is_not_computed(partial: SweepResult) -> None:
    """No `nan` in place of a cell that was not reached or has nothing to score."""
    texts = [note.text for note in decomposition(partial, 1).layout.annotations]
    assert sum("not computed" in text for text in texts) == 2
    columns = best_table(partial).data[0].cells["values"]
    assert [column[1] for column in columns] == [
        "1",
        "a &lt;b&gt; (α = 1, 0.11)",
        *["not computed"] * 2,
    ]
    silent = partial.table.assign(score=math.nan)
    entry = best_table(SweepResult(silent, partial.provenance)).data[0].cells["values"][1][0]
    assert entry == "a &lt;b&gt; (α = 1, no score)"
    assert "nan" not in str([*texts, *columns])


@pytest.mark.parametrize("layer", [1, 5, None])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_cancelled_run_is_exported(
    result: SweepResult, tmp_path: Path, rows: int, layer: int | None
) -> None:
    """Whatever is finished and whichever layer is chosen, the page can be written."""
    done = SweepResult(result.table.head(rows), result.provenance)
    page = save_as(done, tmp_path / "part.html", position=1, target_layer=0, layer=layer)
    assert "not computed" in page.read_text(encoding="utf-8")


def test_the_chosen_target_layer_is_shown_even_if_another_reads_better(
    result: SweepResult, tmp_path: Path
) -> None:
    """Tables and decomposition show one target layer, as the map beside them does."""
    worse = result.table.assign(target_layer=2, text=": c", description="c")
    worse["score"] -= 1
    rows = [*result.table.to_dict("records"), *worse.to_dict("records")]
    both = SweepResult(type(result.table)(rows), result.provenance)
    assert "(α = 3, 0.30)" in best_table(both).data[0].cells["values"][1][0]
    assert best_table(both, target_layer=2).data[0].cells["values"][1][0] == "c (α = 3, -0.70)"
    boxes = [note.text for note in decomposition(both, 0, target_layer=2).layout.annotations]
    assert sum("α = 3, score -0.70" in text for text in boxes) == 3
    table = markup.best(both, Shades("score", -1.0, 1.0), alpha=None, position=1, target_layer=2)
    assert "<bdi>c</bdi>" in table
    assert "a &lt;b&gt;" not in table
    with pytest.raises(ValueError, match=r"target_layer: expected one of \[0, 2\], got 1"):
        best_table(both, target_layer=1)
    save_as(both, tmp_path / "both.html", target_layer=2)
    assert "a &lt;b&gt;" not in (tmp_path / "both.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_nothing_finished_of_the_chosen_token_is_said(
    result: SweepResult, tmp_path: Path, suffix: str
) -> None:
    """The message says what can be written instead; no file is left."""
    with pytest.raises(
        ValueError, match="result: expected at least one finished cell of the token"
    ):
        save_as(result, tmp_path / f"none{suffix}", position=0)
    assert not list(tmp_path.iterdir())


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


def test_every_rung_of_the_ladder_says_what_was_read(result: SweepResult) -> None:
    """Texts stand at the bars' ends, or at zero where there is no score or a negative one."""
    scores = [-0.05, 0.3, math.nan]
    cells = [
        replace(ONE, kind="mlp_out", alpha=alpha, score=score, description=text)
        for alpha, score, text in zip((1.0, 3.0, 9.0), scores, ("a <b>", "c", ""), strict=True)
    ]
    bars, texts = alpha_ladder(SweepResult.from_readings(cells, result.provenance), 0).data
    assert list(bars.x) == [-0.05, 0.3, 0.0]
    assert list(bars.y) == list(texts.y) == ["1", "3", "9"]
    assert list(texts.x) == [0.0, 0.3, 0.0]
    assert [text.strip() for text in texts.text] == ["a &lt;b&gt;", "c", "–"]
