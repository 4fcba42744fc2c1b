"""The share of the model's own words that each cell recovers, and its controls.

1. Take the own words of every token that is read (`own_words`), once.
2. Compute log p(own words) after the patches of every cell and control, a whole batch in one
   teacher-forced pass: nothing is generated.
3. `recovered` is the share of the gap between the plain and the unpatched prompt. A control adds a
   column, such as `random_direction_recovered`. For `other_prompt` it is the mean over several
   other prompts' vectors, and `specific` the difference to it: late layers always recover
   something, since any entity's vector says that a description follows.
4. A patch that leaves the log-probability of the own words as it is has changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from superscopes_tl.engine import Patch
from superscopes_tl.experiment.cells import Part, mean
from superscopes_tl.experiment.controls import ControlPatches
from superscopes_tl.experiment.store import Reading
from superscopes_tl.scores import OwnWords

SPECIFIC = "specific"
LEAST_CHANGE = 1e-4
"""A smaller change of the own words' log-probability, in nats, is that of the arithmetic."""


def add_recovered(
    parts: Sequence[Part], controls: Sequence[ControlPatches], readings: Sequence[Reading]
) -> list[Reading]:
    """Return the readings of all parts with their shares recovered, and their controls'.

    The plans of the parts differ in their prompts and draws alone.
    """
    words = []
    for part in parts:
        own = part.plan.own_words(cell.position for cell in part.cells)
        words += [own[cell.position] for cell in part.cells]
    columns: dict[str, list[list[Patch]]] = {
        "recovered": [[patch for part in parts for patch in part.patches]]
    }
    for name in controls[0]:
        if name != "unpatched":  # recovers nothing, by definition
            # Of several parts one after the other, for each of several other prompts.
            columns[name] = [
                list(chain(*one)) for one in zip(*(made[name] for made in controls), strict=True)
            ]
    generator = parts[0].plan.generator
    scored = [
        # Known texts depend on no seed.
        (replace(patch, seed=None), one.token_ids)
        for several in columns.values()
        for patches in several
        for patch, one in zip(patches, words, strict=True)
        if not one.undefined
    ]
    likely = iter(generator.log_probabilities([p for p, _ in scored], [ids for _, ids in scored]))
    shares: dict[str, list[float]] = {}
    for name, several in columns.items():
        table = [
            [math.nan if one.undefined else one.recovered(sum(next(likely))) for one in words]
            for _ in several
        ]
        shares[name] = [mean(column) for column in zip(*table, strict=True)]
    if "unpatched" in controls[0]:
        shares["unpatched"] = [math.nan if one.undefined else 0.0 for one in words]
    return [
        replace(
            reading,
            recovered=shares["recovered"][row],
            own_words=one.text,
            plain_nats=one.plain_nats,
            unpatched_nats=one.unpatched_nats,
            unchanged=reading.unchanged or _same(one, shares["recovered"][row]),
            controls={**reading.controls, **_columns(shares, row)},
        )
        for row, (reading, one) in enumerate(zip(readings, words, strict=True))
    ]


def _same(words: OwnWords, share: float) -> bool:
    """Return whether a share recovered is none at all; False where it is not defined."""
    return abs(share * (words.plain_nats - words.unpatched_nats)) < LEAST_CHANGE


def _columns(shares: dict[str, list[float]], row: int) -> dict[str, float]:
    """Return the shares that the controls of a row recover, by the table's column."""
    found = {f"{name}_recovered": column[row] for name, column in shares.items()}
    own = found.pop("recovered_recovered")
    if "other_prompt_recovered" in found:
        found[SPECIFIC] = own - found["other_prompt_recovered"]
    return found
