"""Text as the tokens that a model really sees.

1. A text is tokenised once, without the tokenizer's own special tokens; what the model wants in
   front, mostly the beginning-of-sequence token (BOS), is then put there. From here on only token
   ids travel: nothing is ever decoded and tokenised again (which is how a second BOS creeps in).
2. Every token keeps the span of characters that it came from, so that a token can be chosen by a
   substring, and the placeholder of a target prompt be found in its context.
3. With `chat`, the text is a user's message in the model's chat template (`chat`), and the whole is
   tokenised at once. The template writes its own special tokens: no BOS is put in front. Spans are
   still characters of the user's text; a token of the template covers none of them.

Worked example, with a tokenizer that splits "Peppers" in two:

    text      Red Hot Chili Peppers
    tokens    <s> | Red | ·Hot | ·Ch | ili | ·Pe | ppers      (7 tokens; · is a space)
    -1        6, the last token; so is "Peppers", whose last token is where the model forms the
              meaning of the name (paper, section 3.2)
    "Chili"   4
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.model.chat import Framed, check_answer, in_chat
from superscopes_tl.model.language_model import LanguageModel

Position: TypeAlias = int | str
"""One token: its index (negative: from the end of the text) or a substring of the prompt."""

Positions: TypeAlias = Position | slice | Sequence[Position]
"""Tokens of a prompt; `slice(None)` is every token but the BOS or another prefix."""


@dataclass(frozen=True)
class TokenizedText:
    """A text as a model sees it.

    Attributes:
        text: the text; without the chat template, if it stands in one.
        ids: one id per token, the BOS and the template included.
        spans: the characters `[start, end)` of the text that each token covers; empty for the
            prefix and for a template's tokens.
        labels: how to show each token, with visible white space.
        prefix: how many tokens stand in front of all text: a BOS, or what else the tokenizer puts
            there.
        own: the tokens of the text itself: all but that prefix and a template around it.
        joined: tokens of the text that also hold visible characters of a template.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    labels: tuple[str, ...]
    prefix: int
    own: range
    joined: frozenset[int] = frozenset()

    @property
    def has_bos(self) -> bool:
        """Whether a BOS or the like stands in front."""
        return self.prefix > 0

    def __len__(self) -> int:
        return len(self.ids)

    def tensor(self, device: torch.device) -> Int[Tensor, "1 pos"]:
        """Return the ids as a batch of one."""
        return torch.tensor([self.ids], device=device)

    def numbered(self) -> str:
        """Return the tokens with their positions, such as `0 '<s>', 1 '·Red'`."""
        return ", ".join(f"{i} {label!r}" for i, label in enumerate(self.labels))


def tokenize(
    model: LanguageModel,
    text: str,
    *,
    argument: str = "prompt",
    room: int = 0,
    chat: bool = False,
    answer: str = "",
    template: str = "{}",
) -> TokenizedText:
    """Tokenise `text` for `model`.

    Args:
        model: gives the tokenizer, the BOS policy and the context length.
        text: what the model shall read.
        argument: the name of the argument, for error messages.
        room: how many tokens must still fit behind the text.
        chat: whether the text is a user's message in the model's chat template, which goes on
            behind it up to where the model's answer begins.
        answer: with `chat`, how that answer begins.
        template: what stands around the text, with `{}` for the text itself, such as
            `"Tell me about {}"`. Spans and positions are still those of the text.

    Raises:
        TypeError: `text` is no string.
        ValueError: an empty text, one that does not fit into the model's context, `chat` with a
            model that has no chat template or one that changes the text, or `answer` without.
    """
    check_text(text, argument)
    check_answer(answer, chat=chat, argument=argument)
    before, after = template.split("{}")
    message = f"{before}{text}{after}"
    framed = (
        in_chat(model, message, answer=answer, argument=argument)
        if chat
        else Framed(message, 0, len(message))
    )
    framed = framed.within(len(before), len(text))
    ids, spans, labels = _encode(model, framed.whole)
    if not chat:
        missing = _missing_prefix(model.prefix_ids, ids)
        ids, spans = [*missing, *ids], [*[(0, 0)] * len(missing), *spans]
        labels = [*model.tokenizer.convert_ids_to_tokens(missing), *labels]
    _check_vocabulary(model, ids, argument)
    if len(ids) + room > model.n_ctx:
        raise bad_value(
            argument,
            f"at most {model.n_ctx - room} tokens (the context of {model.name}"
            f" is {model.n_ctx}" + (f", {room} are to be generated)" if room else ")"),
            f"{len(ids)} tokens" + (" with the chat template" if chat else ""),
            "shorten the text" + (" or generate fewer tokens" if room else ""),
        )
    prefix = _written_prefix(model, ids) if chat else len(model.prefix_ids)
    found = (text, tuple(ids), _inside(text, framed, spans), tuple(labels), prefix)
    if not chat and template == "{}":
        return TokenizedText(*found, own=range(prefix, len(ids)))
    return TokenizedText(*found, *_in_template(framed, spans, argument))


def _encode(model: LanguageModel, text: str) -> tuple[list[int], list[tuple[int, int]], list[str]]:
    """Return a text's ids, the characters of each token, and how to show it."""
    encoded = model.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = [int(i) for i in encoded["input_ids"]]
    pieces = model.tokenizer.convert_ids_to_tokens(ids)
    spans = [
        _own_span(text, piece, int(a), int(b))
        for piece, (a, b) in zip(pieces, encoded["offset_mapping"], strict=True)
    ]
    return ids, spans, _labels(text, spans)


def _missing_prefix(prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return what of a prefix is still to be put in front of ids that may begin with some of it."""
    there = next(
        n for n in range(len(prefix), -1, -1) if list(prefix[len(prefix) - n :]) == list(ids[:n])
    )
    return list(prefix[: len(prefix) - there])


def _written_prefix(model: LanguageModel, ids: Sequence[int]) -> int:
    """Return how many tokens in front of a chat template are what it, too, begins prompts with."""
    n = len(model.prefix_ids)
    if n and tuple(ids[:n]) == tuple(model.prefix_ids):
        return n
    return int(ids[0] == model.tokenizer.bos_token_id)


def _check_vocabulary(model: LanguageModel, ids: Sequence[int], argument: str) -> None:
    """Raise for a token that the tokenizer knows and the model does not.

    Raises:
        ValueError: its number is past the last embedding.
    """
    unknown = [i for i in ids if i >= model.n_vocab]
    if unknown:
        token = model.tokenizer.convert_ids_to_tokens(unknown[0])
        raise bad_value(
            argument,
            f"tokens that {model.name} has an embedding for, which are 0 to {model.n_vocab - 1}",
            f"{token!r}, token {unknown[0]}",
            "leave it out, or load a model whose embeddings were resized to the tokenizer's "
            "length and trained",
        )


def _inside(
    text: str, framed: Framed, spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Return the characters of `text` that tokens of the whole cover: none for a template's."""
    first, last = framed.skipped, framed.skipped + framed.end - framed.start
    shift = first - framed.start
    return tuple(
        (min(max(a + shift, first), last), min(max(b + shift, first), last)) for a, b in spans
    )


def _in_template(
    framed: Framed, spans: Sequence[tuple[int, int]], argument: str
) -> tuple[range, frozenset[int]]:
    """Return which tokens are the text's own, and which of them hold some of the template too."""
    start, end = framed.start, framed.end
    mine = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    if not mine:
        raise bad_value(
            argument,
            "a text that takes at least one token",
            framed.whole[start:end],
            "write the prompt whose activations you want to read",
        )
    joined = [
        i for i in mine
        if (framed.whole[spans[i][0] : start] + framed.whole[end : spans[i][1]]).strip()
    ]  # fmt: skip
    return range(mine[0], mine[-1] + 1), frozenset(joined)


def check_template(template: object) -> None:
    """Raise unless a source template has one place for the source prompt.

    Raises:
        ValueError: it has none, or several.
    """
    if not isinstance(template, str) or template.count("{}") != 1:
        raise bad_value(
            "source_template",
            "a text with one {} in it, where the source prompt goes",
            template,
            "source_template='Tell me about {}', for example",
        )


def check_text(text: str, argument: str) -> None:
    """Raise unless `text` is a string with something in it that a tokenizer can take.

    Raises:
        TypeError: no string.
        ValueError: nothing visible, or half a character.
    """
    if not isinstance(text, str):
        raise bad_type(
            argument, "a string", text,
            "pass the text itself" + "; evaluate(model, prompts) reads several"
            * (argument == "prompt"),
        )  # fmt: skip
    if not text.strip():
        raise bad_value(
            argument,
            "a text with at least one visible character",
            text,
            "write the prompt whose activations you want to read",
        )
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise bad_value(
            argument,
            "a text of whole characters",
            text.encode("ascii", "backslashreplace").decode(),
            "remove the lone surrogates, the halves of characters that were cut in two",
        )


def _own_span(text: str, piece: str, start: int, end: int) -> tuple[int, int]:
    """Return the characters of a token, none for a space that the tokenizer put in by itself.

    Some tokenizers put a space in front of a text; where it becomes a token of its own, they
    count it to the first character.
    """
    is_space = not piece.strip("Ġ▁ ")
    return (start, start) if is_space and text[start:end].strip() else (start, end)


def resolve_positions(tokens: TokenizedText, positions: Positions) -> tuple[int, ...]:
    """Return the chosen token positions, counted from 0, without repeats.

    Args:
        tokens: the source prompt.
        positions: an index, a substring (its last token is meant), a slice, or a sequence of
            indices and substrings. Indices count every token from 0; negative ones count from the
            end of the text, so that -1 is its last token although a chat template goes on behind
            it. A slice leaves out what is not the text's own: a chat template, and the BOS, whose
            norm dwarfs every other token's (where a model has no BOS, the first word takes its
            part and is kept).

    Raises:
        ValueError: out of range; a substring that is missing or found more than once.
        TypeError: anything else.
    """
    if isinstance(positions, slice):
        chosen = [p for p in range(tokens.own.stop)[positions] if p in tokens.own]
    elif isinstance(positions, Mapping):
        raise _position_type_error(positions)
    elif isinstance(positions, str) or not isinstance(positions, Iterable):
        chosen = [_resolve(tokens, positions)]
    else:
        chosen = [_resolve(tokens, p) for p in positions]
    if not chosen:
        raise bad_value(
            "positions",
            "at least one token",
            positions,
            f"choose from {tokens.numbered()}; slice(None) is every token but the BOS",
        )
    return tuple(dict.fromkeys(chosen))


def named_positions(tokens: TokenizedText, positions: Positions) -> dict[int, str]:
    """Return what each chosen position is about: the text that a reading there can know.

    That is the substring that chose it, else the text up to the token.

    Raises:
        ValueError, TypeError: as `resolve_positions`.
    """
    found = {p: tokens.text[: tokens.spans[p][1]] for p in resolve_positions(tokens, positions)}
    several = [positions] if isinstance(positions, str) else positions
    if not isinstance(several, slice) and isinstance(several, Iterable):
        found |= {_resolve(tokens, part): part for part in several if isinstance(part, str)}
    return found


def _position_type_error(got: object) -> TypeError:
    return bad_type(
        "positions",
        "an index, a substring, a slice or a sequence of indices and substrings",
        got,
        "pass for example positions=-1 or positions='Peppers'",
    )


def _resolve(tokens: TokenizedText, position: Position) -> int:
    if isinstance(position, str):
        return _resolve_substring(tokens, position)
    if isinstance(position, bool) or not hasattr(position, "__index__"):
        raise _position_type_error(position)
    end = tokens.own.stop
    if not -end <= position < len(tokens):
        raise bad_value(
            "positions",
            f"an index from {-end} to {len(tokens) - 1}",
            int(position),
            f"choose from {tokens.numbered()}; slice(None) is every token but the BOS",
        )
    return int(position) + (end if position < 0 else 0)


def _resolve_substring(tokens: TokenizedText, substring: str) -> int:
    starts = _occurrences(tokens.text, substring) if substring.strip() else []
    if not starts:
        raise bad_value(
            "positions",
            f"a substring of {tokens.text!r}",
            substring,
            f"choose from {tokens.numbered()}; slice(None) is every token but the BOS",
        )
    last = [covering(tokens, start, start + len(substring))[-1] for start in starts]
    if len(starts) > 1:
        candidates = ", ".join(
            f"{p} ({tokens.labels[p]!r} at character {start})"
            for p, start in zip(last, starts, strict=True)
        )
        raise bad_value(
            "positions",
            "a substring that occurs once",
            f"{substring!r}, which occurs {len(starts)} times",
            f"give one of the positions {candidates}",
        )
    return last[0]


def _occurrences(text: str, substring: str) -> list[int]:
    return [m.start() for m in re.finditer(f"(?={re.escape(substring)})", text)]


def covering(tokens: TokenizedText, start: int, end: int) -> list[int]:
    """Return the positions of the tokens that cover any of the characters `[start, end)`."""
    return [i for i, (a, b) in enumerate(tokens.spans) if a < end and b > start]


_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def _labels(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return how to show each token.

    A character that takes several tokens (an emoji, say) is shown with a count, `🌶 1/3`.
    """
    labels: list[str] = []
    before = 0
    for index, span in enumerate(spans):
        # Some tokenizers do not count the space in front of a word to its token: show it there.
        gap = text[before : span[0]]
        piece = (gap if gap.isspace() else "") + text[slice(*span)]
        before = max(before, span[1])
        shown = "".join(
            _VISIBLE.get(c, "·" if unicodedata.category(c) == "Zs" else c) for c in piece
        )
        same = [i for i, other in enumerate(spans) if other == span]
        if len(same) > 1:
            shown = f"{shown} {same.index(index) + 1}/{len(same)}"
        labels.append(shown or "∅")
    return labels
