"""What is computed: the same cells for every way.

1. Source prompts of equal length in tokens, so that a batch of them needs no padding.
2. One kind, the block output; several source layers; the paper's α.
3. α = 1 is patched into the layer that it was read from, as every way can do. The other α go into
   other layers, so that rows differ; the last layer is left out, because nothing but the first
   token depends on a patch there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from superscopes_tl import PAPER_ALPHAS, PAPER_PROMPTS, LanguageModel, Patch, capture
from superscopes_tl.model import tokenize
from superscopes_tl.vectors import Scale

T = TypeVar("T")

PROMPTS = 4
LAYERS = 8


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell: what is read, and what is written where."""

    prompt: str
    layer: int
    alpha: float
    patch: Patch

    @property
    def target_layer(self) -> int:
        """Where the vector is written."""
        (layer,) = self.patch.layers
        return layer

    @property
    def same_layer(self) -> bool:
        """Whether a hidden state goes, as it is, into the layer that it was read from."""
        return self.alpha == 1 and self.target_layer == self.layer


def make_cells(model: LanguageModel, count: int) -> list[Cell]:
    """Return up to `count` cells of a model; those of α = 1 come first, the others mixed."""
    prompts = _equally_long(model)
    layers = range(min(LAYERS, model.n_layers - 1))
    states = {
        prompt: capture(model, prompt, kinds="resid_post", layers=layers) for prompt in prompts
    }
    cells = []
    for step, alpha in enumerate(PAPER_ALPHAS):
        for prompt in prompts:
            for layer in layers:
                vector = Scale()(alpha)(states[prompt]["resid_post", layer][-1].float().cpu())
                into = (layer + step) % (model.n_layers - 1)
                cells.append(Cell(prompt, layer, alpha, Patch(vector, into)))
    first = len(prompts) * len(layers)
    others = cells[first:]
    random.Random(0).shuffle(others)
    return (cells[:first] + others)[:count]


def spread(cells: Sequence[T], count: int) -> list[T]:
    """Return `count` of the cells or sites, evenly spread."""
    at = torch.linspace(0, len(cells) - 1, min(count, len(cells))).round().long().tolist()
    return [cells[i] for i in at]


def _equally_long(model: LanguageModel) -> list[str]:
    lengths = {prompt: len(tokenize(model, prompt)) for prompt in PAPER_PROMPTS}
    ((common, _),) = Counter(lengths.values()).most_common(1)
    return [prompt for prompt, length in lengths.items() if length == common][:PROMPTS]
