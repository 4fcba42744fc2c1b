"""Many source prompts in one resumable file, and which setting reads a model best."""

from superscopes_tl.evaluation.adapter import adapter_shares, fit_adapter
from superscopes_tl.evaluation.names import ALL_NAMES, NAMES_BY_KIND, SECOND_LIST
from superscopes_tl.evaluation.prompt_files import PromptFile, SourcePrompt, load_prompts
from superscopes_tl.evaluation.run import FINE_ALPHAS, HIDDEN_STATES, MLP_OUTPUTS, evaluate, methods
from superscopes_tl.evaluation.screening import (
    LONG_PROMPT,
    NAMES,
    SENTENCE,
    SHORT_PROMPT,
    Readability,
    best_config,
    keep,
    kept_readability,
    layer_ranges,
    readability,
)
from superscopes_tl.evaluation.workers import local_workers

__all__ = [
    "ALL_NAMES",
    "FINE_ALPHAS",
    "HIDDEN_STATES",
    "LONG_PROMPT",
    "MLP_OUTPUTS",
    "NAMES",
    "NAMES_BY_KIND",
    "SECOND_LIST",
    "SENTENCE",
    "SHORT_PROMPT",
    "PromptFile",
    "Readability",
    "SourcePrompt",
    "adapter_shares",
    "best_config",
    "evaluate",
    "fit_adapter",
    "keep",
    "kept_readability",
    "layer_ranges",
    "load_prompts",
    "local_workers",
    "methods",
    "readability",
]
