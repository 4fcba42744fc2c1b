"""Patched generation: patch a vector over the placeholder of a target prompt and generate.

1. Start every row of a batch from the KV cache of the target prompt up to its placeholder, and run
   the rest of the prompt with the hooks that patch it (`forced`).
2. Generate one token per step until every row has ended (`decoding`). A patch at the last block
   decides the first token alone: of rows that agree in it one is generated.

The result of greedy rows is what one forward pass per cell would give, token for token (the tests
compare it with plain Hugging Face generation). Patching once and by absolute position follows the
paper's section 3.1: later tokens see the patched state through attention, they are never patched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch

from superscopes_tl.engine.decoding import LIVE_SHARE, Generation, decode
from superscopes_tl.engine.forced import PatchedPrompt, Precision
from superscopes_tl.engine.patch import Patch, no_patch
from superscopes_tl.engine.target_prompt import DESCRIPTION_PROMPT, TargetPrompt
from superscopes_tl.model import LanguageModel

NEAR_TIE = 5e-5
"""Float32 logits closer to each other than this may change their order with the batch size."""


class PatchedGenerator(PatchedPrompt):
    """Patched generation from one target prompt.

    Args:
        model: as in `PatchedPrompt`.
        target_prompt: as in `PatchedPrompt`.
        max_new_tokens: as in `PatchedPrompt`.
        batch_size: as in `PatchedPrompt`.
        chat: as in `PatchedPrompt`.
        precision: as in `PatchedPrompt`; texts are generated in the model's own dtype.
        until: whether a text so far is finished, and then ends there; it must stay true as the
            text grows. Without it, texts end with an end-of-text token or at the longest length.
        live_share: a batch is compacted when fewer of its rows than this are still generating; 0
            never compacts.
    """

    def __init__(
        self,
        model: LanguageModel,
        target_prompt: TargetPrompt | str = DESCRIPTION_PROMPT,
        *,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        precision: Precision = "highest",
        until: Callable[[str], bool] | None = None,
        live_share: float = LIVE_SHARE,
    ) -> None:
        super().__init__(
            model, target_prompt, max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat,
            precision=precision,
        )  # fmt: skip
        self.until, self.live_share = until, live_share

    def generate(self, patches: Sequence[Patch], *, confidence: bool = False) -> list[Generation]:
        """Return the text of every patch, in the same order; of equal patches one is generated.

        When memory runs out, the batch size is halved and the batch repeated.

        Args:
            patches: a row each.
            confidence: whether to find the entropy and the log-probability of each token, which
                takes a look at the whole vocabulary.

        Raises:
            ValueError: a vector that overflows the model's dtype, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self.check(patches)
        keys = [patch.key for patch in patches]
        distinct = dict(zip(keys, patches, strict=True))
        work = partial(self._generate_batch, confidence=confidence)
        batches = self.in_batches(work, list(distinct.values()))
        texts = dict(zip(distinct, chain(*batches), strict=True))
        return [texts[key] for key in keys]

    def unpatched(self) -> Generation:
        """Return what the model generates when nothing is patched: the simplest control."""
        return self._unpatched

    @cached_property
    def _unpatched(self) -> Generation:
        return self.generate([no_patch(self.model)], confidence=True)[0]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return generated tokens as text."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.model.tokenizer.decode(list(token_ids), **options))

    def seconds_per_batch(self, rows: int) -> float:
        """Return an upper bound of a batch's duration, from its prompt and one timed step.

        `batch_size` is halved if memory runs out.
        """
        while True:
            rows = min(rows, self.batch_size)
            seconds = self.unless_out_of_memory(partial(self._time_batch, rows), range(rows))
            if seconds is not None:
                return seconds

    def _time_batch(self, rows: int) -> float:
        token = torch.zeros((rows, 1), dtype=torch.long, device=self.model.device)
        with self.model.lock, torch.no_grad():
            cache = self.cache(rows, new=2)
            moments = [time.perf_counter()]
            for tokens in (self.tail(rows), token, token):
                float(self.step(tokens, cache)[0, 0])  # to a number: waits for the device
                moments.append(time.perf_counter())
        # The first step of a shape is slower than those that follow.
        return (moments[1] - moments[0]) + (self.max_new_tokens - 1) * (moments[3] - moments[2])

    def _generate_batch(self, patches: Sequence[Patch], *, confidence: bool) -> list[Generation]:
        with self.model.lock, torch.no_grad():
            return decode(
                *self.begin(patches),
                max_new_tokens=self.max_new_tokens,
                eos=self.model.eos_token_ids,
                seeds=[patch.seed for patch in patches],
                text_of=self.text_of,
                until=self.until,
                continuations=[self._continuation(patch) for patch in patches],
                live_share=self.live_share,
                confidence=confidence,
            )

    def _continuation(self, patch: Patch) -> Any:
        """Return a common label for greedy rows whose first token decides what follows.

        No later token attends to the last block's output: a patch there changes the logits of its
        own position, and not the KV cache.
        """
        last = all(layer in (self.model.n_layers - 1, -1) for layer in patch.layers)
        return "unpatched" if last and patch.seed is None and patch.guidance == 1 else None
