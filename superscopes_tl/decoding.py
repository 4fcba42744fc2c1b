"""Turn the logits of a batch into texts, one token per row and step.

1. Guidance: where a row asks for it, its logits are u + w·(c − u), with c its own and u those of
   the same text behind the unpatched prompt (classifier-free guidance; paper, section 3.5).
2. Choose: the likeliest token, or for a row with a seed one drawn at temperature 1.
3. Keep, per row, how close the call was, how sure the model was, and how likely the token.
4. Go on until every row has ended or has its longest text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Written:
    """The tokens of a batch; a step is -1, or NaN, where a row had ended.

    Attributes:
        ids: the chosen tokens.
        entropies: the entropy of each choice, in nats.
        log_probabilities: the log-probability of each choice, in nats.
        margins: the closest call of each row, in logits; NaN where arithmetic overflowed.
    """

    ids: Int[Tensor, "batch new"]
    entropies: Float[Tensor, "batch new"]
    log_probabilities: Float[Tensor, "batch new"]
    margins: Float[Tensor, " batch"]

    def generations(self, decode: Callable[[list[int]], str]) -> list[Generation]:
        """Return the rows as text."""
        kept = self.ids >= 0
        columns = (self.ids, self.entropies, self.log_probabilities)
        return [
            Generation(tuple(ids), decode(ids), float(margin), tuple(unsure), tuple(likely))
            for (ids, unsure, likely), margin in zip(
                (
                    [column[row][kept[row]].tolist() for column in columns]
                    for row in range(len(kept))
                ),
                self.margins.tolist(),
                strict=True,
            )
        ]


def guide(
    logits: Float[Tensor, "rows vocab"], weights: Float[Tensor, " batch"], guided: Sequence[int]
) -> Float[Tensor, "batch vocab"]:
    """Return u + w·(c − u) for the guided rows, and the others as they are.

    Args:
        logits: of the batch, and behind it the unpatched twin of each guided row.
        weights: w of every row of the batch; w = 1 is no guidance.
        guided: the rows that have a twin, in the order of the twins.
    """
    batch, unpatched = logits[: len(weights)], logits[len(weights) :]
    if not guided:
        return batch
    mixed = batch.clone()
    w = weights[list(guided), None].to(logits.device)
    mixed[list(guided)] = unpatched + w * (batch[list(guided)] - unpatched)
    return mixed


def decode(
    logits: Float[Tensor, "batch vocab"],
    advance: Callable[[Int[Tensor, " batch"]], Float[Tensor, "batch vocab"]],
    *,
    max_new_tokens: int,
    eos: Collection[int],
    seeds: Sequence[int | None],
) -> Written:
    """Write every row to its end.

    Args:
        logits: what follows the prompt.
        advance: returns what follows the given tokens.
        max_new_tokens: the longest text.
        eos: the tokens that end a text.
        seeds: per row `None` for the likeliest token, or the seed to draw from. What a row draws
            does not depend on the other rows.
    """
    draw = _drawing(seeds)
    device = logits.device
    ended = torch.zeros(len(logits), dtype=torch.bool, device=device)
    broken = torch.zeros_like(ended)
    margins = torch.full((len(logits),), float("inf"), device=device)
    ends = torch.tensor(sorted(eos), device=device, dtype=torch.long)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_new_tokens):
        broken |= ~ended & ~torch.isfinite(logits.amax(dim=-1))  # amax hands NaN on
        ended = ended | broken
        ranked = draw(logits)
        best = ranked.topk(min(2, ranked.shape[-1]), dim=-1).values
        margin = best[:, 0] - best[:, -1]
        margins = torch.where(ended, margins, torch.minimum(margins, margin))
        # argmax, not topk's index: both take the first of equals, topk does not promise to.
        tokens = ranked.argmax(dim=-1)
        ended = ended | torch.isin(tokens, ends)
        likely = logits.log_softmax(dim=-1)
        unsure = -(likely.exp() * likely.clamp_min(-1e30)).sum(dim=-1)
        chosen = likely.gather(1, tokens[:, None])[:, 0]
        steps.append((torch.where(ended, -1, tokens), unsure, chosen))
        if step + 1 == max_new_tokens or bool(ended.all()):
            break
        logits = advance(tokens)
    ids, entropies, log_probabilities = (
        torch.stack(part, dim=1).cpu() for part in zip(*steps, strict=True)
    )
    return Written(
        ids.masked_fill(broken.cpu()[:, None], -1),
        entropies,
        log_probabilities,
        margins.masked_fill(broken, float("nan")).cpu(),
    )


def _drawing(seeds: Sequence[int | None]) -> Callable[[Tensor], Tensor]:
    """Return what adds Gumbel noise to the rows with a seed: the argmax is then a draw."""
    generators = {
        row: torch.Generator().manual_seed(seed)
        for row, seed in enumerate(seeds)
        if seed is not None
    }

    def draw(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        if not generators:
            return logits
        noisy = logits.clone()
        for row, generator in generators.items():
            uniform = torch.rand(logits.shape[-1], generator=generator, dtype=torch.float64)
            gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
            noisy[row] += gumbel.to(logits)
        return noisy

    return draw
