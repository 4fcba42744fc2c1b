"""Other methods at the same sites: lenses, activation patching, next-token predictions."""

from superscopes_tl.neighbours.causal import (
    Amplified,
    Noise,
    OtherTokens,
    Resampled,
    Without,
    Zero,
    beside,
    causal_effects,
    causal_trace,
)
from superscopes_tl.neighbours.first_tokens import LensRecovery, content_token, lens_recovery
from superscopes_tl.neighbours.jacobian_lens import JacobianLens, fit_jacobian_lens
from superscopes_tl.neighbours.knowledge import (
    Agreement,
    Mixture,
    agreement,
    flip_point,
    mixture,
    whose_knowledge,
)
from superscopes_tl.neighbours.lenses import (
    LENSES,
    LOGIT_LENS,
    Lens,
    lens_kl,
    lens_label,
    lens_table,
    logit_lens,
    sites_of,
)
from superscopes_tl.neighbours.methods import NEIGHBOURS, side_by_side
from superscopes_tl.neighbours.next_token import PATCHED, NextTokens, next_tokens
from superscopes_tl.neighbours.token_relevancy import TokenEffect, relevancy, token_effects
from superscopes_tl.neighbours.tuned_lens import TunedLens, train_tuned_lens

__all__ = [
    "LENSES",
    "LOGIT_LENS",
    "NEIGHBOURS",
    "PATCHED",
    "Agreement",
    "Amplified",
    "JacobianLens",
    "Lens",
    "LensRecovery",
    "Mixture",
    "NextTokens",
    "Noise",
    "OtherTokens",
    "Resampled",
    "TokenEffect",
    "TunedLens",
    "Without",
    "Zero",
    "agreement",
    "beside",
    "causal_effects",
    "causal_trace",
    "content_token",
    "fit_jacobian_lens",
    "flip_point",
    "lens_kl",
    "lens_label",
    "lens_recovery",
    "lens_table",
    "logit_lens",
    "mixture",
    "next_tokens",
    "relevancy",
    "side_by_side",
    "sites_of",
    "token_effects",
    "train_tuned_lens",
    "whose_knowledge",
]
