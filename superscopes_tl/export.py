"""Figures and results as files that open anywhere, offline, without Python."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from superscopes_tl.errors import bad_value
from superscopes_tl.figures import best_table, decomposition
from superscopes_tl.plots import alpha_curve, heatmap
from superscopes_tl.results import SweepResult
from superscopes_tl.snapshot import heatmap_png

SUFFIXES = (".html", ".png", ".csv", ".parquet", ".zip")


def write_html(
    figures: go.Figure | Sequence[go.Figure],
    path: str | os.PathLike[str],
    *,
    title: str = "Superscopes",
) -> Path:
    """Write one or several figures to one HTML file that opens offline; return its path."""
    several = [figures] if isinstance(figures, go.Figure) else list(figures)
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(several)
    ]
    target = Path(path)
    target.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title></head><body>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )
    return target


def save_as(
    result: SweepResult,
    path: str | os.PathLike[str],
    *,
    position: int | None = None,
    target_layer: int | None = None,
    layer: int | None = None,
) -> Path:
    """Write a result in the format that the file's suffix names; return its path.

    Args:
        result: the sweep.
        path: ends in `.html` (all figures, opens offline), `.png` (the heatmaps), `.csv` or
            `.parquet` (the table), or `.zip` (the run file, for `SweepResult.load`).
        position: the token of the figures; the rightmost one unless given.
        target_layer: the target layer of the figures, where there are several.
        layer: the layer of the decomposition; the last one unless given.

    Raises:
        ValueError: another suffix, a folder that does not exist, or no cell to write.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise bad_value(
            "path", expected=f"a file name that ends in one of {SUFFIXES}", got=str(path),
            fix="superscopes.html, for example",
        )  # fmt: skip
    if not target.parent.is_dir():
        raise bad_value(
            "path", expected="a folder that exists", got=str(target.parent), fix="make it first"
        )
    if result.table.empty:
        raise bad_value(
            "result", expected="at least one cell", got="an empty table", fix="run a sweep first"
        )
    if target.suffix == ".zip":
        return result.save(target)
    if target.suffix == ".csv":
        result.table.to_csv(target, index=False)
    elif target.suffix == ".parquet":
        result.table.to_parquet(target, index=False)
    elif target.suffix == ".png":
        target.write_bytes(heatmap_png(result, position=position, target_layer=target_layer))
    else:
        at: dict[str, Any] = {"position": position, "target_layer": target_layer}
        shown = max(result.table["source_layer"]) if layer is None else layer
        kinds = dict.fromkeys(result.table["kind"])
        curves = [alpha_curve(result, kind=kind, **at) for kind in kinds]
        tables = [best_table(result, position=position)]
        parts = [decomposition(result, shown, position=position)]
        title = f"Superscopes: {result.provenance.get('prompt', '')}"
        write_html([heatmap(result, **at), *tables, *parts, *curves], target, title=title)
    return target
