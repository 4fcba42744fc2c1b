"""The engine: capture activations, patch them into a target prompt, generate."""

from superscopes_tl.engine.activations import Activations, capture, site_vectors, usual_norms
from superscopes_tl.engine.decoding import Generation
from superscopes_tl.engine.forced import Precision
from superscopes_tl.engine.generation import NEAR_TIE, PatchedGenerator
from superscopes_tl.engine.memory import bytes_per_row, free_bytes
from superscopes_tl.engine.named import generate_named, name_fits, named_log_probabilities
from superscopes_tl.engine.patch import Patch, no_patch
from superscopes_tl.engine.runs import Row, Run, continuation_ids, follow_continuation
from superscopes_tl.engine.target_prompt import (
    CHAT_PROMPT,
    DESCRIPTION_PROMPT,
    IDENTITY_PROMPT,
    MANY_KINDS,
    PAPER_ALPHAS,
    PAPER_PROMPTS,
    TargetPrompt,
    as_target_prompt,
    crop_description,
    default_target_prompt,
    description_is_over,
    is_echo,
)

__all__ = [
    "CHAT_PROMPT",
    "DESCRIPTION_PROMPT",
    "IDENTITY_PROMPT",
    "MANY_KINDS",
    "NEAR_TIE",
    "PAPER_ALPHAS",
    "PAPER_PROMPTS",
    "Activations",
    "Generation",
    "Patch",
    "PatchedGenerator",
    "Precision",
    "Row",
    "Run",
    "TargetPrompt",
    "as_target_prompt",
    "bytes_per_row",
    "capture",
    "continuation_ids",
    "crop_description",
    "default_target_prompt",
    "description_is_over",
    "follow_continuation",
    "free_bytes",
    "generate_named",
    "is_echo",
    "name_fits",
    "named_log_probabilities",
    "no_patch",
    "site_vectors",
    "usual_norms",
]
