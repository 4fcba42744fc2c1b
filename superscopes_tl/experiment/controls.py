"""Controls: what a cell's place would say without the cell's meaning.

1. A control makes, for each cell, another patch: same place, same model, but a vector that cannot
   know what the source token means (`make_control`). Other prompts are those of which the model
   itself says something else.
2. All controls of a batch are generated together, across prompts, identical ones once.
3. Their scores and texts become columns of the table: `random_direction` is the score, and
   `random_direction_text` what was written. `unpatched_log_probability` has no text of its own:
   it is how likely the *cell's* description is when nothing is patched, in nats per token.

A score says something only beside its controls: a text in the target prompt's style has some
similarity to most prompts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from superscopes_tl.engine import MANY_KINDS, PAPER_PROMPTS, Patch, crop_description, tokens_told
from superscopes_tl.experiment.cells import Part, make_patches, mean, score_readings
from superscopes_tl.experiment.plan import Cell, SweepPlan
from superscopes_tl.experiment.results import Reading
from superscopes_tl.hashing import stable_hash
from superscopes_tl.scores import words_of
from superscopes_tl.vectors import random_direction

SEED = 0
"""Chooses random directions, orders of dimensions and other prompts."""
OTHER_PROMPTS = tuple(dict.fromkeys((*PAPER_PROMPTS, *MANY_KINDS)))
"""What the other prompts are chosen from."""


def _unpatched(plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]) -> list[Patch]:
    """Patch nothing: what the target prompt says by itself."""
    return [Patch(torch.zeros_like(patch.vector), None, seed=patch.seed) for patch in patches]


def _alpha_zero(plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]) -> list[Patch]:
    """Patch f(v) at α = 0: a zero vector, or the base alone."""
    at_zero = replace(plan, alphas=(0.0,), finished=frozenset())
    return _found(at_zero, [replace(cell, alpha=0.0) for cell in cells], patches)


def _random_direction(
    plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]
) -> list[Patch]:
    """Patch a random direction of equal norm; one direction per site, for all α."""
    return _at_random(plan, cells, patches, random_direction)


def _shuffled_dimensions(
    plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]
) -> list[Patch]:
    """Patch the vector's own numbers in another order: equal norm, equal outliers."""

    def shuffle(vector: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return vector[..., torch.randperm(vector.shape[-1], generator=generator)]

    return _at_random(plan, cells, patches, shuffle)


def _other_prompt(plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]) -> list[Patch]:
    """Patch the last token's vector of another prompt, same kind and layer."""
    return other_patches(plan, cells, patches, 0)


def other_patches(
    plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch], number: int
) -> list[Patch]:
    """Patch the last token's vector of another prompt, same kind and layer.

    Args:
        plan: the sweep.
        cells: some of its cells.
        patches: what these cells patch.
        number: which of the other prompts, of which there are `SweepConfig.others`.
    """
    made: list[Patch] = []
    for position, group in groupby(
        zip(cells, patches, strict=True), key=lambda pair: pair[0].position
    ):
        mine, given = zip(*group, strict=True)
        other = _other_names(plan, position)[number]
        there = replace(plan, config=replace(plan.config, positions=-1)).at_prompt(other)
        last = there.sites[0].position
        wanted = [replace(cell, position=last) for cell in mine]
        made += _found(there, wanted, given)
    return made


def _other_names(plan: SweepPlan, position: int) -> list[str]:
    """Return other prompts of which the model says something else; chosen by a seed.

    Where the model says the same of two names, the vector of one is no control for the other.
    """
    about = plan.about(position)
    own = {plan.source.text.casefold(), about.casefold()}
    pool = [name for name in OTHER_PROMPTS if name.casefold() not in own]
    random.Random(_seed(plan)).shuffle(pool)
    mine, wanted = words_of(plan.generator, [about])[0].text, plan.config.others
    found: list[str] = []
    for start in range(0, len(pool), wanted + 1):
        names = pool[start : start + wanted + 1]
        words = words_of(plan.generator, names)
        found += [name for name, own in zip(names, words, strict=True) if own.text != mine]
        if len(found) >= wanted:
            return found[:wanted]
    return (found + pool * wanted)[:wanted]  # it says the same of almost everything


_LIKELY = "unpatched_log_probability"

Control = Callable[[SweepPlan, Sequence[Cell], Sequence[Patch]], list[Patch]]

PATCH_CONTROLS: Mapping[str, Control] = {
    "unpatched": _unpatched,
    "alpha_zero": _alpha_zero,
    "random_direction": _random_direction,
    "shuffled_dimensions": _shuffled_dimensions,
    "other_prompt": _other_prompt,
}


def make_control(
    name: str, plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]
) -> list[Patch]:
    """Return a control's patch for each cell.

    Args:
        name: out of `config.CONTROLS`, but not `unpatched_log_probability`.
        plan: the sweep.
        cells: some of its cells.
        patches: what these cells patch.
    """
    return PATCH_CONTROLS[name](plan, cells, patches)


def add_controls(parts: Sequence[Part], readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings with the controls, generated in one go for all parts of a batch.

    Args:
        parts: of plans that differ in their prompts and draws alone.
        readings: those of all parts, one behind the other.
    """
    asked = parts[0].plan.config.controls
    names = [name for name in asked if name in PATCH_CONTROLS]
    made = [
        patch
        for part in parts
        for name in names
        for patch in make_control(name, part.plan, part.cells, part.patches)
    ]
    written = iter(parts[0].plan.generator.generate(made))
    likely = iter(_likely(parts, readings) if _LIKELY in asked else ())
    rows: list[dict[str, float | str]] = []
    for part in parts:
        columns: dict[str, Sequence[Any]] = {}
        for name in names:
            texts = [next(written).text for _ in part.cells]
            cropped = list(map(crop_description, texts))
            columns[name] = score_readings(part.plan, part.cells, texts, cropped)
            columns[f"{name}_text"] = texts
        if _LIKELY in asked:
            columns[_LIKELY] = [next(likely) for _ in part.cells]
        rows += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    return [replace(r, controls=row) for r, row in zip(readings, rows, strict=True)]


def rescored(plan: SweepPlan, readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings, their controls included, as the plan's scorer judges them."""
    cells = [Cell.of(reading) for reading in readings]

    def scores(texts: Sequence[str]) -> list[float]:
        return score_readings(plan, cells, texts, [crop_description(text) for text in texts])

    own = scores([reading.text for reading in readings])
    columns = {
        name: scores([str(reading.controls.get(f"{name}_text", "")) for reading in readings])
        for name in plan.config.controls
        if name in PATCH_CONTROLS
    }
    return [
        replace(
            reading,
            score=own[row],
            controls={
                **reading.controls,
                **{name: column[row] for name, column in columns.items()},
            },
        )
        for row, reading in enumerate(readings)
    ]


def _likely(parts: Sequence[Part], readings: Sequence[Reading]) -> Iterator[float]:
    """Yield how likely each reading's description is without the patch, in nats per token."""
    plan = parts[0].plan
    tokenizer = plan.generator.model.tokenizer
    generations = [generation for part in parts for generation in part.generations]
    told = [
        generation.token_ids[: tokens_told(tokenizer, generation, reading.description)]
        for generation, reading in zip(generations, readings, strict=True)
    ]
    # The same text behind the same unpatched prompt needs no second run.
    distinct = [ids for ids in dict.fromkeys(told) if ids]
    unpatched = _unpatched(plan, (), [patch for part in parts for patch in part.patches])
    likely = plan.generator.log_probabilities(unpatched[: len(distinct)], distinct)
    found = dict(zip(distinct, map(mean, likely), strict=True))
    return (found.get(ids, math.nan) for ids in told)


def _found(plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]) -> list[Patch]:
    """Return the patches of some cells of another plan, drawn as the given ones are."""
    wanted = set(cells)
    part = replace(plan, finished=frozenset(cell for cell in plan.all_cells if cell not in wanted))
    made = dict(zip(part.cells, make_patches(part), strict=True))
    return [replace(made[cell], seed=p.seed) for cell, p in zip(cells, patches, strict=True)]


def _at_random(
    plan: SweepPlan,
    cells: Sequence[Cell],
    patches: Sequence[Patch],
    change: Callable[[Tensor, int], Tensor],
) -> list[Patch]:
    return [
        replace(patch, vector=change(patch.vector, _seed(plan, *cell.place)))
        for cell, patch in zip(cells, patches, strict=True)
    ]


def _seed(plan: SweepPlan, *place: object) -> int:
    """Return a seed that differs between prompts and places and is the same in every run."""
    return stable_hash(SEED, plan.source.text, *place)
