"""Patch a vector over the placeholder of a target prompt and let the model go on writing.

1. Run the target prompt up to its first placeholder token once; keep the keys and values. Every
   cell of a sweep has these tokens in common.
2. Let every row of a batch begin with them. All rows have the same length: no padding, no mask.
3. Run the rest of the prompt. Hooks write each row's vector over the block output at the
   placeholder (`patches`); they are on the model during this step alone.
4. Go on, one token per step, until every row has ended (`decoding`). At the last block the patch
   decides the first token alone: rows that agree in it are written once.

The result of greedy rows is what one forward pass per cell would give, token for token (the tests
compare it with plain Hugging Face generation). Patching once and by absolute position follows the
paper's section 3.1: later tokens see the patched state through attention, they are never patched.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.engine.decoding import Batch, Generation, decode, guide
from superscopes_tl.engine.memory import default_batch_size, free_memory, out_of_memory
from superscopes_tl.engine.patch import Patch, check_patch, patch_hooks
from superscopes_tl.engine.target_prompt import (
    DESCRIPTION_PROMPT,
    PAPER_MAX_NEW_TOKENS,
    TargetPrompt,
    as_target_prompt,
    description_is_over,
)
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import Hook, LanguageModel, hook_name, tokenize

LONGEST_DEFAULT = 64
"""A model that asks for longer texts than this means conversation, not descriptions."""
CHAT_NEW_TOKENS = 24
"""An answer in a conversation is a sentence: the paper's 10 tokens would cut it."""
NEAR_TIE = 5e-5
"""Float32 logits nearer to each other than this may change places with the batch size."""
LOOK_AHEAD = 16
"""How many more tokens it may take to see that another entry has begun."""
MOST_LOGITS = 2**26
"""How many logits a pass over known texts may hold at a time: 256 MB of them."""

T = TypeVar("T")
U = TypeVar("U")


class PatchedGenerator:
    """Patched generation from one target prompt.

    Args:
        model: from `load_model`.
        target_prompt: the prompt with the placeholder.
        max_new_tokens: the longest text; the model's own default if it states one of at most 64
            (`generation_config.json`, as the bundled model does), else the paper's 10, with
            `chat` 24.
        batch_size: rows per batch; 64 to 1,024 by the model's size, or fewer where memory is short,
            unless given.
        chat: whether the target prompt is a message of a user in the model's chat template.
        until: tells whether a text, so far, has said all that is asked for: it ends there. It must
            not change its mind when the text goes on, and rows are written to their end, or their
            longest text, unless it is given.

    Raises:
        ValueError: a bad number, a target prompt that does not fit, no placeholder in it, or
            `chat` with a model that has no chat template.
    """

    def __init__(
        self,
        model: LanguageModel,
        target_prompt: TargetPrompt | str = DESCRIPTION_PROMPT,
        *,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        until: Callable[[str], bool] | None = None,
    ) -> None:
        self.model, self.until, self.chat = model, until, chat
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

    def generate(self, patches: Sequence[Patch]) -> list[Generation]:
        """Return the text of every patch, in the same order."""
        return [generation for batch in self.batches(patches) for generation in batch]

    def batches(self, patches: Sequence[Patch]) -> Iterator[list[Generation]]:
        """Yield the texts batch by batch, as they are finished.

        Patches that are alike are written once: a batch that repeats earlier ones is longer than
        `batch_size`. When memory runs out, the batch size is halved and the batch repeated.

        Raises:
            ValueError: a vector that overflows the model's number type, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self._check(patches)
        keys = [patch.key for patch in patches]
        distinct: dict[tuple[Any, ...], Patch] = {}
        for key, patch in zip(keys, patches, strict=True):
            distinct.setdefault(key, patch)
        waiting, written = iter(distinct), dict[tuple[Any, ...], Generation]()
        start = 0
        for batch in self._in_batches(self._generate_batch, list(distinct.values())):
            # `batch` first: zip takes one more of what comes first when the other has ended.
            written.update((key, text) for text, key in zip(batch, waiting, strict=False))
            # Everything up to the first patch that is still to be written.
            end = next((i for i in range(start, len(keys)) if keys[i] not in written), len(keys))
            yield [written[key] for key in keys[start:end]]
            start = end

    def _check(self, patches: Sequence[Patch]) -> None:
        for patch in patches:
            check_patch(self.model, patch)

    def _in_batches(
        self, work: Callable[[Sequence[T]], list[U]], rows: Sequence[T], most: int | None = None
    ) -> Iterator[list[U]]:
        """Yield what `work` makes of the rows, batch by batch; at most `most` at a time."""
        start = 0
        while start < len(rows):
            size = self.batch_size if most is None else min(self.batch_size, most)
            batch = rows[start : start + size]
            found = self._unless_memory_runs_out(partial(work, batch), batch)
            if found is not None:
                yield found
                start += len(batch)

    def _unless_memory_runs_out(self, work: Callable[[], T], batch: Sized) -> T | None:
        """Return the work's result, or `None` after halving the batch size for another try."""
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"batch_size: not even one row of {self.model.name} fits into memory. "
                    "Fix: a shorter target prompt, fewer max_new_tokens or a smaller model."
                ) from error
            self.batch_size = len(batch) // 2
        free_memory()  # outside the handler, whose traceback keeps the failed batch's tensors
        return None

    def seconds_per_batch(self, rows: int) -> float:
        """Return how long a batch takes, from its prompt and one timed step.

        Rows that end early are not accounted for. `batch_size` is halved if memory runs out.
        """
        while True:
            rows = min(rows, self.batch_size)
            seconds = self._unless_memory_runs_out(partial(self._time_batch, rows), range(rows))
            if seconds is not None:
                return seconds

    def _time_batch(self, rows: int) -> float:
        token = torch.zeros((rows, 1), dtype=torch.long, device=self.model.device)
        with self.model.lock, torch.no_grad():
            cache = self._start(rows, new=2)
            moments = [time.perf_counter()]
            for tokens in (self._tail(rows), token, token):
                float(self.step(tokens, cache)[0, 0])  # to a number: waits for the device
                moments.append(time.perf_counter())
        # The first step of a shape is slower than those that follow.
        return (moments[1] - moments[0]) + (self.max_new_tokens - 1) * (moments[3] - moments[2])

    def unpatched(self) -> Generation:
        """Return what the model writes when nothing is patched: the simplest control."""
        zero = torch.zeros(self.model.d_model)
        return self.generate([Patch(zero, None)])[0]

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

    @property
    def row_length(self) -> int:
        """The most tokens that a row keeps for itself: from the placeholder on."""
        return len(self.target.tokens) - self._first + self.max_new_tokens

    @property
    def _tokens(self) -> Int[Tensor, "1 pos"]:
        return self.target.tokens.tensor(self.model.device)

    @property
    def _first(self) -> int:
        """The first placeholder token: what stands before it is the same in every row."""
        return self.target.positions[0]

    @cached_property
    def _prefix(self) -> Any:
        with torch.no_grad():
            return self.model.decoder.prefill(self._tokens[:, : self._first])

    def _generate_batch(self, patches: Sequence[Patch]) -> list[Generation]:
        with self.model.lock, torch.no_grad():
            batch, logits = self._begin(patches)
            return decode(
                batch,
                logits,
                max_new_tokens=self.max_new_tokens,
                eos=self.model.eos_token_ids,
                seeds=[patch.seed for patch in patches],
                told=partial(self._told, until=self.until) if self.until else None,
                alike=[self._alike(patch) for patch in patches],
            ).generations(self.text_of)

    def _told(self, token_ids: list[int], until: Callable[[str], bool]) -> int | None:
        """Return how many tokens it took to say all; `None` before that."""
        if not until(self.text_of(token_ids)):
            return None
        counts = range(1, len(token_ids) + 1)
        # What was said stays said, so the first such count is found by halves.
        return counts[
            bisect.bisect_left(counts, True, key=lambda n: until(self.text_of(token_ids[:n])))
        ]

    def _alike(self, patch: Patch) -> str | None:
        """Return a common label for greedy rows whose first token decides what follows.

        Nothing after the last block's output attends to it: a patch there changes the logits of
        its own position, and no keys or values.
        """
        last = all(layer % self.model.n_layers == self.model.n_layers - 1 for layer in patch.layers)
        return "as unpatched" if last and patch.seed is None and patch.guidance == 1 else None

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return generated tokens as text."""
        text: str = self.model.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def next_token(self, patches: Sequence[Patch]) -> Float[Tensor, "patches vocab"]:
        """Return, in nats, how likely each token is right behind the patched target prompt.

        Args:
            patches: at least one.

        Raises:
            ValueError: a vector that overflows the model's number type, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self._check(patches)
        found = list(self._in_batches(self._first_choice, patches))
        return torch.stack([row for batch in found for row in batch])

    def log_probabilities(
        self, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return, in nats, how likely each token of each text is behind its patch.

        The texts are known, so one forward pass takes all of their tokens (teacher forcing); a
        text that stands twice behind the same patch is run once.

        Args:
            patches: one per text.
            texts: token ids, one behind the other; lengths may differ.

        Raises:
            ValueError: a vector that overflows the model's number type, or a layer out of range.
            MemoryError: not even one row fits.
        """
        self._check(patches)
        keys = [(patch.key, tuple(text)) for patch, text in zip(patches, texts, strict=True)]
        distinct: dict[Any, tuple[Patch, Sequence[int]]] = {}
        for key, patch, text in zip(keys, patches, texts, strict=True):
            distinct.setdefault(key, (patch, text))
        longest = max((len(text) for text in texts), default=0)
        vocab = self.model.tl.cfg.d_vocab
        rows = max(1, MOST_LOGITS // (max(1, longest) * vocab))
        batches = self._in_batches(self._follow, list(distinct.values()), rows)
        found = dict(zip(distinct, (row for batch in batches for row in batch), strict=True))
        return [found[key] for key in keys]

    def written_for(self, names: Sequence[str]) -> list[Generation]:
        """Return what the model writes where each name itself stands in the placeholder's place.

        Nothing is patched. Each text ends where its description does, or where it is longest: a
        few-shot prompt's own words may be followed by `LOOK_AHEAD` more tokens, which tell
        whether a comma goes on with the description or begins another entry.

        Raises:
            ValueError: a name that does not fit into the context.
        """
        longest = self.max_new_tokens + (LOOK_AHEAD if self.target.prompt.few_shot_names else 0)
        rows = [self._named(name, self.max_new_tokens) for name in names]
        longest = min(longest, self.model.n_ctx - max(map(len, rows), default=0))
        found: dict[int, Generation] = {}
        for places in self._equally_long(rows):
            cache, ids = self._start_named([rows[p] for p in places], new=longest)
            weights = torch.ones(len(places))
            with self.model.lock, torch.no_grad():
                batch = Batch(self.step, self.model.decoder.keep, cache, weights)
                written = decode(
                    batch,
                    batch.run(ids),
                    max_new_tokens=longest,
                    eos=self.model.eos_token_ids,
                    seeds=[None] * len(places),
                    told=partial(self._told, until=description_is_over),
                ).generations(self.text_of)
            found.update(zip(places, written, strict=True))
        return [found[place] for place in range(len(rows))]

    def fits(self, name: str) -> bool:
        """Tell whether a name fits into the target prompt, and a text behind it."""
        try:
            self._named(name, self.max_new_tokens)
        except ValueError:
            return False
        return True

    def named_log_probabilities(
        self, names: Sequence[str], texts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return, in nats, how likely each token of each text is behind the prompt with a name.

        Args:
            names: what stands in the placeholder's place; nothing is patched.
            texts: token ids, one text per name.

        Raises:
            ValueError: a name that does not fit into the context.
        """
        found = []
        for name, text in zip(names, texts, strict=True):
            cache, ids = self._start_named([self._named(name, len(text))], new=len(text))
            wanted = torch.tensor([text], device=self.model.device)
            with self.model.lock, torch.no_grad():
                read = torch.cat([ids, wanted[:, :-1]], dim=1)
                likely = self.model.decoder.logits(read, cache, len(text)).log_softmax(dim=-1)
            found.append(likely.gather(2, wanted[:, :, None])[0, :, 0].tolist())
        return found

    def _named(self, name: str, room: int) -> tuple[int, ...]:
        """Return the tokens of the target prompt with a name in the placeholder's place."""
        prompt = self.target.prompt
        return tokenize(
            self.model,
            prompt.filled(name),
            argument="target_prompt",
            room=room,
            chat=self.chat,
            answer=prompt.answer,
        ).ids

    def _equally_long(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Yield the places of rows that fit into one batch: as long, and with the same prefix."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault((len(row), self._has_prefix(row)), []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _has_prefix(self, row: tuple[int, ...]) -> bool:
        """Tell whether a row begins with what the target prompt has up to the placeholder."""
        first = self._first
        return len(row) > first and row[:first] == self.target.tokens.ids[:first]

    def _start_named(
        self, rows: Sequence[tuple[int, ...]], new: int
    ) -> tuple[Any, Int[Tensor, "rows pos"]]:
        """Return a cache for some rows of equal length, and the tokens that it does not hold."""
        decoder, ids = self.model.decoder, torch.tensor(rows, device=self.model.device)
        shared = self._first if self._has_prefix(rows[0]) else 0
        with self.model.lock, torch.no_grad():
            prefix = self._prefix if shared else decoder.prefill(ids[:1, :0])
        return decoder.expand(prefix, len(rows), ids.shape[1] - shared + new), ids[:, shared:]

    def _first_choice(self, patches: Sequence[Patch]) -> list[Float[Tensor, " vocab"]]:
        """Return what `next_token` does, for the rows of one batch."""
        with self.model.lock, torch.no_grad():
            _, logits = self._begin(patches)
            return list(logits.log_softmax(dim=-1).cpu())

    def _follow(self, rows: Sequence[tuple[Patch, Sequence[int]]]) -> list[list[float]]:
        """Return what `log_probabilities` does, for the rows of one batch."""
        patches, texts = zip(*rows, strict=True)
        longest = max(len(text) for text in texts)
        if not longest:
            return [[] for _ in texts]
        # What stands behind a shorter text is never looked at, by it or by anyone.
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        ids = torch.tensor(padded, device=self.model.device)
        every, weights = _with_twins(patches)
        read = torch.cat([ids, ids[(weights != 1).nonzero()[:, 0]]])[:, :-1]
        tokens = torch.cat([self._tail(len(every)), read], dim=1)
        with self.model.lock, torch.no_grad():
            cache = self._start(len(every), longest)
            with self.model.hooks(self._hooks(every)):
                logits = self.model.decoder.logits(tokens, cache, longest)
            logits = guide(logits, weights)
            likely = logits.gather(2, ids[:, :, None])[..., 0] - logits.logsumexp(dim=-1)
        table = likely.tolist()
        return [row[: len(text)] for row, text in zip(table, texts, strict=True)]

    def _begin(self, patches: Sequence[Patch]) -> tuple[Batch, Float[Tensor, "batch vocab"]]:
        """Return a batch that has read the patched prompt, and the logits behind it."""
        rows, weights = _with_twins(patches)
        batch = Batch(self.step, self.model.decoder.keep, self._start(len(rows), 0), weights)
        with self.model.hooks(self._hooks(rows)):
            return batch, batch.run(self._tail(len(rows)))

    def _hooks(self, rows: Sequence[Patch]) -> list[tuple[str, Hook]]:
        """Return the hooks that patch the rows of a batch at the placeholder's tokens."""
        places = [position - self._first for position in self.target.positions]
        return patch_hooks(self.model, rows, places)

    def _start(self, rows: int, new: int) -> Any:
        """Return a cache of `rows` rows that have read the prompt up to the placeholder."""
        room = self.row_length + max(0, new - self.max_new_tokens)
        return self.model.decoder.expand(self._prefix, rows, room)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Run `tokens` behind `cache` and return the float32 logits of the last one."""
        return self.model.decoder.step(tokens, cache).float()

    def _tail(self, rows: int) -> Int[Tensor, "batch pos"]:
        return self._tokens[:, self._first :].expand(rows, -1)


def _with_twins(patches: Sequence[Patch]) -> tuple[list[Patch], Float[Tensor, " patches"]]:
    """Return the patches with the unpatched twin of each guided row behind, and all w."""
    twins = [replace(patch, target_layer=None) for patch in patches if patch.guidance != 1]
    return [*patches, *twins], torch.tensor([patch.guidance for patch in patches])


def default_new_tokens(model: LanguageModel, *, chat: bool = False) -> int:
    """Return the length of a text if none is asked for (see `PatchedGenerator`)."""
    own = model.max_new_tokens
    usual = CHAT_NEW_TOKENS if chat else PAPER_MAX_NEW_TOKENS
    return own if own is not None and 1 <= own <= LONGEST_DEFAULT else usual


def tokens_told(tokenizer: Any, generation: Generation, description: str) -> int:
    """Return how many tokens a text takes up to the end of its description; 0 without one."""
    if not description:
        return 0
    ids, end = generation.token_ids, generation.text.index(description) + len(description)

    def length(count: int) -> int:
        return len(
            tokenizer.decode(
                list(ids[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    # A text grows with its tokens, so the first count that is long enough is found by halves.
    return bisect.bisect_left(range(len(ids)), end, key=length)


def _at_least_one(argument: str, value: int | None, default: int) -> int:
    fix = f"pass {argument}={default}, the default here, or another count"
    return check_count(argument, default if value is None else value, least=1, fix=fix)
