"""Texts as tokens, tokens chosen by index or substring, and the placeholders of target prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from superscopes_tl import DESCRIPTION_PROMPT, LanguageModel, TargetPrompt
from superscopes_tl.engine import IDENTITY_PROMPT, crop_description
from superscopes_tl.errors import PlaceholderError
from superscopes_tl.model import TokenizedText, resolve_positions, tokenize

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


HAND = by_hand()
PEPPERS = tokenize(HAND, "Red Hot Chili Peppers")


def test_the_worked_example_is_split_as_its_docstring_says() -> None:
    """The name takes seven tokens, the BOS included, and each knows its characters."""
    assert PEPPERS.labels == ("<s>", "Red", "·Hot", "·Ch", "ili", "·Pe", "ppers")
    assert PEPPERS.spans == ((0, 0), (0, 3), (3, 7), (7, 10), (10, 13), (13, 16), (16, 21))
    assert PEPPERS.has_bos
    assert len(PEPPERS) == 7


def test_the_tensor_holds_the_ids_as_one_row() -> None:
    """A model gets a batch of one with exactly the ids of the text."""
    tensor = PEPPERS.tensor(torch.device("cpu"))
    assert tensor.tolist() == [list(PEPPERS.ids)]
    assert tensor.dtype == torch.int64


def test_numbered_lists_every_token_with_its_position() -> None:
    """The list that errors show has each position and its visible label."""
    text = tokenize(HAND, "Red Hot")
    assert text.numbered() == "0 '<s>', 1 'Red', 2 '·Hot'"


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
    """Indices, substrings, slices and sequences name the tokens that they seem to name."""
    assert resolve_positions(PEPPERS, positions) == expected


def test_a_slice_of_a_text_without_bos_takes_every_token() -> None:
    """Without a BOS token 0 is an ordinary token, so a slice keeps it."""
    text = tokenize(by_hand(bos=False), "Red Hot")
    assert not text.has_bos
    assert text.labels == ("Red", "·Hot")
    assert resolve_positions(text, slice(None)) == (0, 1)


def test_a_slice_leaves_out_a_bos_that_the_text_itself_contains() -> None:
    """A typed `<s>` is the same token as one put in front, and no more worth reading."""
    text = tokenize(HAND, "<s>Red Hot")
    assert resolve_positions(text, slice(None)) == (1, 2)


def test_an_ambiguous_substring_lists_its_candidates() -> None:
    """A substring that occurs twice is refused with both positions, labels and characters."""
    text = tokenize(HAND, "Red Hot Red Hot")
    assert text.labels == ("<s>", "Red", "·Hot", "·", "Red", "·Hot")
    with pytest.raises(ValueError, match=r"^positions: .* 2 \('·Hot'.* 5 \('·Hot'"):
        resolve_positions(text, "Hot")
    assert resolve_positions(text, [2, 5]) == (2, 5)


def test_overlapping_occurrences_are_ambiguous_too() -> None:
    """`aa` occurs twice in `aaa`, although the occurrences share a character."""
    text = tokenize(HAND, "aaa")
    with pytest.raises(ValueError, match=r"occurs 2 times.* 2 \('a'.* 3 \('a'"):
        resolve_positions(text, "aa")


@pytest.mark.parametrize("substring", ["Adele", "peppers", "", "  ", "<s>"])
def test_a_substring_that_is_not_there_is_refused(substring: str) -> None:
    """A missing, blank or differently spelt substring is an error that lists the tokens."""
    with pytest.raises(ValueError, match="^positions:"):
        resolve_positions(PEPPERS, substring)


@pytest.mark.parametrize("index", [7, -8, 1000])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    """An index beyond the tokens names the legal range and what came."""
    with pytest.raises(ValueError, match="^positions:"):
        resolve_positions(PEPPERS, index)


@pytest.mark.parametrize("positions", [[], "", slice(5, 2)])
def test_no_position_at_all_is_refused(positions: Any) -> None:
    """An empty choice is an error instead of an empty sweep."""
    with pytest.raises(ValueError, match="^positions:"):
        resolve_positions(PEPPERS, positions)


@pytest.mark.parametrize("positions", [True, 2.5, None, [1.5], [True], {3: 1}, [[1]]])
def test_what_is_no_position_is_a_type_error(positions: Any) -> None:
    """Truth values, fractions and nested lists are no token positions."""
    with pytest.raises(TypeError, match="^positions:"):
        resolve_positions(PEPPERS, positions)


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
    """White space gets a sign, and a character of several tokens a count."""
    assert tokenize(HAND, text).labels == ("<s>", *labels)


def test_labels_show_spaces_where_the_tokenizer_trims_its_offsets() -> None:
    """GPT-NeoX's tokenizer leaves the space out of the offsets; the token still starts with it."""
    text = tokenize(by_hand(trim_offsets=True), "Red Hot")
    assert text.labels == ("<s>", "Red", "·Hot")


def test_offsets_that_are_trimmed_name_the_same_tokens() -> None:
    """Substrings find the same positions whether or not offsets include the space."""
    text = tokenize(by_hand(trim_offsets=True), "Red Hot Chili Peppers")
    assert text.ids == PEPPERS.ids
    for substring, position in (("Red", 1), ("Hot", 2), ("Chili", 4), ("Peppers", 6)):
        assert resolve_positions(text, substring) == (position,)


def test_offsets_belong_to_the_text_as_written_when_the_tokenizer_normalises() -> None:
    """A tokenizer that composes e + accent to é still reports spans of the original text."""
    written = "e\u0301 Red"
    text = tokenize(by_hand(normalizer=normalizers.NFC()), written)
    assert text.text == written
    assert text.ids[1:3] == tokenize(HAND, "é").ids[1:3]
    position = resolve_positions(text, "Red")[0]
    start, end = text.spans[position]
    assert written[start:end] == "Red"


def test_a_right_to_left_word_is_found_by_its_characters() -> None:
    """A substring of Hebrew text names the last token of its last character."""
    text = tokenize(HAND, "שם Red")
    assert resolve_positions(text, "שם") == (4,)
    assert resolve_positions(text, "ש") == (2,)
    assert resolve_positions(text, "Red") == (6,)


@pytest.mark.parametrize(
    ("text", "labels", "has_bos"),
    [
        ("Red", ("<s>", "Red"), True),
        ("<s>Red", ("<s>", "Red"), True),
        ("<s>", ("<s>",), True),
        ("Red<s>", ("<s>", "Red", "<s>"), True),
    ],
)
def test_a_prompt_begins_with_bos_exactly_once(
    text: str, labels: tuple[str, ...], has_bos: bool
) -> None:
    """A BOS is put in front unless the text already begins with it."""
    tokens = tokenize(HAND, text)
    assert tokens.labels == labels
    assert tokens.ids[0] == 0
    assert tokens.ids[:2] != (0, 0)
    assert tokens.has_bos is has_bos


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("Red", ("</s>", "<s>", "Red")),
        ("<s>Red", ("</s>", "<s>", "Red")),
        ("</s><s>Red", ("</s>", "<s>", "Red")),
        ("</s>Red", ("</s>", "<s>", "</s>", "Red")),
    ],
)
def test_a_prefix_of_several_tokens_stands_in_front_once(
    text: str, labels: tuple[str, ...]
) -> None:
    """Whatever of it the text already begins with is not put there again."""
    hand = by_hand()
    hand.prefix_ids = (1, 0)
    tokens = tokenize(hand, text)
    assert tokens.labels == labels
    assert (tokens.prefix, tokens.own) == (2, range(2, len(labels)))
    assert resolve_positions(tokens, slice(None)) == tuple(range(2, len(labels)))
    if text == "Red":
        assert tokens.spans == ((0, 0), (0, 0), (0, 3))


def test_a_token_without_an_embedding_is_named() -> None:
    """The tokenizer may have got tokens that the model was never resized for."""
    hand = by_hand()
    hand.tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert hand.n_vocab == len(hand.tokenizer) - 1
    with pytest.raises(ValueError, match="^prompt:"):
        tokenize(hand, "Red <new> Hot")


def test_no_bos_where_the_model_wants_none() -> None:
    """The tokenizer's own special tokens never sneak in."""
    tokens = tokenize(by_hand(bos=False), "Red")
    assert tokens.labels == ("Red",)
    assert 0 not in tokens.ids


def test_bos_comes_once_although_the_tokenizer_adds_its_own(mini: LanguageModel) -> None:
    """The bundled model's tokenizer prepends a BOS itself; the prompt has one all the same."""
    assert mini.tokenizer("Red")["input_ids"][0] == mini.bos_token_id
    for text in ("Red", "<s>Red"):
        ids = tokenize(mini, text).ids
        assert ids.count(mini.tokenizer.bos_token_id) == 1
        assert ids[0] == mini.tokenizer.bos_token_id


def test_a_text_of_exactly_the_context_fits_and_one_token_more_does_not() -> None:
    """The BOS and the room asked for count towards the context."""
    model = by_hand(n_ctx=8)
    assert len(tokenize(model, "a" * 7)) == 8
    assert len(tokenize(model, "a" * 4, room=3)) == 5
    with pytest.raises(ValueError, match="^prompt:"):
        tokenize(model, "a" * 8)
    with pytest.raises(ValueError, match="^prompt:"):
        tokenize(model, "a" * 5, room=3)


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
@settings(max_examples=60, deadline=None)
def test_every_text_has_tokens_that_cover_it(variant: str, text: str) -> None:
    """Any text at all has ids, one span inside the text and one label for each."""
    check_invariants(VARIANTS[variant], text)


@given(text=st.text(min_size=1, max_size=60).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_byte_level_spans_slice_the_text_without_gaps(text: str) -> None:
    """The distinct spans of a byte-level tokenizer, joined, are the text itself."""
    tokens = tokenize(VARIANTS["no-bos"], text)
    distinct = list(dict.fromkeys(tokens.spans))
    assert "".join(text[start:end] for start, end in distinct) == text


@given(text=st.text(min_size=1, max_size=40).filter(str.strip))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_bundled_tokenizer_takes_every_text(mini: LanguageModel, text: str) -> None:
    """The bundled model reads any text, with its BOS in front exactly once."""
    tokens = check_invariants(mini, text)
    assert tokens.ids[0] == mini.bos_token_id
    assert tokens.ids[:2] != (mini.bos_token_id, mini.bos_token_id) or text.startswith("<s>")


@given(
    words=st.lists(st.text("abcαβ🌶ש", min_size=1, max_size=5), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
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


# Target prompts


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        pytest.param(TargetPrompt("Red Hot, x"), ((9, 10),), id="end"),
        pytest.param(TargetPrompt("The x in it"), ((4, 5),), id="middle"),
        pytest.param(TargetPrompt("x: a band"), ((0, 1),), id="start"),
        pytest.param(TargetPrompt("x and x, x."), ((0, 1), (6, 7), (9, 10)), id="three"),
        pytest.param(TargetPrompt("_ _ _ means:", "_"), ((0, 1), (2, 3), (4, 5)), id="underscores"),
        pytest.param(TargetPrompt("a thing is", "thing"), ((2, 7),), id="other-word"),
        pytest.param(TargetPrompt("an exact x, xs, x_"), ((9, 10),), id="not-inside-words"),
        pytest.param(TargetPrompt("a? ?", "?"), ((3, 4),), id="sign-behind-a-word-is-not-it"),
        pytest.param(TargetPrompt("a.b is (a+b)", "(a+b)"), ((7, 12),), id="regex-signs"),
    ],
)
def test_spans_are_the_occurrences_as_words(
    prompt: TargetPrompt, spans: tuple[tuple[int, int], ...]
) -> None:
    """Each occurrence of the placeholder that is a word of its own is found, and no other."""
    assert prompt.spans == spans


@pytest.mark.parametrize("text", ["Syria: Country", "exact xylophone", "X", "x1 _x x_"])
def test_a_prompt_without_its_placeholder_is_refused(text: str) -> None:
    """A text that lacks the placeholder as a word is an error that names the placeholder."""
    with pytest.raises(PlaceholderError, match="^target_prompt:"):
        TargetPrompt(text)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        (DESCRIPTION_PROMPT, ("Syria", "Leonardo DiCaprio", "Samsung")),
        (IDENTITY_PROMPT, ()),
        (TargetPrompt("Syria: Country\nAdele: singer\nx:"), ("Syria", "Adele")),
        (TargetPrompt("x: a band, Adele: singer, x"), ("Adele",)),
        (TargetPrompt("The x is"), ()),
    ],
)
def test_few_shot_names_are_what_the_prompt_itself_describes(
    prompt: TargetPrompt, names: tuple[str, ...]
) -> None:
    """The names before colons are listed, the placeholder is not."""
    assert prompt.few_shot_names == names


@pytest.mark.parametrize(
    ("prompt", "positions", "labels"),
    [
        pytest.param(TargetPrompt("Red Hot x"), (3,), ("·x",), id="end"),
        pytest.param(TargetPrompt("Red x Hot"), (2,), ("·x",), id="middle"),
        pytest.param(TargetPrompt("x Hot"), (1,), ("x",), id="start"),
        pytest.param(TargetPrompt("x x x Hot"), (1, 2, 3), ("x", "·x", "·x"), id="three"),
        pytest.param(
            TargetPrompt("Red Chili Hot", "Chili"), (2, 3), ("·Ch", "ili"), id="two-tokens"
        ),
    ],
)
def test_locate_finds_all_tokens_of_the_placeholder(
    prompt: TargetPrompt, positions: tuple[int, ...], labels: tuple[str, ...]
) -> None:
    """Positions count the BOS, and every token of every occurrence is among them."""
    target = prompt.locate(HAND, 5)
    assert target.positions == positions
    assert tuple(target.tokens.labels[p] for p in target.positions) == labels


def test_locate_keeps_to_the_placeholder_when_it_has_many_byte_tokens() -> None:
    """A pepper takes four tokens; the separate space token before it is not patched."""
    target = TargetPrompt("a 🌶 b", "🌶").locate(HAND, 5)
    assert target.tokens.labels[1:4] == ("a", "·", "🌶 1/4")
    assert target.positions == (3, 4, 5, 6)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_locate_counts_the_bos_only_where_there_is_one(trim_offsets: bool) -> None:
    """Without a BOS the same placeholder stands one token earlier."""
    prompt = TargetPrompt("Red x Hot")
    with_bos = by_hand(trim_offsets=trim_offsets)
    without = by_hand(trim_offsets=trim_offsets, bos=False)
    assert prompt.locate(with_bos, 1).positions == (2,)
    assert prompt.locate(without, 1).positions == (1,)


@pytest.mark.parametrize(
    ("pieces", "text"), [(("x:",), "Red x: Hot"), ((",x",), "Red,x"), (("x,", "x, y"), "x, y")]
)
def test_a_placeholder_that_is_merged_into_another_token_is_refused(
    pieces: tuple[str, ...], text: str
) -> None:
    """Where a token joins the placeholder with other characters, there is no place to patch."""
    model = by_hand(pieces, words=False)
    with pytest.raises(PlaceholderError, match="^target_prompt:"):
        TargetPrompt(text).locate(model, 1)


def test_a_placeholder_may_be_merged_with_white_space() -> None:
    """A token of white space and placeholder is as good as the placeholder alone."""
    model = by_hand(("\nx", "  y"), words=False)
    assert TargetPrompt("a\nx").locate(model, 1).positions == (2,)
    assert TargetPrompt("a  y", "y").locate(model, 1).positions == (2,)


def test_locate_leaves_room_for_the_new_tokens() -> None:
    """Prompt and new tokens together may just fill the context."""
    prompt = TargetPrompt("Red Hot x")  # four tokens with the BOS
    assert prompt.locate(by_hand(n_ctx=10), 6).positions == (3,)
    with pytest.raises(ValueError, match="^target_prompt:"):
        prompt.locate(by_hand(n_ctx=10), 7)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        (DESCRIPTION_PROMPT, 1),
        (IDENTITY_PROMPT, 1),
        (TargetPrompt("x x and x"), 3),
        (TargetPrompt("Syria: Country, x is a band, Samsung: company"), 1),
        (TargetPrompt("x: American rock band"), 1),
        (TargetPrompt("Red _ _ _ means:", "_"), 3),
    ],
)
def test_locate_on_the_bundled_model(mini: LanguageModel, prompt: TargetPrompt, count: int) -> None:
    """The bundled tokenizer keeps one-letter placeholders apart, wherever they stand."""
    target = prompt.locate(mini, 10)
    assert len(target.positions) == count
    found = [target.tokens.spans[p] for p in target.positions]
    assert [prompt.text[a:b].strip() for a, b in found] == [prompt.placeholder] * count
    assert [b for _, b in found] == [end for _, end in prompt.spans]
    assert target.prompt is prompt


def test_the_placeholder_of_the_description_prompt_is_its_last_token(mini: LanguageModel) -> None:
    """The vector of the paper's prompt goes where the model starts to write."""
    target = DESCRIPTION_PROMPT.locate(mini, 10)
    assert target.positions == (len(target.tokens) - 1,)


@given(
    words=st.lists(st.text("abcdeαש🌶", min_size=1, max_size=4), max_size=5),
    places=st.sets(st.integers(0, 5), min_size=1),
)
@settings(max_examples=80, deadline=None)
def test_locate_covers_exactly_the_placeholders(words: list[str], places: set[int]) -> None:
    """Wherever placeholders are inserted, their tokens' characters are those of the spans."""
    inserted = list(words)
    for place in sorted(places):
        inserted.insert(place, "x")
    prompt = TargetPrompt(" ".join(inserted))
    target = prompt.locate(HAND, 1)
    assert len(prompt.spans) == len(places)
    shown = [target.tokens.labels[p] for p in target.positions]
    assert [label.strip("·") for label in shown] == ["x"] * len(places)


@pytest.mark.parametrize(
    ("text", "description"),
    [
        pytest.param(
            ": American rock band, Adele: English singer", "American rock band", id="next-entry"
        ),
        pytest.param("American rock band", "American rock band", id="no-colon"),
        pytest.param(" : American rock band", "American rock band", id="space-before-colon"),
        pytest.param(": American rock band\nAdele: singer", "American rock band", id="newline"),
        pytest.param("\n: American rock band", "American rock band", id="newline-first"),
        pytest.param(":\nAmerican rock band\nand", "American rock band", id="newline-after-colon"),
        pytest.param(
            ": Ancient Greek king, ruler of Macedon",
            "Ancient Greek king, ruler of Macedon",
            id="legitimate-comma",
        ),
        pytest.param(
            ": king, ruler, conqueror, Adele: English singer, Syria: Country",
            "king, ruler, conqueror",
            id="commas-then-next-entry",
        ),
        pytest.param(": American actor,", "American actor", id="trailing-comma"),
        pytest.param(": Time 12:30", "Time 12:30", id="later-colon-without-comma"),
        pytest.param("", "", id="empty"),
        pytest.param(" \n ", "", id="blank"),
        pytest.param(":", "", id="only-a-colon"),
        pytest.param(" : ", "", id="only-a-spaced-colon"),
        pytest.param(", Adele: English singer", "", id="nothing-before-the-next-entry"),
        pytest.param(": 🌶 פלפל, שם: זמר", "🌶 פלפל", id="other-scripts"),
    ],
)
def test_crop_description(text: str, description: str) -> None:
    """The description ends at the next entry or line, not at any comma."""
    assert crop_description(text) == description


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_a_description_is_one_trimmed_line_of_the_text(text: str) -> None:
    """Cropping only takes away: what is left is a stretch of the text, on one line."""
    description = crop_description(text)
    assert description in text
    assert "\n" not in description
    assert description == description.strip()
