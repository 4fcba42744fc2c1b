"""Figures and results as files that open anywhere, offline, without Python."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.paper import at_target, best_table, decomposition
from superscopes_tl.figures.snapshot import heatmap_png
from superscopes_tl.figures.sweeps import alpha_curve, heatmap
from superscopes_tl.files import written_whole

SUFFIXES = (".html", ".png", ".csv", ".parquet", ".zip")


def write_html(
    figures: go.Figure | Sequence[go.Figure],
    path: str | os.PathLike[str],
    *,
    title: str = "Superscopes",
) -> Path:
    """Write one or several figures to one HTML file that opens offline; return its path.

    Raises:
        OSError: the file cannot be written; an older one of that name stays.
    """
    several = [figures] if isinstance(figures, go.Figure) else list(figures)
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(several)
    ]
    target = Path(path)
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title></head><body>{''.join(parts)}</body></html>"
    )
    with written_whole(target) as fresh:
        fresh.write_text(page, encoding="utf-8")
    return target


def save_as(
    result: SweepResult,
    path: str | os.PathLike[str],
    *,
    position: int | None = None,
    target_layer: int | None = None,
    layer: int | None = None,
    value: str | None = None,
) -> Path:
    """Write a result in the format that the file's suffix names, whole or not; return its path.

    Args:
        result: the sweep.
        path: ends in `.html` (all figures, opens offline), `.png` (the heatmaps), `.csv` or
            `.parquet` (the table), or `.zip` (the run file, for `SweepResult.load`).
        position: the token of the figures; the rightmost one unless given.
        target_layer: the target layer of the figures, where there are several.
        layer: the layer of the decomposition; the last one unless given and finished.
        value: what the figures colour by, "recovered" or "score"; the score unless given, or what
            is recovered where not all cells were written out.

    Raises:
        ValueError: another suffix, a folder that does not exist, or no cell to write or draw.
        OSError: the file cannot be written; an older one of that name stays.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise bad_value(
            "path", f"a file name that ends in one of {SUFFIXES}", str(path),
            "superscopes.html, for example",
        )  # fmt: skip
    if not target.parent.is_dir():
        raise bad_value("path", "a folder that exists", str(target.parent), "make it first")
    if result.table.empty:
        raise bad_value("result", "at least one cell", "an empty table", "run a sweep first")
    if target.suffix == ".zip":
        return result.save(target)
    if target.suffix == ".csv":
        with written_whole(target) as fresh:
            result.table.to_csv(fresh, index=False)
    elif target.suffix == ".parquet":
        with written_whole(target) as fresh:
            fresh.write_bytes(result.table.to_parquet(index=False))
    else:
        at = int(max(result.table["position"])) if position is None else position
        drawn = _at(result, at, target_layer)
        value = value or ("score" if drawn.table["written"].all() else "recovered")
        if target.suffix == ".png":
            picture = heatmap_png(drawn, position=at, target_layer=target_layer, value=value)
            with written_whole(target) as fresh:
                fresh.write_bytes(picture)
        else:
            title = f"Superscopes: {result.provenance.get('prompt', '')}"
            write_html(_figures(drawn, layer, value), target, title=title)
    return target


def _at(result: SweepResult, position: int, target_layer: int | None) -> SweepResult:
    """Return what is finished of one token and target layer."""
    part = at_target(result, target_layer)
    table = part.table[part.table["position"] == position]
    if table.empty:  # of a run that was cancelled, for example
        raise bad_value(
            "result",
            "at least one finished cell of the token and target layer to draw",
            f"none of token {position}",
            "choose another token or target layer, or write .zip or .csv, which hold them all",
        )
    return SweepResult(table, part.provenance)


def _figures(result: SweepResult, layer: int | None, value: str) -> list[go.Figure]:
    """Return all figures of one token; a layer that was not finished gives way to the last."""
    table = result.table
    if layer is None or layer not in set(table["source_layer"]):
        layer = int(max(table["source_layer"]))
    curves = [alpha_curve(result, kind=kind, value=value) for kind in dict.fromkeys(table["kind"])]
    return [heatmap(result, value=value), best_table(result), decomposition(result, layer), *curves]
