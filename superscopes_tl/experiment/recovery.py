"""How much of the model's own words each cell recovers, and each control in its place.

1. Ask for the own words of every token that is read (`own_words`), once.
2. Take log p(own words) behind every cell's patch and every control's, of a whole batch in one
   teacher-forced pass: nothing is generated.
3. `recovered` is the share of the gap between the plain and the unpatched prompt. A control that
   was asked for adds a column: `random_direction_recovered`, say. For `other_prompt` it is the mean
   over several other prompts' vectors, and `specific` is what is left above it: late layers recover
   something of anything, since any entity's vector says that a description follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from superscopes_tl.engine import Patch
from superscopes_tl.experiment.cells import Part, mean
from superscopes_tl.experiment.controls import PATCH_CONTROLS, make_control, other_patches
from superscopes_tl.experiment.results import Reading
from superscopes_tl.scores import OwnWords

SPECIFIC = "specific"


def add_recovered(parts: Sequence[Part], readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings with what they recover, and what their controls recover.

    Args:
        parts: of plans that differ in their prompts and draws alone.
        readings: those of all parts, one behind the other.
    """
    own = [part.plan.own_words(cell.position for cell in part.cells) for part in parts]
    words = [found[cell.position] for part, found in zip(parts, own, strict=True)
             for cell in part.cells]  # fmt: skip
    columns = {name: list(patches) for name, patches in _columns(parts)}
    wanted = [
        (patch, one)
        for patches in columns.values()
        for patch, one in zip(patches, words, strict=True)
        if not one.undefined
    ]
    likely = iter(
        parts[0].plan.generator.log_probabilities(
            # A draw has a seed, which known texts do not care about.
            [replace(patch, seed=None) for patch, _ in wanted],
            [one.token_ids for _, one in wanted],
        )
    )
    shares = {
        name: [math.nan if one.undefined else one.recovered(sum(next(likely))) for one in words]
        for name in columns
    }
    asked = parts[0].plan.config.controls
    return [
        _with_shares(reading, one, {name: column[row] for name, column in shares.items()}, asked)
        for row, (reading, one) in enumerate(zip(readings, words, strict=True))
    ]


def _columns(parts: Sequence[Part]) -> Iterator[tuple[str, Iterator[Patch]]]:
    """Yield, by name, a patch for each cell: its own, and those of its controls."""

    def of_all(name: str, number: int = 0) -> Iterator[Patch]:
        for part in parts:
            given = (part.plan, part.cells, part.patches)
            if name == "recovered":
                yield from part.patches
            elif name == "other_prompt":
                yield from other_patches(*given, number)
            else:
                yield from make_control(name, *given)

    yield "recovered", of_all("recovered")
    for name in parts[0].plan.config.controls:
        if name == "other_prompt":
            for number in range(parts[0].plan.config.others):
                yield f"{name} {number}", of_all(name, number)
        elif name in PATCH_CONTROLS and name != "unpatched":
            yield name, of_all(name)


def _with_shares(
    reading: Reading, words: OwnWords, shares: dict[str, float], asked: Sequence[str]
) -> Reading:
    """Return a reading with its share and those of its controls."""
    own = shares["recovered"]
    controls = {f"{name}_recovered": shares[name] for name in asked if name in shares}
    if "unpatched" in asked:
        controls["unpatched_recovered"] = math.nan if words.undefined else 0.0  # by definition
    if "other_prompt" in asked:
        others = mean([share for name, share in shares.items() if name.startswith("other_prompt ")])
        controls |= {"other_prompt_recovered": others, SPECIFIC: own - others}
    return replace(
        reading,
        recovered=own,
        own_words=words.text,
        plain_nats=words.plain_nats,
        unpatched_nats=words.unpatched_nats,
        controls={**reading.controls, **controls},
    )
