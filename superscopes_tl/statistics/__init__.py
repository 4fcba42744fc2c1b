"""Statistics of readings: null, bootstrap, Figure 3, contextualization layer, choosing α."""

from superscopes_tl.statistics.chance import (
    FEWEST_PROMPTS,
    best_scores,
    bootstrap,
    corrected_hits,
    other_prompt_null,
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

__all__ = [
    "FEWEST_PROMPTS",
    "Comparison",
    "Quality",
    "Recording",
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
    "exact",
    "fixed_alpha",
    "largest_lift",
    "lowest_entropy",
    "metric_table",
    "neighbour_agreement",
    "other_prompt_null",
    "quality",
    "quality_intervals",
    "rate",
    "read_recording",
    "replay",
    "reveals_earlier",
    "token_overlap",
    "word_vectors_scorer",
]
