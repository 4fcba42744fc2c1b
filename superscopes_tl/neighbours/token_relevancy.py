"""How much each token of a reading owes to the vector (SelfIE, Chen et al. 2024).

1. Write the text of every cell, in common batches.
2. Ask how likely each of its tokens is behind the patch, and behind the same prompt unpatched.
3. The relevancy of a token is the difference of the two probabilities: near 1 it is there because
   of the vector, near 0 it would have come anyway, below 0 it came in spite of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pandas as pd

from superscopes_tl.engine import Patch, PatchedGenerator
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment import SITE, Cell, SweepPlan, SweepResult, make_patches


@dataclass(frozen=True)
class TokenEffect:
    """One token of a cell's text.

    Attributes:
        token: the token as text.
        patched: its log-probability with the patch.
        unpatched: the same without, behind the same text.
    """

    token: str
    patched: float
    unpatched: float

    @property
    def raised(self) -> float:
        """By how many powers of ten the patch raised the probability."""
        return (self.patched - self.unpatched) / math.log(10)

    @property
    def relevancy(self) -> float:
        """The probability with the patch minus that without."""
        return math.exp(self.patched) - math.exp(self.unpatched)


def token_effects(
    generator: PatchedGenerator, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
) -> list[tuple[TokenEffect, ...]]:
    """Return what the patches did to the tokens of some texts, one text per patch.

    Args:
        generator: what the patches are written with.
        patches: one per text.
        texts: token ids.
    """
    bare = [replace(patch, target_layer=None, guidance=1.0) for patch in patches]
    likely = generator.log_probabilities([*patches, *bare], [*texts, *texts])
    return [
        tuple(map(TokenEffect, _pieces(generator.model.tokenizer, text), with_it, without))
        for text, with_it, without in zip(
            texts, likely[: len(texts)], likely[len(texts) :], strict=True
        )
    ]


def relevancy(result: SweepResult | SweepPlan, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the relevancy score of every token of every reading.

    Example:
        >>> result = sweep(model, "Pearl Jam", layers=5, write=Add())  # doctest: +SKIP
        >>> relevancy_heatmap(relevancy(result, result.best()))  # doctest: +SKIP

    Args:
        result: of a sweep in this session, or the plan of one.
        rows: rows of its table, such as `result.best()`; defaults to all cells.

    Returns:
        A row per token. Columns: those that name the cell, `step` (0 is the first token),
        `generated_token`, `probability`, `unpatched_probability` and `relevancy`.

    Raises:
        TypeError: neither a plan nor a result that has one, as a loaded result does not.
        ValueError: a cell that is none of the plan's.
    """
    plan = result.plan if isinstance(result, SweepResult) else result
    if not isinstance(plan, SweepPlan):
        raise bad_type("result", "a result with a plan, or a plan", result, "pass plan_sweep(...)")
    every = frozenset(plan.all_cells)
    named: Any = () if rows is None else rows.itertuples(index=False)
    wanted = every if rows is None else frozenset(map(Cell.of, named))
    own = {"prompt": plan.source.text, "mapping": plan.mapping_name, "draw": plan.config.draw}
    for column, value in own.items():
        there = () if rows is None else rows.get(column, ())
        if others := set(there) - {value}:
            raise bad_value(
                "rows", f"rows with {column} {value!r}, as the plan has it", others,
                "pass rows of the table of its sweep",
            )  # fmt: skip
    if not wanted <= every:
        raise bad_value(
            "rows", "cells of the plan", next(iter(wanted - every)),
            "pass rows of the table of its sweep",
        )  # fmt: skip
    part = plan.only(wanted)
    patches = make_patches(part)
    texts = [generation.token_ids for generation in plan.generator.generate(patches)]
    found = [
        (
            plan.source.text, cell.position, cell.kind, cell.source_layer, cell.target_layer,
            plan.mapping_name, plan.source.labels[cell.position], cell.alpha, step, effect.token,
            math.exp(effect.patched), math.exp(effect.unpatched), effect.relevancy,
        )
        for cell, effects in zip(
            part.cells, token_effects(plan.generator, patches, texts), strict=True
        )
        for step, effect in enumerate(effects)
    ]  # fmt: skip
    scores = ["step", "generated_token", "probability", "unpatched_probability", "relevancy"]
    return pd.DataFrame(found, columns=[*SITE, "token", "alpha", *scores])


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds: some characters take more than one token."""
    texts = [
        tokenizer.decode(list(token_ids[:end]), clean_up_tokenization_spaces=False)
        for end in range(len(token_ids) + 1)
    ]
    return [b[len(a) :] if b.startswith(a) else b[-1:] for a, b in pairwise(texts)]
