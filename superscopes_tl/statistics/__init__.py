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
from superscopes_tl.statistics.criterion import Quality, quality, quality_intervals
from superscopes_tl.statistics.ranks import Retrieval, found_by_chance, found_ranks, retrieval
from superscopes_tl.statistics.recordings import Recording, read_recording, replay
from superscopes_tl.statistics.resolution import contextualization_layers, reveals_earlier
from superscopes_tl.statistics.selectors import (
    by_other_prompts,
    by_recovered,
    by_similarity,
    choose,
    equal_dose,
    explains_nothing,
    fixed_alpha,
    largest_lift,
    lowest_entropy,
    mode_frequency,
    neighbour_agreement,
    rate,
    self_explaining,
)
from superscopes_tl.statistics.shares import MEASURES, cross_fitted, layer_shares
from superscopes_tl.statistics.signals import alpha_signals

__all__ = [
    "FEWEST_PROMPTS",
    "MEASURES",
    "Comparison",
    "Quality",
    "Recording",
    "Retrieval",
    "alpha_signals",
    "best_scores",
    "bootstrap",
    "by_other_prompts",
    "by_recovered",
    "by_similarity",
    "choose",
    "compare",
    "contextualization_layers",
    "corrected_hits",
    "cross_fitted",
    "equal_dose",
    "explains_nothing",
    "fixed_alpha",
    "found_by_chance",
    "found_ranks",
    "largest_lift",
    "layer_shares",
    "lowest_entropy",
    "mode_frequency",
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
    "self_explaining",
    "sign_flip_test",
]
