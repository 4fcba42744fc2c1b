"""Run a prompt with some of its own activations replaced, many variants in one batch.

1. A `Row` is one variant: the prompt's tokens, and the vectors to write while they are read.
2. What the rows of a batch have in common, the tokens before the first difference or write, is run
   once; its keys and values are copied (as for target prompts, `patching`).
3. The rest is run with one hook per *distinct* hook point, which writes every row's vector at that
   row's position. The hooks are on the model during this step alone.
4. A given continuation is fed token by token; what each step would say goes to a function that
   keeps the few numbers that matter.

`resid_mid` is written through the attention: attn_out := v − resid_pre. A hook at its own place is
not enough, because a `TransformerBridge` hands what such a hook returns to the MLP alone and goes
on adding to the old residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.engine.decoding import Batch, decode
from superscopes_tl.engine.memory import default_batch_size
from superscopes_tl.engine.patch import cast_for
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import (
    KINDS,
    Hook,
    LanguageModel,
    Site,
    TokenizedText,
    hook_name,
    tokenize,
)


@dataclass(frozen=True, eq=False)
class Run:
    """A source prompt in a model; like a `SweepPlan` it has the attributes `model`, `source`."""

    model: LanguageModel
    source: TokenizedText
    chat: bool = False

    @classmethod
    def of(cls, model: LanguageModel, prompt: str, *, chat: bool = False) -> Run:
        """Return the run of a prompt, in the model's chat template if that is asked for.

        Raises:
            ValueError, TypeError: a bad prompt, or a model without a chat template.
        """
        return cls(model, tokenize(model, prompt, chat=chat), chat)


@dataclass(frozen=True, eq=False)
class Row:
    """One variant of a run.

    Attributes:
        ids: the tokens, the BOS included; as many in every row of a call.
        writes: the vector to write at each site, in float32; nothing for a clean run.
    """

    ids: tuple[int, ...]
    writes: Mapping[Site, Float[Tensor, " d_model"]] = field(default_factory=dict)


Look = Callable[[Float[Tensor, "rows vocab"], int], Float[Tensor, "rows numbers"]]
"""Keeps what matters of the log-probabilities (nats, float32) at one step of a continuation."""


def follow(
    model: LanguageModel,
    rows: Sequence[Row],
    continuation: Sequence[int],
    look: Look,
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "rows steps numbers"]:
    """Return what `look` keeps of each row at each token of the continuation.

    Args:
        model: from `load_model`.
        rows: the variants.
        continuation: at least one token id; step k says what is expected in place of token k
            behind the tokens before it.
        look: what to keep of a step.
        batch_size: rows per batch; chosen by memory unless given.

    Raises:
        ValueError: a vector that overflows the model's number type.
    """
    length = len(rows[0].ids) + len(continuation)
    size = default_batch_size(model, length)
    if batch_size is not None:
        size = check_count("batch_size", batch_size, least=1, fix="leave it out")
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return torch.cat([_follow_batch(model, batch, continuation, look) for batch in batches])


def continuation_ids(run: Run, continuation: str | int) -> tuple[int, ...]:
    """Return the tokens that the model is asked for behind the source prompt.

    Args:
        run: the source prompt in its model.
        continuation: so many tokens of the model's own, or a text that goes on behind the prompt.

    Raises:
        ValueError, TypeError: neither, or no room for it.
    """
    model, source = run.model, run.source
    if not isinstance(continuation, str):
        count = check_count(
            "continuation", continuation, least=1, fix="pass a count of tokens, or a text"
        )
        tokenize(model, source.text, room=count, chat=run.chat)
        return _own_continuation(run, count)
    # In one piece with the prompt: what a tokenizer makes of a text depends on what is before it.
    text, answer = (source.text, continuation) if run.chat else (source.text + continuation, "")
    whole = tokenize(model, text, argument="continuation", chat=run.chat, answer=answer)
    if whole.ids[: len(source)] != source.ids or len(whole) == len(source):
        raise bad_value(
            "continuation",
            f"a text that goes on behind the tokens {source.numbered()}",
            continuation,
            "begin it where a new token begins, with a space or a mark such as ':'",
        )
    return whole.ids[len(source) :]


def _own_continuation(run: Run, count: int) -> tuple[int, ...]:
    """Return the likeliest next tokens; the token that ends a text is one like the others."""
    decoder, ids = run.model.decoder, run.source.tensor(run.model.device)
    with run.model.lock, torch.no_grad():
        cache = decoder.expand(decoder.prefill(ids[:, :-1]), 1, count + 1)
        batch = Batch(decoder.step, decoder.keep, cache, torch.ones(1))
        written = decode(batch, batch.run(ids[:, -1:]), max_new_tokens=count, eos=(), seeds=[None])
    return tuple(written.ids[0].tolist())


def _follow_batch(
    model: LanguageModel, rows: Sequence[Row], continuation: Sequence[int], look: Look
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
            seen.append(look(logits.float().log_softmax(dim=-1), step).cpu())
            if step + 1 < len(continuation):
                written = torch.full((len(rows), 1), token, device=model.device)
                logits = model.decoder.step(written, cache)
    return torch.stack(seen, dim=1)


def _shared_tokens(rows: Sequence[Row]) -> int:
    """Return how many tokens come before the first difference or write, at most all but one."""
    columns = list(zip(*(row.ids for row in rows), strict=True))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    written = [site.position for row in rows for site in row.writes]
    return min([*differing, *written, len(columns) - 1])


def _hooks(model: LanguageModel, rows: Sequence[Row], first: int) -> list[tuple[str, Hook]]:
    """Return what writes every row's vectors into tokens that start at position `first`."""
    places: dict[Any, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for site, vector in row.writes.items():
            places[site.kind, site.layer].append((number, site.position - first, vector))
    hooks: list[tuple[str, Hook]] = []
    # In the order in which a block computes: where two writes of a row meet, the later one holds.
    for kind, layer in sorted(places, key=lambda place: KINDS.index(place[0])):
        numbers, positions, vectors = zip(*places[kind, layer], strict=True)
        at = (torch.tensor(numbers), torch.tensor(positions))
        new = cast_for(model, torch.stack(vectors), "replacement")
        if kind == "resid_mid":
            hooks += _middle_writers(layer, at, new)
        else:
            hooks.append((hook_name(kind, layer), _writer(at, new)))
    return hooks


def _writer(
    at: tuple[Int[Tensor, " writes"], Int[Tensor, " writes"]],
    vectors: Float[Tensor, "writes d_model"],
    before: list[Tensor] | None = None,
) -> Hook:
    """Return what writes the vectors, or what is missing from `before` to them."""

    def write(
        activation: Float[Tensor, "rows pos d_model"], hook: Any
    ) -> Float[Tensor, "rows pos d_model"]:
        written = activation.clone()  # an edit in place would reach other users of the tensor
        written[at] = vectors if before is None else vectors - before.pop()
        return written

    return write


def _middle_writers(
    layer: int,
    at: tuple[Int[Tensor, " writes"], Int[Tensor, " writes"]],
    vectors: Float[Tensor, "writes d_model"],
) -> list[tuple[str, Hook]]:
    """Return the hooks after which the residual stream between attention and MLP is `vectors`."""
    before: list[Tensor] = []

    def remember(activation: Float[Tensor, "rows pos d_model"], hook: Any) -> None:
        before.append(activation[at])

    return [
        (hook_name("resid_pre", layer), remember),
        (hook_name("attn_out", layer), _writer(at, vectors, before)),
    ]
