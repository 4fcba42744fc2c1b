"""Plotly figures of results, named by what they show and their form, and their export.

`figure_1`, `figure_3`, `figure_5` and `figure_6` are the paper's own numbers.
"""

from superscopes_tl.figures.export import heatmap_png, save_as, write_html
from superscopes_tl.figures.grid import (
    COLOR_SCALE,
    MARKS,
    METHOD_COLORS,
    NO_CELL,
    Grid,
    axis_label,
    cell_texts,
    draw,
    on_scale,
)
from superscopes_tl.figures.neighbours import (
    cells_of,
    effect_heatmap,
    lens_heatmap,
    lens_kl_curve,
    mixture_curve,
    next_token_curve,
    next_token_grid,
    relevancy_heatmap,
    side_by_side_table,
)
from superscopes_tl.figures.paper import (
    alpha_ladder,
    best_table,
    decomposition,
    figure_1,
    figure_3,
    figure_5,
    figure_6,
)
from superscopes_tl.figures.shares import share_curves, share_panels
from superscopes_tl.figures.statistics import earlier_table, readability_curve, selector_dots
from superscopes_tl.figures.sweeps import (
    USUAL_SCORES,
    Shades,
    alpha_curve,
    heatmap,
    hover_text,
    layer_grid,
    mark_of,
    usual_value,
    value_range,
)

__all__ = [
    "COLOR_SCALE",
    "MARKS",
    "METHOD_COLORS",
    "NO_CELL",
    "USUAL_SCORES",
    "Grid",
    "Shades",
    "alpha_curve",
    "alpha_ladder",
    "axis_label",
    "best_table",
    "cell_texts",
    "cells_of",
    "decomposition",
    "draw",
    "earlier_table",
    "effect_heatmap",
    "figure_1",
    "figure_3",
    "figure_5",
    "figure_6",
    "heatmap",
    "heatmap_png",
    "hover_text",
    "layer_grid",
    "lens_heatmap",
    "lens_kl_curve",
    "mark_of",
    "mixture_curve",
    "next_token_curve",
    "next_token_grid",
    "on_scale",
    "readability_curve",
    "relevancy_heatmap",
    "save_as",
    "selector_dots",
    "share_curves",
    "share_panels",
    "side_by_side_table",
    "usual_value",
    "value_range",
    "write_html",
]
