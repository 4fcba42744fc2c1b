"""A sweep, checked before any work is done: what will be computed and what that costs.

1. `plan_sweep` checks the settings against the model and the prompt.
2. The `SweepPlan` lays out the cells, every site x target layer x α, and knows what they cost.
3. A `Cell` is the one address of a reading, in plans, tables and figures.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch

from superscopes_tl.engine import PatchedGenerator, bytes_per_row, description_is_over, free_bytes
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment.config import SweepConfig, TargetLayer
from superscopes_tl.model import (
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    check_text,
    load_model,
    named_positions,
    tokenize,
)
from superscopes_tl.scores import (
    OwnWords,
    Scorer,
    SentenceEmbeddingScorer,
    as_scorer,
    scorer_name,
    words_of,
)
from superscopes_tl.vectors import label

if TYPE_CHECKING:
    from superscopes_tl.experiment.results import SweepResult


@dataclass(frozen=True, order=True)
class Cell:
    """The address of one reading: a token, a kind, a source layer, a target layer and an α.

    Attributes:
        position: the token whose activation is read, counted from 0.
        kind: the kind of activation.
        source_layer: where it is read.
        target_layer: where it is patched.
        alpha: the amplifier.
    """

    position: int
    kind: str
    source_layer: int
    target_layer: int
    alpha: float

    @classmethod
    def at(cls, site: Site, target_layer: int, alpha: float) -> Cell:
        """Return the cell that patches the vector of a site, amplified, into a layer."""
        return cls(site.position, site.kind, site.layer, target_layer, alpha)

    @classmethod
    def of(cls, reading: Any) -> Cell:
        """Return the cell of a `Reading`, or of a row of `SweepResult.table`."""
        return cls(
            int(reading.position),
            str(reading.kind),
            int(reading.source_layer),
            int(reading.target_layer),
            float(reading.alpha),
        )

    @property
    def site(self) -> Site:
        """Where the vector is read."""
        kind: Any = self.kind
        return Site(kind, self.source_layer, self.position)

    @property
    def place(self) -> tuple[Site, int]:
        """The site and the target layer: what the cells that differ in α alone share."""
        return self.site, self.target_layer


def target_layers(site: Site, target_layer: Literal["same"] | tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers into which the vector of a site is patched."""
    return (site.layer,) if target_layer == "same" else target_layer


def lay_out(
    sites: Sequence[Site], target_layer: Literal["same"] | tuple[int, ...], alphas: Sequence[float]
) -> tuple[Cell, ...]:
    """Return every cell of some sites: site, target layer, α."""
    return tuple(
        Cell.at(site, into, alpha)
        for site in sites
        for into in target_layers(site, target_layer)
        for alpha in alphas
    )


READING_BYTES = 2000
"""What a reading takes in memory, with its texts; measured on finished sweeps."""


@dataclass(frozen=True)
class PlannedMemory:
    """What a sweep will keep in memory at a time, in bytes.

    Attributes:
        vectors: v and α·v of every site, in float32, in this machine's memory.
        kv_cache: of one batch, on the model's device.
        readings: the finished table; `evaluate` with a path keeps it on disk until the end.
    """

    vectors: int
    kv_cache: int
    readings: int


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """A checked sweep, ready to run: what will be computed, and what that costs.

    Attributes:
        model: the source model; the target model is the generator's.
        source: the source prompt's tokens.
        sites: where vectors are read.
        generator: patched generator for the target prompt.
        config: the settings, checked against the model: target layers are counted from 0, and the
            scorer is a callable.
        finished: cells that need not be computed again.
        abouts: what a reading at each position is scored against.
    """

    model: LanguageModel
    source: TokenizedText
    sites: tuple[Site, ...]
    generator: PatchedGenerator
    config: SweepConfig
    finished: frozenset[Cell] = frozenset()
    abouts: Mapping[int, str] = field(default_factory=dict)

    @property
    def alphas(self) -> tuple[float, ...]:
        """The amplifiers."""
        alphas: Any = self.config.alphas
        return tuple(alphas)

    @property
    def target_layer(self) -> Literal["same"] | tuple[int, ...]:
        """Where vectors are patched: layers counted from 0, or "same" as the source layer."""
        layers: Any = self.config.target_layer
        return layers if layers == "same" else tuple(layers)

    @property
    def scorer(self) -> Scorer:
        """The scorer of the texts."""
        return as_scorer(self.config.scorer)

    def run(self, *, progress: bool = True) -> SweepResult:
        """Run the plan.

        Args:
            progress: whether to show a progress bar.

        Raises:
            SweepInterrupted: stopped by the user (a `KeyboardInterrupt`); finished cells are in
                its `partial`.
            SweepError: an error during the run; finished cells are in its `partial`.
        """
        from superscopes_tl.experiment.run import collect  # it imports this module

        return collect([self], progress=progress)

    def at_prompt(self, prompt: str) -> SweepPlan:
        """Return the same plan for another source prompt, with nothing finished.

        Raises:
            ValueError: an empty prompt, or one without the tokens to read.
        """
        source, abouts = _read_source(self.model, prompt, self.config)
        places = dict.fromkeys((site.kind, site.layer) for site in self.sites)
        sites = tuple(Site(kind, layer, p) for p in abouts for kind, layer in places)
        return replace(self, source=source, sites=sites, finished=frozenset(), abouts=abouts)

    def with_settings(self, **settings: Any) -> SweepPlan:
        """Return the same plan with other settings, which the model need not check."""
        return replace(self, config=SweepConfig.of(self.config, settings))

    def only(self, cells: Iterable[Cell]) -> SweepPlan:
        """Return the same plan for some of its cells."""
        return replace(self, finished=frozenset(self.all_cells).difference(cells))

    def about(self, position: int) -> str:
        """Return what a reading at a position is scored against; defaults to the source text."""
        return self.abouts.get(position, self.source.text)

    def own_words(self, positions: Iterable[int]) -> dict[int, OwnWords]:
        """Return the model's own words about the text of each position."""
        several = list(dict.fromkeys(positions))
        reference = self.config.reference_of(self.source.text)
        found = words_of(self.generator, map(self.about, several), reference)
        return dict(zip(several, found, strict=True))

    @cached_property
    def all_cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order position, kind, source layer, target layer, α as given."""
        return lay_out(self.sites, self.target_layer, self.alphas)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells to compute: all but the finished ones."""
        return tuple(cell for cell in self.all_cells if cell not in self.finished)

    @property
    def n_texts(self) -> int:
        """How many texts will be generated (see `SweepConfig.generate`)."""
        if self.config.generate == "all":
            return len(self.cells)
        return len({c.place for c in self.cells}) if self.config.generate == "best" else 0

    @property
    def mapping_name(self) -> str:
        """How f(v) is made, in words: the table's column `mapping`."""
        parts = [label(self.config.mapping)]
        if self.config.vectors is not None:
            parts.append(f"of {label(self.config.vectors)}")
        if self.config.base is not None:
            parts.append(f"from {label(self.config.base)}")
        if self.config.unit == "residual":
            parts.append("in residual norms")
        if self.config.guide == "logits":
            parts.append("on logits")
        if self.config.write is not None:
            parts.append(f"by {label(self.config.write)}")
        if self.generator.model is not self.model:
            parts.append(f"into {self.generator.model.name}")
        return ", ".join(parts)

    @cached_property
    def memory(self) -> PlannedMemory:
        """What the sweep will take in memory, known before it starts."""
        generator, places = self.generator, len(self.all_cells) // len(self.alphas)
        # As read, minus their base, and mapped with one α after the other.
        copies = 3 + len(self.alphas)
        rows = min(generator.batch_size, max(1, len(self.cells)))
        return PlannedMemory(
            vectors=4 * places * copies * generator.model.d_model,
            kv_cache=rows * bytes_per_row(generator.model, generator.row_length),
            readings=READING_BYTES * len(self.cells),
        )

    def check_memory(self) -> None:
        """Refuse a sweep that cannot fit, before any work.

        Raises:
            ValueError: it needs more memory than is free.
        """
        planned, free = self.memory, free_bytes(torch.device("cpu"))
        needed = planned.vectors + planned.readings
        if self.generator.model.device.type == "cpu":
            needed += planned.kv_cache
        if needed > free:
            raise bad_value(
                "positions, layers, kinds, alphas",
                f"a sweep within the {free / 1e9:.1f} GB of free memory",
                f"{needed / 1e9:.1f} GB for {len(self.sites)} sites x {len(self.alphas)} α",
                "read fewer tokens at a time; evaluate(..., path=...) adds them to one file",
            )

    def estimate_seconds(self) -> float:
        """Return the expected duration of generating the texts, from one timed batch.

        Scoring comes on top; texts that end early save time.
        """
        if not self.n_texts:
            return 0.0
        seconds = self.generator.seconds_per_batch(self.n_texts)
        return seconds * math.ceil(self.n_texts / self.generator.batch_size)

    def provenance(self) -> dict[str, Any]:
        """Return where the result comes from, as plain data."""
        target = self.generator.target
        return {
            "superscopes_tl": version("superscopes-tl"),
            "python": platform.python_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.model.provenance(),
            "target_model": None
            if self.generator.model is self.model
            else self.generator.model.provenance(),
            "prompt": self.source.text,
            "tokens": {"ids": list(self.source.ids), "labels": list(self.source.labels)},
            "target_prompt": {
                "text": target.prompt.text,
                "placeholder": target.prompt.placeholder,
                "answer": target.prompt.answer,
                "ids": list(target.tokens.ids),
                "positions": list(target.positions),
            },
            "config": self._settings(),
            "planned_cells": len(self.all_cells),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the settings as plain data, the defaults filled in."""
        config, target_layer = self.config, self.target_layer
        reference = config.reference
        return {
            "layers": list(dict.fromkeys(site.layer for site in self.sites)),
            "kinds": list(dict.fromkeys(site.kind for site in self.sites)),
            "alphas": list(self.alphas),
            "positions": list(dict.fromkeys(site.position for site in self.sites)),
            "target_layer": target_layer if target_layer == "same" else list(target_layer),
            **{name: _name(getattr(config, name)) for name in _NAMED},
            **{name: getattr(config, name) for name in _PLAIN},
            "reference": dict(reference) if isinstance(reference, Mapping) else reference,
            "controls": list(config.controls),
            "max_new_tokens": self.generator.max_new_tokens,
            "batch_size": self.generator.batch_size,
            "scorer": scorer_name(self.scorer),
            "scorer_weights": getattr(self.scorer, "weights", None),
            "decoding": f"sampled at temperature 1, {config.draw}" if config.draw else "greedy",
        }


_NAMED = ("mapping", "vectors", "base", "write")
_PLAIN = ("unit", "guide", "chat", "source_template", "about", "generate", "draw", "others",
          "score_on")  # fmt: skip
"""Settings that a provenance records by their names, and as they are."""


def _read_source(
    model: LanguageModel, prompt: str, config: SweepConfig
) -> tuple[TokenizedText, dict[int, str]]:
    """Return a source prompt's tokens, and what a reading at each position is scored against."""
    source = tokenize(model, prompt, chat=config.chat, template=config.source_template)
    abouts = named_positions(source, config.positions)
    if config.about is not None:
        abouts = dict.fromkeys(abouts, config.about)
    return source, abouts


def _name(setting: Callable[..., object] | None) -> str | None:
    return None if setting is None else label(setting)


def plan_sweep(
    model: LanguageModel | Any, prompt: str, config: SweepConfig | None = None, **settings: Any
) -> SweepPlan:
    """Check every setting of a sweep before any work is done.

    Args:
        model: from `load_model`, or anything that it takes.
        prompt: the source prompt.
        config: the settings; defaults to `SweepConfig()`.
        **settings: fields of `SweepConfig` to change in it.

    Raises:
        ValueError: a setting out of range, or a sweep that does not fit into memory.
        TypeError: a setting of the wrong type, or an unknown one.
    """
    config = SweepConfig.of(config, settings)
    check_text(prompt, "prompt")  # before a model is loaded
    model = load_model(model)
    target_model = model if config.target_model is None else load_model(config.target_model)
    source, abouts = _read_source(model, prompt, config)
    kinds = model.checked_kinds(config.kinds)
    layers = check_layers(config.layers, model.n_layers)
    into: TargetLayer = "same"
    if config.target_layer == "same":
        check_layers(layers, target_model.n_layers, "target_layer")
    else:
        into = check_layers(config.target_layer, target_model.n_layers, "target_layer")
    if target_model.d_model != model.d_model and config.vectors is None:
        raise bad_value(
            "target_model",
            f"a model as wide as {model.name}, {model.d_model}",
            f"{target_model.name}, {target_model.d_model}",
            "fit an affine map between the two: vectors=Mapped(fit_affine(...))",
        )
    scorer = as_scorer(config.scorer)
    plan = SweepPlan(
        model=model,
        source=source,
        sites=tuple(Site(k, layer, p) for p in abouts for k in kinds for layer in layers),
        generator=PatchedGenerator(
            target_model,
            config.prompt_with_placeholder,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            chat=config.chat,
            until=description_is_over if config.score_on == "description" else None,
        ),
        config=replace(config, target_layer=into, scorer=scorer),
        abouts=abouts,
    )
    plan.check_memory()
    if isinstance(scorer, SentenceEmbeddingScorer) and config.generate != "none":
        scorer.load()  # last, because it takes seconds; but before anything is generated
    return plan
