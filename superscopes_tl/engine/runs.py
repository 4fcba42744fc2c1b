"""Run a prompt with some of its own activations replaced, many variants in one batch.

1. A `Row` is one variant: the prompt's tokens, and the vectors to write while they are run.
2. The tokens before the rows' first difference or write are run once; the rows share their KV
   cache (as in `forced`).
3. The rest is run with one hook per *distinct* hook point, which writes every row's vector at that
   row's position (`patch`). The hooks are on the model during this step alone.
4. A continuation is fed token by token (teacher forcing); a readout reduces the log-probabilities
   of each step to a few numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine.decoding import Batch, decode
from superscopes_tl.engine.memory import default_batch_size
from superscopes_tl.engine.patch import cast_for, write_hooks
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import KINDS, Hook, HookKind, LanguageModel, Site, TokenizedText, tokenize


@dataclass(frozen=True, eq=False)
class Run:
    """A source prompt in a model; `model` and `source` as in a `SweepPlan`."""

    model: LanguageModel
    source: TokenizedText
    chat: bool = False

    @classmethod
    def of(cls, model: LanguageModel, prompt: str, *, chat: bool = False) -> Run:
        """Return the run of a prompt, with `chat` in the model's chat template."""
        return cls(model, tokenize(model, prompt, chat=chat), chat)


@dataclass(frozen=True, eq=False)
class Row:
    """One variant of a run.

    Attributes:
        ids: the tokens, BOS included; equally many in every row of a call.
        writes: the vector to write at each site, in float32; nothing for a clean run.
    """

    ids: tuple[int, ...]
    writes: Mapping[Site, Float[Tensor, " d_model"]] = field(default_factory=dict)


Readout = Callable[[Float[Tensor, "rows vocab"], int], Float[Tensor, "rows numbers"]]
"""Reduces the log-probabilities (nats, float32) at one step of a continuation to a few numbers."""


def follow_continuation(
    model: LanguageModel,
    rows: Sequence[Row],
    continuation: Sequence[int],
    readout: Readout,
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "rows steps numbers"]:
    """Return the readout of each row at each token of the continuation.

    Step k is the distribution of token k. The batch size defaults to what fits into memory.

    Raises:
        ValueError: a vector that overflows the model's dtype.
    """
    length = len(rows[0].ids) + len(continuation)
    size = default_batch_size(model, length) if batch_size is None else batch_size
    check_count("batch_size", size, least=1, fix="leave it out")
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return torch.cat([_follow_batch(model, batch, continuation, readout) for batch in batches])


def continuation_ids(run: Run, continuation: str | int) -> tuple[int, ...]:
    """Return a text's tokens as a continuation of the prompt, or that many greedy tokens.

    Raises:
        ValueError: no room in the context, or a text whose first token joins the prompt's last.
    """
    model, source = run.model, run.source
    if not isinstance(continuation, str):
        fix = "pass a count of tokens, or a text"
        check_count("continuation", continuation, least=1, fix=fix)
        tokenize(model, source.text, room=continuation, chat=run.chat)
        return _own_continuation(run, continuation)
    # Tokenised together with the prompt: the tokens of a text depend on what is before it.
    text, answer = (source.text, continuation) if run.chat else (source.text + continuation, "")
    whole = tokenize(model, text, argument="continuation", chat=run.chat, answer=answer)
    if whole.ids[: len(source)] != source.ids or len(whole) == len(source):
        expected = f"a text that continues the tokens {source.numbered()}"
        fix = "begin it with a new token, such as a space or ':'"
        raise bad_value("continuation", expected, continuation, fix)
    return whole.ids[len(source) :]


def _own_continuation(run: Run, count: int) -> tuple[int, ...]:
    """Return the greedy next tokens; the end-of-text token is one like the others."""
    decoder, ids = run.model.decoder, run.source.tensor(run.model.device)
    with run.model.lock, torch.no_grad():
        cache = decoder.expand(decoder.prefill(ids[:, :-1]), 1, count + 1)
        batch = Batch(decoder.step, decoder.keep, cache, torch.ones(1))
        (text,) = decode(
            batch,
            batch.run(ids[:, -1:]),
            max_new_tokens=count,
            eos=(),
            seeds=[None],
            text_of=run.model.tokenizer.decode,
        )
    return text.token_ids


def _follow_batch(
    model: LanguageModel, rows: Sequence[Row], continuation: Sequence[int], readout: Readout
) -> Float[Tensor, "rows steps numbers"]:
    first = _shared_tokens(rows)
    ids = torch.tensor([row.ids for row in rows], device=model.device)
    seen: list[Tensor] = []
    with model.lock, torch.no_grad():
        room = ids.shape[1] - first + len(continuation)
        cache = model.decoder.expand(model.decoder.prefill(ids[:1, :first]), len(rows), room)
        with model.hooks(_hooks(model, rows, first)):
            logits = model.decoder.step(ids[:, first:], cache)
        for step, token in enumerate(continuation):
            seen.append(readout(logits.float().log_softmax(dim=-1), step).cpu())
            if step + 1 < len(continuation):
                tokens = torch.full((len(rows), 1), token, device=model.device)
                logits = model.decoder.step(tokens, cache)
    return torch.stack(seen, dim=1)


def _shared_tokens(rows: Sequence[Row]) -> int:
    """Return how many tokens come before the first difference or write, at most all but one."""
    columns = list(zip(*(row.ids for row in rows), strict=True))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    written = [site.position for row in rows for site in row.writes]
    return min([*differing, *written, len(columns) - 1])


def _hooks(model: LanguageModel, rows: Sequence[Row], first: int) -> list[tuple[str, Hook]]:
    """Return the hooks that write every row's vectors; tokens start at position `first`."""
    places: dict[tuple[HookKind, int], list[tuple[int, int, Tensor]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for site, vector in row.writes.items():
            places[site.kind, site.layer].append((number, site.position - first, vector))
    hooks: list[tuple[str, Hook]] = []
    # In the order in which a block computes: where two writes of a row meet, the later one holds.
    for kind, layer in sorted(places, key=lambda place: KINDS.index(place[0])):
        numbers, positions, vectors = zip(*places[kind, layer], strict=True)
        at = (torch.tensor(numbers), torch.tensor(positions))
        new = cast_for(model, torch.stack(vectors), "replacement")
        hooks += write_hooks(kind, layer, at, new)
    return hooks
