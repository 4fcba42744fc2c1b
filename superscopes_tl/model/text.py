"""Text as the tokens that a model sees, and token positions in it.

1. A text is tokenized once, without special tokens; the model's prefix, usually the
   beginning-of-sequence token (BOS), is prepended. From then on only token ids are passed around:
   decoding and tokenizing again is how a second BOS slips in.
2. Every token keeps its span of characters, so that a token can be chosen by a substring, and the
   placeholder of a target prompt be found in context.
3. With `chat`, the text is a user message in the model's chat template (`chat`), tokenized as a
   whole. The template has its own special tokens, so no prefix is added. Spans still index the
   user's text; tokens of the template have empty ones.

Worked example, with a tokenizer that splits "Peppers" in two:

    text      Red Hot Chili Peppers
    tokens    <s> | Red | ·Hot | ·Ch | ili | ·Pe | ppers      (7 tokens; · is a space)
    -1        6, the last token, where the model forms the meaning of the name (paper, section
              3.2); "Peppers" is the same one
    "Chili"   4
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.model.chat import Framed, check_answer, in_chat
from superscopes_tl.model.language_model import LanguageModel

Position: TypeAlias = int | str
"""One token: its index (negative ones count from the end) or a substring of the prompt."""

Positions: TypeAlias = Position | slice | Sequence[Position]
"""Tokens of a prompt; `slice(None)` is every token except the prefix."""

_PROMPT = "write the prompt whose activations you want to read"
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class TokenizedText:
    """A text as a model sees it.

    Attributes:
        text: the text, without a template around it.
        ids: one id per token, prefix and template included.
        spans: the characters `[start, end)` of `text` that each token covers; empty outside it.
        labels: each token for display, with visible white space.
        prefix: number of tokens before all text: the BOS, or whatever else the tokenizer adds.
        own: the tokens of the text itself, without prefix and template.
        joined: tokens of the text that also contain visible characters of a template.
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
        """Whether a BOS or another prefix comes first."""
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
    """Tokenize `text` for `model`.

    Args:
        model: its tokenizer, prefix and context length apply.
        text: the prompt.
        argument: name of the argument in error messages.
        room: number of tokens that must still fit after the text.
        chat: render the text as a user message in the model's chat template.
        answer: with `chat`, the beginning of the model's answer.
        template: text around the prompt, such as `"Tell me about {}"`. Spans and positions remain
            those of `text`.

    Raises:
        TypeError: `text` is not a string.
        ValueError: an empty text, one that exceeds the context, an `answer` without `chat`, or
            `chat` where the model has no chat template or its template alters the text.
    """
    check_text(text, argument)
    check_answer(answer, chat=chat, argument=argument)
    before, after = template.split("{}")
    message = f"{before}{text}{after}"
    framed = Framed(message, 0, len(message))
    if chat:
        framed = in_chat(model, message, answer=answer, argument=argument)
    framed = framed.within(len(before), len(text))
    ids, spans, labels = _encode(model, framed.whole)
    if not chat:
        missing = _missing_prefix(model.prefix_ids, ids)
        ids, spans = [*missing, *ids], [*[(0, 0)] * len(missing), *spans]
        labels = [*model.tokenizer.convert_ids_to_tokens(missing), *labels]
    _check_vocabulary(model, ids, argument)
    if len(ids) + room > model.n_ctx:
        generated = f" minus {room} to be generated" if room else ""
        expected = f"at most {model.n_ctx - room} tokens (the context of {model.name}{generated})"
        got = f"{len(ids)} tokens" + (" with the chat template" if chat else "")
        fix = "shorten the text" + (" or generate fewer tokens" if room else "")
        raise bad_value(argument, expected, got, fix)
    prefix = _written_prefix(model, ids) if chat else len(model.prefix_ids)
    found = (text, tuple(ids), _inside(text, framed, spans), tuple(labels), prefix)
    if not chat and template == "{}":
        return TokenizedText(*found, own=range(prefix, len(ids)))
    return TokenizedText(*found, *_in_template(framed, spans, argument))


def _encode(model: LanguageModel, text: str) -> tuple[list[int], list[tuple[int, int]], list[str]]:
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
    """Return the part of a prefix that is missing before ids that may start with the rest."""
    n = len(prefix)
    missing = next(m for m in range(n + 1) if list(prefix[m:]) == list(ids[: n - m]))
    return list(prefix[:missing])


def _written_prefix(model: LanguageModel, ids: Sequence[int]) -> int:
    """Return the length of the prefix that a chat template itself starts with."""
    n = len(model.prefix_ids)
    if n and tuple(ids[:n]) == tuple(model.prefix_ids):
        return n
    return int(ids[0] == model.tokenizer.bos_token_id)


def _check_vocabulary(model: LanguageModel, ids: Sequence[int], argument: str) -> None:
    """Raise for a token of the tokenizer that has no embedding in the model."""
    unknown = [i for i in ids if i >= model.n_vocab]
    if unknown:
        got = f"{model.tokenizer.convert_ids_to_tokens(unknown[0])!r}, token {unknown[0]}"
        expected = f"tokens with an embedding in {model.name}, 0 to {model.n_vocab - 1}"
        fix = "leave it out, or load a model whose embeddings were resized and trained with it"
        raise bad_value(argument, expected, got, fix)


def _inside(
    text: str, framed: Framed, spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Convert spans of the framed text to spans of `text`, empty ones for the template."""
    first, last = framed.skipped, framed.skipped + framed.end - framed.start
    shift = first - framed.start
    return tuple(
        (min(max(a + shift, first), last), min(max(b + shift, first), last)) for a, b in spans
    )


def _in_template(
    framed: Framed, spans: Sequence[tuple[int, int]], argument: str
) -> tuple[range, frozenset[int]]:
    """Return the tokens of the text, and which of them also contain some of the template."""
    start, end = framed.start, framed.end
    mine = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    if not mine:
        raise bad_value(argument, "a text of at least one token", framed.whole[start:end], _PROMPT)
    around = {i: framed.whole[spans[i][0] : start] + framed.whole[end : spans[i][1]] for i in mine}
    joined = frozenset(i for i, characters in around.items() if characters.strip())
    return range(mine[0], mine[-1] + 1), joined


def check_template(template: object) -> None:
    """Raise a `ValueError` unless a source template has one `{}`."""
    if not isinstance(template, str) or template.count("{}") != 1:
        fix = "pass for example source_template='Tell me about {}'"
        raise bad_value("source_template", "a string with one {} for the prompt", template, fix)


def check_text(text: object, argument: str) -> None:
    """Raise unless `text` is a visible string that a tokenizer accepts.

    Raises:
        TypeError: not a string.
        ValueError: no visible character, or a lone surrogate.
    """
    if not isinstance(text, str):
        several = "; evaluate(model, prompts) reads several" if argument == "prompt" else ""
        raise bad_type(argument, "a string", text, f"pass the text itself{several}")
    if not text.strip():
        raise bad_value(argument, "a text with a visible character", text, _PROMPT)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        got = text.encode("ascii", "backslashreplace").decode()
        fix = "remove them: they are halves of characters that were cut in two"
        raise bad_value(argument, "text without lone surrogates", got, fix)


def _own_span(text: str, piece: str, start: int, end: int) -> tuple[int, int]:
    """Return a token's span, empty for an inserted space, which tokenizers map to a character."""
    is_space = not piece.strip("Ġ▁ ")
    return (start, start) if is_space and text[start:end].strip() else (start, end)


def resolve_positions(tokens: TokenizedText, positions: Positions) -> tuple[int, ...]:
    """Return the chosen token positions, counted from 0, without duplicates.

    Args:
        tokens: the source prompt.
        positions: an index, a substring (which means its last token), a slice, or a sequence of
            indices and substrings. Indices count all tokens; negative ones count from the end of
            the text, so that -1 is its last token even where a chat template follows. A slice
            excludes a chat template and the BOS, whose norm dwarfs that of every other token. (In
            a model without BOS the first word becomes the attention sink; it is kept.)

    Raises:
        ValueError: out of range, or a substring that does not occur exactly once.
        TypeError: anything else.
    """
    if isinstance(positions, slice):
        chosen = [p for p in range(tokens.own.stop)[positions] if p in tokens.own]
    elif isinstance(positions, str | Mapping) or not isinstance(positions, Iterable):
        chosen = [_resolve(tokens, positions)]  # which refuses a mapping
    else:
        chosen = [_resolve(tokens, p) for p in positions]
    if not chosen:
        raise bad_value("positions", "at least one token", positions, _choices(tokens))
    return tuple(dict.fromkeys(chosen))


def named_positions(tokens: TokenizedText, positions: Positions) -> dict[int, str]:
    """Return for each chosen position the text that a reading there can know.

    That is the substring that chose it, or else the text up to and including the token.
    """
    found = {p: tokens.text[: tokens.spans[p][1]] for p in resolve_positions(tokens, positions)}
    several = [positions] if isinstance(positions, str) else positions
    if not isinstance(several, slice) and isinstance(several, Iterable):
        found |= {_resolve(tokens, part): part for part in several if isinstance(part, str)}
    return found


def _choices(tokens: TokenizedText) -> str:
    return f"choose from {tokens.numbered()}; slice(None) is every token except the BOS"


def _resolve(tokens: TokenizedText, position: Position) -> int:
    if isinstance(position, str):
        return _resolve_substring(tokens, position)
    if isinstance(position, bool) or not hasattr(position, "__index__"):
        expected = "an index, a substring, a slice or a sequence of indices and substrings"
        raise bad_type("positions", expected, position, "pass for example -1 or 'Peppers'")
    end = tokens.own.stop
    if not -end <= position < len(tokens):
        expected = f"an index from {-end} to {len(tokens) - 1}"
        raise bad_value("positions", expected, int(position), _choices(tokens))
    return int(position) + (end if position < 0 else 0)


def _resolve_substring(tokens: TokenizedText, substring: str) -> int:
    found = re.finditer(f"(?={re.escape(substring)})", tokens.text) if substring.strip() else ()
    starts = [match.start() for match in found]
    if not starts:
        raise bad_value("positions", f"a substring of {tokens.text!r}", substring, _choices(tokens))
    last = [covering(tokens, start, start + len(substring))[-1] for start in starts]
    if len(starts) > 1:
        candidates = ", ".join(f"{p} ({tokens.labels[p]!r})" for p in last)
        got = f"{substring!r}, which occurs {len(starts)} times"
        fix = f"pass one of the positions {candidates}"
        raise bad_value("positions", "a substring that occurs once", got, fix)
    return last[0]


def covering(tokens: TokenizedText, start: int, end: int) -> list[int]:
    """Return the positions of all tokens that overlap the characters `[start, end)`."""
    return [i for i, (a, b) in enumerate(tokens.spans) if a < end and b > start]


def _labels(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return each token for display; the tokens that share a character are counted: `🌶 1/3`."""
    sharing: dict[int, list[int]] = {}  # the tokens of each character
    for index, span in enumerate(spans):
        for place in range(*span):
            sharing.setdefault(place, []).append(index)
    labels: list[str] = []
    before = 0
    for index, (start, end) in enumerate(spans):
        # Some tokenizers leave the space before a word out of its token's span.
        gap = text[before:start]
        shown = _visible(gap) if gap.isspace() else ""
        # A byte-level tokenizer may join a part of one character to the next one.
        for several, places in groupby(range(start, end), sharing.__getitem__):
            part = f" {several.index(index) + 1}/{len(several)} " if len(several) > 1 else ""
            shown += _visible("".join(text[place] for place in places)) + part
        before = max(before, end)
        labels.append(shown.removesuffix(" ") or "∅")
    return labels


def _visible(piece: str) -> str:
    """Return a piece of text with signs for white space; of what shows nothing, the code points."""
    kinds = {unicodedata.category(c) for c in piece}
    if kinds and (kinds == {"Cf"} or "\ufe00" <= min(piece) <= max(piece) <= "\ufe0f"):
        return " ".join(f"U+{ord(c):04X}" for c in piece)
    if kinds == {"Mn"}:
        return f"◌{piece}"  # an accent needs something to stand on
    return "".join(_VISIBLE.get(c, "·" if unicodedata.category(c) == "Zs" else c) for c in piece)
