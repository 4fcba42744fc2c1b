"""Target prompts: placeholders found in context, and descriptions cropped from generations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import DESCRIPTION_PROMPT, TargetPrompt
from superscopes_tl.engine import IDENTITY_PROMPT, crop_description
from superscopes_tl.errors import PlaceholderError
from tests.support.hand_tokenizer import by_hand

HAND = by_hand()


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
        pytest.param(TargetPrompt("a? ?", "?"), ((3, 4),), id="sign-after-a-word"),
        pytest.param(TargetPrompt("a.b is (a+b)", "(a+b)"), ((7, 12),), id="regex"),
    ],
)
def test_spans_are_the_occurrences_as_words(
    prompt: TargetPrompt, spans: tuple[tuple[int, int], ...]
) -> None:
    """Each occurrence of the placeholder that is a word of its own is found, and no other."""
    assert prompt.spans == spans


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        (TargetPrompt("x and x, x."), "A B and A B, A B."),
        (TargetPrompt("What is _ _ _? _", "_"), "What is A B? A B"),
        (TargetPrompt("an exact x x_"), "an exact A B x_"),
    ],
)
def test_a_name_takes_the_place_of_placeholders_in_a_row_once(
    prompt: TargetPrompt, filled: str
) -> None:
    """The own words are about the name as one would write it."""
    assert prompt.filled("A B") == filled


@pytest.mark.parametrize("text", ["Syria: Country", "exact xylophone", "X", "x1 _x x_"])
def test_a_prompt_without_its_placeholder_is_refused(text: str) -> None:
    """A text that lacks the placeholder as a word is an error."""
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
    """The names before colons are listed, without the placeholder."""
    assert prompt.few_shot_names == names


@pytest.mark.parametrize(
    ("prompt", "positions", "labels"),
    [
        pytest.param(TargetPrompt("Red Hot x"), (3,), ("·x",), id="end"),
        pytest.param(
            TargetPrompt("🌶 b", "🌶"),
            (1, 2, 3, 4),
            tuple(f"🌶 {i}/4" for i in (1, 2, 3, 4)),
            id="bytes",
        ),
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
def test_a_placeholder_merged_into_another_token_is_refused(
    pieces: tuple[str, ...], text: str
) -> None:
    """A token that also contains other visible characters cannot be patched."""
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


@given(
    words=st.lists(st.text("abcdeαש🌶", min_size=1, max_size=4), max_size=5),
    places=st.sets(st.integers(0, 5), min_size=1),
)
def test_locate_covers_exactly_the_placeholders(words: list[str], places: set[int]) -> None:
    """Wherever placeholders are inserted, their tokens and no others are patched."""
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
def test_a_description_is_one_trimmed_line_of_the_text(text: str) -> None:
    """A description is a substring of the text, on one line, without blanks around it."""
    description = crop_description(text)
    assert description in text
    assert "\n" not in description
    assert description == description.strip()
