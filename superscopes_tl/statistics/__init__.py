"""Statistics of readings: null, bootstrap, Figure 3, contextualization layer, choosing α."""

from superscopes_tl.statistics.chance import FEWEST_PROMPTS, best_scores, bootstrap, corrected_hits
from superscopes_tl.statistics.comparison import Comparison, compare
from superscopes_tl.statistics.criterion import Quality
from superscopes_tl.statistics.recordings import Recording, read_recording, replay
from superscopes_tl.statistics.resolution import contextualization_layers, reveals_earlier

__all__ = [
    "FEWEST_PROMPTS",
    "Comparison",
    "Quality",
    "Recording",
    "best_scores",
    "bootstrap",
    "compare",
    "contextualization_layers",
    "corrected_hits",
    "read_recording",
    "replay",
    "reveals_earlier",
]
