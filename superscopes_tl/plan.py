"""A sweep, checked before any work is done: what will be computed and what that costs.

1. `SweepConfig` holds the settings; the defaults are the paper's.
2. `plan_sweep` checks every one of them against the model and the prompt.
3. The `SweepPlan` lays out the cells, every site x target layer x α, and estimates the time.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

from superscopes_tl.amplify import MappingFamily, family_name, scale
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.loading import load_model
from superscopes_tl.models import LanguageModel
from superscopes_tl.patching import PatchedGenerator
from superscopes_tl.prompts import (
    DESCRIPTION_PROMPT,
    PAPER_ALPHAS,
    TargetPrompt,
    as_target_prompt,
)
from superscopes_tl.scoring import (
    Scorer,
    SentenceEmbeddingScorer,
    as_scorer,
    scorer_name,
)
from superscopes_tl.sites import PAPER_KINDS, Site, check_kinds, check_layers
from superscopes_tl.tokens import Positions, TokenizedText, check_text, resolve_positions, tokenize

TargetLayer: TypeAlias = int | Literal["same"] | Sequence[int]
"""A fixed layer, the source layer, or several layers (a source layer x target layer grid)."""

ScoreOn = Literal["description", "text"]

Cell: TypeAlias = tuple[Site, int, float]
"""What one reading takes: a site, a target layer and an α."""


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep; the defaults are the paper's (sections 4.1 and 5.1).

    With two exceptions: the description is scored without what follows it (`score_on="text"` is
    the paper's protocol), and a model may state its own length of a text.

    Attributes:
        layers: source layers, counted from 0; every layer unless given.
        kinds: kinds of activation.
        alphas: amplifiers; 0 and negative numbers are legal.
        positions: tokens of the source prompt: an index, a substring, a slice (`slice(None)` is
            every token but the BOS) or a sequence of these. The last token unless given.
        target_layer: where to patch: a layer, "same" as the source layer, or several layers.
        target_prompt: the prompt with the placeholder; a plain text has the placeholder `x`.
        mapping: gives the mapping function of each α.
        max_new_tokens: the longest text; the paper's 10, or the model's own (`PatchedGenerator`).
        batch_size: rows per batch; chosen by memory unless given.
        scorer: `None` for the paper's, a SentenceTransformer name or path, or a callable.
        score_on: score the cropped "description", or as the paper did the whole "text".
    """

    layers: int | Iterable[int] | None = None
    kinds: str | Sequence[str] = PAPER_KINDS
    alphas: float | Sequence[float] = PAPER_ALPHAS
    positions: Positions = -1
    target_layer: TargetLayer = 0
    target_prompt: TargetPrompt | str = DESCRIPTION_PROMPT
    mapping: MappingFamily = scale
    max_new_tokens: int | None = None
    batch_size: int | None = None
    scorer: Scorer | str | None = None
    score_on: ScoreOn = "description"


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """A checked sweep, ready to run: what will be computed, and what that costs.

    Attributes:
        model: the model.
        source: the source prompt's tokens.
        sites: the places to read.
        alphas: the amplifiers.
        target_layer: as in `SweepConfig`, with layer numbers counted from 0.
        generator: patches and writes.
        scorer: scores.
        config: the settings that this plan was made from.
        finished: cells that need not be computed again.
    """

    model: LanguageModel
    source: TokenizedText
    sites: tuple[Site, ...]
    alphas: tuple[float, ...]
    target_layer: Literal["same"] | tuple[int, ...]
    generator: PatchedGenerator
    scorer: Scorer
    config: SweepConfig
    finished: frozenset[Cell] = frozenset()

    def target_layers(self, site: Site) -> tuple[int, ...]:
        """Return where the vector of `site` is patched."""
        return (site.layer,) if self.target_layer == "same" else self.target_layer

    @cached_property
    def all_cells(self) -> tuple[Cell, ...]:
        """Every cell: site, target layer, α."""
        return tuple(
            (site, target_layer, alpha)
            for site in self.sites
            for target_layer in self.target_layers(site)
            for alpha in self.alphas
        )

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells to compute: all but the finished ones."""
        return tuple(cell for cell in self.all_cells if cell not in self.finished)

    @property
    def n_batches(self) -> int:
        """How many batches the cells make."""
        return math.ceil(len(self.cells) / self.generator.batch_size)

    def estimate_seconds(self) -> float:
        """Return the expected duration of generating all cells, from one timed batch.

        Scoring comes on top; texts that end early save time.
        """
        if not self.cells:
            return 0.0
        generator = self.generator
        seconds = generator.seconds_per_batch(min(generator.batch_size, len(self.cells)))
        return seconds * self.n_batches

    def provenance(self) -> dict[str, Any]:
        """Return where the result comes from, as plain data."""
        target = self.generator.target
        return {
            "superscopes_tl": version("superscopes-tl"),
            "python": platform.python_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.model.provenance(),
            "prompt": self.source.text,
            "tokens": {"ids": list(self.source.ids), "labels": list(self.source.labels)},
            "target_prompt": {
                "text": target.prompt.text,
                "placeholder": target.prompt.placeholder,
                "ids": list(target.tokens.ids),
                "positions": list(target.positions),
            },
            "config": {
                "layers": list(dict.fromkeys(site.layer for site in self.sites)),
                "kinds": list(dict.fromkeys(site.kind for site in self.sites)),
                "alphas": list(self.alphas),
                "positions": list(dict.fromkeys(site.position for site in self.sites)),
                "target_layer": self.target_layer
                if isinstance(self.target_layer, str)
                else list(self.target_layer),
                "mapping": family_name(self.config.mapping),
                "max_new_tokens": self.generator.max_new_tokens,
                "batch_size": self.generator.batch_size,
                "scorer": scorer_name(self.scorer),
                "scorer_weights": getattr(self.scorer, "weights", None),
                "score_on": self.config.score_on,
                "decoding": "greedy",
            },
            "planned_cells": len(self.all_cells),
        }


def plan_sweep(
    model: LanguageModel | Any, prompt: str, config: SweepConfig | None = None, **settings: Any
) -> SweepPlan:
    """Check every setting of a sweep before any work is done.

    Args:
        model: from `load_model`, or anything that it takes.
        prompt: the source prompt.
        config: the settings; or give them one by one as keyword arguments.
        **settings: the fields of `SweepConfig`.

    Raises:
        ValueError, TypeError: a bad setting; the message says what was expected.
    """
    config = _check_config(config, settings)
    # First what needs no model: a bad setting should not cost a download.
    alphas = _check_alphas(config.alphas)
    target_prompt = as_target_prompt(config.target_prompt)
    scorer = as_scorer(config.scorer)
    check_text(prompt, "prompt")
    model = load_model(model)
    source = tokenize(model, prompt)
    kinds = check_kinds(config.kinds, model.kinds, model.name)
    layers = check_layers(config.layers, model.n_layers)
    positions = resolve_positions(source, config.positions)
    plan = SweepPlan(
        model=model,
        source=source,
        sites=tuple(Site(k, layer, p) for p in positions for k in kinds for layer in layers),
        alphas=alphas,
        target_layer=_check_target_layer(config.target_layer, model.n_layers),
        generator=PatchedGenerator(
            model,
            target_prompt,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        ),
        scorer=scorer,
        config=config,
    )
    if isinstance(scorer, SentenceEmbeddingScorer):
        scorer.load()  # last, because it takes seconds; but before anything is generated
    return plan


def _check_config(config: SweepConfig | None, settings: dict[str, Any]) -> SweepConfig:
    """Return the settings as one object, after the checks that concern it alone."""
    if config is not None and settings:
        raise bad_value(
            "config",
            expected="either config or single settings",
            got=settings,
            fix="use dataclasses.replace(config, ...)",
        )
    names = [field.name for field in fields(SweepConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise bad_type(
            "settings", expected=f"settings out of {names}", got=unknown, fix="correct the name"
        )
    config = config or SweepConfig(**settings)
    if config.score_on not in ("description", "text"):
        raise bad_value(
            "score_on",
            expected="'description' or 'text'",
            got=config.score_on,
            fix="'text' is the paper's protocol",
        )
    if not callable(config.mapping):
        raise bad_type(
            "mapping",
            expected="a callable from α to a mapping function",
            got=config.mapping,
            fix="see superscopes_tl.amplify",
        )
    return config


def _check_alphas(alphas: Any) -> tuple[float, ...]:
    if isinstance(alphas, str):  # a string would pass for a sequence, digit by digit
        raise bad_type(
            "alphas", expected="finite numbers", got=alphas, fix="pass numbers, as in alphas=(1, 3)"
        )
    given: list[Any] = list(alphas) if isinstance(alphas, Iterable) else [alphas]
    fix = "pass for example alphas=(1, 3, 6, 9, 12, 15)"
    if not given:
        raise bad_value("alphas", expected="at least one finite number", got=given, fix=fix)
    checked: dict[float, None] = {}
    for alpha in given:
        try:
            number = float(alpha)
        except (TypeError, ValueError) as error:
            raise bad_type("alphas", expected="finite numbers", got=alpha, fix=fix) from error
        if not math.isfinite(number):
            raise bad_value("alphas", expected="finite numbers", got=alpha, fix=fix)
        checked[number] = None
    return tuple(checked)


def _check_target_layer(
    target_layer: TargetLayer, n_layers: int
) -> Literal["same"] | tuple[int, ...]:
    if isinstance(target_layer, str):
        if target_layer != "same":
            raise bad_value(
                "target_layer",
                expected="a layer, 'same' or a list of layers",
                got=target_layer,
                fix="0 and 'same' are the paper's choices",
            )
        return "same"
    return check_layers(target_layer, n_layers, "target_layer")
