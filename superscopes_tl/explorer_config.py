"""Between a `SweepConfig` and the Explorer's controls, both ways.

1. `read_config` makes the configuration that the controls show; what has no control (mapping,
   length, batch size) stays as it was given.
2. `write_config` sets the controls to a configuration, or says why they cannot show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from superscopes_tl.amplify import MappingFamily, family_name, in_units_of, scale
from superscopes_tl.errors import bad_value
from superscopes_tl.explorer_view import ALPHA_PRESETS, OWN, TARGET_PRESETS, View
from superscopes_tl.models import LanguageModel
from superscopes_tl.plan import SweepConfig
from superscopes_tl.prompts import TargetPrompt, as_target_prompt
from superscopes_tl.scoring import PAPER_SCORER, scorer_name
from superscopes_tl.sites import check_kinds, check_layers
from superscopes_tl.tokens import TokenizedText, resolve_positions

_SHOWS_ALL = "sweep() takes it, and Explorer.from_result(result) shows what comes out"


NormAt = Callable[[TargetPrompt, int], float]
"""The norm of the residual stream at a target prompt's placeholder, after a layer."""


def read_config(view: View, base: SweepConfig, norm_at: NormAt) -> SweepConfig:
    """Return what the controls show, as changes of `base`.

    Raises:
        ValueError: something that is no list of numbers, no kind, or no placeholder.
    """
    first, last = view.layers.value
    kinds = tuple(kind for kind, box in view.kinds.items() if box.value)
    if not kinds:
        raise bad_value("kinds", expected="at least one kind", got=kinds, fix="tick one")
    preset = view.target_preset.value
    target_prompt = TARGET_PRESETS.get(preset) or TargetPrompt(
        view.target_text.value, view.placeholder.value.strip()
    )
    into = view.fixed.value if view.target.value == "fixed" else view.target.value
    mapping = scale if _has_units(base.mapping) else base.mapping
    if view.units.value == "norm":
        if into == "same":
            raise bad_value(
                "α times the residual norm",
                expected="one target layer, whose norm is meant",
                got="the same layer as the source",
                fix="patch into layer 0 or a fixed layer",
            )
        mapping = in_units_of(round(norm_at(target_prompt, into), 4))
    return replace(
        base,
        layers=tuple(range(first, last + 1)),
        kinds=kinds,
        alphas=parse_alphas(view.alphas.value),
        positions=view.tokens.value,
        target_layer=into,
        mapping=mapping,
        target_prompt=target_prompt,
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
            "alphas", expected="numbers with commas between them", got=text, fix="write 1, 3, 6"
        ) from error
    if not numbers:
        raise bad_value("alphas", expected="at least one number", got=text, fix="write 1, 3, 6")
    return numbers


def write_config(
    view: View, config: SweepConfig, model: LanguageModel, tokens: TokenizedText
) -> None:
    """Set the controls to `config`; all of them, or none.

    Raises:
        ValueError: a bad setting, or one that the controls cannot show.
    """
    layers = check_layers(config.layers, model.n_layers)
    if layers != tuple(range(layers[0], layers[-1] + 1)):
        raise bad_value("layers", expected="a range without gaps", got=list(layers), fix=_SHOWS_ALL)
    positions = resolve_positions(tokens, config.positions)
    if len(positions) > 1:
        raise bad_value("positions", expected="one token", got=positions, fix=_SHOWS_ALL)
    into = config.target_layer
    if into != "same":
        chosen = check_layers(into, model.n_layers, "target_layer")
        if len(chosen) > 1:
            raise bad_value(
                "target_layer", expected="one layer or 'same'", got=into, fix=_SHOWS_ALL
            )
        into = chosen[0]
    kinds = check_kinds(config.kinds, model.kinds, model.name)
    target = as_target_prompt(config.target_prompt)
    given = config.alphas if isinstance(config.alphas, Iterable) else [config.alphas]
    alphas = parse_alphas(", ".join(f"{alpha:.10g}" for alpha in given))

    view.units.value = "norm" if _has_units(config.mapping) else "vector"
    view.layers.value = (layers[0], layers[-1])
    view.tokens.value = positions[0]
    view.target.value = into if into in (0, "same") else "fixed"
    view.fixed.value = 0 if into == "same" else into
    for kind, box in view.kinds.items():
        box.value = kind in kinds
    view.alpha_preset.value = next((n for n, p in ALPHA_PRESETS.items() if p == alphas), OWN)
    view.alphas.value = ", ".join(f"{alpha:.10g}" for alpha in alphas)
    view.target_preset.value = next((n for n, p in TARGET_PRESETS.items() if p == target), OWN)
    view.target_text.value, view.placeholder.value = target.text, target.placeholder
    view.score_on.value = config.score_on
    _choose_scorer(view, config.scorer)


def _has_units(mapping: MappingFamily) -> bool:
    return family_name(mapping).startswith("in_units_of(")


def _choose_scorer(view: View, scorer: Any) -> None:
    """Select the scorer, as a new option if it is none yet."""
    scorer = PAPER_SCORER if scorer is None else scorer
    if not any(scorer is known for _, known in view.scorer.options):
        name = scorer if isinstance(scorer, str) else scorer_name(scorer)
        view.scorer.options = (*view.scorer.options, (name, scorer))
    view.scorer.value = scorer
