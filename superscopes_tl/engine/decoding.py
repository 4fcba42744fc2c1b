"""Turn the logits of a batch into texts, one token per row and step.

1. Guidance: the logits of a guided row are u + w·(c − u), with c its own logits and u those of
   the same text after the unpatched prompt (classifier-free guidance; paper, section 3.5).
2. Choose the most likely token, or for a row with a seed sample one at temperature 1.
3. Record, per row, the margin over the second best token, and where asked for the entropy of the
   distribution and the log-probability of the choice.
4. Repeat until every row has ended or reached its greatest length. The batch is compacted when a
   quarter of its rows have ended, so that later steps cost less.
5. Find where the description ends, once, and put both text and description into a `Generation`.

The text of a row depends neither on the other rows nor on when the batch is compacted.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from superscopes_tl.engine.target_prompt import crop_description
from superscopes_tl.model import Decoder

LIVE_SHARE = 0.75
"""The batch is compacted when fewer of its rows than this are still generating."""
CHECK_EVERY, FEW = 4, 16
"""Steps between two checks whether texts are finished; of few rows every step is checked."""
CHUNK = 2**20
"""How many logits a CPU processes together: as many as stay in its cache."""
BLOCK = 256
"""How many logits are compared at a time in the search for the two highest."""
UNEMBEDDED_ON_CPU, UNEMBEDDED = 2**21, 2**26
"""How many logits of known texts are made at a time: on a CPU as many as stay in its cache."""
UNEMBEDDED_ROWS = 2048
"""Of how many positions at a time."""


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        token_ids: the new tokens, without the one that ended the text.
        text: the same, decoded.
        margin: the smallest difference, in logits, between the chosen token and the second best
            over the steps. Below `NEAR_TIE` another batch size may choose differently. NaN, and
            the text empty, where the model's own arithmetic overflowed.
        entropies: the entropy of each token's distribution, in nats; empty if not asked for.
        log_probabilities: of each token, in nats; empty if not asked for.
        description: the part of the text that describes the placeholder (`crop_description`).
        n_description_tokens: tokens up to the end of the description; 0 without one.
    """

    token_ids: tuple[int, ...]
    text: str
    margin: float
    entropies: tuple[float, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    description: str = ""
    n_description_tokens: int = 0


def token_log_probabilities(
    logits: Float[Tensor, "*pos vocab"], ids: Int[Tensor, "*pos"]
) -> Float[Tensor, "*pos"]:
    """Return the log-probability, in nats, of a given token at each position."""
    # `log_softmax` is several times as fast as the difference to `logsumexp` on a CPU.
    return logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def unembedded_log_probabilities(
    decoder: Decoder, residual: Float[Tensor, "pos d_model"], ids: Int[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """Return the same from the last block's outputs, without all logits at a time.

    A part of the vocabulary is unembedded for many positions and is used while it is in cache.
    """
    size = UNEMBEDDED_ROWS
    parts = zip(torch.split(residual, size), torch.split(ids, size), strict=True)
    return torch.cat([_unembedded_some(decoder, *part) for part in parts])


def _unembedded_some(decoder: Decoder, residual: Tensor, ids: Tensor) -> Tensor:
    highest = torch.full((len(ids), 1), -1e30, device=ids.device)
    total, chosen, start = torch.zeros_like(highest), torch.zeros_like(highest), 0
    most = UNEMBEDDED_ON_CPU if ids.device.type == "cpu" else UNEMBEDDED
    size = max(1, most // len(ids))
    for part in decoder.unembed_parts(residual, size):
        logits = part.to(ids.device)
        rows = ((ids >= start) & (ids < start + logits.shape[1])).nonzero()[:, 0]
        chosen[rows, 0] = logits[rows, ids[rows] - start]
        new = torch.maximum(highest, logits.amax(dim=-1, keepdim=True))  # propagates NaN
        total = total * (highest - new).exp() + logits.sub_(new).exp_().sum(dim=-1, keepdim=True)
        highest, start = new, start + logits.shape[1]
    return (chosen - highest - total.log())[:, 0]


class TokenTable:
    """The tokens of a batch, a row per text and a column per step; -1 after the end of a text.

    Entropies and log-probabilities are in nats, margins in logits; there is a margin for the
    end-of-text token too. `overflowed` marks the rows whose arithmetic overflowed. Without
    `confidence` there are neither entropies nor log-probabilities.
    """

    def __init__(self, rows: int, steps: int, *, confidence: bool) -> None:
        shape = (rows, steps)
        self.confidence = confidence
        self.ids: Int[Tensor, "batch new"] = torch.full(shape, -1)
        self.entropies: Float[Tensor, "batch new"] = torch.zeros(shape)
        self.log_probabilities: Float[Tensor, "batch new"] = torch.zeros(shape)
        self.margins: Float[Tensor, "batch new"] = torch.full(shape, torch.inf)
        self.overflowed: Bool[Tensor, " batch"] = torch.zeros(rows, dtype=torch.bool)

    def add(
        self,
        step: int,
        rows: Int[Tensor, " rows"],
        live: Bool[Tensor, " rows"],
        choice: Choice,
        ends: Int[Tensor, " ends"],
    ) -> Bool[Tensor, " rows"]:
        """Record what the live rows chose; return which of them are live after it."""
        overflowed = live & torch.isnan(choice.margins)
        self.overflowed[rows[overflowed]] = True
        now = live & ~overflowed
        self.margins[rows[now], step] = choice.margins[now]
        now &= ~torch.isin(choice.tokens, ends)
        self.ids[rows[now], step] = choice.tokens[now]
        if self.confidence:
            self.entropies[rows[now], step] = choice.entropies[now]
            self.log_probabilities[rows[now], step] = choice.log_probabilities[now]
        return now

    def tokens(self, row: int) -> list[int]:
        """Return the tokens of a row so far."""
        return [token for token in self.ids[row].tolist() if token >= 0]

    def copy_continuation(self, row: int, leader: int) -> None:
        """Give a row the same second and later tokens as another row."""
        for table in (self.ids, self.entropies, self.log_probabilities, self.margins):
            table[row, 1:] = table[leader, 1:]
        self.overflowed[row] |= self.overflowed[leader]

    def generation(
        self, row: int, text_of: Callable[[list[int]], str], until: Callable[[str], bool] | None
    ) -> Generation:
        """Return a row as text, cut where `until` is first true, and its description."""
        ids, end = self.tokens(row), None
        if until is not None and until(text_of(ids)):
            end = _first_count(lambda count: until(text_of(ids[:count])), len(ids))
        if end is None and self.overflowed[row]:
            return Generation((), text_of([]), math.nan)
        ids = ids[:end]
        text, known = text_of(ids), len(ids) if self.confidence else 0
        description, length = crop_description(text), 0
        if description:
            last = text.index(description) + len(description)
            length = _first_count(lambda count: len(text_of(ids[:count])) >= last, len(ids))
        return Generation(
            token_ids=tuple(ids),
            text=text,
            margin=min(self.margins[row, :end].tolist(), default=math.inf),
            entropies=tuple(self.entropies[row, :known].tolist()),
            log_probabilities=tuple(self.log_probabilities[row, :known].tolist()),
            description=description,
            n_description_tokens=length,
        )


def _first_count(reached: Callable[[int], bool], most: int) -> int:
    """Return the smallest count from 1 for which `reached` holds, by bisection; else `most`."""
    counts = range(1, most + 1)
    return bisect.bisect_left(counts, True, hi=max(0, most - 1), key=reached) + 1


class Batch:
    """A batch being decoded: the KV cache of its rows and of the unpatched twins of guided rows.

    `step` runs tokens on the cache and returns the logits of the last ones; `keep` drops rows of
    it. The weights are w of every row: rows with w = 1 are not guided and have no twin.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Any], Float[Tensor, "rows vocab"]],
        keep: Callable[[Any, Tensor], None],
        cache: Any,
        weights: Float[Tensor, " batch"],
    ) -> None:
        self._step, self._keep = step, keep
        self._cache, self._weights = cache, weights

    def run(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits after the next tokens of every row and twin."""
        return guide(self._step(tokens, self._cache), self._weights)

    def advance(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits after one more token of every row; a twin gets the token of its row."""
        twins = tokens[guided_rows(self._weights).to(tokens.device)]
        return self.run(torch.cat([tokens, twins])[:, None])

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows but these, and the twins of the others."""
        twins = len(self._weights) + torch.isin(guided_rows(self._weights), rows).nonzero()[:, 0]
        self._keep(self._cache, torch.cat([rows, twins]))
        self._weights = self._weights[rows]


def guided_rows(weights: Float[Tensor, " batch"]) -> Int[Tensor, " guided"]:
    """Return the numbers of the guided rows: those with w other than 1."""
    return (weights != 1).nonzero()[:, 0]


def guide(
    logits: Float[Tensor, "rows *pos vocab"], weights: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *pos vocab"]:
    """Return u + w·(c − u) for the guided rows, those with w other than 1, and c for the others.

    The logits u of the guided rows' unpatched twins follow the logits c of the batch.
    """
    batch, unpatched = logits[: len(weights)], logits[len(weights) :]
    rows = guided_rows(weights)
    if not len(rows):
        return batch
    mixed, w = batch.clone(), weights[rows].view(-1, *[1] * (logits.ndim - 1)).to(logits.device)
    rows = rows.to(logits.device)
    mixed[rows] = unpatched + w * (batch[rows] - unpatched)
    return mixed


def decode(
    batch: Batch,
    logits: Float[Tensor, "batch vocab"],
    *,
    max_new_tokens: int,
    eos: Collection[int],
    seeds: Sequence[int | None],
    text_of: Callable[[list[int]], str],
    until: Callable[[str], bool] | None = None,
    continuations: Sequence[Hashable] = (),
    live_share: float = LIVE_SHARE,
    confidence: bool = False,
) -> list[Generation]:
    """Generate every row to its end, given the logits of the first new token.

    A row with a seed is sampled, the others are greedy. `continuations` may label, per row, all
    that decides the text after its first token: of rows with equal labels and first tokens, one is
    generated. `until` and `live_share` are those of `PatchedGenerator`, `confidence` is that of its
    `generate`.
    """
    table = TokenTable(len(logits), max_new_tokens, confidence=confidence)
    sample, ends = _sampler(seeds), torch.tensor(sorted(eos), dtype=torch.long)
    rows = torch.arange(len(logits))  # of the batch, by their number at the start
    live = torch.ones(len(logits), dtype=torch.bool)
    leaders: dict[int, int] = {}
    for step in range(max_new_tokens):
        choice = _choose(logits, sample(logits, rows.tolist()), confidence=confidence)
        live &= table.add(step, rows, live, choice, ends)
        if step == 0 and continuations:
            leaders = _leaders(continuations, choice.tokens, live)
            live[list(leaders)] = False
        if until is not None and (len(rows) <= FEW or (step + 1) % CHECK_EVERY == 0):
            for place in live.nonzero()[:, 0].tolist():
                live[place] = not until(text_of(table.tokens(int(rows[place]))))
        if step + 1 == max_new_tokens or not live.any():
            break
        tokens = choice.tokens
        if live.sum() <= live_share * len(rows):
            left = live.nonzero()[:, 0]
            batch.keep(left)
            rows, live, tokens = rows[left], live[left], tokens[left]
        logits = batch.advance(tokens.to(logits.device))
    for row, leader in leaders.items():
        table.copy_continuation(row, leader)
    return [table.generation(row, text_of, until) for row in range(len(table.ids))]


class Choice(NamedTuple):
    """The next token of each row, on the CPU; the margin is NaN where the logits overflowed."""

    tokens: Int[Tensor, " batch"]
    margins: Float[Tensor, " batch"]
    entropies: Float[Tensor, " known"]
    log_probabilities: Float[Tensor, " known"]


def _choose(
    logits: Float[Tensor, "batch vocab"],
    ranked: Float[Tensor, "batch vocab"],
    *,
    confidence: bool = True,
) -> Choice:
    """Choose the first token of each row of `ranked`, and judge it by `logits`."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, CHUNK // logits.shape[-1])
    own = torch.split(logits, rows)
    others = own if ranked is logits else torch.split(ranked, rows)
    parts = [_choose_some(*part, confidence) for part in zip(own, others, strict=True)]
    return Choice(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _choose_some(
    logits: Float[Tensor, "rows vocab"], ranked: Float[Tensor, "rows vocab"], confidence: bool
) -> Choice:
    best, tokens = _best_two(ranked)
    margins = best[:, 0] - best[:, -1]
    equal = margins == 0
    if equal.any():  # argmax takes the first of equals, topk does not promise to
        tokens = torch.where(equal, ranked.argmax(dim=-1), tokens)
    # As `amax` of the logits, NaN where one of them is.
    highest = best[:, :1] if ranked is logits else logits.amax(dim=-1, keepdim=True)
    margins = margins.where(torch.isfinite(highest[:, 0]), torch.nan)
    if not confidence:
        return Choice(tokens, margins, margins[:0], margins[:0])
    below = logits - highest
    weights = below.exp()
    total = weights.sum(dim=-1)
    entropies = total.log() - _dot(weights, below) / total
    likely = below.gather(1, tokens[:, None])[:, 0] - total.log()
    return Choice(tokens, margins, entropies, likely)


def _best_two(
    ranked: Float[Tensor, "rows vocab"],
) -> tuple[Float[Tensor, "rows two"], Int[Tensor, " rows"]]:
    """Return the two highest numbers of each row, and the place of the first.

    They are among the two blocks of highest maximum: those are found much faster than by sorting.
    """
    n_vocab = ranked.shape[-1]
    whole = n_vocab - n_vocab % BLOCK
    if whole < 2 * BLOCK:
        best, places = ranked.topk(min(2, n_vocab), dim=-1)
        return best, places[:, 0]
    highest = torch.unflatten(ranked[:, :whole], 1, (-1, BLOCK)).amax(dim=-1)
    if whole < n_vocab:
        highest = torch.cat([highest, ranked[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    blocks = highest.topk(2, dim=-1).indices
    places = (BLOCK * blocks[:, :, None] + torch.arange(BLOCK, device=ranked.device)).flatten(1)
    there = ranked.gather(1, places.clamp_max(n_vocab - 1)).where(places < n_vocab, -torch.inf)
    best, at = there.topk(2, dim=-1)
    return best, places.gather(1, at[:, :1])[:, 0]


def _dot(
    weights: Float[Tensor, "rows vocab"], logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return the sums of weights times logits; those without weight do not count."""
    if weights.device.type == "cpu":  # row by row: one product without a tensor in between
        sums = torch.stack([w.dot(x) for w, x in zip(weights, logits, strict=True)])
    else:
        sums = (weights * logits).sum(dim=-1)
    masked = torch.isnan(sums)
    if masked.any():  # 0 · -inf
        sums[masked] = (weights[masked] * logits[masked].clamp_min(-1e30)).sum(dim=-1)
    return sums


def _leaders(
    continuations: Sequence[Hashable], tokens: Int[Tensor, " batch"], live: Bool[Tensor, " batch"]
) -> dict[int, int]:
    """Return, for each row whose continuation another row generates, that other row."""
    first: dict[Hashable, int] = {}
    leaders = {}
    for row in live.nonzero()[:, 0].tolist():
        if continuations[row] is not None:
            leader = first.setdefault((continuations[row], int(tokens[row])), row)
            if leader != row:
                leaders[row] = leader
    return leaders


def _sampler(seeds: Sequence[int | None]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Return what adds Gumbel noise to the rows with a seed: the argmax is then a sample."""
    generators = {
        row: torch.Generator().manual_seed(seed)
        for row, seed in enumerate(seeds)
        if seed is not None
    }

    def sample(
        logits: Float[Tensor, "batch vocab"], rows: Sequence[int]
    ) -> Float[Tensor, "batch vocab"]:
        if not generators:
            return logits
        noisy = logits.clone()
        for place, row in enumerate(rows):
            if row in generators:
                uniform = torch.rand(
                    logits.shape[-1], generator=generators[row], dtype=torch.float64
                )
                gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
                noisy[place] += gumbel.to(logits)
        return noisy

    return sample
