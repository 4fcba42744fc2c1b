"""Turn the logits of a batch into texts, one token per row and step.

1. Guidance: where a row asks for it, its logits are u + w·(c − u), with c its own and u those of
   the same text behind the unpatched prompt (classifier-free guidance; paper, section 3.5).
2. Choose: the likeliest token, or for a row with a seed one drawn at temperature 1.
3. Keep, per row, how close the call was, how sure the model was, and how likely the token.
4. Go on until every row has ended or has its longest text. Rows that have ended are dropped from
   the batch when they are a quarter of it, so that the others take less time.

What a row writes does not depend on the other rows, nor on when they are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LIVE_SHARE = 0.75
"""The batch is made smaller when fewer of its rows than this go on."""
LOOK_EVERY = 4
"""How many steps to take between two looks at the texts, whether they have said all."""
CHUNK = 2**18
"""How many logits a CPU looks at together: what stays in its cache, instead of 25 MB a step."""


@dataclass(frozen=True)
class Generation:
    """What the model wrote.

    Attributes:
        token_ids: the new tokens, without the one that ended the text.
        text: the same as text.
        margin: the smallest distance, in logits, between the chosen token and the second best
            over the steps. Below `patching.NEAR_TIE` another batch size may choose differently.
            NaN, and the text empty, where the model's own arithmetic overflowed.
        entropies: how unsure the model was at each token, the entropy of its choice in nats.
        log_probabilities: how likely each token was, in nats.
    """

    token_ids: tuple[int, ...]
    text: str
    margin: float
    entropies: tuple[float, ...] = ()
    log_probabilities: tuple[float, ...] = ()


class Written:
    """The tokens of a batch; a step is -1 where a row had ended.

    Attributes:
        ids: the chosen tokens.
        entropies: the entropy of each choice, in nats.
        log_probabilities: the log-probability of each choice, in nats.
        margins: how close each choice was, in logits, that of the end included.
        broken: rows whose arithmetic overflowed.
    """

    def __init__(self, rows: int, steps: int) -> None:
        shape = (rows, steps)
        self.ids: Int[Tensor, "batch new"] = torch.full(shape, -1)
        self.entropies: Float[Tensor, "batch new"] = torch.zeros(shape)
        self.log_probabilities: Float[Tensor, "batch new"] = torch.zeros(shape)
        self.margins: Float[Tensor, "batch new"] = torch.full(shape, torch.inf)
        self.broken: Bool[Tensor, " batch"] = torch.zeros(rows, dtype=torch.bool)

    def add(
        self,
        step: int,
        rows: Int[Tensor, " rows"],
        going: Bool[Tensor, " rows"],
        choice: _Choice,
        ends: Int[Tensor, " ends"],
    ) -> Bool[Tensor, " rows"]:
        """Write down what the rows that go on chose, and tell which of them go on after it."""
        broken = going & torch.isnan(choice.margins)
        self.broken[rows[broken]] = True
        now = going & ~broken
        self.margins[rows[now], step] = choice.margins[now]
        now &= ~torch.isin(choice.tokens, ends)
        for table, column in (
            (self.ids, choice.tokens),
            (self.entropies, choice.entropies),
            (self.log_probabilities, choice.log_probabilities),
        ):
            table[rows[now], step] = column[now]
        return now

    def tokens(self, row: int) -> list[int]:
        """Return what a row has written so far."""
        ids = self.ids[row]
        found: list[int] = ids[ids >= 0].tolist()
        return found

    def crop(self, told: Callable[[list[int]], int | None]) -> None:
        """Forget what each row wrote after it had said all."""
        for row in range(len(self.ids)):
            length = told(self.tokens(row))
            if length is not None:
                self.ids[row, length:] = -1
                self.margins[row, length:] = torch.inf
                self.broken[row] = False  # what overflowed was behind it, if anything

    def follow(self, row: int, leader: int) -> None:
        """Let a row go on, from its second token on, as another one did."""
        for table in (self.ids, self.entropies, self.log_probabilities, self.margins):
            table[row, 1:] = table[leader, 1:]
        self.broken[row] |= self.broken[leader]

    def generations(self, decode: Callable[[list[int]], str]) -> list[Generation]:
        """Return the rows as text."""
        found = []
        for row, margin in enumerate(self.margins.amin(dim=1).tolist()):
            if self.broken[row]:
                found.append(Generation((), decode([]), float("nan")))
                continue
            ids = self.tokens(row)
            unsure, likely = (
                tuple(table[row, : len(ids)].tolist())
                for table in (self.entropies, self.log_probabilities)
            )
            found.append(Generation(tuple(ids), decode(ids), margin, unsure, likely))
        return found


class Batch:
    """A batch that is being written: its cache, and the unpatched twins of its guided rows.

    Args:
        step: runs tokens behind a cache and returns the logits of the last ones.
        keep: drops all rows of a cache but some.
        cache: of the rows, and behind them of the twins.
        weights: w of every row; w = 1 is no guidance, and has no twin.
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
        """Return the logits behind some more tokens of every row and twin."""
        return guide(self._step(tokens, self._cache), self._weights)

    def advance(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits behind one more token of every row; a twin reads what its row does."""
        return self.run(
            torch.cat([tokens, tokens[_guided(self._weights).to(tokens.device)]])[:, None]
        )

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows but these, and the twins of the others."""
        guided = _guided(self._weights)
        twins = len(self._weights) + torch.isin(guided, rows).nonzero()[:, 0]
        self._keep(self._cache, torch.cat([rows, twins]))
        self._weights = self._weights[rows]


def _guided(weights: Float[Tensor, " batch"]) -> Int[Tensor, " guided"]:
    return (weights != 1).nonzero()[:, 0]


def guide(
    logits: Float[Tensor, "rows *pos vocab"], weights: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *pos vocab"]:
    """Return u + w·(c − u) for the guided rows, and the others as they are.

    Args:
        logits: of the batch, and behind it the unpatched twin of each guided row, in their order.
        weights: w of every row of the batch; w = 1 is no guidance.
    """
    batch, unpatched = logits[: len(weights)], logits[len(weights) :]
    guided = _guided(weights)
    if not len(guided):
        return batch
    mixed = batch.clone()
    w = weights[guided].view(-1, *[1] * (logits.ndim - 1)).to(logits.device)
    rows = guided.to(logits.device)
    mixed[rows] = unpatched + w * (batch[rows] - unpatched)
    return mixed


def decode(
    batch: Batch,
    logits: Float[Tensor, "batch vocab"],
    *,
    max_new_tokens: int,
    eos: Collection[int],
    seeds: Sequence[int | None],
    told: Callable[[list[int]], int | None] | None = None,
    alike: Sequence[Hashable] = (),
) -> Written:
    """Write every row to its end.

    Args:
        batch: what reads the chosen tokens.
        logits: what follows the prompt.
        max_new_tokens: the longest text.
        eos: the tokens that end a text.
        seeds: per row `None` for the likeliest token, or the seed to draw from. What a row draws
            does not depend on the other rows.
        told: where a text has said all, returns how many of its tokens that took; else `None`.
            It ends there. Rows are written to their end, or longest text, unless given.
        alike: per row, if given, what decides its text from the second token on besides the first
            token, or `None`: of rows that agree in both, one is written.
    """
    written = Written(len(logits), max_new_tokens)
    draw, ends = _drawing(seeds), torch.tensor(sorted(eos), dtype=torch.long)
    rows = torch.arange(len(logits))  # of the batch, by their number at the start
    going = torch.ones(len(logits), dtype=torch.bool)
    leaders: dict[int, int] = {}
    for step in range(max_new_tokens):
        choice = _choose(logits, draw(logits, rows.tolist())).cpu()
        going &= written.add(step, rows, going, choice, ends)
        if step == 0 and alike:
            leaders = _leaders(alike, choice.tokens, going)
            going[list(leaders)] = False
        if told is not None and (step + 1) % LOOK_EVERY == 0:
            for place in going.nonzero()[:, 0].tolist():
                going[place] = told(written.tokens(int(rows[place]))) is None
        if step + 1 == max_new_tokens or not going.any():
            break
        tokens = choice.tokens
        if going.sum() <= LIVE_SHARE * len(rows):
            left = going.nonzero()[:, 0]
            batch.keep(left)
            rows, going, tokens = rows[left], going[left], tokens[left]
        logits = batch.advance(tokens.to(logits.device))
    for row, leader in leaders.items():
        written.follow(row, leader)
    if told is not None:
        written.crop(told)
    return written


class _Choice(NamedTuple):
    """What each row writes next; a margin of NaN is that of a row that overflowed."""

    tokens: Int[Tensor, " batch"]
    margins: Float[Tensor, " batch"]
    entropies: Float[Tensor, " batch"]
    log_probabilities: Float[Tensor, " batch"]

    def cpu(self) -> _Choice:
        return _Choice(*(part.cpu() for part in self))


def _choose(logits: Float[Tensor, "batch vocab"], ranked: Float[Tensor, "batch vocab"]) -> _Choice:
    """Choose the first token of each row of `ranked`, and judge it by `logits`."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, CHUNK // logits.shape[-1])
    parts = [
        _choose_some(logits[start : start + rows], ranked[start : start + rows])
        for start in range(0, len(logits), rows)
    ]
    return _Choice(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _choose_some(
    logits: Float[Tensor, "rows vocab"], ranked: Float[Tensor, "rows vocab"]
) -> _Choice:
    best, places = ranked.topk(min(2, ranked.shape[-1]), dim=-1)
    margins, tokens = best[:, 0] - best[:, -1], places[:, 0]
    equal = margins == 0
    if equal.any():  # argmax takes the first of equals, topk does not promise to
        tokens = torch.where(equal, ranked.argmax(dim=-1), tokens)
    highest = logits.amax(dim=-1, keepdim=True)  # hands NaN on
    below = (logits - highest).clamp_min_(-1e30)  # 0 · -inf would be NaN
    weights = below.exp()
    total = weights.sum(dim=-1)
    entropies = total.log() - (weights * below).sum(dim=-1) / total
    likely = below.gather(1, tokens[:, None])[:, 0] - total.log()
    finite = torch.isfinite(highest[:, 0])
    return _Choice(tokens, margins.where(finite, torch.nan), entropies, likely)


def _leaders(
    alike: Sequence[Hashable], tokens: Int[Tensor, " batch"], going: Bool[Tensor, " batch"]
) -> dict[int, int]:
    """Return, of the rows that another one can write for, which one that is."""
    first: dict[Hashable, int] = {}
    leaders = {}
    for row in going.nonzero()[:, 0].tolist():
        if alike[row] is not None:
            leader = first.setdefault((alike[row], int(tokens[row])), row)
            if leader != row:
                leaders[row] = leader
    return leaders


def _drawing(seeds: Sequence[int | None]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Return what adds Gumbel noise to the rows with a seed: the argmax is then a draw."""
    generators = {
        row: torch.Generator().manual_seed(seed)
        for row, seed in enumerate(seeds)
        if seed is not None
    }

    def draw(
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

    return draw
