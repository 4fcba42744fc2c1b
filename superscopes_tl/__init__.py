"""Superscopes for TransformerLens: amplify an activation and let the model say what it means.

    from superscopes_tl import heatmap, load_model, sweep

    result = sweep(load_model(), "Red Hot Chili Peppers")
    heatmap(result)

Data flows one way through the folders, each of which has one job and a face of its own:

    weights -> model -> engine -> vectors, scores -> experiment -> statistics -> evaluation
    -> neighbours -> figures -> explorer -> cli

The names below are the short way to the usual work. The rest is a folder away:
`superscopes_tl.vectors.Head(3)`, `superscopes_tl.statistics.replay(...)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from superscopes_tl.engine import (
        CHAT_PROMPT,
        DESCRIPTION_PROMPT,
        PAPER_ALPHAS,
        PAPER_PROMPTS,
        Patch,
        PatchedGenerator,
        TargetPrompt,
        capture,
    )
    from superscopes_tl.evaluation import evaluate, readability
    from superscopes_tl.experiment import (
        CONTROLS,
        SweepConfig,
        SweepResult,
        iter_sweep,
        plan_sweep,
        read_vectors,
        sweep,
    )
    from superscopes_tl.explorer import Explorer
    from superscopes_tl.figures import alpha_curve, heatmap, write_html
    from superscopes_tl.model import KINDS, LanguageModel, Site, load_model
    from superscopes_tl.statistics import compare
    from superscopes_tl.vectors import load_vectors
    from superscopes_tl.weights import fetch

    __version__: str

_FOLDERS = (
    "errors", "weights", "model", "engine", "vectors", "scores", "experiment", "statistics",
    "evaluation", "neighbours", "figures", "explorer",
)  # fmt: skip

__all__ = [
    "CHAT_PROMPT",
    "CONTROLS",
    "DESCRIPTION_PROMPT",
    "KINDS",
    "PAPER_ALPHAS",
    "PAPER_PROMPTS",
    "Explorer",
    "LanguageModel",
    "Patch",
    "PatchedGenerator",
    "Site",
    "SweepConfig",
    "SweepResult",
    "TargetPrompt",
    "__version__",
    "alpha_curve",
    "capture",
    "compare",
    "evaluate",
    "fetch",
    "heatmap",
    "iter_sweep",
    "load_model",
    "load_vectors",
    "plan_sweep",
    "read_vectors",
    "readability",
    "sweep",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import a folder, or a name with its folder and those below it, when it is first used."""
    if name == "__version__":
        from importlib.metadata import version  # pyproject.toml states it

        return version("superscopes-tl")
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    for folder in _FOLDERS if name in __all__ else ():
        if hasattr(face := import_module(f"{__name__}.{folder}"), name):
            return getattr(face, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_FOLDERS]
