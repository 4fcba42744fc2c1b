"""Figures as files that open anywhere, offline, without Python."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go


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
