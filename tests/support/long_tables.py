"""Small hand-made tables of cells, for the modules that read the table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd


def cell(
    prompt: str = "P",
    source_layer: int = 0,
    alpha: float = 1.0,
    score: float = 0.5,
    description: str = "text",
    **others: Any,
) -> dict[str, Any]:
    """Return one greedy cell at the last token; `others` are further columns."""
    row = {
        "prompt": prompt,
        "position": 3,
        "token": "·Live",
        "kind": "resid_post",
        "source_layer": source_layer,
        "target_layer": 0,
        "mapping": "Scale()",
        "alpha": float(alpha),
        "text": f": {description}, Adele: singer",
        "description": description,
        "score": score,
        "draw": 0,
        "entropy": 1.0,
        "log_probability": -1.0,
        "written": True,
        "echo": False,
        "about": prompt,
        "recovered": math.nan,
        "own_words": "",
        "norm_outlier": math.nan,
        "unchanged": False,
    }
    return row | others


def table_of(*cells: dict[str, Any]) -> pd.DataFrame:
    """Return the table of these cells."""
    return pd.DataFrame(list(cells))
