"""Texts as tokens, and tokens chosen by index or substring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from superscopes_tl import LanguageModel
from superscopes_tl.model import TokenizedText, resolve_positions, tokenize
from superscopes_tl.model.text import _labels
from tests.support.hand_tokenizer import by_hand

HAND = by_hand()
PEPPERS = tokenize(HAND, "Red Hot Chili Peppers")


def test_the_worked_example_is_split_as_its_docstring_says() -> None:
    """The name is seven tokens, the BOS included, each with its label and span of characters."""
    assert PEPPERS.labels == ("<s>", "Red", "·Hot", "·Ch", "ili", "·Pe", "ppers")
    assert PEPPERS.spans == ((0, 0), (0, 3), (3, 7), (7, 10), (10, 13), (13, 16), (16, 21))
    assert PEPPERS.has_bos
    assert len(PEPPERS) == 7
    assert PEPPERS.tensor(torch.device("cpu")).tolist() == [list(PEPPERS.ids)]
    assert PEPPERS.numbered().startswith("0 '<s>', 1 'Red', 2 '·Hot', ")


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        pytest.param(-1, (6,), id="last"),
        pytest.param(-7, (0,), id="first-from-the-end"),
        pytest.param(2, (2,), id="index"),
        pytest.param(0, (0,), id="explicit-BOS"),
        pytest.param("Peppers", (6,), id="last-token-of-a-substring"),
        pytest.param("Chili", (4,), id="middle-word"),
        pytest.param("ed", (1,), id="part-of-a-token"),
        pytest.param("Chili Pe", (5,), id="several-words"),
        pytest.param(" Hot ", (3,), id="substring-ending-in-a-space"),
        pytest.param(slice(None), (1, 2, 3, 4, 5, 6), id="slice-leaves-BOS-out"),
        pytest.param(slice(0, 2), (1,), id="slice-from-0-leaves-BOS-out"),
        pytest.param(slice(-2, None), (5, 6), id="slice-from-the-end"),
        pytest.param(slice(None, None, -2), (6, 4, 2), id="slice-backwards"),
        pytest.param([5, 2], (5, 2), id="order-is-kept"),
        pytest.param(["Peppers", -1, 6, "Red"], (6, 1), id="repeats-are-dropped"),
        pytest.param((0, 3), (0, 3), id="sequence-with-BOS"),
        pytest.param(range(3, 1, -1), (3, 2), id="range"),
    ],
)
def test_positions_mean_these_tokens(positions: Any, expected: tuple[int, ...]) -> None:
    """Indices, substrings, slices and sequences choose the expected tokens, in order."""
    assert resolve_positions(PEPPERS, positions) == expected


@pytest.mark.parametrize(
    "positions", [*("Adele", "peppers", "", "  ", "<s>"), *(7, -8, 1000), *([], slice(5, 2))]
)
def test_positions_that_do_not_exist_are_refused(positions: Any) -> None:
    """A missing substring, an index out of range, and an empty choice are errors."""
    with pytest.raises(ValueError, match="^positions:"):
        resolve_positions(PEPPERS, positions)


@pytest.mark.parametrize("positions", [True, 2.5, None, [1.5], [True], {3: 1}, [[1]]])
def test_other_types_of_positions_are_refused(positions: Any) -> None:
    """Booleans, fractions, mappings and nested lists are not token positions."""
    with pytest.raises(TypeError, match="^positions:"):
        resolve_positions(PEPPERS, positions)


@pytest.mark.parametrize(
    ("text", "substring", "candidates"), [("Red Hot Red Hot", "Hot", (2, 5)), ("aaa", "aa", (2, 3))]
)
def test_an_ambiguous_substring_lists_its_candidates(
    text: str, substring: str, candidates: tuple[int, int]
) -> None:
    """A substring that occurs twice, overlaps included, is refused with both positions."""
    tokens = tokenize(HAND, text)
    first, second = (rf"{p} \('{tokens.labels[p]}'" for p in candidates)
    with pytest.raises(ValueError, match=rf"^positions: .* {first}.* {second}"):
        resolve_positions(tokens, substring)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        pytest.param("a b", ("a", "·", "b"), id="space"),
        pytest.param("a  b", ("a", "·", "·", "b"), id="two-spaces"),
        pytest.param("a\nb\tc\rd", ("a", "⏎", "b", "⇥", "c", "␍", "d"), id="line-ends-and-tabs"),
        pytest.param("Red\n\n", ("Red", "⏎⏎"), id="two-newlines-in-a-token"),
        pytest.param("🌶", ("🌶 1/4", "🌶 2/4", "🌶 3/4", "🌶 4/4"), id="emoji"),
        pytest.param(
            "a🌶b🌶",
            ("a", "🌶 1/4", "🌶 2/4", "🌶 3/4", "🌶 4/4", "b", "🌶 1/4", "🌶 2/4", "🌶 3/4", "🌶 4/4"),
            id="emoji-twice",
        ),
        pytest.param("שם", ("ש 1/2", "ש 2/2", "ם 1/2", "ם 2/2"), id="right-to-left"),
        pytest.param("é", ("é 1/2", "é 2/2"), id="accent"),
        pytest.param("a\u00a0b", ("a", "· 1/2", "· 2/2", "b"), id="no-break-space"),
        pytest.param("Red Hot Hot", ("Red", "·Hot", "·Hot"), id="repeated-token"),
        pytest.param("aaa", ("a", "a", "a"), id="repeated-letter"),
    ],
)
def test_labels_make_every_character_visible(text: str, labels: tuple[str, ...]) -> None:
    """White space gets a sign, and the tokens of one character are counted."""
    assert tokenize(HAND, text).labels == ("<s>", *labels)


@pytest.mark.parametrize(
    ("text", "spans", "labels"),
    [
        ("ים", ((0, 2), (1, 2)), ["ים 1/2", "ם 2/2"]),
        (" 👩", ((0, 2), (1, 2), (1, 2)), ["·👩 1/3", "👩 2/3", "👩 3/3"]),
        ("国家", ((0, 1), (0, 2), (1, 2)), ["国 1/2", "国 2/2 家 1/2", "家 2/2"]),
        ("e\u0301", ((0, 2), (0, 2)), ["e\u0301 1/2", "e\u0301 2/2"]),
        ("e\u0301", ((0, 1), (1, 2)), ["e", "◌\u0301"]),
        ("👩\u200d👩", ((0, 1), (1, 2), (2, 3)), ["👩", "U+200D", "👩"]),
        ("👩\u200d👩", ((0, 3),), ["👩\u200d👩"]),
        ("🌶\ufe0f\u202e", ((0, 1), (1, 2), (2, 3)), ["🌶", "U+FE0F", "U+202E"]),
    ],
)
def test_parts_of_characters_and_signs_that_show_nothing_have_a_label(
    text: str, spans: tuple[tuple[int, int], ...], labels: list[str]
) -> None:
    """Tokens of SmolLM2 hold parts of characters, joined to others; a joiner may be a token."""
    assert _labels(text, spans) == labels


def test_trimmed_offsets_change_neither_labels_nor_positions() -> None:
    """GPT-NeoX's tokenizer leaves the space out of the offsets; the token still starts with it."""
    text = tokenize(by_hand(trim_offsets=True), "Red Hot Chili Peppers")
    assert (text.ids, text.labels) == (PEPPERS.ids, PEPPERS.labels)
    for substring, position in (("Red", 1), ("Hot", 2), ("Chili", 4), ("Peppers", 6)):
        assert resolve_positions(text, substring) == (position,)


def test_spans_are_those_of_the_text_before_normalization() -> None:
    """A tokenizer that composes e + accent to é still reports spans of the original text."""
    written = "e\u0301 Red"
    text = tokenize(by_hand(normalizer=normalizers.NFC()), written)
    assert text.text == written
    assert text.ids[1:3] == tokenize(HAND, "é").ids[1:3]
    position = resolve_positions(text, "Red")[0]
    start, end = text.spans[position]
    assert written[start:end] == "Red"


@pytest.mark.parametrize(
    ("prefix", "text", "labels"),
    [
        ((0,), "Red", ("<s>", "Red")),
        ((0,), "<s>Red", ("<s>", "Red")),
        ((0,), "<s>", ("<s>",)),
        ((0,), "Red<s>", ("<s>", "Red", "<s>")),
        ((), "Red Hot", ("Red", "·Hot")),
        ((1, 0), "Red", ("</s>", "<s>", "Red")),
        ((1, 0), "<s>Red", ("</s>", "<s>", "Red")),
        ((1, 0), "</s><s>Red", ("</s>", "<s>", "Red")),
        ((1, 0), "</s>Red", ("</s>", "<s>", "</s>", "Red")),
    ],
)
def test_a_prompt_starts_with_its_prefix_once(
    prefix: tuple[int, ...], text: str, labels: tuple[str, ...]
) -> None:
    """What of the prefix the text already starts with is not repeated; a slice excludes it."""
    hand = by_hand()
    hand.prefix_ids = prefix
    tokens = tokenize(hand, text)
    assert tokens.labels == labels
    own = range(len(prefix), len(labels))
    assert (tokens.prefix, tokens.own, tokens.has_bos) == (len(prefix), own, bool(prefix))
    if own:
        assert resolve_positions(tokens, slice(None)) == tuple(own)


def test_a_token_without_an_embedding_is_refused() -> None:
    """A tokenizer may have tokens that the model's embedding was not resized for."""
    hand = by_hand()
    hand.tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert hand.n_vocab == len(hand.tokenizer) - 1
    with pytest.raises(ValueError, match="^prompt:"):
        tokenize(hand, "Red <new> Hot")


def test_a_text_of_exactly_the_context_fits_and_one_token_more_does_not() -> None:
    """BOS and requested room count towards the context."""
    model = by_hand(n_ctx=8)
    assert len(tokenize(model, "a" * 7)) == 8
    assert len(tokenize(model, "a" * 4, room=3)) == 5
    for length, room in ((8, 0), (5, 3)):
        with pytest.raises(ValueError, match="^prompt:"):
            tokenize(model, "a" * length, room=room)


VARIANTS = {
    "plain": HAND,
    "no-bos": by_hand(bos=False),
    "trimmed": by_hand(trim_offsets=True),
    "nfc": by_hand(normalizer=normalizers.NFC()),
}


def check_invariants(model: Any, text: str) -> TokenizedText:
    """Assert what holds for every text and return its tokens."""
    tokens = tokenize(model, text)
    assert len(tokens.ids) == len(tokens.spans) == len(tokens.labels) == len(tokens) > 0
    assert all(0 <= start <= end <= len(text) for start, end in tokens.spans)
    assert list(tokens.spans) == sorted(tokens.spans)
    assert all(tokens.labels)
    # Every visible character is covered by the characters of some token.
    covered = {i for start, end in tokens.spans for i in range(start, end)}
    assert covered >= {i for i, character in enumerate(text) if not character.isspace()}
    assert tokens.numbered().startswith(f"0 {tokens.labels[0]!r}")
    assert f"{len(tokens) - 1} {tokens.labels[-1]!r}" in tokens.numbered()
    assert resolve_positions(tokens, range(len(tokens))) == tuple(range(len(tokens)))
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
@given(text=st.text(min_size=1, max_size=60).filter(str.strip))
@example(text="🌶️ Red\u200d\n\t")
@example(text="שלום עולם")
@example(text="<s> Red </s>")
@example(text="\x00\x1f a")
def test_every_text_has_tokens_that_cover_it(variant: str, text: str) -> None:
    """Any text at all has ids, one span inside the text and one label for each."""
    check_invariants(VARIANTS[variant], text)


@given(text=st.text(min_size=1, max_size=60).filter(str.strip))
def test_byte_level_spans_slice_the_text_without_gaps(text: str) -> None:
    """The distinct spans of a byte-level tokenizer, joined, are the text itself."""
    tokens = tokenize(VARIANTS["no-bos"], text)
    distinct = list(dict.fromkeys(tokens.spans))
    assert "".join(text[start:end] for start, end in distinct) == text


@given(text=st.text(min_size=1, max_size=40).filter(str.strip))
def test_every_text_starts_with_the_bos_once(llama: LanguageModel, text: str) -> None:
    """A tokenizer that adds a BOS itself still leads to one, whatever the text."""
    assert llama.tokenizer("Red")["input_ids"][0] == llama.bos_token_id
    tokens = check_invariants(llama, text)
    assert tokens.ids[0] == llama.bos_token_id
    assert tokens.ids[:2] != (llama.bos_token_id, llama.bos_token_id) or text.startswith("<s>")


@given(
    words=st.lists(st.text("abcαβ🌶ש", min_size=1, max_size=5), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_a_unique_word_is_found_at_the_token_of_its_last_character(
    words: list[str], data: st.DataObject
) -> None:
    """A substring that occurs once names a token that covers its last character."""
    text = " ".join(f"{i}{word}" for i, word in enumerate(words))
    index = data.draw(st.integers(0, len(words) - 1))
    word = f"{index}{words[index]}"
    tokens = tokenize(HAND, text)
    (position,) = resolve_positions(tokens, word)
    start, end = tokens.spans[position]
    last = text.index(word) + len(word) - 1
    assert start <= last < end
    assert position + 1 == len(tokens) or tokens.spans[position + 1][0] > last
