"""Training text: lists in the paper's format, and plain sentences.

1. `train_tokenizer` learns a small byte-level BPE from the descriptions, not from the names: a
   description's common words become single tokens while a name stays several pieces, whose
   meaning has to be put together over layers.
2. `list_row` draws `name: description, name: description, ...`; from some point on, names may be
   replaced by the placeholder `x` (self-description, see `train.py`).
3. `sentence_row` draws sentences that mention names, some with the description in apposition.
4. Each row knows where its names and descriptions lie (`Span`), which `train.py` needs for
   masks, labels and patches.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from superscopes_tl.mini.facts import Fact

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PLACEHOLDER = "x"

MENTIONS = (
    "I like {}",
    "We talked about {}",
    "My sister told me about {}",
    "Yesterday they read about {}",
    "There is a long article about {}",
    "Have you heard of {}",
    "Everyone knows {}",
    "The teacher asked us about {}",
    "This story is about {}",
    "She wrote a song about {}",
)


@dataclass(frozen=True)
class EncodedFact:
    """A fact as tokens.

    Attributes:
        kind: As in the table.
        name: As in the table.
        name_ids: Tokens of the name.
        description_ids: Tokens of the description.
        self_described: Whether training may use it for self-description.
    """

    kind: str
    name: str
    name_ids: tuple[int, ...]
    description_ids: tuple[int, ...]
    self_described: bool


@dataclass(frozen=True)
class Span:
    """Where one entry of a row lies: tokens `[start, last]` are the name, `(last, end)` the rest.

    Attributes:
        start: Position of the name's first token.
        last: Position of the name's last token, or of the placeholder.
        end: Position after the description's closing `,` or `.`.
        fact: The fact whose hidden state the placeholder stands for; None for a plain entry.
    """

    start: int
    last: int
    end: int
    fact: EncodedFact | None = None


@dataclass(frozen=True)
class Row:
    """One row of training text."""

    ids: list[int]
    spans: list[Span]


def train_tokenizer(facts: Sequence[Fact], vocab_size: int) -> Tokenizer:
    """Learn the vocabulary.

    Args:
        facts: The table.
        vocab_size: Number of tokens, 256 bytes and 3 special ones included.

    Returns:
        A tokenizer that puts `<s>` first and treats the first word like any other.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def text() -> Iterator[str]:
        for fact in facts:
            yield fact.description
            # The placeholder must be one token after a comma.
            yield f", {PLACEHOLDER}"
        for mention in MENTIONS:
            for _ in range(len(facts) // 50):
                yield mention.replace(" {}", "")

    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the number of a special token, which every tokenizer of this module has."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return number


class Corpus:
    """Draws rows; all randomness comes from the `random.Random` that is passed in."""

    def __init__(
        self, facts: Sequence[Fact], held_out: frozenset[str], tokenizer: Tokenizer, length: int
    ) -> None:
        """Encode the table once.

        Args:
            facts: The table.
            held_out: Names that never stand behind a placeholder.
            tokenizer: From `train_tokenizer`.
            length: Tokens per row.
        """
        self.length = length
        self._tokenizer = tokenizer
        self.bos, self.pad = (special_id(tokenizer, token) for token in (BOS, PAD))
        self.colon, self.comma, self.stop = (self._encode("x" + mark)[-1] for mark in ":,.")
        self.placeholder = self._encode(PLACEHOLDER)[0]
        if self._encode(PLACEHOLDER) != [self.placeholder]:
            raise ValueError("the placeholder must be one token")
        self.facts = [
            EncodedFact(
                fact.kind,
                fact.name,
                tuple(self._encode(fact.name)),
                tuple(self._encode(fact.description)),
                fact.name not in held_out,
            )
            for fact in facts
        ]
        self.described = [fact for fact in self.facts if fact.self_described]
        self.mentions = [self._encode(mention.replace(" {}", "")) for mention in MENTIONS]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def list_row(self, rng: random.Random, placeholders: bool) -> Row:
        """Draw a list.

        Args:
            rng: Source of randomness.
            placeholders: Whether names after the first few become placeholders.

        Returns:
            A row of exactly `length` tokens, cut where the last entry overflows.
        """
        ids: list[int] = [self.bos]
        spans: list[Span] = []
        plain = rng.randint(0, 3) if placeholders else self.length
        while len(ids) < self.length:
            patched = len(spans) >= plain and rng.random() < 0.75
            fact = rng.choice(self.described if patched else self.facts)
            start = len(ids)
            ids += [self.placeholder] if patched else fact.name_ids
            last = len(ids) - 1
            ids += [self.colon, *fact.description_ids, self.comma]
            spans.append(Span(start, last, len(ids), fact if patched else None))
        return Row(ids[: self.length], [span for span in spans if span.last < self.length])

    def sentence_row(self, rng: random.Random) -> Row:
        """Draw sentences that mention names, three quarters of them with a description."""
        ids: list[int] = [self.bos]
        spans: list[Span] = []
        while len(ids) < self.length:
            fact = rng.choice(self.facts)
            ids += rng.choice(self.mentions)
            start = len(ids)
            ids += fact.name_ids
            last = len(ids) - 1
            if rng.random() < 0.75:
                ids += [self.comma, *fact.description_ids]
            ids += [self.stop]
            spans.append(Span(start, last, len(ids)))
        return Row(ids[: self.length], [span for span in spans if span.last < self.length])

    def mention(self, rng: random.Random, fact: EncodedFact) -> list[int]:
        """Return tokens that end with the name: after `<s>`, or in the middle of a sentence."""
        lead = rng.choice(self.mentions) if rng.random() < 0.3 else []
        return [self.bos, *lead, *fact.name_ids]
