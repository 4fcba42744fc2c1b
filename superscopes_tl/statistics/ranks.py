"""Which prompt is it? Recall@1 and MRR of the right prompt among all prompts.

A similarity or a share recovered says how close a reading is to its own prompt. Retrieval asks
whether it is closer to its own than to any other: SelfIE adapters are evaluated so, by text
embeddings among 50,000 topics (agencyenterprise/selfie-adapters, `evals/embedding_retrieval`).

1. `scores[s, r]` is how well the reading of source prompt s fits reference prompt r; the diagonal
   is right. It is the similarity of the text to r (also in `compare`), or the share that s's vector
   recovers of r's own words, which needs no text and no second model.
2. Rank the references within each row. Recall@1 is the share of rows whose own reference is first;
   MRR the mean of 1 / its rank. Ties count as if ordered at random. An own score that is missing is
   never found, any other that is missing is never in the way.
3. By chance, with n prompts, recall@1 is 1/n and MRR (1 + 1/2 + ... + 1/n)/n: exactly, for any
   scores, if the rows are assigned to the prompts at random and no score is missing.
4. Intervals are percentile bootstraps over source prompts, all references kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import Cell, SweepPlan, make_patches, plan_sweep
from superscopes_tl.model import LanguageModel
from superscopes_tl.scores import similarities
from superscopes_tl.statistics.chance import bootstrap

Scores = Float[np.ndarray, "source reference"]
FOUND = ("recall_at_1", "mrr")
"""The columns of what is found, by the names of the measures."""


def found_ranks(scores: Scores) -> Float[np.ndarray, "source 2"]:
    """Return, per source prompt, whether its own reference ranks first, and 1 / its rank.

    Of t references that tie for the ranks k to k + t - 1, each has every one of them with
    probability 1/t.

    Raises:
        ValueError: not as many references as sources, or fewer than two.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        expected = "one row and one column for each of at least two prompts"
        raise bad_value("scores", expected, f"shape {scores.shape}", "add prompts")
    own = np.diagonal(scores)[:, None]
    above, ties = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    upto = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(scores) + 1))])
    there = np.maximum(ties, 1)  # a missing score equals nothing, not even itself
    found = np.stack([(above == 0) / there, (upto[above + ties] - upto[above]) / there], axis=1)
    return np.where(ties[:, None] > 0, found, 0.0)


def found_by_chance(prompts: int) -> tuple[float, float]:
    """Return recall@1 and MRR of readings that are assigned to the prompts at random."""
    return 1 / prompts, float(np.sum(1 / np.arange(1, prompts + 1))) / prompts


def summary(scores: Scores, *, resamples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Return recall@1 and MRR with their intervals, and what they are by chance."""
    found = found_ranks(scores)
    ends = zip(*bootstrap(found, resamples=resamples, seed=seed), strict=True)
    row: dict[str, float] = {"prompts": len(scores)}
    for name, mean, (low, high), chance in zip(
        FOUND, found.mean(axis=0), ends, found_by_chance(len(scores)), strict=True
    ):
        row |= {name: mean, f"{name}_low": low, f"{name}_high": high, f"chance_{name}": chance}
    return row


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How often readings find their own prompt among all.

    Attributes:
        table: a row per cell and score: `by` ("recovered" or "similarity"), `kind`,
            `source_layer`, `target_layer`, `alpha`, the number of `prompts`, `recall_at_1` and
            `mrr` with the ends `_low` and `_high` of their 95 % intervals, and
            `chance_recall_at_1` and `chance_mrr`.
        scores: by score, the matrix of every cell, in the order of the table.
        prompts: the prompts, rows and columns of a matrix.
        left_out: prompts whose share recovered is not defined.
    """

    table: pd.DataFrame
    scores: Mapping[str, Float[np.ndarray, "cell source reference"]]
    prompts: tuple[str, ...]
    left_out: tuple[str, ...]


def retrieval(
    model: LanguageModel | Any,
    prompts: Sequence[str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    **settings: Any,
) -> Retrieval:
    """Find the right prompt among all, by what each vector recovers and by what it says.

    Every cell of n prompts scores n² known texts, one forward pass each, and writes n texts.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompts: the source prompts, each read at one token.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        **settings: sweep settings. `generate="none"` writes no texts and leaves out "similarity",
            which is that of `scorer` and `score_against`.

    Raises:
        ValueError, TypeError: a bad setting, several tokens per prompt, or fewer than two prompts
            whose share recovered is defined.
    """
    plans = _plans(model, prompts, settings)
    generator = plans[0].generator
    everyone = [next(iter(plan.own_words([plan.cells[0].position]).values())) for plan in plans]
    kept = [number for number, words in enumerate(everyone) if not words.undefined]
    if len(kept) < 2:
        why = "; ".join(words.undefined for words in everyone if words.undefined)
        expected = "at least two prompts whose share recovered is defined"
        raise bad_value("prompts", expected, why or prompts, "add prompts, or pass reference=...")
    plans, words = [plans[n] for n in kept], [everyone[n] for n in kept]
    patches = [patch for plan in plans for patch in make_patches(plan)]  # source, then cell
    known = [replace(patch, seed=None) for patch in patches for _ in words]
    texts = [one.token_ids for _ in patches for one in words]
    nats = np.array([sum(likely) for likely in generator.log_probabilities(known, texts)])
    shape = (len(plans), len(plans[0].cells), len(words))
    gaps, unpatched = ([getattr(w, name) for w in words] for name in ("gap", "unpatched_nats"))
    scores = {"recovered": ((nats.reshape(shape) - unpatched) / gaps).swapaxes(0, 1)}
    config = plans[0].config
    if config.generate != "none":
        written = generator.generate(patches)
        judged = [t.description if config.score_on == "description" else t.text for t in written]
        against = [
            one.text if config.score_against == "own words" else plan.about(plan.cells[0].position)
            for plan, one in zip(plans, words, strict=True)
        ]
        alike = similarities(plans[0].scorer, judged, against)
        scores["similarity"] = alike.reshape(shape).swapaxes(0, 1)
    cells = [_where(cell) for cell in plans[0].cells]
    rows = [
        {"by": by, **cell, **summary(matrix, resamples=resamples, seed=seed)}
        for by, matrices in scores.items()
        for cell, matrix in zip(cells, matrices, strict=True)
    ]
    names = tuple(plan.source.text for plan in plans)
    left_out = tuple(dict.fromkeys(prompts))
    return Retrieval(
        pd.DataFrame(rows), scores, names, tuple(name for name in left_out if name not in names)
    )


def _plans(model: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[SweepPlan]:
    """Return a plan for each prompt, all with the same cells but for the token."""
    distinct = [] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise bad_value("prompts", "at least two prompts", prompts, "PAPER_PROMPTS, for example")
    first = plan_sweep(model, distinct[0], **settings)
    plans = [first, *map(first.at_prompt, distinct[1:])]
    for plan in plans:
        if (n := len({cell.position for cell in plan.cells})) != 1:
            got = f"{n} tokens of {plan.source.text}"
            raise bad_value("positions", "one token of each prompt", got, "leave it out")
    return plans


def _where(cell: Cell) -> dict[str, Any]:
    names = ("kind", "source_layer", "target_layer", "alpha")
    return {name: getattr(cell, name) for name in names}
