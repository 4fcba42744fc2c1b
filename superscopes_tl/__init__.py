"""Superscopes for TransformerLens: amplify an activation and let the model say what it means.

Data flows one way through the modules, each of which has one job:

    models -> tokens -> prompts -> capture -> amplify -> patching -> scoring -> results
    -> plan -> sweep -> plots -> explorer

A first look:

    from superscopes_tl import heatmap, load_model, sweep

    result = sweep(load_model("mini"), "Red Hot Chili Peppers")
    heatmap(result)
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from superscopes_tl.amplify import (
    MappingFamily,
    MappingFunction,
    in_units_of,
    random_direction,
    scale,
)
from superscopes_tl.capture import Activations, capture
from superscopes_tl.contextualization import contextualization_layers, reveals_earlier
from superscopes_tl.errors import (
    ModelLoadError,
    PlaceholderError,
    RunFileError,
    UnavailableKindError,
)
from superscopes_tl.export import save_as, write_html
from superscopes_tl.figures import best_table, decomposition
from superscopes_tl.loading import load_model
from superscopes_tl.metric import (
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
from superscopes_tl.metric_figures import earlier_table, roc_figure, selector_figure
from superscopes_tl.models import LanguageModel
from superscopes_tl.patching import Generation, Patch, PatchedGenerator
from superscopes_tl.plan import SweepConfig, SweepPlan, plan_sweep
from superscopes_tl.plots import alpha_curve, heatmap
from superscopes_tl.prompts import (
    DESCRIPTION_PROMPT,
    IDENTITY_PROMPT,
    PAPER_ALPHAS,
    TargetPrompt,
    crop_description,
)
from superscopes_tl.results import Reading, SweepResult
from superscopes_tl.scoring import PAPER_THRESHOLD, Scorer, SentenceEmbeddingScorer
from superscopes_tl.selectors import (
    Selector,
    by_similarity,
    choose,
    fixed_alpha,
    largest_lift,
    lowest_entropy,
    neighbour_agreement,
    rate,
)
from superscopes_tl.sites import KINDS, PAPER_KINDS, HookKind, Site
from superscopes_tl.sweep import SweepError, SweepInterrupted, iter_sweep, sweep
from superscopes_tl.tokens import TokenizedText, resolve_positions, tokenize

if TYPE_CHECKING:
    from superscopes_tl.explorer import Explorer

__version__ = version("superscopes-tl")

__all__ = [
    "DESCRIPTION_PROMPT",
    "IDENTITY_PROMPT",
    "KINDS",
    "PAPER_ALPHAS",
    "PAPER_KINDS",
    "PAPER_THRESHOLD",
    "Activations",
    "Explorer",
    "Generation",
    "HookKind",
    "LanguageModel",
    "MappingFamily",
    "MappingFunction",
    "ModelLoadError",
    "Patch",
    "PatchedGenerator",
    "PlaceholderError",
    "Quality",
    "Reading",
    "RunFileError",
    "Scorer",
    "Selector",
    "SentenceEmbeddingScorer",
    "Site",
    "SweepConfig",
    "SweepError",
    "SweepInterrupted",
    "SweepPlan",
    "SweepResult",
    "TargetPrompt",
    "TokenizedText",
    "UnavailableKindError",
    "__version__",
    "alpha_curve",
    "best_table",
    "by_similarity",
    "capture",
    "ceiling",
    "choose",
    "compared_scores",
    "contextualization_layers",
    "crop_description",
    "decomposition",
    "earlier_table",
    "exact",
    "fixed_alpha",
    "heatmap",
    "in_units_of",
    "iter_sweep",
    "largest_lift",
    "load_model",
    "lowest_entropy",
    "metric_table",
    "neighbour_agreement",
    "plan_sweep",
    "quality",
    "quality_intervals",
    "random_direction",
    "rate",
    "resolve_positions",
    "reveals_earlier",
    "roc_figure",
    "save_as",
    "scale",
    "selector_figure",
    "sweep",
    "token_overlap",
    "tokenize",
    "word_vectors_scorer",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import the Explorer when it is asked for: its widgets take a second that others need not."""
    if name == "Explorer":
        from superscopes_tl.explorer import Explorer

        return Explorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
