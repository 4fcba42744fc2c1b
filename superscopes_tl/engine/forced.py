"""A patched target prompt, and how likely known tokens are after it (teacher forcing).

1. Run the target prompt up to its first placeholder token once and keep the KV cache: these tokens
   are the same in every row of every batch.
2. Start every row of a batch from that cache. All rows have the same length: no padding, no mask.
3. Run the rest of the prompt. Hooks write each row's vector over the block output at the
   placeholder, or over its input embedding (`patch`); they are on the model during this one pass.
4. The tokens of a known text are appended to the prompt, so the same pass scores all of them.
5. Where a patch has several texts, its prompt is run once, and each text continues its KV cache.
6. Rows with the same text are equal below the layers at which they are patched. There one row
   stands for all of them, and the batch grows on its way up (`growing_hooks`); texts of equal
   length share a batch. Only the positions that predict a text are unembedded, and a part of the
   vocabulary at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.engine.decoding import (
    Batch,
    guide,
    guided_rows,
    token_log_probabilities,
    unembedded_log_probabilities,
)
from superscopes_tl.engine.memory import default_batch_size, free_memory, out_of_memory
from superscopes_tl.engine.patch import Patch, growing_hooks, layer_numbers, patch_hooks
from superscopes_tl.engine.target_prompt import PAPER_MAX_NEW_TOKENS, TargetPrompt, as_target_prompt
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import EMBED, Hook, LanguageModel, first_block_input, hook_name

LONGEST_DEFAULT = 64
"""A model whose own default is longer than this means conversations, not descriptions."""
CHAT_NEW_TOKENS = 24
"""An answer in a conversation is a sentence: the paper's 10 tokens would cut it."""
MOST_LOGITS = 2**26
"""How many logits a teacher-forced pass may hold at a time: 256 MB of them."""
FEWEST_GROWING = 2
"""The fewest patches with one text for which an unpatched row is worth its time."""
GROWN, MOST_GROWN = 3, 2**13
"""A growing batch may have so many times more rows, as most are there for a part of the layers, but
no more positions than this, since progress and cancelling wait for it."""

Precision = Literal["highest", "high"]
"""What matrix products are computed in: see `SweepConfig.precision`."""

T = TypeVar("T")
U = TypeVar("U")


class PatchedPrompt:
    """A target prompt to be patched, many rows at a time; scores known texts after it.

    Args:
        model: the target model, from `load_model`.
        target_prompt: the prompt with the placeholder; `target` holds its tokens and positions.
        max_new_tokens: the longest text; defaults to the model's own if it states one of at most
            64 in `generation_config.json`, else to the paper's 10, with `chat` to 24.
        batch_size: rows per batch, halved when memory runs out; defaults to 64 to 1,024 rows by
            the model's size, fewer where memory is short. Known texts may take three times as many,
            which are there for a part of the layers.
        chat: whether the target prompt is a user's message in the model's chat template.
        precision: of the matrix products that score known texts: "highest" is the model's own
            dtype; "high" is bfloat16, where the device has units for it (`multiplies_bfloat16`).

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
        precision: Precision = "highest",
    ) -> None:
        self.model, self.chat, self.precision = model, chat, precision
        if max_new_tokens is None:
            max_new_tokens = _default_new_tokens(model, chat=chat)
        fix = "10 is the paper's choice"
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens, least=1, fix=fix)
        if max_new_tokens >= model.n_ctx:
            expected = f"fewer than {model.n_ctx}, the context of {model.name}"
            raise bad_value("max_new_tokens", expected, max_new_tokens, fix)
        target = as_target_prompt(target_prompt)
        self.target = target.locate(model, max_new_tokens, chat=chat)
        if batch_size is None:
            batch_size = default_batch_size(model, self.row_length)
        self.batch_size = check_count("batch_size", batch_size, least=1, fix="leave it out")

    @property
    def first(self) -> int:
        """The first placeholder token: the tokens before it are the same in every row."""
        return self.target.positions[0]

    @property
    def places(self) -> list[int]:
        """The placeholder's tokens, counted from the first token that is run."""
        return [position - self.first for position in self.target.positions]

    @property
    def row_length(self) -> int:
        """The most tokens that a row caches for itself: from the placeholder on."""
        return len(self.target.tokens) - self.first + self.max_new_tokens

    @cached_property
    def prefix(self) -> Any:
        """The KV cache of the tokens before the placeholder, of one row, in the model's dtype."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return self.model.decoder.prefill(self._tokens[:, : self.first])

    @cached_property
    def placeholder_states(self) -> Float[Tensor, "places placeholders d_model"]:
        """The residual stream at the placeholder's tokens after each block, unpatched.

        The last one, index `EMBED`, is the input embedding, where the model has a hook on it.
        """
        layers = [*range(self.model.n_layers), *[EMBED] * self.model.embeds]
        names = [hook_name("resid_post", layer) for layer in layers]
        seen = self.model.activations(self._tokens, names)
        at = list(self.target.positions)
        return torch.stack([seen[name][0, at].float().cpu() for name in names])

    @cached_property
    def placeholder_norms(self) -> Float[Tensor, " places"]:
        """The norms of `placeholder_states`, the reference for ||α·v||.

        Several placeholder tokens are averaged.
        """
        norms: Tensor = self.placeholder_states.norm(dim=-1)
        return norms.mean(dim=-1)

    def next_token(self, patches: Sequence[Patch]) -> Float[Tensor, "patches vocab"]:
        """Return the log-probabilities, in nats, of the token after the patched target prompt.

        Raises:
            ValueError, MemoryError: as `PatchedGenerator.generate`.
        """
        self.check(patches)
        return torch.stack(list(chain(*self.in_batches(self._next_token_batch, patches))))

    def log_probabilities(
        self, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probability, in nats, of each token of each text after its patch.

        One forward pass takes all tokens of a text; of equal texts after equal patches one is run,
        and the prompt of a patch with several texts at most once for all of them.
        The texts are token ids of any length, one per patch.

        Raises:
            ValueError, MemoryError: as `PatchedGenerator.generate`.
        """
        self.check(patches)
        pairs = list(zip(patches, texts, strict=True))
        keys = [(patch.key, tuple(text)) for patch, text in pairs]
        distinct = dict(zip(keys, pairs, strict=True))
        found: dict[Any, list[float]] = {}
        for sharing, size in self._sharing(distinct):
            scored = chain(*chain(*self.in_batches(self._score_sharing, sharing, size)))
            shared = [(patch.key, text) for patch, own in sharing for text in own]
            found |= zip(shared, scored, strict=True)
        left = {key: pair for key, pair in distinct.items() if key not in found}
        for several in self._growing(left):
            pairs = [distinct[key] for key in several]
            size = self.grown_rows(len(pairs[0][1]))
            batches = self.in_batches(self._score_growing, pairs, size)
            found |= zip(several, chain(*batches), strict=True)
        rest = [key for key in distinct if key not in found]
        longest = max([1, *(len(key[1]) for key in rest)])
        most = max(1, MOST_LOGITS // (longest * self.model.tl.cfg.d_vocab))
        size = min(self.batch_size, most)
        batches = self.in_batches(self._score_batch, [distinct[key] for key in rest], size)
        found |= zip(rest, chain(*batches), strict=True)
        return [found[key] for key in keys]

    def differentiable(
        self, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "patches longest"]:
        """Return them for one batch as a tensor, with gradients to the patches' vectors.

        After the end of a shorter text it is 0.

        Raises:
            ValueError: as `PatchedGenerator.generate`.
        """
        self.check(patches)
        likely = self._likely(patches, texts, gradients=True)
        lengths = torch.tensor([len(text) for text in texts], device=likely.device)
        inside = torch.arange(likely.shape[1], device=likely.device) < lengths[:, None]
        return likely.where(inside, 0.0)

    def residuals(
        self, patches: Sequence[Patch], text: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "patches places d_model"]:
        """Return block outputs of the patched prompt, followed by a known text, on the CPU.

        One forward pass takes a whole batch of patches. Guidance acts on logits, and so not here.

        Args:
            patches: a row each.
            text: token ids; the same after every patch.
            places: layer and position of each output; positions count from the prompt's first
                token and go on in the text, and none is before the placeholder.

        Raises:
            ValueError, MemoryError: as `PatchedGenerator.generate`.
        """
        self.check(patches)
        layers = list(dict.fromkeys(layer for layer, _ in places))
        at = [position - self.first for _, position in places]
        where = [(layers.index(layer), p) for (layer, _), p in zip(places, at, strict=True)]

        def work(batch: Sequence[Patch]) -> list[Tensor]:
            with self._scoring():
                seen = self._outputs(batch, [tuple(text)] * len(batch), layers, min(at))
                found = torch.stack([seen[n][:, p - min(at)] for n, p in where], dim=1)
            return list(found.float().cpu())

        size = self.grown_rows(len(text) + 1) if self.model.decoder.grows else None
        return torch.stack(list(chain(*self.in_batches(work, patches, size))))

    def check(self, patches: Sequence[Patch]) -> None:
        """Check the layers and kept shares of patches before anything is run."""
        for patch in patches:
            if patch.target_layer is not None:
                self.model.checked_targets(patch.target_layer)
            if not math.isfinite(patch.keep):
                raise bad_value("keep", "a finite number", patch.keep, "0 replaces, 1 adds")

    def rows(self, patches: Sequence[Patch]) -> tuple[list[Patch], Float[Tensor, " patches"]]:
        """Return the patches followed by the unpatched twin of each guided one, and all w."""
        twins = [replace(patch, target_layer=None) for patch in patches if patch.guidance != 1]
        return [*patches, *twins], torch.tensor([patch.guidance for patch in patches])

    def begin(self, patches: Sequence[Patch]) -> tuple[Batch, Float[Tensor, "patches vocab"]]:
        """Start a batch: run the prompt with its patches, and return the logits after it."""
        rows, weights = self.rows(patches)
        batch = Batch(self.step, self.model.decoder.keep, self.cache(len(rows)), weights)
        with self.model.hooks(self.hooks(rows)):
            return batch, batch.run(self.tail(len(rows)))

    def hooks(self, rows: Sequence[Patch]) -> list[tuple[str, Hook]]:
        """Return the hooks that patch the rows of a batch at the placeholder's tokens."""
        return patch_hooks(self.model, rows, self.places)

    def cache(self, rows: int, new: int = 0) -> Any:
        """Return a cache of `rows` rows that hold the prompt up to the placeholder.

        It has room for `max_new_tokens`, or for `new` tokens where these are more.
        """
        room = self.row_length + max(0, new - self.max_new_tokens)
        return self.model.decoder.expand(self.prefix, rows, room)

    def tail(self, rows: int) -> Int[Tensor, "batch pos"]:
        """Return the tokens from the placeholder on, for every row."""
        return self._tokens[:, self.first :].expand(rows, -1)

    def step(self, tokens: Int[Tensor, "batch pos"], cache: Any) -> Float[Tensor, "batch vocab"]:
        """Run `tokens` on `cache` and return the float32 logits of the last one."""
        return self.model.decoder.step(tokens, cache).float()

    def grown_rows(self, length: int) -> int:
        """Return how many rows with a known text of this length may grow in one batch."""
        positions = len(self.target.tokens) - self.first + length - 1
        return max(1, min(GROWN * self.batch_size, MOST_GROWN // positions))

    def in_batches(
        self, work: Callable[[Sequence[T]], list[U]], rows: Sequence[T], size: int | None = None
    ) -> Iterator[list[U]]:
        """Yield the results of `work` for `size` rows at a time, by default the batch size."""
        size, start = size or self.batch_size, 0
        while start < len(rows):
            batch = rows[start : start + size]
            found = self.unless_out_of_memory(partial(work, batch), batch)
            if found is None:
                size = self.batch_size
            else:
                yield found
                start += len(batch)

    def unless_out_of_memory(self, work: Callable[[], T], batch: Sized) -> T | None:
        """Return the result, or `None` after halving the batch size for another try."""
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
            self.batch_size = min(self.batch_size, len(batch) // 2)
        free_memory()  # outside the handler, whose traceback keeps the failed batch's tensors
        return None

    @property
    def _tokens(self) -> Int[Tensor, "1 pos"]:
        return self.target.tokens.tensor(self.model.device)

    def _next_token_batch(self, patches: Sequence[Patch]) -> list[Float[Tensor, " vocab"]]:
        with self.model.lock, torch.no_grad():
            _, logits = self.begin(patches)
        return list(logits.log_softmax(dim=-1).cpu())

    def _score_batch(self, pairs: Sequence[tuple[Patch, Sequence[int]]]) -> list[list[float]]:
        patches, texts = zip(*pairs, strict=True)
        if not any(texts):
            return [[] for _ in texts]
        rows = self._likely(patches, texts).tolist()
        return [row[: len(text)] for row, text in zip(rows, texts, strict=True)]

    def _likely(
        self, patches: Sequence[Patch], texts: Sequence[Sequence[int]], *, gradients: bool = False
    ) -> Float[Tensor, "patches longest"]:
        """Return the log-probability of each token of texts of any length, from one pass."""
        longest = max(map(len, texts))
        # Attention is causal: the padding of a shorter text changes none of its own tokens.
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        ids = torch.tensor(padded, device=self.model.device)
        rows, weights = self.rows(patches)
        read = torch.cat([ids, ids[guided_rows(weights)]])[:, :-1]
        tokens = torch.cat([self.tail(len(rows)), read], dim=1)
        with self._scoring(gradients=gradients):
            cache = self.cache(len(rows), longest)
            with self.model.hooks(self.hooks(rows)):
                logits = self.model.decoder.logits(tokens, cache, longest)
            return token_log_probabilities(guide(logits, weights), ids)

    @contextlib.contextmanager
    def _scoring(self, *, gradients: bool = False) -> Iterator[None]:
        """Hold the model, by default without gradients, in the precision of known texts."""
        device = self.model.device.type
        fast = self.precision == "high" and multiplies_bfloat16(device)
        with (
            self.model.lock,
            torch.set_grad_enabled(gradients),
            torch.autocast(device, torch.bfloat16, fast),
        ):
            yield

    def _sharing(
        self, pairs: Mapping[Any, tuple[Patch, Sequence[int]]]
    ) -> Iterator[tuple[list[tuple[Patch, list[tuple[int, ...]]]], int]]:
        """Yield patches with several texts, where sharing a prompt is cheaper, and how many fit.

        The cost of a text is counted in tokens through all layers.
        """
        texts: dict[Any, tuple[Patch, list[tuple[int, ...]]]] = {}
        for patch, text in pairs.values():
            if text and patch.guidance == 1:
                texts.setdefault(patch.key, (patch, []))[1].append(tuple(text))
        tail, layers = len(self.target.tokens) - self.first, self.model.n_layers
        by_number: dict[int, list[tuple[Patch, list[tuple[int, ...]]]]] = {}
        for patch, own in texts.values():
            mean = sum(map(len, own)) / len(own)
            below = min((n + 1 for n in layer_numbers(self.model, patch)), default=0) / layers
            alone = (tail + mean) * (1 - below if self.model.decoder.grows else 1)
            if len(own) > 1 and tail / len(own) + mean < alone:
                most = max(1, MOST_LOGITS // (max(map(len, own)) * self.model.tl.cfg.d_vocab))
                rows = min(len(own), self.batch_size, most)
                for start in range(0, len(own), rows):
                    part = own[start : start + rows]
                    by_number.setdefault(len(part), []).append((patch, part))
        for number, several in by_number.items():
            longest = max(len(text) for _, own in several for text in own)
            most = max(1, MOST_LOGITS // (longest * self.model.tl.cfg.d_vocab))
            yield several, max(1, min(self.batch_size, most) // number)

    def _score_sharing(
        self, several: Sequence[tuple[Patch, Sequence[tuple[int, ...]]]]
    ) -> list[list[list[float]]]:
        """Score several texts after each patch, from the cache of one run of its prompt."""
        decoder, patches = self.model.decoder, [patch for patch, _ in several]
        texts = [text for _, own in several for text in own]
        owners = torch.tensor([row for row, (_, own) in enumerate(several) for _ in own])
        longest = max(map(len, texts))
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        ids = torch.tensor(padded, device=self.model.device)
        with self._scoring():
            cache = self.cache(len(patches), longest)
            with self.model.hooks(self.hooks(patches)):
                first = decoder.logits(self.tail(len(patches)), cache, 1)
            likely = [token_log_probabilities(first[owners.to(first.device)], ids[:, :1])]
            if longest > 1:
                decoder.keep(cache, owners)
                logits = decoder.logits(ids[:, :-1], cache, longest - 1)
                likely.append(token_log_probabilities(logits, ids[:, 1:]))
        rows = iter(torch.cat(likely, dim=1).tolist())
        return [[next(rows)[: len(text)] for text in own] for _, own in several]

    def _growing(self, pairs: Mapping[Any, tuple[Patch, Sequence[int]]]) -> Iterable[list[Any]]:
        """Return the pairs that are to grow from unpatched rows, by the length of their texts."""
        together: dict[tuple[int, ...], list[Any]] = {}
        if self.model.decoder.grows:
            for key, (patch, text) in pairs.items():
                if text and patch.guidance == 1:
                    together.setdefault(tuple(text), []).append(key)
        by_length: dict[int, list[Any]] = {}
        for text, several in together.items():
            if len(several) >= FEWEST_GROWING:
                by_length.setdefault(len(text), []).extend(several)
        return by_length.values()

    def _score_growing(self, pairs: Sequence[tuple[Patch, Sequence[int]]]) -> list[list[float]]:
        """Score texts of equal length in a batch that grows from a row for each text."""
        decoder = self.model.decoder
        patches, texts = zip(*pairs, strict=True)
        ids = torch.tensor(texts, device=self.model.device)
        with self._scoring():
            read = [text[:-1] for text in texts]
            (last,) = self._outputs(patches, read, [self.model.n_layers - 1], -ids.shape[1])
            likely = unembedded_log_probabilities(decoder, last.flatten(0, 1), ids.flatten())
        found: list[list[float]] = likely.view(len(pairs), -1).tolist()
        return found

    def _outputs(
        self,
        patches: Sequence[Patch],
        texts: Sequence[Sequence[int]],
        layers: Sequence[int],
        start: int,
    ) -> list[Float[Tensor, "patches pos d_model"]]:
        """Return outputs of blocks after texts of equal length, from the run position `start` on.

        The batch grows from a row for each text, where the model can do that.
        """
        model, decoder = self.model, self.model.decoder
        distinct, origins = list(map(tuple, texts)), list(range(len(texts)))
        hooks, rows = self.hooks(patches), origins
        if decoder.grows:
            distinct = list(dict.fromkeys(distinct))
            origins = [distinct.index(tuple(text)) for text in texts]
            starts, hooks, rows = growing_hooks(model, patches, origins, self.places)
            distinct = [distinct[text] for text in starts]
        ids = torch.tensor(distinct, dtype=torch.long, device=model.device)
        seen: dict[int, Tensor] = {}

        def take(activation: Float[Tensor, "batch pos d_model"], hook: Any, layer: int) -> Any:
            # A row that is not there yet is still that of its text.
            pairs = zip(rows, origins, strict=True)
            there = [row if row < len(activation) else origin for row, origin in pairs]
            seen[layer] = activation[there, start:]
            # The model's own unembedding is not needed.
            return activation[:1] if decoder.grows and layer == model.n_layers - 1 else None

        hooks += [(hook_name("resid_post", n), partial(take, layer=n)) for n in layers]
        tokens = torch.cat([self.tail(len(ids)), ids], dim=1)
        first = 1 if decoder.grows else len(ids)
        if first < len(ids):  # a mask for one row is right for any number of rows
            run = partial(decoder.logits, tokens, self.cache(len(ids), ids.shape[1]), 1)
            at_embedding = [hook for hook in hooks if hook[0] == hook_name("resid_post", EMBED)]
            with model.hooks(at_embedding):
                embedded = first_block_input(model.tl, run)
            hooks = [hook for hook in hooks if hook not in at_embedding]
            hooks.append((hook_name("resid_pre", 0), lambda activation, hook: embedded))
        cache = self.cache(first, ids.shape[1])
        with model.hooks(hooks):
            decoder.logits(tokens[:first], cache, 1)
        return [seen[layer] for layer in layers]


def multiplies_bfloat16(device: str) -> bool:
    """Return whether a type of device has units for matrix products in bfloat16.

    A device without them takes several times as long as in float32.
    """
    if device == "cpu":  # torch offers no public way to ask
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _default_new_tokens(model: LanguageModel, *, chat: bool) -> int:
    own = model.max_new_tokens
    if own is not None and 1 <= own <= LONGEST_DEFAULT:
        return own
    return CHAT_NEW_TOKENS if chat else PAPER_MAX_NEW_TOKENS
