"""Count hooks: a run must leave a model as it found it."""

from __future__ import annotations

from superscopes_tl import LanguageModel


def hooks_on(model: LanguageModel) -> int:
    """Count the functions that are attached to the model's hook points."""
    return sum(
        len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks)
        for point in model.tl.hook_dict.values()
    )
