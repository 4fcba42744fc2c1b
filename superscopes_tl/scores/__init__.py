"""What a generated description is worth: similarity, and the share of the model's own words."""

from superscopes_tl.scores.similarity import (
    PAPER_SCORER,
    PAPER_THRESHOLD,
    Contains,
    Scorer,
    SentenceEmbeddingScorer,
    as_scorer,
    no_scores,
    packaged_scorer,
    score_texts,
    scorer_name,
    similarities,
)
from superscopes_tl.scores.words import LEAST_GAP, OwnWords, above_others, own_words, words_of

__all__ = [
    "LEAST_GAP",
    "PAPER_SCORER",
    "PAPER_THRESHOLD",
    "Contains",
    "OwnWords",
    "Scorer",
    "SentenceEmbeddingScorer",
    "above_others",
    "as_scorer",
    "no_scores",
    "own_words",
    "packaged_scorer",
    "score_texts",
    "scorer_name",
    "similarities",
    "words_of",
]
