"""Relevancy scores: the effect of the vector on each generated token (SelfIE, Chen et al. 2024).

1. Generate the text of every cell, in shared batches.
2. Compute each token's probability given the preceding text, with the patch and without it.
3. The relevancy of a token is the difference of the two probabilities: near 1 the vector causes
   the token, near 0 it makes no difference, below 0 it makes the token less likely.
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
        unpatched: its log-probability without the patch, after the same text.
    """

    token: str
    patched: float
    unpatched: float

    @property
    def raised(self) -> float:
        """The change of the probability by the patch, in powers of ten."""
        return (self.patched - self.unpatched) / math.log(10)

    @property
    def relevancy(self) -> float:
        """The probability with the patch minus that without it."""
        return math.exp(self.patched) - math.exp(self.unpatched)


def token_effects(
    generator: PatchedGenerator, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
) -> list[tuple[TokenEffect, ...]]:
    """Return the effect of each patch on the tokens of its text, which is given as token ids."""
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
        A row per token: the columns that name the cell, `step` (0 is the first token),
        `generated_token`, `probability`, `unpatched_probability` and `relevancy`.

    Raises:
        TypeError: neither a plan nor a result with one; a loaded result has none.
        ValueError: a cell outside the plan.
    """
    plan = result.plan if isinstance(result, SweepResult) else result
    if not isinstance(plan, SweepPlan):
        raise bad_type("result", "a result with a plan, or a plan", result, "pass plan_sweep(...)")
    chosen = frozenset(plan.all_cells)
    if rows is not None:
        named: Any = rows.itertuples(index=False)
        cells, fix = frozenset(map(Cell.of, named)), "pass rows of the table of its sweep"
        own = {"prompt": plan.source.text, "mapping": plan.mapping_name, "draw": plan.config.draw}
        for column, value in own.items():
            if others := set(rows.get(column, ())) - {value}:
                raise bad_value("rows", f"rows of the plan's {column} {value!r}", others, fix)
        if outside := cells - chosen:
            raise bad_value("rows", "cells of the plan", next(iter(outside)), fix)
        chosen = cells
    part = plan.only(chosen)
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
    """Return the text that each token adds; some characters span several tokens."""
    texts = [
        tokenizer.decode(list(token_ids[:end]), clean_up_tokenization_spaces=False)
        for end in range(len(token_ids) + 1)
    ]
    return [b[len(a) :] if b.startswith(a) else b[-1:] for a, b in pairwise(texts)]
