"""Between a `SweepConfig` and the Explorer's controls, both ways.

1. `read_config` makes the configuration that the controls show; what has no control (mapping,
   length, batch size, controls, the beginning of an answer) stays as it was given.
2. `write_config` sets the controls to a configuration, or says why they cannot show it: everything
   is checked before the first control moves, so that what is read back is what was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from superscopes_tl.engine import TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment import SweepConfig, SweepPlan, plan_sweep
from superscopes_tl.explorer.view import ALPHA_PRESETS, OWN, View
from superscopes_tl.model import LanguageModel, TokenizedText
from superscopes_tl.scores import PAPER_SCORER, as_scorer, no_scores, scorer_name
from superscopes_tl.vectors import MappingFamily, family_name, in_units_of, scale

_SHOWS_ALL = "sweep() takes it, and Explorer.from_result(result) shows what comes out"


NormAt = Callable[[TargetPrompt, int, bool], float]
"""The norm of the residual stream at a target prompt's placeholder, after a layer; the last
argument says whether the prompt stands in a chat template."""


def read_config(view: View, base: SweepConfig, norm_at: NormAt) -> SweepConfig:
    """Return what the controls show, as changes of `base`.

    Raises:
        ValueError: something that is no list of numbers, no kind, or no placeholder.
    """
    first, last = view.layers.value
    kinds = tuple(kind for kind, box in view.kinds.items() if box.value)
    if not kinds:
        raise bad_value("kinds", "at least one kind", kinds, "tick one")
    chat = bool(view.chat.value)
    target_prompt = view.presets.get(view.target_preset.value) or TargetPrompt(
        view.target_text.value, view.placeholder.value.strip(), base.asked.answer if chat else ""
    )
    usual = base.target_prompt is None and target_prompt == default_target_prompt(None, chat=chat)
    into = view.fixed.value if view.target.value == "fixed" else view.target.value
    mapping = scale if units_of(base.mapping) else base.mapping
    unit: Literal["vector", "residual"] = "vector"
    if view.units.value == "norm" and (into == "same" or base.unit == "residual"):
        unit = "residual"  # of each layer its own
    elif view.units.value == "norm":
        own = _own_norm(norm_at, target_prompt, into, chat)
        given = units_of(base.mapping)
        mapping = base.mapping if given and round(given, 4) == own else in_units_of(own)
    return replace(
        base,
        layers=tuple(range(first, last + 1, view.step.value)),
        kinds=kinds,
        alphas=parse_alphas(view.alphas.value),
        positions=view.tokens.value,
        source_template=view.template.value or "{}",
        about=view.about.value or None,
        reference=base.reference
        if isinstance(base.reference, Mapping)
        else view.reference.value or None,
        chat=chat,
        generate=view.write.value,
        target_layer=into,
        mapping=mapping,
        unit=unit,
        target_prompt=None if usual else target_prompt,
        scorer=None if view.scorer.value == PAPER_SCORER else view.scorer.value,
        score_on=view.score_on.value,
    )


def parse_alphas(text: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas, semicolons or spaces between them.

    Raises:
        ValueError: something in it is no number, or there is none.
    """
    try:
        numbers = tuple(float(part) for part in re.split(r"[\s,;]+", text) if part)
    except ValueError as error:
        raise bad_value(
            "alphas", "numbers with commas between them", text, "write 1, 3, 6"
        ) from error
    if not numbers:
        raise bad_value("alphas", "at least one number", text, "write 1, 3, 6")
    return numbers


def alphas_text(alphas: Sequence[float]) -> str:
    """Return a list of numbers as short as `parse_alphas` reads the same numbers from it."""
    short = {alpha: f"{alpha:g}" for alpha in alphas}
    return ", ".join(text if float(text) == a else repr(float(a)) for a, text in short.items())


def write_config(
    view: View, config: SweepConfig, model: LanguageModel, prompt: str, norm_at: NormAt
) -> None:
    """Set the controls to `config`; all of them, or none.

    Raises:
        ValueError, TypeError: a bad setting, or one that the controls cannot show.
    """
    plan = _checked(config, model, prompt)
    layers, position, into = _shown(plan)
    kinds = {site.kind for site in plan.sites}
    target = plan.generator.target.prompt
    units = units_of(config.mapping)
    if units:
        own = _own_norm(norm_at, target, into, config.chat)
        if round(units, 4) != own:
            raise bad_value(
                "mapping",
                f"in_units_of({own}), the model's own norm at this target prompt and "
                "layer, or another family",
                family_name(config.mapping),
                _SHOWS_ALL,
            )

    view.units.value = "norm" if units or config.unit == "residual" else "vector"
    view.layers.value = (layers[0], layers[-1])
    view.step.value = layers[1] - layers[0] if len(layers) > 1 else 1
    view.chat.value, view.template.value = config.chat, config.source_template
    show_tokens(view, plan.source)
    view.tokens.value = position
    about = plan.about(position)
    usual = plan.source.text[: plan.source.spans[position][1]]
    view.about.value = about if config.about is not None or about != usual else ""
    show_reference(view, config, prompt)
    view.write.value = config.generate
    view.target.value = into if into in (0, "same") else "fixed"
    view.fixed.value = 0 if into == "same" else into
    for kind, box in view.kinds.items():
        box.value = kind in kinds
    view.alpha_preset.value = next((n for n, p in ALPHA_PRESETS.items() if p == plan.alphas), OWN)
    view.alphas.value = alphas_text(plan.alphas)
    view.target_preset.value = next((n for n, p in view.presets.items() if p == target), OWN)
    view.target_text.value, view.placeholder.value = target.text, target.placeholder
    view.score_on.value = config.score_on
    _choose_scorer(view, config.scorer)


def show_reference(view: View, config: SweepConfig, prompt: str) -> None:
    """Show the text that takes the place of own words; one of several cannot be changed here."""
    view.reference.value = config.reference_of(prompt) or ""
    view.reference.disabled = isinstance(config.reference, Mapping)


def same_token(view: View, tokens: TokenizedText) -> int:
    """Return where the chosen token is when its prompt stands in another template.

    The last one of the prompt, where the template changes how it is split.
    """
    place, last = view.tokens.value - view.own.start, len(tokens.own) - 1
    alike = len(view.own) == len(tokens.own) and 0 <= place <= last
    return tokens.own.start + (place if alike else last)


def show_tokens(view: View, tokens: TokenizedText) -> None:
    """Offer a prompt's tokens; the last one of its text is chosen."""
    # Pairs, because a label may occur twice.
    view.tokens.options = [(label, i) for i, label in enumerate(tokens.labels)]
    view.tokens.value, view.own = tokens.own.stop - 1, tokens.own
    (view.tokens.add_class if tokens.has_bos else view.tokens.remove_class)("ssx-bos")


def _checked(config: SweepConfig, model: LanguageModel, prompt: str) -> SweepPlan:
    """Return the sweep that `config` means, without loading its scorer: that takes seconds."""
    if not isinstance(config, SweepConfig):
        raise bad_type("config", "a SweepConfig", config, "SweepConfig(alphas=3)")
    if config.target_model is not None:  # layers and norms of the controls are those of `model`
        raise bad_value(
            "target_model",
            f"the model that is read, {model.name}, which the controls are for",
            getattr(config.target_model, "name", config.target_model),
            f"leave it out; {_SHOWS_ALL}",
        )
    as_scorer(config.scorer)
    plan = plan_sweep(model, prompt, replace(config, scorer=no_scores))
    target = plan.generator.target.prompt
    if target.placeholder != target.placeholder.strip():
        raise bad_value(
            "target_prompt.placeholder", "no blanks around it", repr(target.placeholder), _SHOWS_ALL
        )
    return plan


def _shown(plan: SweepPlan) -> tuple[tuple[int, ...], int, Any]:
    """Return a plan's layers, token and target, of which the controls show one range or value."""
    layers = tuple(dict.fromkeys(site.layer for site in plan.sites))
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if step < 1 or layers != tuple(range(layers[0], layers[-1] + 1, step)):
        raise bad_value(
            "layers", "every layer of a range, or every k-th", list(layers),
            _SHOWS_ALL,
        )  # fmt: skip
    positions = tuple(dict.fromkeys(site.position for site in plan.sites))
    if len(positions) > 1:
        raise bad_value("positions", "one token", positions, _SHOWS_ALL)
    into = plan.target_layer
    if into != "same" and len(into) > 1:
        raise bad_value("target_layer", "one layer or 'same'", into, _SHOWS_ALL)
    return layers, positions[0], into if into == "same" else into[0]


def units_of(mapping: MappingFamily) -> float | None:
    """Return the norm of an `in_units_of` family; `None` for every other family."""
    try:
        norm = float(family_name(mapping).removeprefix("in_units_of(").removesuffix(")"))
    except ValueError:
        return None
    return norm if in_units_of(norm) is mapping else None


def _own_norm(norm_at: NormAt, target_prompt: TargetPrompt, into: Any, chat: bool) -> float:
    if into == "same":
        raise bad_value(
            "mapping",
            "one target layer, whose norm is meant",
            "the same layer as the source",
            "unit='residual' takes each layer's own",
        )
    return round(norm_at(target_prompt, into, chat), 4)


def _choose_scorer(view: View, scorer: Any) -> None:
    """Select the scorer, as a new option if it is none yet."""
    scorer = PAPER_SCORER if scorer is None else scorer
    if not any(scorer is known for _, known in view.scorer.options):
        name = scorer if isinstance(scorer, str) else scorer_name(scorer)
        view.scorer.options = (*view.scorer.options, (name, scorer))
    view.scorer.value = scorer
