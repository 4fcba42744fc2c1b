"""Chat templates: a text as a user message, in the format that a chat model was trained on.

1. Render a conversation with the model's own template (`tokenizer.apply_chat_template`): the text
   as a user message, followed by the generation prompt or the beginning of an answer.
2. Render it again with a marker in place of the text. Everything before and after the marker is
   the template's, so the text is located by place and not by its words, which the template may
   contain too.
3. Check that the text came through unaltered; only white space around it may be stripped.

The beginning of an answer is an assistant message that is left open, because the template decides
what precedes the first word of an answer. SelfIE's prompts begin answers like this (Chen et al.
2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from superscopes_tl.errors import bad_value, reason
from superscopes_tl.model.language_model import LanguageModel

_MARKER = "TheMessageOfTheUserStandsHere"
_OTHER_TEMPLATE = "set another model.tokenizer.chat_template, or leave chat out"


@dataclass(frozen=True)
class Framed:
    """A text in a template: the characters `[start, end)` of `whole`.

    `skipped` is the number of leading blanks that the template stripped from the text.
    """

    whole: str
    start: int
    end: int
    skipped: int = 0

    def within(self, before: int, length: int) -> Framed:
        """Return the frame of the part of the text that `before` characters precede."""
        skipped = max(0, self.skipped - before)
        start = self.start + max(0, before - self.skipped)
        return Framed(self.whole, start, min(self.end, start + length - skipped), skipped)


def check_answer(answer: str, *, chat: bool, argument: str) -> None:
    """Raise a `ValueError` for an answer without a chat template to put it into."""
    if answer and not chat:
        fix = "pass chat=True, or append it to the text"
        raise bad_value(f"{argument}.answer", "no answer without chat=True", answer, fix)


def in_chat(model: LanguageModel, text: str, *, answer: str, argument: str) -> Framed:
    """Return `text` as a user message in the model's chat template.

    Args:
        model: its tokenizer has the template.
        text: the message.
        answer: beginning of the model's answer; empty for the template's generation prompt.
        argument: name of the text's argument in error messages.

    Raises:
        ValueError: no template, or one that alters the text or the answer.
    """
    if not getattr(model.tokenizer, "chat_template", None):
        fix = "leave chat out, or set model.tokenizer.chat_template to the one of its training"
        got = f"{model.name}, whose tokenizer has none"
        raise bad_value("chat", "a model with a chat template", got, fix)
    whole, marked = _render(model, text, answer), _render(model, _MARKER, answer)
    if marked.count(_MARKER) != 1:
        expected = "a chat template that contains the user's message once, unaltered"
        got = f"one that contains it {marked.count(_MARKER)} times: {marked}"
        raise bad_value("chat", expected, got, _OTHER_TEMPLATE)
    before, after = marked.split(_MARKER)
    start, end = len(before), len(whole) - len(after)
    shown = whole[start:end]
    framed = (whole[:start], whole[end:]) == (before, after)
    if not framed or shown.strip() != text.strip() or shown not in text:
        expected = f"a text that the chat template of {model.name} does not alter"
        fix = "write it without what the template changes, or leave chat out"
        raise bad_value(argument, expected, f"{text!r}, rendered as {whole!r}", fix)
    if not whole.endswith(answer):
        expected = f"an answer that the chat template of {model.name} does not alter"
        got = f"{answer!r}, rendered as {whole!r}"
        raise bad_value(f"{argument}.answer", expected, got, "write it without blanks around it")
    return Framed(whole, start, end, text.index(shown))


def _render(model: LanguageModel, text: str, answer: str) -> str:
    """Return the conversation as rendered by the template."""
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
    except Exception as error:  # a template is a program and may raise anything
        expected = f"a chat template of {model.name} that accepts one user message"
        expected += " and the beginning of an answer" if answer else ""
        raise bad_value("chat", expected, reason(error), _OTHER_TEMPLATE) from error
    return rendered
