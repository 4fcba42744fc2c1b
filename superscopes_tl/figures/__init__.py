"""Plotly figures of results, and their export."""

from superscopes_tl.figures.causal_figures import effect_heatmap
from superscopes_tl.figures.export import save_as, write_html
from superscopes_tl.figures.grid_figures import layer_grid, next_token_curve, next_token_grid
from superscopes_tl.figures.lens_figures import lens_heatmap, lens_kl_figure
from superscopes_tl.figures.metric_figures import earlier_table
from superscopes_tl.figures.model_check import readability_figure
from superscopes_tl.figures.paper import at_target, best_table, decomposition, text_lines, unsaid
from superscopes_tl.figures.paper_figures import (
    alpha_ladder,
    figure_1,
    figure_3,
    figure_5,
    figure_6,
)
from superscopes_tl.figures.side_by_side import cells_of, relevancy_figure, side_by_side_figure
from superscopes_tl.figures.snapshot import heatmap_png
from superscopes_tl.figures.sweeps import (
    COLOR_SCALE,
    LABEL_LIMIT,
    MARKS,
    TITLES,
    USUAL_SCORES,
    Shades,
    alpha_curve,
    heatmap,
    hover_text,
    mark_of,
    score_range,
    usual_value,
    value_range,
)

__all__ = [
    "COLOR_SCALE",
    "LABEL_LIMIT",
    "MARKS",
    "TITLES",
    "USUAL_SCORES",
    "Shades",
    "alpha_curve",
    "alpha_ladder",
    "at_target",
    "best_table",
    "cells_of",
    "decomposition",
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
    "lens_kl_figure",
    "mark_of",
    "next_token_curve",
    "next_token_grid",
    "readability_figure",
    "relevancy_figure",
    "save_as",
    "score_range",
    "side_by_side_figure",
    "text_lines",
    "unsaid",
    "usual_value",
    "value_range",
    "write_html",
]
