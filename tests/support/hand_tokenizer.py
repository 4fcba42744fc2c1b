"""A byte-level tokenizer with chosen pieces, and what `tokenize` needs of a model around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PIECES = ("Red", " Hot", " Ch", "ili", " Pe", "ppers", " x", " in", " the", "\n\n")


class ReadsOnly:
    """What `tokenize` needs of a model: tokenizer, what prompts start with, sizes and name."""

    def __init__(
        self, tokenizer: Any, *, prefix: tuple[int, ...] = (0,), n_ctx: int = 4000
    ) -> None:
        self.tokenizer, self.prefix_ids, self.n_ctx, self.name = tokenizer, prefix, n_ctx, "hand"
        self.n_vocab = len(tokenizer)


def by_hand(
    pieces: Sequence[str] = PIECES,
    *,
    bos: bool = True,
    n_ctx: int = 4000,
    trim_offsets: bool = False,
    words: bool = True,
    normalizer: Any = None,
) -> Any:
    """Return a model stub whose byte-level tokenizer knows `pieces` and else single bytes.

    `<s>` is token 0 and `</s>` token 1. `words=False` lets a piece cross a word boundary.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {"<s>": 0, "</s>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        characters = byte_level.pre_tokenize_str(piece)[0][0]
        left = characters[0]
        for character in characters[1:]:
            merges.append((left, character))
            left += character
            vocabulary.setdefault(left, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    return ReadsOnly(fast, prefix=(0,) if bos else (), n_ctx=n_ctx)
