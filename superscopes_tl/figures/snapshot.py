"""A sweep as a plain picture, for readers of a saved notebook that runs no JavaScript.

1. One panel per kind, all on one colour scale, as in `plots.heatmap`.
2. Drawn by matplotlib's `Figure` without pyplot: no global state, so any thread may draw.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd

from superscopes_tl.experiment import SweepResult
from superscopes_tl.figures.sweeps import (
    COLOR_SCALE,
    LABEL_LIMIT,
    MARKS,
    TITLES,
    mark_of,
    score_range,
    usual_value,
    value_range,
)


def heatmap_png(
    result: SweepResult,
    *,
    position: int | None = None,
    target_layer: int | None = None,
    value: str | None = None,
) -> bytes:
    """Return a value over source layer x α as a PNG.

    Args:
        result: the sweep; cells that were not computed stay grey.
        position: the token; the rightmost one unless given.
        target_layer: which target layer; the best one of each cell unless given.
        value: "recovered" or "score"; the former unless given, where it is defined.
    """
    from matplotlib.figure import Figure

    table = result.table
    at = table["position"].max() if position is None else position
    table = table[table["position"] == at]
    if target_layer is not None:
        table = table[table["target_layer"] == target_layer]
    kinds = list(dict.fromkeys(table["kind"])) or [""]
    layers, alphas = sorted(table["source_layer"].unique()), sorted(table["alpha"].unique())
    figure = Figure(
        figsize=(3.2 * len(kinds) + 1.0, 0.26 * max(4, len(layers)) + 1.3),
        layout="constrained",
        facecolor="white",
    )
    value = value or usual_value(table)
    low, high = value_range(table, value) or score_range(table)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        grid = np.full((len(layers), len(alphas)), np.nan)
        for row in (
            table[table["kind"] == kind].sort_values(value, na_position="first").to_dict("records")
        ):
            grid[layers.index(row["source_layer"]), alphas.index(row["alpha"])] = row[value]
        panel.set_facecolor("#e9e9e9")
        panel.set_title(TITLES.get(kind, kind), fontsize=10)
        panel.set_xlabel("α")
        panel.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        if not grid.size:
            continue
        image = panel.imshow(
            grid, cmap=COLOR_SCALE, vmin=low, vmax=high, aspect="auto", origin="lower"
        )
        for (y, x), score in np.ndenumerate(grid):
            if np.isfinite(score) and len(alphas) <= LABEL_LIMIT:
                light = score > (low + high) / 2
                colour = "black" if light else "white"
                panel.text(x, y, f"{score:.2f}", ha="center", va="center", size=7, color=colour)
    panels[0].set_ylabel("source layer")
    if layers:
        figure.colorbar(image, ax=list(panels), label=value, fraction=0.03)
        figure.suptitle(_title(result, str(table["token"].iloc[0])), fontsize=11)
    if grey := _grey(table, kinds, len(layers) * len(alphas), value):
        figure.supxlabel(f"grey: {', '.join(grey)}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _title(result: SweepResult, token: str) -> str:
    prompt = str(result.provenance.get("prompt", ""))[:80]
    # A dollar sign would start a formula.
    return f"{prompt} · token {token}".replace("$", r"\$")


def _grey(table: pd.DataFrame, kinds: Sequence[str], places: int, value: str) -> list[str]:
    """Return why cells have no colour, in the words of `MARKS`."""
    rows = table.to_dict("records")
    found = {mark_of(row, value) for row in rows if not np.isfinite(row[value])}
    drawn = table.drop_duplicates(["kind", "source_layer", "alpha"])
    if len(drawn) < places * len(kinds):
        found.add("not computed")
    return [name for name in MARKS if name in found]
