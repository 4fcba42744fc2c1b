"""A model's own words about a name: the best that a patch can achieve.

1. Put the name itself in the placeholder's place, generate greedily, and crop the text to the
   description: the *own words* D. A reference text may replace them.
2. L_plain = log p(D | target prompt with the name), L_0 = log p(D | unpatched target prompt).
3. For a patch with L = log p(D | patched target prompt):

       recovered = (L - L_0) / (L_plain - L_0)

   0 equals the unpatched prompt, 1 the prompt with the name. In activation patching the same ratio
   of logit differences is the fraction recovered (Zhang and Nanda 2024, "Towards Best Practices of
   Activation Patching in Language Models").

All are sums over the tokens of D, in nats. Nothing is generated after a patch, and no second model
is needed. Where L_plain - L_0 is under 1 nat the share is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, ref

import numpy as np

from superscopes_tl.engine import (
    PatchedGenerator,
    TargetPrompt,
    crop_description,
    default_target_prompt,
    generate_named,
    name_fits,
    named_log_probabilities,
    no_patch,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.model import (
    LanguageModel,
    Position,
    check_template,
    check_text,
    load_model,
    named_positions,
    state_of,
    tokenize,
)

if TYPE_CHECKING:
    import pandas as pd

Shares = TypeVar("Shares", np.ndarray, "pd.Series[float]")
"""Shares recovered, as an array or as a column of a table."""

LEAST_GAP = 1.0
"""Below this gap between plain and unpatched, in nats, the share is not defined."""


@dataclass(frozen=True)
class OwnWords:
    """A model's description of a name, and its log-probability with and without the name.

    Attributes:
        about: the name, in the placeholder's place.
        token_ids: D, from the first token after the prompt to the end of the description.
        text: the description in it.
        plain_nats: log p(D) after the target prompt with the name, in nats.
        unpatched_nats: log p(D) after the unpatched target prompt.
        given: whether D is a reference text.
        too_long: whether the name does not fit into the target prompt; then nothing was run.
    """

    about: str
    token_ids: tuple[int, ...]
    text: str
    plain_nats: float
    unpatched_nats: float
    given: bool = False
    too_long: bool = False

    @property
    def gap(self) -> float:
        """The log-probability that the name adds to D, in nats."""
        return self.plain_nats - self.unpatched_nats

    @property
    def undefined(self) -> str:
        """Why the share recovered is not defined; empty where it is."""
        if not self.about.strip():
            return "there is no text at or before this token"
        if self.too_long:
            return f"{self.about[:40]!r}... does not fit into the target prompt"
        if not self.token_ids:
            return f"the model generates no description of {self.about!r}"
        if not self.gap >= LEAST_GAP:
            return f"{self.about!r} in the prompt adds {self.gap:.2f} nats to {self.text!r}"
        return ""

    def recovered(self, nats: float) -> float:
        """Return the share that a patch recovers, from its log p(D); NaN where undefined."""
        return math.nan if self.undefined else (nats - self.unpatched_nats) / self.gap


def own_words(
    model: LanguageModel | Any,
    prompt: str,
    position: Position = -1,
    target_prompt: TargetPrompt | str | None = None,
    *,
    about: str | None = None,
    reference: str | None = None,
    chat: bool = False,
    source_template: str = "{}",
    max_new_tokens: int | None = None,
) -> OwnWords:
    """Return the model's own words about a prompt, up to one of its tokens.

    Example:
        >>> own_words(load_model(), "Pink Floyd").text  # doctest: +SKIP
        'British rock band'

    Args:
        model: from `load_model`, or anything that it takes.
        prompt: the source prompt.
        position: one of its tokens: the words are about the text up to it, or about the substring
            that chose it.
        target_prompt: the prompt with the placeholder; as in `SweepConfig`.
        about: another text for the words to be about.
        reference: a text, such as a true fact, in place of the model's words.
        chat: as in `SweepConfig`.
        source_template: as in `SweepConfig`.
        max_new_tokens: as in `SweepConfig`.

    Raises:
        ValueError: an empty prompt, or a position that it does not have.
        PlaceholderError: a target prompt without its placeholder.
    """
    model = load_model(model)
    check_template(source_template)
    if about is None:
        tokens = tokenize(model, prompt, chat=chat, template=source_template)
        (about,) = named_positions(tokens, position).values()
    else:
        check_text(about, "about")
    target = default_target_prompt(target_prompt, chat=chat)
    generator = PatchedGenerator(model, target, max_new_tokens=max_new_tokens, chat=chat)
    return words_of(generator, [about], reference)[0]


def above_others(own: Shares, others: Shares) -> Shares:
    """Return the shares above those of other prompts' vectors, or above 0.

    Control vectors that make the words less likely than no patch do not count in favour.
    """
    above: Shares = own - np.maximum(others, 0)
    return above


Known: TypeAlias = dict[tuple[str, str | None], OwnWords]
_KNOWN: WeakKeyDictionary[LanguageModel, tuple[Any, dict[Any, Known]]] = WeakKeyDictionary()
"""By model, the state in which it was asked, and what is known of each target prompt."""


def _known(generator: PatchedGenerator) -> Known:
    """Return the words that are known already of what the generator's target prompt asks for.

    Words found before a weight, a hook or a mode of the model changed are forgotten.
    """
    model, target = generator.model, generator.target
    state = state_of(model.tl)
    then, known = _KNOWN.get(model) or (state, {})
    if then != state:
        known = {}
    _KNOWN[model] = state, known
    asked = target.prompt, target.tokens.ids, generator.chat
    # With a hook on the model, which may have a state of its own, only the generator knows them.
    alone = ref(generator) if state[0] else None
    return known.setdefault((*asked, generator.max_new_tokens, generator.precision, alone), {})


def words_of(
    generator: PatchedGenerator, names: Iterable[str], reference: str | None = None
) -> list[OwnWords]:
    """Return the own words of several names, or their `reference`; each is found once.

    Raises:
        ValueError: a reference that does not fit.
    """
    known = _known(generator)
    several = list(names)
    new = [name for name in dict.fromkeys(several) if (name, reference) not in known]
    there = [name for name in new if name.strip() and name_fits(generator, name)]
    if reference is None:
        found = _generated(generator, there)
    else:
        found = _referenced(generator, there, reference)
    nothing = no_patch(generator.model)
    texts = [words.token_ids for words in found]
    unpatched = generator.log_probabilities([nothing] * len(texts), texts)
    for words, likely in zip(found, unpatched, strict=True):
        known[words.about, reference] = replace(words, unpatched_nats=sum(likely))
    for name in set(new).difference(there):
        too_long = bool(name.strip())
        known[name, reference] = OwnWords(name, (), "", math.nan, math.nan, too_long=too_long)
    return [known[name, reference] for name in several]


def _generated(generator: PatchedGenerator, names: Sequence[str]) -> list[OwnWords]:
    """Return the model's own words, `unpatched_nats` still missing."""
    found = []
    for name, generation in zip(names, generate_named(generator, names), strict=True):
        text, length = generation.description, generation.n_description_tokens
        if length > generator.max_new_tokens:  # no longer than a patched text may be
            length = generator.max_new_tokens
            text = crop_description(generator.text_of(generation.token_ids[:length]))
        nats = sum(generation.log_probabilities[:length])
        found.append(OwnWords(name, generation.token_ids[:length], text, nats, math.nan))
    return found


def _referenced(
    generator: PatchedGenerator, names: Sequence[str], reference: str
) -> list[OwnWords]:
    """Return a reference text for each name, `unpatched_nats` still missing."""
    check_text(reference, "reference")
    ids = _continuation(generator, reference)
    likely = named_log_probabilities(generator, names, [ids for _ in names])
    text = reference.strip().removeprefix(":").strip()
    return [
        OwnWords(name, ids, text, sum(nats), math.nan, given=True)
        for name, nats in zip(names, likely, strict=True)
    ]


def _continuation(generator: PatchedGenerator, text: str) -> tuple[int, ...]:
    """Return a text's tokens as a continuation of the target prompt.

    Raises:
        ValueError: its first token joins the prompt's last one.
    """
    target, model = generator.target, generator.model
    prompt, chat = target.prompt, generator.chat
    # A few-shot prompt continues a name with a colon, a sentence its first words with a space.
    lead = ": " if prompt.few_shot_names and not chat else " "
    if chat and not prompt.answer:
        lead = ""  # the template itself begins the answer
    shown = text if text.startswith((":", " ", "\n")) else f"{lead}{text}"
    read, answer = (prompt.text, prompt.answer + shown) if chat else (prompt.text + shown, "")
    whole = tokenize(model, read, argument="reference", chat=chat, answer=answer)
    before = target.tokens.ids
    if whole.ids[: len(before)] != before:
        expected = "a text whose first token does not join the target prompt's last"
        raise bad_value("reference", expected, text, "begin it with a space or a colon")
    return whole.ids[len(before) :]
