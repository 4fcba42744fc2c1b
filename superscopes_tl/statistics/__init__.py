"""Statistics of readings: null, bootstrap, Figure 3, shares recovered, ℓ_c, choosing α."""

from superscopes_tl.statistics.chance import (
    FEWEST_PROMPTS,
    best_scores,
    bootstrap,
    corrected_hits,
    other_prompt_null,
    q_values,
    sign_flip_test,
)
from superscopes_tl.statistics.comparison import Comparison, compare
from superscopes_tl.statistics.criterion import (
    Quality,
    ceiling,
    compared_scores,
    exact,
    metric_table,
    quality,
    quality_intervals,
    token_overlap,
    word_vectors_scorer,
)
from superscopes_tl.statistics.ranks import Retrieval, found_by_chance, found_ranks, retrieval
from superscopes_tl.statistics.recordings import Recording, read_recording, replay
from superscopes_tl.statistics.resolution import contextualization_layers, reveals_earlier
from superscopes_tl.statistics.selectors import (
    amplifiers,
    by_similarity,
    choose,
    fixed_alpha,
    largest_lift,
    lowest_entropy,
    neighbour_agreement,
    rate,
)
from superscopes_tl.statistics.shares import MEASURES, cross_fitted, layer_shares

__all__ = [
    "FEWEST_PROMPTS",
    "MEASURES",
    "Comparison",
    "Quality",
    "Recording",
    "Retrieval",
    "amplifiers",
    "best_scores",
    "bootstrap",
    "by_similarity",
    "ceiling",
    "choose",
    "compare",
    "compared_scores",
    "contextualization_layers",
    "corrected_hits",
    "cross_fitted",
    "exact",
    "fixed_alpha",
    "found_by_chance",
    "found_ranks",
    "largest_lift",
    "layer_shares",
    "lowest_entropy",
    "metric_table",
    "neighbour_agreement",
    "other_prompt_null",
    "q_values",
    "quality",
    "quality_intervals",
    "rate",
    "read_recording",
    "replay",
    "retrieval",
    "reveals_earlier",
    "sign_flip_test",
    "token_overlap",
    "word_vectors_scorer",
]
