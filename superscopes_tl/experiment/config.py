"""The settings of a sweep, and what of them can be checked without a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from superscopes_tl.engine import PAPER_ALPHAS, TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_type, bad_value, check_callable, check_count
from superscopes_tl.model import (
    PAPER_KINDS,
    LanguageModel,
    Positions,
    check_layers,
    check_template,
    check_text,
)
from superscopes_tl.scores import Scorer
from superscopes_tl.vectors import MappingFamily, PlaceVectors, Scale, Write

TargetLayer: TypeAlias = int | Literal["same"] | Sequence[int]
"""A fixed layer, the source layer, or several layers (a source layer x target layer grid)."""

ScoreOn = Literal["description", "text"]
Generate = Literal["all", "best", "none"]

CONTROLS = (
    "unpatched",
    "alpha_zero",
    "random_direction",
    "shuffled_dimensions",
    "other_prompt",
    "unpatched_log_probability",
)
"""The controls that a sweep can compute beside each cell; see `controls`."""


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep; the defaults are the paper's (sections 4.1 and 5.1).

    With two exceptions: the description is scored without what follows it (`score_on="text"` is
    the paper's protocol), and a model may state its own length of a text. Of the paper's two
    target layers, 0 and "same", the default is the one that `readability` finds to read both
    real models with the paper's prompt: Gemma-3-270M's own words are recovered to 0.87 (layer 0:
    0.71), SmolLM2-135M's to 0.88 (0.90), other names' vectors far less.

    Attributes:
        layers: source layers, counted from 0; every layer unless given.
        kinds: kinds of activation.
        alphas: amplifiers; 0 and negative numbers are legal.
        positions: tokens of the source prompt: an index, a substring, a slice (`slice(None)` is
            every token but the BOS) or a sequence of these. The last token unless given.
        source_template: what stands around the source prompt, such as `"Tell me about {}"`:
            positions are still those of the prompt. A name of one token needs it where a model
            puts no BOS in front: the first token of a text is the attention sink.
        about: what a reading is scored against; unless given the substring that chose its
            position, else the source prompt up to that token.
        reference: a text, such as a true fact, in place of the model's own words (`own_words`);
            or several, by source prompt.
        target_layer: where to patch: a layer, "same" as the source layer, or several layers.
        target_prompt: the prompt with the placeholder; a plain text has the placeholder `x`.
            Unless given `DESCRIPTION_PROMPT`, the paper's, or with `chat` `CHAT_PROMPT`.
        mapping: gives the mapping function of each α.
        vectors: what v is, where it is not the site's own activation: `Head(3)`, `Window(3)`,
            `Mapped(maps)`, or any `PlaceVectors`.
        base: the b of f(v) = b + mapping(α)(v − b), such as `ResidMid()`; defaults to 0.
        unit: what α = 1 means: the "vector" as it is, or as long as the "residual" stream that it
            replaces, whatever its own length.
        guide: where α acts: on the "vector", or on the "logits", u + α·(c − u), with c those of
            the vector at α = 1 and u those of the unpatched prompt.
        write: how the patch is written, where it does not simply replace the residual stream at
            the target layer: `Add()`, `Interpolate()`, `AtLayers(0, 3)`, or any `Write`.
        target_model: the model that is asked; the one that is read unless given. Its tokenizer,
            layers and width are those of the target prompt, the target layers and f(v).
        chat: whether the source prompt and the target prompt are each a message of a user in the
            chat template of the model that gets them (see `tokens`).
        draw: 0 for the likeliest tokens; k for the k-th text drawn at temperature 1.
        controls: out of `CONTROLS`, computed beside each cell, as columns of the table.
        others: how many other prompts' vectors the control "other_prompt" takes for `recovered`: a
            single one is a noisy control. The text beside a cell is that of the first.
        max_new_tokens: the longest text; the paper's 10, with `chat` 24, or the model's own
            (`PatchedGenerator`).
        generate: which cells to write out: "all"; "best", of each site the α that recovers most;
            or "none": then there is `recovered` alone, a whole map in the time of a few texts.
        batch_size: rows per batch; chosen by memory unless given.
        scorer: `None` for the paper's, a SentenceTransformer name or path, or a callable.
        score_on: score the cropped "description", or as the paper did the whole "text". Texts end
            where their description does, unless they are scored whole.
    """

    layers: int | Iterable[int] | None = None
    kinds: str | Sequence[str] = PAPER_KINDS
    alphas: float | Sequence[float] = PAPER_ALPHAS
    positions: Positions = -1
    source_template: str = "{}"
    about: str | None = None
    reference: str | Mapping[str, str] | None = None
    target_layer: TargetLayer = "same"
    target_prompt: TargetPrompt | str | None = None
    mapping: MappingFamily = Scale()
    vectors: PlaceVectors | None = None
    base: PlaceVectors | None = None
    unit: Literal["vector", "residual"] = "vector"
    guide: Literal["vector", "logits"] = "vector"
    write: Write | None = None
    target_model: LanguageModel | str | None = None
    chat: bool = False
    draw: int = 0
    controls: str | Sequence[str] = ()
    others: int = 3
    max_new_tokens: int | None = None
    generate: Generate = "all"
    batch_size: int | None = None
    scorer: Scorer | str | None = None
    score_on: ScoreOn = "description"

    @property
    def asked(self) -> TargetPrompt:
        """The target prompt, the default one filled in."""
        return default_target_prompt(self.target_prompt, chat=self.chat)

    def reference_of(self, prompt: str) -> str | None:
        """Return the text that takes the place of the own words of a source prompt."""
        given = self.reference
        return given.get(prompt) if isinstance(given, Mapping) else given


_PLACES = "a callable from a plan and its places to vectors"
_CALLABLES = (
    ("vectors", _PLACES, "sources"),
    ("base", _PLACES, "guided"),
    ("write", "a callable from a patch and its α to a patch", "selfie"),
)
"""Settings that are callables if they are given: name, what is expected, where examples are."""


def check_names(settings: dict[str, Any]) -> None:
    """Check that the settings are fields of `SweepConfig`.

    Raises:
        TypeError: one is not.
    """
    names = [field.name for field in fields(SweepConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise bad_type("settings", f"settings out of {names}", unknown, "correct the name")


def check_config(config: SweepConfig | None, settings: dict[str, Any]) -> SweepConfig:
    """Return the settings as one object, after the checks that concern it alone."""
    if config is not None and settings:
        raise bad_value(
            "config",
            "either config or single settings",
            settings,
            "use dataclasses.replace(config, ...)",
        )
    check_names(settings)
    config = config or SweepConfig(**settings)
    if config.score_on not in ("description", "text"):
        raise bad_value(
            "score_on", "'description' or 'text'", config.score_on, "'text' is the paper's protocol"
        )
    for name, choices in (
        ("unit", ("vector", "residual")),
        ("guide", ("vector", "logits")),
        ("generate", ("all", "best", "none")),
    ):
        if getattr(config, name) not in choices:
            raise bad_value(
                name,
                " or ".join(map(repr, choices)),
                getattr(config, name),
                "leave it out for the default",
            )
    _check_source(config)
    if not isinstance(config.chat, bool):
        raise bad_type("chat", "True or False", config.chat, "chat=True")
    asked = (config.controls,) if isinstance(config.controls, str) else tuple(config.controls)
    if unknown := [name for name in asked if name not in CONTROLS]:
        raise bad_value("controls", f"controls out of {CONTROLS}", unknown, "correct the name")
    config = replace(config, controls=tuple(name for name in CONTROLS if name in asked))
    check_count("others", config.others, least=1, fix="3 is the default")
    check_count("draw", config.draw, least=0, fix="0 is greedy, 1 the first drawn text")
    for name, expected, where in _CALLABLES:
        if (given := getattr(config, name)) is not None:
            fix = f"pass the function itself, without quotes; see superscopes_tl.{where}"
            check_callable(name, given, expected=expected, fix=fix)
    if not callable(config.mapping):
        raise bad_type(
            "mapping",
            "a callable from α to a mapping function",
            config.mapping,
            "see superscopes_tl.vectors.amplify",
        )
    return config


def _check_source(config: SweepConfig) -> None:
    """Check what stands around a source prompt, and what its readings are held against."""
    check_template(config.source_template)
    references = config.reference
    if config.about is not None:
        check_text(config.about, "about")
    for text in references.values() if isinstance(references, Mapping) else [references]:
        if text is not None:
            check_text(text, "reference")


def check_alphas(alphas: Any) -> tuple[float, ...]:
    """Return the amplifiers as distinct finite numbers, in the given order.

    Raises:
        ValueError, TypeError: none, or something that is no finite number.
    """
    if isinstance(alphas, str):  # a string would pass for a sequence, digit by digit
        raise bad_type("alphas", "finite numbers", alphas, "pass numbers, as in alphas=(1, 3)")
    given: list[Any] = list(alphas) if isinstance(alphas, Iterable) else [alphas]
    fix = "pass for example alphas=(1, 3, 6, 9, 12, 15)"
    if not given:
        raise bad_value("alphas", "at least one finite number", given, fix)
    checked: dict[float, None] = {}
    for alpha in given:
        try:
            number = float(alpha)
        except (TypeError, ValueError) as error:
            raise bad_type("alphas", "finite numbers", alpha, fix) from error
        if not math.isfinite(number):
            raise bad_value("alphas", "finite numbers", alpha, fix)
        checked[number] = None
    return tuple(checked)


def check_target_layer(
    target_layer: TargetLayer, n_layers: int
) -> Literal["same"] | tuple[int, ...]:
    """Return where to patch, as layer numbers counted from 0 or as "same".

    Raises:
        ValueError, TypeError: neither of these.
    """
    if isinstance(target_layer, str):
        if target_layer != "same":
            raise bad_value(
                "target_layer",
                "a layer, 'same' or a list of layers",
                target_layer,
                "0 and 'same' are the paper's choices",
            )
        return "same"
    return check_layers(target_layer, n_layers, "target_layer")
