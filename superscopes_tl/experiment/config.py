"""The settings of a sweep: an object that validates itself.

1. `SweepConfig` checks at construction all that needs no model, so that a bad setting costs no
   download, and normalises it: α are floats, names and layers are tuples.
2. `plan_sweep` checks the rest against the model: kinds, layers, positions, target layers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypeAlias, get_args

from superscopes_tl.engine import PAPER_ALPHAS, Precision, TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_type, bad_value, check_callable, check_choice, check_count
from superscopes_tl.model import (
    PAPER_KINDS,
    LanguageModel,
    PatchedLayer,
    Positions,
    check_answer,
    check_template,
    check_text,
)
from superscopes_tl.scores import Scorer, as_scorer
from superscopes_tl.vectors import MappingFamily, PlaceVectors, Scale, Write

TargetLayer: TypeAlias = PatchedLayer | Literal["same"] | Sequence[PatchedLayer]
"""A fixed layer, the source layer, or several layers (a source layer x target layer grid)."""

ScoreOn = Literal["description", "text"]
ScoreAgainst = Literal["prompt", "own words"]
Generate = Literal["all", "best", "none"]
"""Which cells get a text: see `SweepConfig.generate`."""
Unit = Literal["vector", "residual"]
Guide = Literal["vector", "logits"]

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

    With two exceptions: only the description in a text is scored (`score_on="text"` is the paper's
    protocol), and a model may state its own length of a text. Of the paper's two target layers, 0
    and "same", the default reads both real models with the paper's prompt (`readability`): it
    recovers 0.87 of Gemma-3-270M's own words (layer 0: 0.71) and 0.88 of SmolLM2-135M's (0.90),
    and far less with other names' vectors.

    Attributes:
        layers: source layers, counted from 0; defaults to every layer.
        kinds: kinds of activation.
        alphas: amplifiers; 0 and negative numbers are legal.
        positions: tokens of the source prompt: an index, a substring, a slice (`slice(None)` is
            every token but the BOS) or a sequence of these; or these by source prompt. Defaults
            to the last token.
        source_template: the text around the source prompt, such as `"Tell me about {}"`;
            positions are still those of the prompt. A name of one token needs it where a model
            has no BOS: the first token of a text is the attention sink.
        about: the text that readings are scored against; defaults to the substring that chose
            the position, else to the source prompt up to that token; or several, by source prompt.
        reference: a text, such as a true fact, in place of the model's own words (`own_words`);
            or several, by source prompt.
        target_layer: where to patch: a layer, "same" as the source layer, "embed" for the input
            embedding (what a Hugging Face model takes as `inputs_embeds`), or several of these
            but "same". In the table "embed" is layer −1, `EMBED`.
        target_prompt: the prompt with the placeholder; a plain text has the placeholder `x`.
            Defaults to `DESCRIPTION_PROMPT`, the paper's, with `chat` to `CHAT_PROMPT`.
        mapping: the mapping family: returns the mapping function of each α.
        vectors: the source of v, where it is not the site's own activation: `Head(3)`,
            `Window(3)`, `Span()`, `MinusModel(base)`, `Mapped(maps)`, or any `PlaceVectors`.
        base: the b of f(v) = b + mapping(α)(v − b), such as `ResidMid()`; defaults to 0.
        unit: what α = 1 means: the "vector" as it is, or scaled to the norm of the "residual"
            stream that it replaces.
        guide: where α acts: on the "vector", or on the "logits", u + α·(c − u), with c those of
            the vector at α = 1 and u those of the unpatched prompt.
        write: how the patch is written, where it does not simply replace the residual stream at
            the target layer: `Add()`, `Interpolate()`, `AtLayers(0, 3)`, or any `Write`.
        target_model: the model of the target prompt; defaults to the source model. Its tokenizer,
            layers and width are those of the target prompt, the target layers and f(v).
        chat: whether the source prompt and the target prompt are each a user's message in the
            chat template of their model.
        draw: 0 for greedy texts; k for the k-th text sampled at temperature 1.
        controls: out of `CONTROLS`, computed beside each cell, as columns of the table.
        others: how many other prompts' vectors the control "other_prompt" averages `recovered`
            over, as a single one is noisy. The text beside a cell is that of the first.
        max_new_tokens: the longest text; defaults to the paper's 10, with `chat` to 24, or to the
            model's own (`PatchedPrompt`).
        generate: which cells to generate: "all"; "best", of each site and target layer the α that
            recovers most; or "none", which gives `recovered` alone, in the time of a few texts.
        precision: "high" computes `recovered` with matrix products in bfloat16 where the device
            has units for it (a GPU, a CPU with AMX or AVX512-BF16), and elsewhere as "highest",
            in the model's own dtype. Against float32 the shares of SmolLM2-135M and Gemma-3-270M
            differ by 0.004 (median) and 0.03 (99th percentile). Texts are always generated in the
            model's own dtype.
        batch_size: rows per batch; defaults to what fits into memory.
        scorer: `None` for the paper's, a SentenceTransformer name or path, or a callable.
        score_against: what the score compares a reading with: the "prompt" itself, as in the
            paper, or the model's "own words" about it, which agree better with judged readings
            (notebook 04).
        score_on: score the cropped "description", or as the paper did the whole "text". Texts end
            where their description does, unless they are scored whole.
    """

    layers: int | Iterable[int] | None = None
    kinds: str | Sequence[str] = PAPER_KINDS
    alphas: float | Sequence[float] = PAPER_ALPHAS
    positions: Positions | Mapping[str, Positions] = -1
    source_template: str = "{}"
    about: str | Mapping[str, str] | None = None
    reference: str | Mapping[str, str] | None = None
    target_layer: TargetLayer = "same"
    target_prompt: TargetPrompt | str | None = None
    mapping: MappingFamily = Scale()
    vectors: PlaceVectors | None = None
    base: PlaceVectors | None = None
    unit: Unit = "vector"
    guide: Guide = "vector"
    write: Write | None = None
    target_model: LanguageModel | str | None = None
    chat: bool = False
    draw: int = 0
    controls: str | Sequence[str] = ()
    others: int = 3
    max_new_tokens: int | None = None
    generate: Generate = "all"
    precision: Precision = "highest"
    batch_size: int | None = None
    scorer: Scorer | str | None = None
    score_against: ScoreAgainst = "prompt"
    score_on: ScoreOn = "description"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        if not isinstance(self.chat, bool):
            raise bad_type("chat", "True or False", self.chat, "chat=True")
        check_count("others", self.others, least=1, fix="3 is the default")
        check_count("draw", self.draw, least=0, fix="0 is greedy, 1 the first sampled text")
        self._check_prompts()
        for name, expected in _CALLABLES.items():
            if (given := getattr(self, name)) is not None or name == "mapping":
                fix = "pass the function itself, without quotes; see superscopes_tl.vectors"
                check_callable(name, given, expected=expected, fix=fix)
        as_scorer(self.scorer)
        names = (self.controls,) if isinstance(self.controls, str) else tuple(self.controls)
        for control in names:
            check_choice("controls", control, CONTROLS)
        normal: dict[str, Any] = {
            "alphas": _alphas(self.alphas),
            "controls": tuple(name for name in CONTROLS if name in names),
            "layers": _several(self.layers),
            "target_layer": _several(self.target_layer),
        }
        if isinstance(self.target_layer, str):
            check_choice("target_layer", self.target_layer, ("same", "embed"))
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """Return a config, by default the default one, with some settings changed.

        Raises:
            TypeError: an unknown setting.
        """
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in names]:
            close = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.7)
            fix = f"use {close[0]!r}" if close else f"settings are {', '.join(names)}"
            raise bad_type(unknown[0], "a setting of SweepConfig", settings[unknown[0]], fix)
        return replace(config or cls(), **settings)

    @property
    def prompt_with_placeholder(self) -> TargetPrompt:
        """The target prompt, or the default one."""
        return default_target_prompt(self.target_prompt, chat=self.chat)

    def reference_of(self, prompt: str) -> str | None:
        """Return the text that takes the place of the own words of a source prompt."""
        text: str | None = _at(self.reference, prompt, None)
        return text

    def positions_of(self, prompt: str) -> Positions:
        """Return the tokens to read of a source prompt."""
        positions: Positions = _at(self.positions, prompt, -1)
        return positions

    def about_of(self, prompt: str) -> str | None:
        """Return the text that readings of a source prompt are scored against, if one is given."""
        text: str | None = _at(self.about, prompt, None)
        return text

    def _check_prompts(self) -> None:
        """Check the target prompt, and the texts around and beside a source prompt."""
        answer = self.prompt_with_placeholder.answer
        check_answer(answer, chat=self.chat, argument="target_prompt")
        check_template(self.source_template)
        for name in ("about", "reference"):
            given = getattr(self, name)
            for text in given.values() if isinstance(given, Mapping) else (given,):
                if text is not None:
                    check_text(text, name)


_CHOICES = {
    "score_on": ScoreOn, "score_against": ScoreAgainst, "unit": Unit, "guide": Guide,
    "generate": Generate, "precision": Precision,
}  # fmt: skip
_CALLABLES = {
    "mapping": "a callable from α to a mapping function",
    "vectors": "a callable from a plan and its places to vectors",
    "base": "a callable from a plan and its places to vectors",
    "write": "a callable from a patch and its α to a patch",
}


def _at(given: Any, prompt: str, default: Any) -> Any:
    """Return a setting's value for a source prompt, where it has one for each."""
    return given.get(prompt, default) if isinstance(given, Mapping) else given


def _several(value: Any) -> Any:
    """Return an iterable as a tuple; a text, a number or `None` as it is."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _alphas(alphas: Any) -> tuple[float, ...]:
    """Return the amplifiers as distinct finite numbers, in the given order."""
    fix = "pass for example alphas=(1, 3, 6, 9, 12, 15)"
    if isinstance(alphas, str):  # float() would take the text of a number
        raise bad_type("alphas", "finite numbers", alphas, fix)
    try:
        numbers = [float(a) for a in (alphas if isinstance(alphas, Iterable) else [alphas])]
    except (TypeError, ValueError) as error:
        raise bad_type("alphas", "finite numbers", alphas, fix) from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise bad_value("alphas", "finite numbers, at least one", numbers, fix)
    return tuple(dict.fromkeys(numbers))
