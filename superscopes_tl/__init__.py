"""Superscopes for TransformerLens: amplify an activation and let the model say what it means.

Data flows one way through the modules, each of which has one job:

    models -> tokens -> prompts -> capture -> amplify -> patching -> scoring -> results
    -> plan -> sweep -> plots -> explorer

A first look:

    from superscopes_tl import heatmap, load_model, sweep

    result = sweep(load_model(), "Red Hot Chili Peppers")
    heatmap(result)
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from superscopes_tl.affine import AffineMap, load_maps, mapped, save_maps
from superscopes_tl.affine_fit import fit_affine
from superscopes_tl.amplify import (
    MappingFamily,
    MappingFunction,
    in_units_of,
    random_direction,
    scale,
)
from superscopes_tl.capture import Activations, capture
from superscopes_tl.causal import beside, causal_effects, causal_trace
from superscopes_tl.causal_figures import effect_heatmap
from superscopes_tl.comparison import Comparison, compare
from superscopes_tl.config import CONTROLS, SweepConfig
from superscopes_tl.contextualization import contextualization_layers, reveals_earlier
from superscopes_tl.decoding import Generation
from superscopes_tl.directions import difference_of_means, mlp_keys, mlp_values
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
from superscopes_tl.grid_figures import layer_grid, next_token_curve, next_token_grid
from superscopes_tl.guided import mean_activation, placeholder_state, resid_mid
from superscopes_tl.lens_figures import lens_heatmap, lens_kl_figure
from superscopes_tl.lenses import LENSES, lens_kl, lens_table, logit_lens, sites_of
from superscopes_tl.loading import load_model
from superscopes_tl.models import LanguageModel
from superscopes_tl.neighbours import NEIGHBOURS, side_by_side, side_by_side_figure
from superscopes_tl.next_token import NextTokens, next_tokens
from superscopes_tl.paper_figures import alpha_ladder, figure_1, figure_3, figure_5, figure_6
from superscopes_tl.patches import Patch
from superscopes_tl.patching import PatchedGenerator
from superscopes_tl.plan import SweepPlan, plan_sweep
from superscopes_tl.plots import alpha_curve, heatmap
from superscopes_tl.prompts import (
    CHAT_PROMPT,
    DESCRIPTION_PROMPT,
    IDENTITY_PROMPT,
    PAPER_ALPHAS,
    PAPER_PROMPTS,
    TargetPrompt,
    crop_description,
)
from superscopes_tl.refine import refine
from superscopes_tl.relevancy import relevancy, relevancy_figure
from superscopes_tl.replacements import amplified, noise, other_tokens, resampled, without, zero
from superscopes_tl.replay import Recording, read_recording, replay
from superscopes_tl.results import Reading, SweepResult
from superscopes_tl.scoring import PAPER_THRESHOLD, Scorer, SentenceEmbeddingScorer, contains
from superscopes_tl.selfie import SELFIE_PROMPT, add, at_layers, both, interpolate
from superscopes_tl.sites import KINDS, PAPER_KINDS, HookKind, Site
from superscopes_tl.sources import accumulated, head, sum_of, window
from superscopes_tl.spread import local_workers
from superscopes_tl.sweep import SweepError, SweepInterrupted, iter_sweep, sweep
from superscopes_tl.tokens import TokenizedText, resolve_positions, tokenize
from superscopes_tl.tuned_lens import TunedLens, train_tuned_lens
from superscopes_tl.vector_files import load_vectors
from superscopes_tl.vectors import plan_vectors, read_vector, read_vectors

if TYPE_CHECKING:
    from superscopes_tl.explorer import Explorer

__version__ = version("superscopes-tl")

__all__ = [
    "CHAT_PROMPT",
    "CONTROLS",
    "DESCRIPTION_PROMPT",
    "FINE_ALPHAS",
    "HIDDEN_STATES",
    "IDENTITY_PROMPT",
    "KINDS",
    "LENSES",
    "MLP_OUTPUTS",
    "NEIGHBOURS",
    "PAPER_ALPHAS",
    "PAPER_KINDS",
    "PAPER_PROMPTS",
    "PAPER_THRESHOLD",
    "SELFIE_PROMPT",
    "Activations",
    "AffineMap",
    "Comparison",
    "Evaluation",
    "Explorer",
    "Generation",
    "HookKind",
    "LanguageModel",
    "MappingFamily",
    "MappingFunction",
    "ModelLoadError",
    "NextTokens",
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
    "TunedLens",
    "UnavailableKindError",
    "__version__",
    "accumulated",
    "add",
    "alpha_curve",
    "alpha_ladder",
    "amplified",
    "at_layers",
    "beside",
    "best_table",
    "both",
    "capture",
    "causal_effects",
    "causal_trace",
    "compare",
    "contains",
    "contextualization_layers",
    "crop_description",
    "decomposition",
    "difference_of_means",
    "effect_heatmap",
    "evaluate",
    "figure_1",
    "figure_3",
    "figure_5",
    "figure_6",
    "fit_affine",
    "head",
    "heatmap",
    "in_units_of",
    "interpolate",
    "iter_sweep",
    "layer_grid",
    "lens_heatmap",
    "lens_kl",
    "lens_kl_figure",
    "lens_table",
    "load_maps",
    "load_model",
    "load_vectors",
    "local_workers",
    "logit_lens",
    "mapped",
    "mean_activation",
    "methods",
    "mlp_keys",
    "mlp_values",
    "next_token_curve",
    "next_token_grid",
    "next_tokens",
    "noise",
    "other_tokens",
    "placeholder_state",
    "plan_sweep",
    "plan_vectors",
    "random_direction",
    "read_recording",
    "read_vector",
    "read_vectors",
    "refine",
    "relevancy",
    "relevancy_figure",
    "replay",
    "resampled",
    "resid_mid",
    "resolve_positions",
    "reveals_earlier",
    "save_as",
    "save_maps",
    "scale",
    "side_by_side",
    "side_by_side_figure",
    "sites_of",
    "sum_of",
    "sweep",
    "tokenize",
    "train_tuned_lens",
    "window",
    "without",
    "write_html",
    "zero",
]


def __getattr__(name: str) -> Any:
    """Import the Explorer when it is asked for: its widgets take a second that others need not."""
    if name == "Explorer":
        from superscopes_tl.explorer import Explorer

        return Explorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
