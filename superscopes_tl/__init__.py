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
from superscopes_tl.comparison import Comparison, compare
from superscopes_tl.config import CONTROLS, SweepConfig
from superscopes_tl.contextualization import contextualization_layers, reveals_earlier
from superscopes_tl.decoding import Generation
from superscopes_tl.errors import (
    ModelLoadError,
    PlaceholderError,
    RunFileError,
    UnavailableKindError,
)
from superscopes_tl.evaluate import FINE_ALPHAS, HIDDEN_STATES, MLP_OUTPUTS, evaluate, methods
from superscopes_tl.evaluation import Evaluation
from superscopes_tl.export import save_as, write_html
from superscopes_tl.figures import best_table, decomposition
from superscopes_tl.guided import mean_activation, placeholder_state, resid_mid
from superscopes_tl.loading import load_model
from superscopes_tl.models import LanguageModel
from superscopes_tl.paper_figures import alpha_ladder, figure_1, figure_3, figure_5, figure_6
from superscopes_tl.patches import Patch
from superscopes_tl.patching import PatchedGenerator
from superscopes_tl.plan import SweepPlan, plan_sweep
from superscopes_tl.plots import alpha_curve, heatmap
from superscopes_tl.prompts import (
    DESCRIPTION_PROMPT,
    IDENTITY_PROMPT,
    PAPER_ALPHAS,
    PAPER_PROMPTS,
    TargetPrompt,
    crop_description,
)
from superscopes_tl.refine import refine
from superscopes_tl.replay import Recording, read_recording, replay
from superscopes_tl.results import Reading, SweepResult
from superscopes_tl.scoring import PAPER_THRESHOLD, Scorer, SentenceEmbeddingScorer
from superscopes_tl.sites import KINDS, PAPER_KINDS, HookKind, Site
from superscopes_tl.sweep import SweepError, SweepInterrupted, iter_sweep, sweep
from superscopes_tl.tokens import TokenizedText, resolve_positions, tokenize

if TYPE_CHECKING:
    from superscopes_tl.explorer import Explorer

__version__ = version("superscopes-tl")

__all__ = [
    "CONTROLS",
    "DESCRIPTION_PROMPT",
    "FINE_ALPHAS",
    "HIDDEN_STATES",
    "IDENTITY_PROMPT",
    "KINDS",
    "MLP_OUTPUTS",
    "PAPER_ALPHAS",
    "PAPER_KINDS",
    "PAPER_PROMPTS",
    "PAPER_THRESHOLD",
    "Activations",
    "Comparison",
    "Evaluation",
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
    "Reading",
    "Recording",
    "RunFileError",
    "Scorer",
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
    "alpha_ladder",
    "best_table",
    "capture",
    "compare",
    "contextualization_layers",
    "crop_description",
    "decomposition",
    "evaluate",
    "figure_1",
    "figure_3",
    "figure_5",
    "figure_6",
    "heatmap",
    "in_units_of",
    "iter_sweep",
    "load_model",
    "mean_activation",
    "methods",
    "placeholder_state",
    "plan_sweep",
    "random_direction",
    "read_recording",
    "refine",
    "replay",
    "resid_mid",
    "resolve_positions",
    "reveals_earlier",
    "save_as",
    "scale",
    "sweep",
    "tokenize",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import the Explorer when it is asked for: its widgets take a second that others need not."""
    if name == "Explorer":
        from superscopes_tl.explorer import Explorer

        return Explorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
