"""What a source of vectors and a way to write may be: plain callables of these shapes.

1. A source gives one vector per (site, target layer) of a `SourceRun`, the part of a sweep's plan
   that it needs.
2. A write changes how one cell's patch is written, given its α.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Patch, PatchedGenerator
from superscopes_tl.model import LanguageModel, Site, TokenizedText


class SourceRun(Protocol):
    """What a source of vectors sees of a sweep: `SweepPlan` is one.

    Attributes:
        model: the source model.
        source: the source prompt, as tokens.
        generator: the patched generator for the target prompt.
    """

    @property
    def model(self) -> LanguageModel: ...  # noqa: D102
    @property
    def source(self) -> TokenizedText: ...  # noqa: D102
    @property
    def generator(self) -> PatchedGenerator: ...  # noqa: D102


PlaceVectors: TypeAlias = Callable[
    [Any, Sequence[tuple[Site, int]]], Float[Tensor, "places d_model"]
]
"""One vector for every (site, target layer) of a `SourceRun`: what is amplified in place of the
site's own activation (`SweepConfig.vectors`), or the origin that α is counted from (`.base`).
Called once per plan, with all places."""

Write: TypeAlias = Callable[[Patch, float], Patch]
"""Changes how a cell's patch is written, given its α."""
