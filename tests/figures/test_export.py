"""Files: pages that open offline, plain pictures, and what a cancelled run leaves."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from superscopes_tl import SweepResult, alpha_curve, heatmap, write_html
from superscopes_tl.figures import heatmap_png, save_as
from superscopes_tl.figures.export import _fonts
from tests.support.readings import NAN, reading, result_of

EVIL = "<script>alert('x')</script>"
RESULT = result_of(
    *(
        reading(layer, alpha, alpha / 10, kind=kind)
        for kind in ("resid_mid", "mlp_out", "resid_post")
        for layer in (0, 1)
        for alpha in (1, 3)
    )
)


def test_the_file_opens_offline_and_runs_no_generated_code(tmp_path: Path) -> None:
    """One HTML file holds plotly once, loads nothing, and keeps generated text inert."""
    result = result_of(reading(5, 3, 0.7, description=EVIL), reading(2, 3, NAN))
    figures = [heatmap(result), alpha_curve(result)]
    path = write_html(figures, tmp_path / "map.html", title=f"A & B {EVIL}")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html")
    assert page.count("plotly.js v") == 1
    one = write_html(heatmap(result), tmp_path / "one.html").read_text(encoding="utf-8")
    assert one.count("Plotly.newPlot(") + 1 == page.count("Plotly.newPlot(")
    assert not re.search(r"""<(script|link|img|iframe)[^>]*\s(src|href)=["']?(https?:)?//""", page)
    assert "<script>alert" not in page
    assert "alert(" in page  # it is there, as text
    assert f"<title>{html.escape('A & B ' + EVIL)}</title>" in page


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_a_cancelled_run_is_exported(tmp_path: Path, rows: int) -> None:
    """Whatever is finished and whichever layer is chosen, page and picture can be written."""
    done = SweepResult(RESULT.table.head(rows), {"prompt": "P $x$"})
    page = save_as(done, tmp_path / "part.html", position=6, target_layer=0, layer=5)
    assert "not computed" in page.read_text(encoding="utf-8") or rows == 12
    assert save_as(done, tmp_path / "part.png").read_bytes().startswith(b"\x89PNG")


def test_every_suffix_has_its_format(tmp_path: Path) -> None:
    """Tables and run files come back as they were; other suffixes and folders are refused."""
    assert SweepResult.load(save_as(RESULT, tmp_path / "r.zip")).table.equals(RESULT.table)
    for suffix in (".csv", ".parquet"):
        assert save_as(RESULT, tmp_path / f"r{suffix}").stat().st_size
    for name in ("r.pdf", "r", "missing/r.csv"):
        with pytest.raises(ValueError, match="^path: "):
            save_as(RESULT, tmp_path / name)
    with pytest.raises(ValueError, match="^result: "):
        save_as(result_of(), tmp_path / "empty.csv")
    for suffix in (".html", ".png"):
        with pytest.raises(ValueError, match="^position: "):
            save_as(RESULT, tmp_path / f"none{suffix}", position=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_chosen_target_layer_is_shown_even_if_another_reads_better(tmp_path: Path) -> None:
    """Tables and decomposition show one target layer, as the map beside them does."""
    both = result_of(
        reading(0, 1, 0.9, description="better"),
        reading(0, 1, 0.1, description="worse", target_layer=2),
    )
    page = save_as(both, tmp_path / "both.html", target_layer=2).read_text(encoding="utf-8")
    assert "worse" in page
    assert "better" not in page


def test_the_plain_picture_takes_any_sweep() -> None:
    """One cell, no score at all, several target layers: the best one of each cell counts."""
    for result in (
        result_of(reading(5, 1, NAN)),
        result_of(reading(5, 1, 0.1), reading(5, 1, 0.9, target_layer=3)),
        result_of(*(reading(5, alpha, 0.5) for alpha in range(1, 12))),
    ):
        assert heatmap_png(result).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompt", "title", "note"),
    [
        ("宮崎 é", "?? é · token ·token6", "?: no font on this machine has U+5BAE, U+5D0E"),
        ("نجيب محفوظ", "\u200eنجيب محفوظ · token ·token6", ""),
        ("a $ b\x12", r"a \$ b? · token ·token6", "?: no font on this machine has U+0012"),
    ],
)
def test_the_picture_shows_no_boxes(
    prompt: str, title: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine with matplotlib's own fonts: what they lack is said, and nothing warns."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    _fonts.cache_clear()
    texts: list[str] = []
    for name in ("suptitle", "supxlabel"):
        draw = getattr(Figure, name)
        monkeypatch.setattr(
            Figure, name, lambda self, t, *, draw=draw, **k: texts.append(t) or draw(self, t, **k)
        )
    result = result_of(reading(5, 1, 0.5))
    result = replace(result, provenance={**result.provenance, "prompt": prompt})
    assert heatmap_png(result).startswith(b"\x89PNG")
    _fonts.cache_clear()
    assert texts == [title, *([note] if note else [])]
