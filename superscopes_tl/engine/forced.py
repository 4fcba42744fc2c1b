"""A patched target prompt, and how likely known tokens are after it (teacher forcing).

1. Run the target prompt up to its first placeholder token once and keep the KV cache: these tokens
   are the same in every row of every batch.
2. Start every row of a batch from that cache. All rows have the same length: no padding, no mask.
3. Run the rest of the prompt. Hooks write each row's vector over the block output at the
   placeholder (`patch`); they are on the model during this one forward pass.
4. The tokens of a known text are appended to the prompt, so the same pass scores all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.engine.decoding import guide, guided_rows
from superscopes_tl.engine.memory import default_batch_size, free_memory, out_of_memory
from superscopes_tl.engine.patch import Patch, check_patch, patch_hooks
from superscopes_tl.engine.target_prompt import PAPER_MAX_NEW_TOKENS, TargetPrompt, as_target_prompt
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import Hook, LanguageModel, hook_name

LONGEST_DEFAULT = 64
"""A model whose own default is longer than this means conversations, not descriptions."""
CHAT_NEW_TOKENS = 24
"""An answer in a conversation is a sentence: the paper's 10 tokens would cut it."""
MOST_LOGITS = 2**26
"""How many logits a teacher-forced pass may hold at a time: 256 MB of them."""

T = TypeVar("T")
U = TypeVar("U")


class PatchedPrompt:
    """A target prompt to be patched, many rows at a time; scores known texts after it.

    Attributes:
        model: the target model.
        target: the target prompt's tokens and the placeholder's positions.
        chat: whether the target prompt is a user's message in the model's chat template.
        max_new_tokens: the longest text.
        batch_size: rows per batch; halved when memory runs out.

    Args:
        model: from `load_model`.
        target_prompt: the prompt with the placeholder.
        max_new_tokens: defaults to the model's own if it states one of at most 64
            (`generation_config.json`, as the bundled model does), else to the paper's 10, with
            `chat` to 24.
        batch_size: defaults to 64 to 1,024 rows by the model's size, fewer where memory is short.
        chat: see above.

    Raises:
        ValueError: `max_new_tokens` or `batch_size` out of range, or a target prompt that does not
            fit into the context.
        PlaceholderError: no placeholder that is a token of its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        target_prompt: TargetPrompt | str,
        *,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        chat: bool = False,
    ) -> None:
        self.model, self.chat = model, chat
        self.max_new_tokens = _at_least_one(
            "max_new_tokens", max_new_tokens, default_new_tokens(model, chat=chat)
        )
        if self.max_new_tokens >= model.n_ctx:
            raise bad_value(
                "max_new_tokens",
                f"fewer than {model.n_ctx}, the context of {model.name}",
                self.max_new_tokens,
                "10 is the paper's choice",
            )
        target = as_target_prompt(target_prompt)
        self.target = target.locate(model, self.max_new_tokens, chat=chat)
        self.batch_size = _at_least_one(
            "batch_size", batch_size, default_batch_size(model, self.row_length)
        )

    @property
    def first(self) -> int:
        """The first placeholder token: the tokens before it are the same in every row."""
        return self.target.positions[0]

    @property
    def row_length(self) -> int:
        """The most tokens that a row caches for itself: from the placeholder on."""
        return len(self.target.tokens) - self.first + self.max_new_tokens

    @cached_property
    def prefix(self) -> Any:
        """The KV cache of the tokens before the placeholder, of one row."""
        with torch.no_grad():
            return self.model.decoder.prefill(self._tokens[:, : self.first])

    @cached_property
    def placeholder_states(self) -> Float[Tensor, "n_layers placeholders d_model"]:
        """The residual stream at the placeholder's tokens after each block, unpatched."""
        names = [hook_name("resid_post", layer) for layer in range(self.model.n_layers)]
        seen = self.model.activations(self._tokens, names)
        at = list(self.target.positions)
        return torch.stack([seen[name][0, at].float().cpu() for name in names])

    @cached_property
    def placeholder_norms(self) -> Float[Tensor, " n_layers"]:
        """The norm of the residual stream at the placeholder, after each block, unpatched.

        The yardstick for ||α·v||: an equal one weighs as much. With several tokens, their mean.
        """
        norms: Tensor = self.placeholder_states.norm(dim=-1).mean(dim=-1)
        return norms

    def next_token(self, patches: Sequence[Patch]) -> Float[Tensor, "patches vocab"]:
        """Return the log-probabilities, in nats, of the token after the patched target prompt.

        Args:
            patches: at least one.

        Raises:
            ValueError: a vector that overflows the model's dtype, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self.check(patches)
        found = list(self.in_batches(self._next_token_batch, patches))
        return torch.stack([row for batch in found for row in batch])

    def log_probabilities(
        self, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability, in nats, of each token of each text after its patch.

        One forward pass takes all tokens of a text; of equal texts after equal patches one is run.

        Args:
            patches: one per text.
            texts: token ids; lengths may differ.

        Raises:
            ValueError: a vector that overflows the model's dtype, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self.check(patches)
        pairs = list(zip(patches, texts, strict=True))
        keys = [(patch.key, tuple(text)) for patch, text in pairs]
        distinct = dict(zip(keys, pairs, strict=True))
        longest = max((len(text) for text in texts), default=0)
        vocab = self.model.tl.cfg.d_vocab
        rows = max(1, MOST_LOGITS // (max(1, longest) * vocab))
        batches = self.in_batches(self._score_batch, list(distinct.values()), rows)
        found = dict(zip(distinct, (row for batch in batches for row in batch), strict=True))
        return [found[key] for key in keys]

    def check(self, patches: Sequence[Patch]) -> None:
        """Check patches before anything is run.

        Raises:
            ValueError: a layer out of range, or a `keep` that is no finite number.
        """
        for patch in patches:
            check_patch(self.model, patch)

    def rows(self, patches: Sequence[Patch]) -> tuple[list[Patch], Float[Tensor, " patches"]]:
        """Return the patches followed by the unpatched twin of each guided one, and all w."""
        twins = [replace(patch, target_layer=None) for patch in patches if patch.guidance != 1]
        return [*patches, *twins], torch.tensor([patch.guidance for patch in patches])

    def hooks(self, rows: Sequence[Patch]) -> list[tuple[str, Hook]]:
        """Return the hooks that patch the rows of a batch at the placeholder's tokens."""
        places = [position - self.first for position in self.target.positions]
        return patch_hooks(self.model, rows, places)

    def cache(self, rows: int, new: int = 0) -> Any:
        """Return a cache of `rows` rows that hold the prompt up to the placeholder.

        Args:
            rows: their number.
            new: room for that many new tokens, where they are more than `max_new_tokens`.
        """
        room = self.row_length + max(0, new - self.max_new_tokens)
        return self.model.decoder.expand(self.prefix, rows, room)

    def tail(self, rows: int) -> Int[Tensor, "batch pos"]:
        """Return the tokens from the placeholder on, for every row."""
        return self._tokens[:, self.first :].expand(rows, -1)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Run `tokens` on `cache` and return the float32 logits of the last one."""
        return self.model.decoder.step(tokens, cache).float()

    def in_batches(
        self, work: Callable[[Sequence[T]], list[U]], rows: Sequence[T], most: int | None = None
    ) -> Iterator[list[U]]:
        """Yield what `work` makes of the rows, batch by batch; at most `most` rows at a time.

        Raises:
            MemoryError: not even one row fits.
        """
        start = 0
        while start < len(rows):
            size = self.batch_size if most is None else min(self.batch_size, most)
            batch = rows[start : start + size]
            found = self.unless_out_of_memory(partial(work, batch), batch)
            if found is not None:
                yield found
                start += len(batch)

    def unless_out_of_memory(self, work: Callable[[], T], batch: Sized) -> T | None:
        """Return the work's result, or `None` after halving the batch size for another try.

        Raises:
            MemoryError: the batch has one row.
        """
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"batch_size: out of memory even at batch_size=1 ({self.model.name}). "
                    "Fix: a shorter target prompt, fewer max_new_tokens or a smaller model."
                ) from error
            self.batch_size = len(batch) // 2
        free_memory()  # outside the handler, whose traceback keeps the failed batch's tensors
        return None

    @property
    def _tokens(self) -> Int[Tensor, "1 pos"]:
        return self.target.tokens.tensor(self.model.device)

    def _next_token_batch(self, patches: Sequence[Patch]) -> list[Float[Tensor, " vocab"]]:
        rows, weights = self.rows(patches)
        with self.model.lock, torch.no_grad():
            cache = self.cache(len(rows))
            with self.model.hooks(self.hooks(rows)):
                logits = self.step(self.tail(len(rows)), cache)
        return list(guide(logits, weights).log_softmax(dim=-1).cpu())

    def _score_batch(self, pairs: Sequence[tuple[Patch, Sequence[int]]]) -> list[list[float]]:
        patches, texts = zip(*pairs, strict=True)
        longest = max(len(text) for text in texts)
        if not longest:
            return [[] for _ in texts]
        # Attention is causal: what pads a shorter text changes none of its own tokens.
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        ids = torch.tensor(padded, device=self.model.device)
        rows, weights = self.rows(patches)
        read = torch.cat([ids, ids[guided_rows(weights)]])[:, :-1]
        tokens = torch.cat([self.tail(len(rows)), read], dim=1)
        with self.model.lock, torch.no_grad():
            cache = self.cache(len(rows), longest)
            with self.model.hooks(self.hooks(rows)):
                logits = self.model.decoder.logits(tokens, cache, longest)
            logits = guide(logits, weights)
            likely = logits.gather(2, ids[:, :, None])[..., 0] - logits.logsumexp(dim=-1)
        table = likely.tolist()
        return [row[: len(text)] for row, text in zip(table, texts, strict=True)]


def default_new_tokens(model: LanguageModel, *, chat: bool = False) -> int:
    """Return the default of `max_new_tokens` (see `PatchedPrompt`)."""
    own = model.max_new_tokens
    usual = CHAT_NEW_TOKENS if chat else PAPER_MAX_NEW_TOKENS
    return own if own is not None and 1 <= own <= LONGEST_DEFAULT else usual


def _at_least_one(argument: str, value: int | None, default: int) -> int:
    fix = f"pass {argument}={default}, the default here, or another count"
    return check_count(argument, default if value is None else value, least=1, fix=fix)
