"""A sweep, checked before any work is done: its cells and their cost.

1. `plan_sweep` checks the settings against the model and the prompt.
2. The `SweepPlan` lays out the cells, every site x target layer x α, and estimates their cost.
3. A `Cell` is the one address of a reading, in plans, tables and figures.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import (
    PatchedGenerator,
    bytes_per_row,
    description_is_over,
    free_bytes,
    site_vectors,
    usual_norms,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment.config import SweepConfig
from superscopes_tl.model import (
    EMBED,
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    check_text,
    layer_name,
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
    """The address of one reading: the site that is read, the target layer and the α."""

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
        site = Site(reading.kind, int(reading.source_layer), int(reading.position))
        return cls.at(site, int(reading.target_layer), float(reading.alpha))

    @property
    def site(self) -> Site:
        """Where the vector is read."""
        kind: Any = self.kind
        return Site(kind, self.source_layer, self.position)

    @property
    def place(self) -> tuple[Site, int]:
        """The site and the target layer: cells of one place differ in α alone."""
        return self.site, self.target_layer


def target_layers(site: Site, target_layer: Literal["same"] | tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers into which the vector of a site is patched."""
    return (site.layer,) if target_layer == "same" else target_layer


def lay_out(
    sites: Sequence[Site], target_layer: Literal["same"] | tuple[int, ...], alphas: Sequence[float]
) -> tuple[Cell, ...]:
    """Return every cell of some sites: site, target layer, α."""
    places = ((site, into) for site in sites for into in target_layers(site, target_layer))
    return tuple(Cell.at(*place, alpha) for place in places for alpha in alphas)


READING_BYTES = 2000
"""The memory of a reading with its texts, measured on finished sweeps."""


class PlannedMemory(NamedTuple):
    """The memory that a sweep will take, in bytes.

    Attributes:
        vectors: v and f(v) of every site, in float32, on the CPU.
        kv_cache: of one batch, on the model's device.
        readings: the finished table; `evaluate` with a path keeps it on disk until the end.
    """

    vectors: int
    kv_cache: int
    readings: int


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """A checked sweep, ready to run.

    Attributes:
        model: the source model; the target model is the generator's.
        source: the source prompt's tokens.
        sites: where vectors are read.
        generator: patched generation from the target prompt.
        config: the settings, with target layers counted from 0 and a callable scorer.
        finished: cells that need not be computed again.
        abouts: the text that a reading at each position is scored against.
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
        """Where vectors are patched: layers from 0, `EMBED`, or "same" as the source layer."""
        layers: Any = self.config.target_layer
        if layers == "same":
            return "same"
        return tuple(EMBED if layer == "embed" else layer for layer in layers)

    @property
    def scorer(self) -> Scorer:
        """The scorer of the texts."""
        return as_scorer(self.config.scorer)

    def run(self, *, progress: bool = True) -> SweepResult:
        """Run the plan, by default beside a progress bar.

        Raises:
            SweepInterrupted: stopped by the user (a `KeyboardInterrupt`); its `partial` holds the
                finished cells.
            SweepError: an error during the run; its `partial` holds the finished cells.
        """
        from superscopes_tl.experiment.run import collect  # it imports this module

        return collect([self], progress=progress)

    def at_prompt(self, prompt: str) -> SweepPlan:
        """Return the same plan for another source prompt, with nothing finished."""
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
        with self.generator.model.lock:  # two threads should not both compute them
            found = words_of(self.generator, map(self.about, several), reference)
        return dict(zip(several, found, strict=True))

    @cached_property
    def activations(self) -> Float[Tensor, "sites d_model"]:
        """The activation of every site, in float32 on the CPU, from one forward pass."""
        return site_vectors(self.model, self.source, self.sites)

    @cached_property
    def norm_outliers(self) -> Mapping[Site, float]:
        """How many times as long each activation is as `usual_norms` of its kind and layer.

        Empty where vectors do not come from the sites, or the model has no usual norms.
        """
        if self.config.vectors is not None:
            return {}
        usual = usual_norms(self.model, (site.kind for site in self.sites))
        norms = self.activations.norm(dim=-1).tolist()
        return {
            site: norm / usual[site.kind, site.layer]
            for site, norm in zip(self.sites, norms, strict=True)
            if usual.get((site.kind, site.layer))
        }

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
        best = len({cell.place for cell in self.cells})
        return {"all": len(self.cells), "best": best, "none": 0}[self.config.generate]

    @property
    def mapping_name(self) -> str:
        """How f(v) is made, in words: the table's column `mapping`."""
        config = self.config
        parts = [
            label(config.mapping),
            config.vectors is not None and f"of {label(config.vectors)}",
            config.base is not None and f"from {label(config.base)}",
            config.unit == "residual" and "in residual norms",
            config.guide == "logits" and "on logits",
            config.write is not None and f"by {label(config.write)}",
            self.generator.model is not self.model and f"into {self.generator.model.name}",
        ]
        return ", ".join(part for part in parts if isinstance(part, str))

    @cached_property
    def memory(self) -> PlannedMemory:
        """The memory that the sweep will take, known before it starts."""
        generator, places = self.generator, len(self.all_cells) // len(self.alphas)
        copies = 3 + len(self.alphas)  # as read, the base, minus the base, and mapped with each α
        rows = generator.batch_size
        if self.config.generate != "all":
            rows = generator.grown_rows(generator.max_new_tokens)
        rows = min(rows, max(1, len(self.cells)))
        return PlannedMemory(
            vectors=4 * places * copies * generator.model.d_model,
            kv_cache=rows * bytes_per_row(generator.model, generator.row_length),
            readings=READING_BYTES * len(self.cells),
        )

    def check_memory(self, free: int | None = None) -> None:
        """Raise a `ValueError` for a sweep that does not fit into the free memory, in bytes."""
        free = free_bytes(torch.device("cpu")) if free is None else free
        needed = self.memory.vectors + self.memory.readings
        if self.generator.model.device.type == "cpu":
            needed += self.memory.kv_cache
        if needed > free:
            expected = f"a sweep within the {free / 1e9:.1f} GB of free memory"
            got = f"{needed / 1e9:.1f} GB for {len(self.sites)} sites x {len(self.alphas)} α"
            fix = "read fewer tokens at a time; evaluate(..., path=...) adds them to one file"
            raise bad_value("positions, layers, kinds, alphas", expected, got, fix)

    def estimate_seconds(self, per_batch: float | None = None) -> float:
        """Return the expected duration of generating the texts, from one timed batch.

        Scoring comes on top; texts that end early save time.

        Args:
            per_batch: the seconds of a batch, where they are known; defaults to timing one.
        """
        if not self.n_texts:
            return 0.0
        if per_batch is None:
            per_batch = self.generator.seconds_per_batch(self.n_texts)
        return per_batch * math.ceil(self.n_texts / self.generator.batch_size)

    def provenance(self) -> dict[str, Any]:
        """Return where the result comes from, as plain data."""
        target, other = self.generator.target, self.generator.model
        return {
            "superscopes_tl": version("superscopes-tl"),
            "python": platform.python_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.model.provenance(),
            "target_model": None if other is self.model else other.provenance(),
            "prompt": self.source.text,
            "tokens": {"ids": list(self.source.ids), "labels": list(self.source.labels)},
            "target_prompt": {
                **asdict(target.prompt),
                "ids": list(target.tokens.ids),
                "positions": list(target.positions),
            },
            "config": self._settings(),
            "planned_cells": len(self.all_cells),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the settings as plain data, the defaults filled in."""
        config, target_layer = self.config, cast("Any", self.config.target_layer)
        return {
            "layers": list(dict.fromkeys(site.layer for site in self.sites)),
            "kinds": list(dict.fromkeys(site.kind for site in self.sites)),
            "alphas": list(self.alphas),
            "positions": list(dict.fromkeys(site.position for site in self.sites)),
            "target_layer": target_layer if target_layer == "same" else list(target_layer),
            **{n: v if (v := getattr(config, n)) is None else label(v) for n in _NAMED},
            **{name: getattr(config, name) for name in _PLAIN},
            **{n: dict(v) if isinstance(v := getattr(config, n), Mapping) else v for n in _TEXTS},
            "controls": list(config.controls),
            "max_new_tokens": self.generator.max_new_tokens,
            "batch_size": self.generator.batch_size,
            "scorer": scorer_name(self.scorer),
            "scorer_weights": getattr(self.scorer, "weights", None),
            "decoding": f"sampled at temperature 1, {config.draw}" if config.draw else "greedy",
        }


_NAMED = ("mapping", "vectors", "base", "write")
_TEXTS = ("about", "reference")
_PLAIN = ("unit", "guide", "chat", "source_template", "generate", "draw", "others",
          "precision", "score_against", "score_on")  # fmt: skip
"""Settings that a provenance records by their names, and as they are."""


def _read_source(
    model: LanguageModel, prompt: str, config: SweepConfig
) -> tuple[TokenizedText, dict[int, str]]:
    """Return a source prompt's tokens, and what a reading at each position is scored against."""
    source = tokenize(model, prompt, chat=config.chat, template=config.source_template)
    abouts = named_positions(source, config.positions_of(prompt))
    if (about := config.about_of(prompt)) is not None:
        abouts = dict.fromkeys(abouts, about)
    return source, abouts


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
    kinds, layers = model.checked_kinds(config.kinds), check_layers(config.layers, model.n_layers)
    into: Any = config.target_layer
    numbers = target_model.checked_targets(layers if into == "same" else into)
    if target_model.d_model != model.d_model and config.vectors is None:
        expected = f"a model as wide as {model.name}, {model.d_model}"
        got = f"{target_model.name}, {target_model.d_model}"
        fix = "fit an affine map between the two: vectors=Mapped(fit_affine(...))"
        raise bad_value("target_model", expected, got, fix)
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
            precision=config.precision,
            until=description_is_over if config.score_on == "description" else None,
        ),
        config=replace(
            config,
            target_layer=into if into == "same" else tuple(map(layer_name, numbers)),
            scorer=scorer,
        ),
        abouts=abouts,
    )
    plan.check_memory()
    if isinstance(scorer, SentenceEmbeddingScorer) and config.generate != "none":
        scorer.load()  # last, because it takes seconds, and before anything is generated
    return plan
