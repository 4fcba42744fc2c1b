"""The target prompt with a name in the placeholder's place: nothing is patched.

1. Put the name into the prompt's text and tokenise it; names differ in length.
2. Names of equal length share a batch, which starts from the KV cache of the target prompt up to
   its placeholder wherever they begin with the same tokens.
3. Generate the model's description of each name, or score a known text after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from superscopes_tl.engine.decoding import Batch, Generation, decode, token_log_probabilities
from superscopes_tl.engine.generation import PatchedGenerator
from superscopes_tl.engine.target_prompt import description_is_over
from superscopes_tl.model import tokenize

LOOK_AHEAD = 16
"""How many more tokens it may take to see that another entry has begun."""


def name_fits(generator: PatchedGenerator, name: str) -> bool:
    """Return whether a name fits into the target prompt, with a text after it."""
    try:
        return bool(_tokens(generator, name, generator.max_new_tokens))
    except ValueError:
        return False


def generate_named(generator: PatchedGenerator, names: Sequence[str]) -> list[Generation]:
    """Return the greedy text after the target prompt with each name in it.

    Texts end with their description. Those of a few-shot prompt may take `LOOK_AHEAD` more tokens
    than usual, to see whether a comma continues the description or begins another entry.

    Raises:
        ValueError: a name that does not fit into the context.
    """
    model, longest = generator.model, generator.max_new_tokens
    rows = [_tokens(generator, name, longest) for name in names]
    if generator.target.prompt.few_shot_names:
        longest += LOOK_AHEAD
    longest = min(longest, model.n_ctx - max(map(len, rows), default=0))
    found: dict[int, Generation] = {}
    for places in _equally_long(generator, rows):
        with model.lock, torch.no_grad():
            cache, ids = _start(generator, [rows[place] for place in places], new=longest)
            batch = Batch(generator.step, model.decoder.keep, cache, torch.ones(len(places)))
            texts = decode(
                batch,
                batch.run(ids),
                max_new_tokens=longest,
                eos=model.eos_token_ids,
                seeds=[None] * len(places),
                text_of=generator.text_of,
                until=description_is_over,
                confidence=True,
            )
        found.update(zip(places, texts, strict=True))
    return [found[place] for place in range(len(rows))]


def named_log_probabilities(
    generator: PatchedGenerator, names: Sequence[str], texts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the log-probability, in nats, of each token of each text after its name's prompt.

    Raises:
        ValueError: a name that does not fit into the context.
    """
    model, found = generator.model, []
    for name, text in zip(names, texts, strict=True):
        row = _tokens(generator, name, len(text))
        with model.lock, torch.no_grad():
            cache, ids = _start(generator, [row], new=len(text))
            wanted = torch.tensor([text], device=model.device)
            read = torch.cat([ids, wanted[:, :-1]], dim=1)
            likely = token_log_probabilities(model.decoder.logits(read, cache, len(text)), wanted)
        found.append(likely[0].tolist())
    return found


def _tokens(generator: PatchedGenerator, name: str, room: int) -> tuple[int, ...]:
    """Return the tokens of the target prompt with a name in the placeholder's place."""
    prompt = generator.target.prompt
    return tokenize(
        generator.model,
        prompt.filled(name),
        argument="target_prompt",
        room=room,
        chat=generator.chat,
        answer=prompt.answer,
    ).ids


def _equally_long(
    generator: PatchedGenerator, rows: Sequence[tuple[int, ...]]
) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each batch: of one length, and with one prefix."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((len(row), _has_prefix(generator, row)), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), generator.batch_size):
            yield places[start : start + generator.batch_size]


def _has_prefix(generator: PatchedGenerator, row: tuple[int, ...]) -> bool:
    """Return whether a row begins with the tokens before the placeholder."""
    first = generator.first
    return len(row) > first and row[:first] == generator.target.tokens.ids[:first]


def _start(
    generator: PatchedGenerator, rows: Sequence[tuple[int, ...]], new: int
) -> tuple[Any, Int[Tensor, "rows pos"]]:
    """Return a cache for some rows of equal length, and the tokens that it does not hold."""
    decoder, ids = generator.model.decoder, torch.tensor(rows, device=generator.model.device)
    shared = generator.first if _has_prefix(generator, rows[0]) else 0
    prefix = generator.prefix if shared else decoder.prefill(ids[:1, :0])
    return decoder.expand(prefix, len(rows), ids.shape[1] - shared + new), ids[:, shared:]
