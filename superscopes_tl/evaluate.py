"""The experiments of the paper's section 4, live and over many prompts.

1. Make a plan per prompt (and per extra draw); leave out the cells that the file already holds.
2. Fill batches across prompts, generate, score, and compute the controls that are asked for.
3. Write each finished batch to the file; a stopped run goes on where it was.
4. `methods` names the parts of the table that are compared: Patchscopes is α = 1, Superscopes any
   other α, and Patchscopes with equal budget has as many readings as Superscopes, one greedy and
   the others drawn.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from superscopes_tl.cells import Part, make_patches
from superscopes_tl.config import CONTROLS, SweepConfig
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.evaluation import Evaluation, EvaluationFile
from superscopes_tl.models import LanguageModel
from superscopes_tl.patching import Patch
from superscopes_tl.plan import Cell, SweepPlan, plan_sweep
from superscopes_tl.prompts import PAPER_PROMPTS
from superscopes_tl.results import Reading
from superscopes_tl.sweep import read_batch

MLP_OUTPUTS = SweepConfig(layers=range(1, 8), kinds="mlp_out", target_layer="same", score_on="text")
"""Section 4.1: MLP outputs of layers 1 to 7, patched into the same layer; the default."""

FINE_ALPHAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15)

HIDDEN_STATES = SweepConfig(
    kinds="resid_post", alphas=FINE_ALPHAS, target_layer="same", score_on="text"
)
"""Section 4.2: block outputs over "a wider range" of α, at every layer."""

Work = tuple[SweepPlan, Cell, Patch]


def evaluate(
    model: LanguageModel | Any,
    prompts: Sequence[str] = PAPER_PROMPTS,
    path: str | os.PathLike[str] | None = None,
    config: SweepConfig = MLP_OUTPUTS,
    *,
    draws: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Read many prompts as one sweep would read each of them.

    With a `path`, finished batches are written to that file, and cells that it holds already are
    not computed again: call it once more to go on with a run that was stopped, or with more
    prompts, layers, α or mappings to extend it. The result holds everything in the file.

    Example:
        >>> found = evaluate("mini", PAPER_PROMPTS[:8])  # doctest: +SKIP
        >>> compare(methods(found)).lines()  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes.
        prompts: the source prompts; the paper's 48 unless given.
        path: the file of the experiment; kept in memory alone unless given.
        config: the settings; those of section 4.1 unless given.
        draws: that many more readings of α = 1, drawn at temperature 1: the equal-budget baseline.
            As many as give α = 1 the budget of all other α together, unless given; 0 for none.
        progress: whether to show a progress bar.
        **settings: fields of `SweepConfig` to change in `config`.

    Raises:
        ValueError, TypeError: a bad setting, or a file of another experiment.
        OSError: the file cannot be written; what it holds is kept.
    """
    several = check_prompts(prompts)
    first = plan_sweep(model, several[0], replace(config, **settings))
    if draws is None:
        draws = max(0, len(first.alphas) - 2) if 1 in first.alphas else 0
    check_count("draws", draws, least=0, fix="4 more readings make 5, as many as the paper's α")
    with contextlib.closing(EvaluationFile(path, first)) as file:
        plans = [
            replace(plan, finished=file.finished(plan))
            for prompt in several
            for plan in _plans(first, prompt, draws)
        ]
        left = sum(len(plan.cells) for plan in plans)
        done = sum(len(plan.all_cells) for plan in plans) - left
        with tqdm(total=left + done, initial=done, unit="cell", disable=not progress) as bar:
            for readings in _run(plans):
                file.add(readings)
                bar.update(len(readings))
        return file.evaluation()


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct prompts.

    Raises:
        ValueError, TypeError: none, or something that is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise bad_type(
            "prompts", expected="several texts", got=prompts, fix="pass a list, or use sweep()"
        )
    if not tuple(prompts):
        raise bad_value("prompts", expected="at least one text", got=(), fix="PAPER_PROMPTS")
    return tuple(dict.fromkeys(prompts))


def _plans(first: SweepPlan, prompt: str, draws: int) -> Iterator[SweepPlan]:
    """Yield what is to be read of one prompt: the sweep, and the draws of α = 1."""
    plan = first.at_prompt(prompt)
    yield plan
    for draw in range(1, draws + 1):
        yield replace(plan, alphas=(1.0,), config=replace(plan.config, draw=draw))


def _run(plans: Iterable[SweepPlan]) -> Iterator[list[Reading]]:
    """Yield the readings of all plans, batch by batch; a batch may hold several plans' cells."""
    for batch in _batches(plans):
        generator = batch[0][0].generator
        generations = iter(generator.generate([patch for _, _, patch in batch]))
        parts = []
        for plan, work in groupby(batch, key=lambda work: work[0]):
            cells, patches = zip(*((cell, patch) for _, cell, patch in work), strict=True)
            parts.append(Part(plan, cells, patches, [next(generations) for _ in cells]))
        yield read_batch(parts)


def _batches(plans: Iterable[SweepPlan]) -> Iterator[list[Work]]:
    waiting: list[Work] = []
    for plan in plans:
        waiting += [
            (plan, cell, patch) for cell, patch in zip(plan.cells, make_patches(plan), strict=True)
        ]
        size = plan.generator.batch_size
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def methods(evaluation: Evaluation, *, kind: str | None = None) -> dict[str, pd.DataFrame]:
    """Return the rows of an evaluation that stand for each method, for `compare`.

    Args:
        evaluation: from `evaluate`.
        kind: which kind of activation; the only one unless given.

    Returns:
        `Patchscopes` (α = 1, greedy), `Superscopes` (every other α), `Patchscopes, equal budget`
        (α = 1, all draws) where there are draws, one entry per other mapping, and one per control
        (what was written in the place of the Superscopes cells).

    Raises:
        ValueError: several kinds to choose from, or no such kind.
    """
    table = evaluation.table
    there = list(dict.fromkeys(table["kind"]))
    if kind is None and len(there) == 1:
        kind = there[0]
    if kind not in there:
        raise bad_value("kind", expected=f"one of {there}", got=kind, fix="choose one of these")
    rows = table[table["kind"] == kind]
    scaled = rows[rows["mapping"] == "scale"]
    plain, amplified = scaled[scaled["alpha"] == 1], scaled[scaled["alpha"] != 1]
    found = {"Patchscopes": plain[plain["draw"] == 0], "Superscopes": amplified}
    if (plain["draw"] > 0).any():
        found["Patchscopes, equal budget"] = plain
    for mapping, others in rows.groupby("mapping", sort=False):
        if mapping != "scale":
            found[f"Superscopes, {mapping}"] = others[others["draw"] == 0]
    for name in CONTROLS:
        if f"{name}_text" in rows and len(amplified):
            found[name.replace("_", " ")] = amplified.assign(text=amplified[f"{name}_text"])
    return {name: part for name, part in found.items() if len(part)}
