"""Chat templates: a text as the message of a user, the way a chat model was trained to see it.

1. Render a conversation with the model's own template (`tokenizer.apply_chat_template`): the text
   as one message of the user, and behind it what the template writes in front of an answer, or an
   answer that is begun.
2. Render it again with a mark in place of the text. What stands before and behind the mark is the
   template's, so the text is found by its place and never by its words: the template may hold the
   same ones.
3. Check that the text came back as it was given; only blanks around it may be trimmed.

A beginning of the answer goes in as a message of the assistant that is left open, because the
template knows what stands before an answer's first word. SelfIE's prompts begin their answers so
(Chen et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from superscopes_tl.errors import bad_value
from superscopes_tl.model.language_model import LanguageModel

_MARK = "TheMessageOfTheUserStandsHere"


@dataclass(frozen=True)
class Framed:
    """A text and what stands around it.

    Attributes:
        whole: what the model reads.
        start: the character of `whole` at which the text begins.
        end: the character of `whole` at which it has ended.
        skipped: how many blanks at the text's beginning the template left out.
    """

    whole: str
    start: int
    end: int
    skipped: int = 0

    def within(self, before: int, length: int) -> Framed:
        """Return the frame of a part of the text.

        Args:
            before: how many characters of the text stand before the part.
            length: how many the part has.
        """
        skipped = max(0, self.skipped - before)  # of the part's own blanks
        start = self.start + max(0, before - self.skipped)
        return Framed(self.whole, start, min(self.end, start + length - skipped), skipped)


def check_answer(answer: str, *, chat: bool, argument: str) -> None:
    """Raise where an answer is begun without a template that says where answers begin.

    Raises:
        ValueError: an answer without `chat`.
    """
    if answer and not chat:
        raise bad_value(
            f"{argument}.answer",
            "no beginning of an answer without chat=True",
            answer,
            "pass chat=True, or write it at the end of the text",
        )


def in_chat(model: LanguageModel, text: str, *, answer: str, argument: str) -> Framed:
    """Return `text` as a user's message in the model's chat template.

    Args:
        model: gives the template.
        text: the message.
        answer: how the model's answer begins; empty for what the template writes before one.
        argument: the name of the text's argument, for error messages.

    Raises:
        ValueError: the model has no template, or it changes the text or the answer.
    """
    if not getattr(model.tokenizer, "chat_template", None):
        raise bad_value(
            "chat",
            "a model with a chat template",
            f"{model.name}, whose tokenizer has none",
            "leave chat out, or set model.tokenizer.chat_template to the template that the "
            "model was trained with",
        )
    whole, marked = _render(model, text, answer), _render(model, _MARK, answer)
    if marked.count(_MARK) != 1:
        raise bad_value(
            "chat",
            "a chat template that shows the user's message once, as it is",
            f"one that shows it {marked.count(_MARK)} times: {marked}",
            "set another model.tokenizer.chat_template, or leave chat out",
        )
    before, behind = marked.split(_MARK)
    start, end = len(before), len(whole) - len(behind)
    shown = whole[start:end]
    framed = (whole[:start], whole[end:]) == (before, behind)
    if not framed or shown.strip() != text.strip() or shown not in text:
        raise bad_value(
            argument,
            f"a text that the chat template of {model.name} leaves as it is",
            f"{text!r}, which it renders as {whole!r}",
            "write it without what the template changes, or leave chat out",
        )
    if not whole.endswith(answer):
        raise bad_value(
            f"{argument}.answer",
            f"a beginning that the chat template of {model.name} leaves as it is",
            f"{answer!r}, rendered as {whole!r}",
            "write it without blanks around it",
        )
    return Framed(whole, start, end, text.index(shown))


def _render(model: LanguageModel, text: str, answer: str) -> str:
    """Return the conversation as the template writes it.

    Raises:
        ValueError: the template refuses it.
    """
    messages = [{"role": "user", "content": text}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    try:
        rendered: str = model.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not answer,
            continue_final_message=bool(answer),
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise bad_value(
            "chat",
            f"a chat template of {model.name} that takes one message of a user"
            + (" and an answer that is begun" if answer else ""),
            f"{type(error).__name__}: {error}",
            "set another model.tokenizer.chat_template, or leave chat out",
        ) from error
    return rendered
