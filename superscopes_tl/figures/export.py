"""Figures and results as files that open anywhere, offline, without Python.

`heatmap_png` is the heatmap of saved notebooks, which run no JavaScript. It is drawn by matplotlib,
because plotly needs a browser to write a PNG, and without pyplot, so that any thread may draw.
"""

from __future__ import annotations

import html
import io
import math
import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from superscopes_tl.errors import bad_value, check_choice, describe
from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.grid import (
    COLOR_SCALE,
    LABEL_LIMIT,
    MARKS,
    TITLES,
    Grid,
    Row,
    escape,
    on_scale,
)
from superscopes_tl.figures.paper import best_table, decomposition
from superscopes_tl.figures.sweeps import Shades, alpha_curve, heatmap, mark_of, usual_value
from superscopes_tl.files import written_whole
from superscopes_tl.model import PatchedLayer

LEFT_TO_RIGHT = "\u200e"
SUFFIXES = (".html", ".png", ".csv", ".parquet", ".zip")


def write_html(
    figures: go.Figure | Sequence[go.Figure],
    path: str | os.PathLike[str],
    *,
    title: str = "Superscopes",
) -> Path:
    """Write one or several figures to one HTML file that opens offline; return its path."""
    several = [figures] if isinstance(figures, go.Figure) else figures
    body = "".join(
        figure.to_html(full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(several)
    )
    target = Path(path)
    head = f"<head><meta charset='utf-8'><title>{html.escape(title)}</title></head>"
    page = f"<!doctype html><html lang='en'>{head}<body>{body}</body></html>"
    with written_whole(target) as fresh:
        fresh.write_text(page, encoding="utf-8")
    return target


def save_as(
    result: SweepResult,
    path: str | os.PathLike[str],
    *,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
    layer: int | None = None,
    value: str | None = None,
) -> Path:
    """Write a result, complete or not, in the format of the file's suffix; return its path.

    Args:
        result: the sweep.
        path: ends in `.html` (all figures, opens offline), `.png` (the heatmaps), `.csv` or
            `.parquet` (the table), or `.zip` (the run file, for `SweepResult.load`).
        position: the token of the figures; defaults to the rightmost one.
        target_layer: the target layer of the figures, where there are several.
        layer: the layer of the decomposition; defaults to the last one that is finished.
        value: the column of the colours, "recovered" or "score"; defaults to the score, or to
            "recovered" where not all cells were written out.

    Raises:
        ValueError: another suffix, a folder that does not exist, or no cell to write or draw.
        ImportError: a `.png` without matplotlib, of the extra `notebook`.
    """
    target = Path(path)
    check_choice("path", target.suffix, SUFFIXES)
    if not target.parent.is_dir():
        raise bad_value("path", "a folder that exists", str(target.parent), "make it first")
    if result.table.empty:
        raise bad_value("result", "at least one cell", "an empty table", "run a sweep first")
    if target.suffix == ".zip":
        return result.save(target)
    if target.suffix in (".csv", ".parquet"):
        write = result.table.to_csv if target.suffix == ".csv" else result.table.to_parquet
        with written_whole(target) as fresh:
            write(fresh, index=False)
        return target
    drawn = result.at(position=position, target_layer=target_layer)
    value = value or ("score" if drawn.table["written"].all() else "recovered")
    if target.suffix == ".html":
        title = f"Superscopes: {result.provenance.get('prompt', '')}"
        return write_html(_figures(drawn, layer, value), target, title=title)
    with written_whole(target) as fresh:
        fresh.write_bytes(heatmap_png(drawn, value=value))
    return target


def _figures(result: SweepResult, layer: int | None, value: str) -> list[go.Figure]:
    """Return all figures of one token; an unfinished layer is replaced by the last one."""
    table = result.table
    if layer is None or layer not in set(table["source_layer"]):
        layer = int(max(table["source_layer"]))
    curves = [alpha_curve(result, kind=kind, value=value) for kind in dict.fromkeys(table["kind"])]
    return [heatmap(result, value=value), best_table(result), decomposition(result, layer), *curves]


def heatmap_png(
    result: SweepResult,
    *,
    position: int | None = None,
    target_layer: PatchedLayer | None = None,
    value: str | None = None,
) -> bytes:
    """Return a value over source layer x α as a PNG, with grey cells where there is none.

    Arguments as in `heatmap`; by default the best target layer of each cell counts, and `value` is
    "recovered" where that is defined.

    Raises:
        ImportError: matplotlib, of the extra `notebook`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install 'superscopes-tl[notebook]'"
        raise ImportError(describe("picture", "matplotlib", "no such package", fix)) from error

    into: Any = "all" if target_layer is None else target_layer
    table = result.at(position=position, target_layer=into).table
    value = value or usual_value(table)
    best = table.sort_values(value, ascending=False, na_position="last", kind="stable")
    grid = Grid.of(best, x="alpha", panel="kind", panels=dict.fromkeys(table["kind"]))
    shades = Shades.of(table, value)
    size = (3.2 * len(grid.panels) + 1.0, 0.26 * max(4, len(grid.ys)) + 1.3)
    figure = Figure(size, layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(grid.panels), sharey=True, squeeze=False)[0]
    for panel, kind in zip(axes, grid.panels, strict=True):
        numbers = [[math.nan if z is None else z for z in row] for row in grid.numbers(kind, value)]
        panel.set_facecolor("#e9e9e9")
        panel.set_title(TITLES.get(kind, kind), fontsize=10)
        panel.set_xlabel("α")
        panel.set_xticks(range(len(grid.xs)), [f"{alpha:g}" for alpha in grid.xs])
        panel.set_yticks(range(len(grid.ys)), [str(layer) for layer in grid.ys])
        image = panel.imshow(
            numbers, cmap=COLOR_SCALE, vmin=shades.low, vmax=shades.high, aspect="auto",
            origin="lower",
        )  # fmt: skip
        for y, row in enumerate(numbers):
            for x, number in enumerate(row):
                if math.isfinite(number) and len(grid.xs) <= LABEL_LIMIT:
                    _, color = on_scale(number, shades.low, shades.high)
                    panel.text(x, y, f"{number:.2f}", ha="center", va="center", size=7, color=color)
    axes[0].set_ylabel("source layer")
    figure.colorbar(image, ax=list(axes), label=value, fraction=0.03)
    title = f"{str(result.provenance.get('prompt', ''))[:80]} · token {table['token'].iloc[0]}"
    families, missing = _fonts(title)
    for character in missing:
        title = title.replace(character, "?")
    # A dollar would start a formula, right-to-left letters at the beginning a line that runs so.
    title = f"{LEFT_TO_RIGHT}{title}" if escape(title) != html.escape(title, quote=False) else title
    figure.suptitle(title.replace("$", r"\$"), fontsize=11, family=families)
    notes = [f"grey: {', '.join(grey)}"] if (grey := _grey(grid, value)) else []
    if missing:
        points = ", ".join(f"U+{ord(character):04X}" for character in missing)
        notes.append(textwrap.shorten(f"?: no font on this machine has {points}", 80))
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


@lru_cache
def _fonts(text: str) -> tuple[list[str], tuple[str, ...]]:
    """Return families of fonts that together have a text's characters, and what none of them has.

    Matplotlib's own font has no Chinese, Japanese or Korean. Bitmap fonts (emoji in colour) are
    none that matplotlib can draw.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    families = ["DejaVu Sans"]
    has = FT2Font(findfont(FontProperties(family=families))).get_char_index
    missing = tuple(dict.fromkeys(c for c in text if not has(ord(c)) and c != "\n"))
    for entry in fontManager.ttflist if missing else ():
        if entry.weight != 400 or entry.style != "normal" or entry.name.startswith("Last Resort"):
            continue
        font = FT2Font(entry.fname)
        left = tuple(c for c in missing if not font.scalable or not font.get_char_index(ord(c)))
        if left != missing:
            families, missing = [*families, entry.name], left
    return families, missing


def _grey(grid: Grid, value: str) -> list[str]:
    """Return why cells have no colour, by the names of `MARKS`."""

    def mark(row: Row | None) -> str:
        return "" if row is not None and math.isfinite(row[value]) else mark_of(row, value)

    marked = [grid.marked(kind, mark) for kind in grid.panels]
    return [name for name in MARKS if any(places[name] for places in marked)]
