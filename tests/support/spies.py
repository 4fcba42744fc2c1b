"""A model whose decoder tells what it is asked to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from superscopes_tl import LanguageModel


class SpyDecoder:
    """The decoder of a model, which records its work.

    Attributes:
        batches: the number of rows of every batch that was begun.
        prefills: the length of every prompt that was run.
        steps: the number of rows of every step.
        seen: the logits of every step.
        on_batch: called with the rows of a batch before it is begun; may raise.
        on_step: called before every step; may raise.
        change: changes the logits of a step.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.batches: list[int] = []
        self.prefills: list[int] = []
        self.steps: list[int] = []
        self.seen: list[torch.Tensor] = []
        self.on_batch: Callable[[int], Any] = lambda rows: None
        self.on_step: Callable[[], Any] = lambda: None
        self.change: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, tokens: torch.Tensor) -> Any:
        """Run a prompt."""
        self.prefills.append(tokens.shape[1])
        return self._decoder.prefill(tokens)

    def expand(self, prefix: Any, batch: int, room: int) -> Any:
        """Begin a batch."""
        self.batches.append(batch)
        self.on_batch(batch)
        return self._decoder.expand(prefix, batch, room)

    def step(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run a step."""
        self.steps.append(len(tokens))
        self.on_step()
        self.seen.append(self.change(self._decoder.step(tokens, cache)))
        return self.seen[-1]


def spied(model: LanguageModel) -> tuple[LanguageModel, SpyDecoder]:
    """Return the same model with a decoder that records its work, and that decoder."""
    decoder: Any = SpyDecoder(model.decoder)
    return replace(model, decoder=decoder), decoder
