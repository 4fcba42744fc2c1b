"""Target prompts: the prompt that makes the model describe a patched vector.

1. A target prompt asks the model to describe its placeholder, whose tokens are patched.
2. It is tokenised in one piece, and the placeholder is found by its characters: a token that also
   holds other characters cannot be patched.
3. The generated text is cropped to the description of the placeholder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from superscopes_tl.errors import PlaceholderError, bad_type, bad_value, describe
from superscopes_tl.model import LanguageModel, TokenizedText, covering, tokenize

PAPER_ALPHAS: tuple[float, ...] = (1, 3, 6, 9, 12, 15)
"""The amplifiers of the paper's section 4.1; 1 is Patchscopes."""

PAPER_PROMPTS: tuple[str, ...] = (
    "Pink Floyd", "Led Zeppelin", "Arctic Monkeys", "Daft Punk", "Iron Maiden", "Green Day",
    "Pearl Jam", "Maroon 5", "Joy Division", "Deep Purple", "Depeche Mode", "Black Sabbath",
    "Judas Priest", "Arcade Fire", "Tame Impala", "Pulp Fiction", "Fight Club", "Top Gun",
    "King Kong", "Mad Max", "Die Hard", "Mean Girls", "Home Alone", "Dirty Dancing",
    "Black Panther", "Kill Bill", "Forrest Gump", "Finding Nemo", "Independence Day",
    "Pitch Perfect", "Shutter Island", "The Shining", "Reservoir Dogs", "Star Wars", "Baby Driver",
    "American Psycho", "Pretty Woman", "Fatal Attraction", "Black Swan", "Taxi Driver",
    "Diana, Princess of Wales", "Back to the Future", "Alexander the Great", "Saturday Night Live",
    "Red Hot Chili Peppers", "Will Smith", "Titanic", "George Washington",
)  # fmt: skip
"""The 48 source prompts of the paper's Figure 3 (section 4.1; the authors' recordings)."""

MANY_KINDS: tuple[str, ...] = (
    "Paris", "Albert Einstein", "Microsoft", "Amazon River", "Diabetes", "Violin", "Star Wars",
    "Napoleon", "Photosynthesis", "The Beatles", "Kangaroo", "Basketball", "Mount Everest",
    "Coca-Cola", "Jupiter", "Gold", "Toyota", "Japan", "William Shakespeare", "Harvard University",
    "Pizza", "Python", "Penicillin", "Christmas",
)  # fmt: skip
"""Names of as many kinds, with different descriptions: 40 of the paper's 48 are bands or films.
`readability` reads the first dozen."""

PAPER_MAX_NEW_TOKENS = 10
"""The length of a text in the authors' code."""


@dataclass(frozen=True)
class TargetPrompt:
    """A prompt that makes the model describe its placeholder.

    All tokens of every occurrence of `placeholder` as a word of its own are patched:
    `TargetPrompt("_ _ _ means:", "_")` has three.

    Attributes:
        text: the prompt; with `chat`, the message of a user.
        placeholder: the word to patch, in the text alone, not in the answer or chat template.
        answer: with `chat` only, the beginning of the model's answer, which generation continues.

    Raises:
        ValueError: the text is empty.
        PlaceholderError: the text does not contain the placeholder as a word of its own.
    """

    text: str
    placeholder: str = "x"
    answer: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "placeholder", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise bad_type(f"target_prompt.{name}", "a string", value, "pass text")
            if not value.strip() and (name, value) != ("answer", ""):
                fix = "see DESCRIPTION_PROMPT and CHAT_PROMPT for examples"
                raise bad_value(f"target_prompt.{name}", "visible characters", value, fix)
        if not self.spans:
            expected = f"a text with the placeholder {self.placeholder!r} as a word"
            fix = f"put {self.placeholder!r} where the vector goes, or pass placeholder=..."
            raise PlaceholderError(describe("target_prompt", expected, self.text, fix))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The characters `[start, end)` of every occurrence of the placeholder."""
        return tuple(m.span() for m in re.finditer(self._word, self.text))

    @property
    def _word(self) -> str:
        """The placeholder with no letter or digit next to it, as a regular expression."""
        return rf"(?<!\w){re.escape(self.placeholder)}(?!\w)"

    @property
    def few_shot_names(self) -> tuple[str, ...]:
        """The names that the prompt itself describes (`Syria`, ...): no reading of v."""
        names = re.findall(r"(?:^|,|\n)\s*([^,:\n]+):", self.text)
        return tuple(n.strip() for n in names if not re.search(self._word, n))

    def filled(self, name: str) -> str:
        """Return the text with a name in place of every placeholder, once for several in a row."""
        return re.sub(rf"{self._word}(?:\s+{self._word})*", lambda _: name, self.text)

    def locate(
        self, model: LanguageModel, max_new_tokens: int, *, chat: bool = False
    ) -> TargetTokens:
        """Tokenise for `model` and find the placeholder's tokens.

        Args:
            model: the target model.
            max_new_tokens: how many tokens must fit after the prompt.
            chat: whether the text is a user's message in the chat template.

        Raises:
            ValueError: the prompt and the new tokens do not fit into the context, or the chat
                template does not contain the prompt as it is.
            PlaceholderError: a token joins the placeholder with other characters.
        """
        tokens = tokenize(
            model, self.text, argument="target_prompt", room=max_new_tokens, chat=chat,
            answer=self.answer,
        )  # fmt: skip
        positions: list[int] = []
        for start, end in self.spans:
            patched = covering(tokens, start, end)
            joined = [p for p in patched if _joins_others(tokens, p, start, end)]
            if joined or not patched:
                token = repr(tokens.labels[joined[0]]) if joined else "none"
                expected = f"the placeholder {self.placeholder!r} to be a token of its own"
                fix = "put spaces around the placeholder or choose another one"
                got = f"the token {token} in {tokens.numbered()}"
                raise PlaceholderError(describe("target_prompt", expected, got, fix))
            positions += patched
        return TargetTokens(self, tokens, tuple(dict.fromkeys(positions)))


def _joins_others(tokens: TokenizedText, position: int, start: int, end: int) -> bool:
    """Return whether a token also holds visible characters outside `[start, end)`."""
    a, b = tokens.spans[position]
    outside = tokens.text[a : min(b, start)] + tokens.text[max(a, end) : b]
    return bool(outside.strip()) or position in tokens.joined


@dataclass(frozen=True)
class TargetTokens:
    """A target prompt as one model sees it; `positions` are the placeholder's tokens."""

    prompt: TargetPrompt
    tokens: TokenizedText
    positions: tuple[int, ...]


DESCRIPTION_PROMPT = TargetPrompt(
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
    "multinational major appliance and consumer electronics corporation, x"
)
"""The description prompt of Patchscopes and of the paper (reference code of both)."""

IDENTITY_PROMPT = TargetPrompt("cat -> cat\n1135 -> 1135\nhello -> hello\n?", placeholder="?")
"""The token-identity prompt of Patchscopes (section 4.1 there)."""

CHAT_PROMPT = TargetPrompt(
    "What is x? Describe it in a few words, and write nothing else.", answer="It is"
)
"""A question for chat models, to be used with `chat=True`.

The wording is this package's own: try others, and report controls beside the readings.
"""


def default_target_prompt(target_prompt: TargetPrompt | str | None, *, chat: bool) -> TargetPrompt:
    """Return the target prompt; `None` is `CHAT_PROMPT` with `chat`, else `DESCRIPTION_PROMPT`."""
    default = CHAT_PROMPT if chat else DESCRIPTION_PROMPT
    return default if target_prompt is None else as_target_prompt(target_prompt)


def as_target_prompt(target_prompt: TargetPrompt | str) -> TargetPrompt:
    """Return a `TargetPrompt`; a plain text has the placeholder `x`.

    Raises:
        TypeError: neither of the two.
        PlaceholderError: a plain text without the placeholder `x`.
    """
    return target_prompt if isinstance(target_prompt, TargetPrompt) else TargetPrompt(target_prompt)


_NEXT_ENTRY = re.compile(r",[^,:]{1,80}:")


def crop_description(text: str) -> str:
    """Crop a generated text to the description of the placeholder.

    The model continues the prompt's list: what follows the comma (or line break) before the next
    `name:` is not about the placeholder.

    >>> crop_description(": American rock band, Adele: English singer")
    'American rock band'
    >>> crop_description(": Ancient Greek king, ruler of Macedon")
    'Ancient Greek king, ruler of Macedon'
    """
    first_line = _entry(text).split("\n", 1)[0]
    return _NEXT_ENTRY.split(first_line, maxsplit=1)[0].strip().rstrip(",").strip()


def description_is_over(text: str) -> bool:
    """Return whether `crop_description` returns the same however the text continues.

    >>> description_is_over(": American rock band, Adele")
    False
    >>> description_is_over(": American rock band, Adele:")
    True
    """
    entry = _entry(text)
    return "\n" in entry or _NEXT_ENTRY.search(entry) is not None


def is_echo(description: str, about: str) -> bool:
    """Return whether a description repeats the name instead of describing it.

    It does where it contains the whole name, or where half of its words of more than three letters
    are words of the name.

    >>> is_echo("-great-great-great", "Alexander the Great")
    True
    >>> is_echo("King of the Roman Empire", "Alexander the Great")
    False
    """
    words, name = (re.findall(r"\w+", text.lower()) for text in (description, about))
    if not words or not name:
        return False
    whole = f" {' '.join(name)} " in f" {' '.join(words)} "
    content = [word for word in words if len(word) > 3]  # not "the", "of"
    return whole or (bool(content) and 2 * sum(word in name for word in content) >= len(content))


def _entry(text: str) -> str:
    return text.strip().removeprefix(":").strip()
