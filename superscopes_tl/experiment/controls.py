"""Controls: the target prompt's text when the patched vector carries no meaning of the source.

1. A control makes, for each cell, another patch: same place, same model, but a vector that cannot
   know what the source token means (`make_control`). Other prompts are chosen among those that the
   model itself describes differently.
2. All controls of a batch are generated together, across prompts, equal ones once.
3. Their scores and texts become columns of the table: `random_direction` is the score, and
   `random_direction_text` the text. `unpatched_log_probability` has no text of its own: it is the
   log-probability of the *cell's* description when nothing is patched, in nats per token.

A score means something only beside its controls: a text in the target prompt's style has some
similarity to most prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from superscopes_tl.engine import (
    MANY_KINDS,
    PAPER_PROMPTS,
    Generation,
    Patch,
    PatchedGenerator,
    crop_description,
    no_patch,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment.cells import (
    Part,
    make_patches,
    mean,
    score_generations,
    score_readings,
)
from superscopes_tl.experiment.plan import Cell, SweepPlan
from superscopes_tl.experiment.store import Reading
from superscopes_tl.scores import words_of
from superscopes_tl.vectors import random_direction, stable_hash

SEED = 0
"""Chooses random directions, orders of dimensions and other prompts."""
OTHER_PROMPTS = tuple(dict.fromkeys((*PAPER_PROMPTS, *MANY_KINDS)))
"""The pool of other prompts."""


def _unpatched(part: Part) -> list[Patch]:
    """Patch nothing."""
    return [Patch(torch.zeros_like(patch.vector), None, seed=patch.seed) for patch in part.patches]


def _alpha_zero(part: Part) -> list[Patch]:
    """Patch f(v) at α = 0: a zero vector, or the base alone."""
    cells = [replace(cell, alpha=0.0) for cell in part.cells]
    return _found(part.plan.with_settings(alphas=0), cells, part.patches)


def _random_direction(part: Part) -> list[Patch]:
    """Patch a random direction of equal norm; one direction per site, for all α."""
    return _at_random(part, random_direction)


def _shuffled_dimensions(part: Part) -> list[Patch]:
    """Patch the vector's own numbers in another order: equal norm, equal outliers."""

    def shuffle(vector: Tensor, seed: int) -> Tensor:
        order = torch.Generator().manual_seed(seed)
        return vector[..., torch.randperm(vector.shape[-1], generator=order)]

    return _at_random(part, shuffle)


def _other_prompt(part: Part, number: int = 0) -> list[Patch]:
    """Patch the last token's vector of another prompt, one of `others`; same kind and layer."""
    made: list[Patch] = []
    pairs = zip(part.cells, part.patches, strict=True)
    for position, group in groupby(pairs, key=lambda pair: pair[0].position):
        mine, given = zip(*group, strict=True)
        other = other_prompts(part.plan, position, given)[number]
        there = part.plan.with_settings(positions=-1).at_prompt(other)
        last = there.sites[0].position
        made += _found(there, [replace(cell, position=last) for cell in mine], given)
    return made


def other_prompts(plan: SweepPlan, position: int, patches: Sequence[Patch]) -> list[str]:
    """Return other prompts that the model describes differently, chosen by a seed.

    Where two names have the same description, the vector of one is no control for the other. Where
    the patches hold several vectors, the other prompts have as many tokens.
    """
    about = plan.about(position)
    own = {plan.source.text.casefold(), about.casefold()}
    pool = [name for name in OTHER_PROMPTS if name.casefold() not in own]
    if (most := max(patch.vector[..., 0].numel() for patch in patches)) > 1:
        last = plan.with_settings(positions=-1)
        pool = [name for name in pool if len(last.at_prompt(name).source.own) >= most]
        if not pool:
            expected = f"controls for target prompts of up to {most - 1} placeholders"
            fix = "leave it out: no other prompt has as many tokens"
            raise bad_value("controls", expected, "other_prompt", fix)
    random.Random(_seed(plan)).shuffle(pool)
    mine, wanted = words_of(plan.generator, [about])[0].text, plan.config.others
    found: list[str] = []
    for start in range(0, len(pool), wanted + 1):
        names = pool[start : start + wanted + 1]
        words = words_of(plan.generator, names)
        found += [name for name, own in zip(names, words, strict=True) if own.text != mine]
        if len(found) >= wanted:
            return found[:wanted]
    return (found + pool * wanted)[:wanted]  # almost all have one description


_UNPATCHED_COLUMN = "unpatched_log_probability"

PATCH_CONTROLS: Mapping[str, Callable[[Part], list[Patch]]] = {
    "unpatched": _unpatched,
    "alpha_zero": _alpha_zero,
    "random_direction": _random_direction,
    "shuffled_dimensions": _shuffled_dimensions,
    "other_prompt": _other_prompt,
}

ControlPatches: TypeAlias = Mapping[str, Sequence[Sequence[Patch]]]
"""By control, one or several lists with a patch for each cell; only other prompts are several."""


def make_control(
    name: str, plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]
) -> list[Patch]:
    """Return a control's patch for each of some cells, given their own patches.

    The names are those of `CONTROLS` except `unpatched_log_probability`.
    """
    return PATCH_CONTROLS[name](Part(plan, cells, patches))


def control_patches(part: Part) -> ControlPatches:
    """Return the patches of all controls that the plan asks for."""
    found = {
        name: [PATCH_CONTROLS[name](part)]
        for name in part.plan.config.controls
        if name in PATCH_CONTROLS
    }
    if others := found.get("other_prompt"):
        others += [_other_prompt(part, number) for number in range(1, part.plan.config.others)]
    return found


def add_controls(
    parts: Sequence[Part],
    controls: Sequence[ControlPatches],
    generations: Sequence[Generation],
    readings: Sequence[Reading],
) -> list[Reading]:
    """Return the readings of all parts with their controls' texts and scores.

    The plans of the parts differ in their prompts and draws alone; their controls are generated in
    one batch.
    """
    generator = parts[0].plan.generator
    patches = [patch for made in controls for several in made.values() for patch in several[0]]
    texts = iter(generator.generate(patches))
    with_unpatched = _UNPATCHED_COLUMN in parts[0].plan.config.controls
    likely = iter(_unpatched_log_probabilities(generator, generations) if with_unpatched else [])
    rows: list[dict[str, float | str]] = []
    for part, made in zip(parts, controls, strict=True):
        columns: dict[str, Sequence[Any]] = {}
        for name in made:
            own = [next(texts) for _ in part.cells]
            columns[name] = score_generations(part, own)
            columns[f"{name}_text"] = [generation.text for generation in own]
        if with_unpatched:
            columns[_UNPATCHED_COLUMN] = [next(likely) for _ in part.cells]
        rows += [
            {name: column[row] for name, column in columns.items()}
            for row in range(len(part.cells))
        ]
    return [replace(r, controls=row) for r, row in zip(readings, rows, strict=True)]


def rescored(plan: SweepPlan, readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings, their controls included, with the scores of the plan's scorer."""
    cells = [Cell.of(reading) for reading in readings]

    def scores(texts: Sequence[str]) -> list[float]:
        return score_readings(plan, cells, texts, [crop_description(text) for text in texts])

    own = scores([reading.text for reading in readings])
    columns = {
        name: scores([str(reading.controls.get(f"{name}_text", "")) for reading in readings])
        for name in plan.config.controls
        if name in PATCH_CONTROLS
    }
    found = []
    for row, reading in enumerate(readings):
        judged = {name: column[row] for name, column in columns.items()}
        found.append(replace(reading, score=own[row], controls={**reading.controls, **judged}))
    return found


def _unpatched_log_probabilities(
    generator: PatchedGenerator, generations: Sequence[Generation]
) -> list[float]:
    """Return the log-probability of each description without a patch, in nats per token."""
    texts = [g.token_ids[: g.n_description_tokens] for g in generations]
    unpatched = [no_patch(generator.model)] * len(texts)
    return [mean(likely) for likely in generator.log_probabilities(unpatched, texts)]


def _found(plan: SweepPlan, cells: Sequence[Cell], patches: Sequence[Patch]) -> list[Patch]:
    """Return the patches of some cells of another plan, with the seeds of the given ones."""
    part = plan.only(cells)
    made = dict(zip(part.cells, make_patches(part), strict=True))
    return [replace(made[cell], seed=p.seed) for cell, p in zip(cells, patches, strict=True)]


def _at_random(part: Part, change: Callable[[Tensor, int], Tensor]) -> list[Patch]:
    """Return the patches with their vectors changed by a seed of their places."""
    return [
        replace(patch, vector=change(patch.vector, _seed(part.plan, *cell.place)))
        for cell, patch in zip(part.cells, part.patches, strict=True)
    ]


def _seed(plan: SweepPlan, *place: object) -> int:
    """Return a seed that differs between prompts and places and is the same in every run."""
    return stable_hash(SEED, plan.source.text, *place)
