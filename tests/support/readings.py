"""Hand-made results, and what of a heatmap a test looks at."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from superscopes_tl import SweepResult
from superscopes_tl.experiment import Reading

NAN = math.nan
PROVENANCE = {"model": {"name": "a-model"}, "prompt": "Red Hot Chili Peppers"}


def reading(
    source_layer: int = 5,
    alpha: float = 1.0,
    score: float = 0.5,
    *,
    kind: str = "resid_post",
    position: int = 6,
    description: str | None = None,
    **others: Any,
) -> Reading:
    """Return one cell; its norm ratio is a tenth of layer plus α, and so differs from its score."""
    name = f"{kind} {source_layer} x {alpha:g}" if description is None else description
    if math.isnan(score) and description is None:
        name = ""
    usual = Reading(
        prompt="Red Hot Chili Peppers",
        position=position,
        token=f"·token{position}",
        kind=kind,
        source_layer=source_layer,
        target_layer=0,
        mapping="Scale()",
        alpha=float(alpha),
        vector_norm=2.0,
        norm_ratio=(source_layer + alpha) / 10,
        text=f": {name}" if name else "",
        description=name,
        score=score,
        few_shot_copy=False,
        n_tokens=4,
        margin=0.25,
    )
    return replace(usual, **others)


def result_of(*readings: Reading) -> SweepResult:
    """Return the result that holds these cells."""
    return SweepResult.from_readings(readings, PROVENANCE)


def heatmaps(figure: go.Figure) -> list[go.Heatmap]:
    """Return the coloured panels."""
    return [trace for trace in figure.data if trace.type == "heatmap"]


def marks(figure: go.Figure, name: str) -> list[tuple[str, str, str]]:
    """Return axis, horizontal and vertical place of every mark of one sort."""
    return [
        (trace.xaxis, x, y)
        for trace in figure.data
        if trace.type == "scatter" and trace.name == name
        for x, y in zip(trace.x, trace.y, strict=True)
    ]


def rows_of(values: Any) -> list[list[Any]]:
    """Return nested lists whatever sequence plotly keeps."""
    return [list(row) for row in values]
