"""The controls of a sweep: what they show as a prompt and a `SweepConfig`, and back.

1. `Settings.config` is the configuration that the controls show; what has no control (mapping,
   length, batch size, controls, the beginning of an answer) stays as it was given.
2. To set it sets the controls, or says why they cannot show it: everything is checked before the
   first control moves, so that what is read back is what was given.
3. Controls that depend on each other follow: a preset fills in its numbers, a prompt its tokens,
   the chat template a question to match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from superscopes_tl.engine import TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment import SweepConfig, SweepPlan, plan_sweep
from superscopes_tl.explorer.view import ALPHA_PRESETS, CUSTOM, View
from superscopes_tl.model import LanguageModel, TokenizedText, layer_name, tokenize
from superscopes_tl.scores import PAPER_SCORER, as_scorer, no_scores, scorer_name

_SHOWS_ALL = "sweep() takes it, and Explorer(result=result) shows the result"


class Settings:
    """The prompt and the configuration that the controls show.

    Args:
        view: the widgets.
        model: the model that the controls are for.
        on_change: called after a change; with `True` if it makes an earlier message obsolete.
    """

    def __init__(
        self, view: View, model: LanguageModel, on_change: Callable[[bool], object]
    ) -> None:
        self._view, self._model, self._on_change = view, model, on_change
        self._base = SweepConfig()
        view.on_change(self._prompt_changed, view.prompt)
        view.on_change(self._preset_changed, view.alpha_preset)
        view.on_change(self._alphas_changed, view.alphas)
        view.on_change(self._chat_changed, view.chat)
        view.on_change(self._source_changed, view.template)
        view.on_change(self._follow_targets, view.target, view.target_preset)
        view.on_change(
            lambda: on_change(False),
            view.tokens, view.layers, view.step, *view.kinds.values(), view.alphas, view.unit,
            view.target, view.fixed, view.target_preset, view.target_text, view.placeholder,
            view.scorer, view.score_on, view.generate, view.about, view.reference,
        )  # fmt: skip

    @property
    def prompt(self) -> str:
        """The source prompt; its last token is selected when it is set."""
        return str(self._view.prompt.value)

    @prompt.setter
    def prompt(self, text: str) -> None:
        tokens = self._tokens(text)
        with self._view.quietly():
            self._view.prompt.value = text
            self._show_prompt(tokens)
        self._on_change(False)

    @property
    def config(self) -> SweepConfig:
        """What the controls show, as changes of what was set."""
        view, base = self._view, self._base
        first, last = view.layers.value
        kinds = tuple(kind for kind, box in view.kinds.items() if box.value)
        if not kinds:
            raise bad_value("kinds", "at least one kind", kinds, "tick one")
        chat = bool(view.chat.value)
        target_prompt = view.presets.get(view.target_preset.value) or TargetPrompt(
            view.target_text.value,
            view.placeholder.value.strip(),
            base.prompt_with_placeholder.answer if chat else "",
        )
        usual = target_prompt == default_target_prompt(None, chat=chat)
        several = isinstance(base.reference, Mapping)
        return replace(
            base,
            layers=tuple(range(first, last + 1, view.step.value)),
            kinds=kinds,
            alphas=parse_alphas(view.alphas.value),
            positions=view.tokens.value,
            source_template=view.template.value or "{}",
            about=view.about.value or None,
            reference=base.reference if several else view.reference.value or None,
            chat=chat,
            generate=view.generate.value,
            target_layer=view.fixed.value if view.target.value == "fixed" else view.target.value,
            unit=view.unit.value,
            target_prompt=None if usual and base.target_prompt is None else target_prompt,
            scorer=None if view.scorer.value == PAPER_SCORER else view.scorer.value,
            score_on=view.score_on.value,
        )

    @config.setter
    def config(self, config: SweepConfig) -> None:
        plan = self._checked(config)
        with self._view.quietly():
            self._show(config, plan)
        self._base = config
        self._follow_targets()
        self._on_change(False)

    def adopt(self, best: SweepConfig) -> None:
        """Take over the prompts and the target layer of another configuration, nothing else."""
        tokens = tokenize(self._model, self.prompt, chat=best.chat, template=best.source_template)
        self.config = replace(
            self.config,
            target_prompt=best.target_prompt,
            target_layer=best.target_layer,
            chat=best.chat,
            source_template=best.source_template,
            positions=self._same_token(tokens),
        )

    def _show(self, config: SweepConfig, plan: SweepPlan) -> None:
        """Set every control."""
        view, target = self._view, plan.generator.target.prompt
        layers, position, into = _shown(plan)
        view.unit.value = config.unit
        view.layers.value = (layers[0], layers[-1])
        view.step.value = layers[1] - layers[0] if len(layers) > 1 else 1
        view.chat.value, view.template.value = config.chat, config.source_template
        self._show_tokens(plan.source)
        view.tokens.value = position
        about = plan.about(position)
        usual = plan.source.text[: plan.source.spans[position][1]]
        view.about.value = about if config.about is not None or about != usual else ""
        self._show_reference(config)
        view.generate.value = config.generate
        view.target.value = into if into in (0, "same", "embed") else "fixed"
        view.fixed.value = into if isinstance(into, int) else 0
        kinds = {site.kind for site in plan.sites}
        for kind, box in view.kinds.items():
            box.value = kind in kinds
        view.alpha_preset.value = _name_of(plan.alphas, ALPHA_PRESETS)
        view.alphas.value = alphas_text(plan.alphas)
        view.target_preset.value = _name_of(target, view.presets)
        view.target_text.value, view.placeholder.value = target.text, target.placeholder
        view.score_on.value = config.score_on
        scorer = PAPER_SCORER if config.scorer is None else config.scorer
        if not any(scorer is known for _, known in view.scorer.options):
            name = scorer if isinstance(scorer, str) else scorer_name(scorer)
            view.scorer.options = (*view.scorer.options, (name, scorer))
        view.scorer.value = scorer

    def _checked(self, config: SweepConfig) -> SweepPlan:
        """Return the plan of a config that can be shown; its scorer, slow to load, is left out."""
        if not isinstance(config, SweepConfig):
            raise bad_type("config", "a SweepConfig", config, "SweepConfig(alphas=3)")
        if config.target_model is not None:  # the controls have the layers of the source model
            other = getattr(config.target_model, "name", config.target_model)
            raise bad_value("target_model", self._model.name, other, _SHOWS_ALL)
        as_scorer(config.scorer)
        plan = plan_sweep(self._model, self.prompt, replace(config, scorer=no_scores))
        placeholder = plan.generator.target.prompt.placeholder
        if placeholder != placeholder.strip():
            argument = "target_prompt.placeholder"
            raise bad_value(argument, "no blanks around it", repr(placeholder), _SHOWS_ALL)
        _shown(plan)
        return plan

    # Changes of one control that another one follows.

    def _prompt_changed(self) -> None:
        """Show another prompt's tokens; what the old one was compared with goes with it."""
        self._view.tokens.options = [("∅", 0)]
        tokens = self._tokens(self.prompt)
        with self._view.quietly():
            self._show_prompt(tokens)
        self._on_change(True)

    def _source_changed(self) -> None:
        """Show the same prompt in another template."""
        tokens = self._tokens(self.prompt)
        position = self._same_token(tokens)
        with self._view.quietly():
            self._show_tokens(tokens)
            self._view.tokens.value = position
        self._on_change(True)

    def _chat_changed(self) -> None:
        """Show the same prompt with or without the chat template, with a question to match."""
        view, chat = self._view, bool(self._view.chat.value)
        before, now = (default_target_prompt(None, chat=c) for c in (not chat, chat))
        if view.presets.get(view.target_preset.value) == before:
            with view.quietly():
                view.target_preset.value = _name_of(now, view.presets)
            self._follow_targets()
        self._source_changed()

    def _preset_changed(self) -> None:
        preset = ALPHA_PRESETS.get(self._view.alpha_preset.value)
        if preset:
            self._view.alphas.value = alphas_text(preset)

    def _alphas_changed(self) -> None:
        texts = {name: alphas_text(preset) for name, preset in ALPHA_PRESETS.items()}
        self._view.alpha_preset.value = _name_of(self._view.alphas.value, texts)

    def _follow_targets(self) -> None:
        """Enable what the chosen target layer and target prompt leave open."""
        view = self._view
        view.fixed.disabled = view.target.value != "fixed"
        preset = view.presets.get(view.target_preset.value)
        for control in (view.target_text, view.placeholder):
            control.disabled = preset is not None
            control.layout.display = "none" if preset else ""
        if preset:
            view.target_text.value, view.placeholder.value = preset.text, preset.placeholder

    # Prompts and tokens.

    def _tokens(self, prompt: str) -> TokenizedText:
        """Return a prompt's tokens in the template that the controls show."""
        template = self._view.template.value or "{}"
        SweepConfig(source_template=template)  # checks it
        return tokenize(self._model, prompt, chat=bool(self._view.chat.value), template=template)

    def _show_prompt(self, tokens: TokenizedText) -> None:
        self._show_tokens(tokens)
        self._view.about.value = ""
        several = isinstance(self._base.reference, Mapping)
        self._show_reference(self._base if several else SweepConfig())

    def _show_tokens(self, tokens: TokenizedText) -> None:
        """Offer a prompt's tokens; the last one of its text is selected."""
        view = self._view
        # Pairs, because a label may occur twice.
        view.tokens.options = [(label, i) for i, label in enumerate(tokens.labels)]
        view.tokens.value, view.own = tokens.own.stop - 1, tokens.own
        (view.tokens.add_class if tokens.has_bos else view.tokens.remove_class)("ssx-bos")

    def _show_reference(self, config: SweepConfig) -> None:
        """Show the text that replaces own words; one of several cannot be changed here."""
        self._view.reference.value = config.reference_of(self.prompt) or ""
        self._view.reference.disabled = isinstance(config.reference, Mapping)

    def _same_token(self, tokens: TokenizedText) -> int:
        """Return where the selected token is in another template, or the last one."""
        view, own = self._view, tokens.own
        place = view.tokens.value - view.own.start
        same = len(view.own) == len(own) and 0 <= place < len(own)
        return own[place if same else -1]


def parse_alphas(text: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas, semicolons or spaces between them."""
    try:
        return tuple(map(float, re.split(r"[\s,;]+", text.strip(" \n\t,;"))))
    except ValueError as error:
        raise bad_value("alphas", "numbers, separated by commas", text, "1, 3, 6") from error


def alphas_text(alphas: Sequence[float]) -> str:
    """Return the shortest list that `parse_alphas` reads the same numbers from."""
    short = [(alpha, f"{alpha:g}") for alpha in alphas]
    return ", ".join(text if float(text) == a else repr(float(a)) for a, text in short)


def _name_of(value: object, presets: Mapping[str, object]) -> str:
    return next((name for name, preset in presets.items() if preset == value), CUSTOM)


def _shown(plan: SweepPlan) -> tuple[tuple[int, ...], int, Any]:
    """Return a plan's range of layers, one token and one target; refuse what has more."""
    layers = tuple(dict.fromkeys(site.layer for site in plan.sites))
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if step < 1 or layers != tuple(range(layers[0], layers[-1] + 1, step)):
        raise bad_value("layers", "every layer of a range, or every k-th", list(layers), _SHOWS_ALL)
    positions = tuple(dict.fromkeys(site.position for site in plan.sites))
    if len(positions) > 1:
        raise bad_value("positions", "one token", positions, _SHOWS_ALL)
    into = plan.target_layer
    if into != "same" and len(into) > 1:
        raise bad_value("target_layer", "one layer or 'same'", into, _SHOWS_ALL)
    return layers, positions[0], into if into == "same" else layer_name(into[0])
