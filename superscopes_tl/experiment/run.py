"""The sweep: from one prompt to a scored layer x α map.

1. Check every setting (`plan`): bad input ends here, before any work.
2. Read the source prompt once and map the vectors, one f(v) per cell (`cells`).
3. Fill batches with the cells of one plan or of several. Generate the texts of a batch, score
   them, generate its controls, compute what its cells recover (`recovery`), and yield its readings.
   With `generate="best"` or "none", the shares recovered come first and choose the cells that are
   generated (`run_map`). `write_cell` generates any other one.
4. `refine` goes from coarse to fine: it tries the α between those of a sweep where it reads best
   (paper, section 4.1). The ratio of α·v to the residual stream matters, so the midpoint of two
   positive α is their geometric mean.

The order of the cells, and so of the table's rows, is position, kind, source layer, target layer,
α, as they were given.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from superscopes_tl.engine import Patch, PatchedGenerator
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.experiment.cells import Part, make_patches, read, unwritten
from superscopes_tl.experiment.config import SweepConfig
from superscopes_tl.experiment.controls import add_controls, control_patches
from superscopes_tl.experiment.plan import Cell, SweepPlan, plan_sweep
from superscopes_tl.experiment.recovery import add_recovered
from superscopes_tl.experiment.results import SweepResult
from superscopes_tl.experiment.store import Reading
from superscopes_tl.model import LanguageModel, Site
from superscopes_tl.scores import SentenceEmbeddingScorer, score_texts

Work = tuple[SweepPlan, Cell, Patch]


class SweepInterrupted(KeyboardInterrupt):
    """The user stopped a sweep; `partial` holds the finished cells."""

    def __init__(self, message: str, partial: SweepResult) -> None:
        super().__init__(message)
        self.partial = partial


class SweepError(RuntimeError):
    """A sweep failed; `partial` holds the finished cells."""

    def __init__(self, message: str, partial: SweepResult) -> None:
        super().__init__(message)
        self.partial = partial


def iter_sweep(
    model: LanguageModel | Any,
    prompt: str,
    config: SweepConfig | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> Iterator[Reading]:
    """Yield the readings of a sweep as they are finished, batch by batch.

    Settings are checked at the call, before the first reading is requested. Closing the iterator
    stops the sweep; no hook stays on the model. With `generate="best"` a cell that is generated
    comes twice: first with what it recovers, later with its text.

    Arguments and errors are those of `sweep`.
    """
    plan = plan_sweep(model, prompt, config, **settings)
    return (reading for batch in _with_bar([plan], progress) for reading in batch)


def sweep(
    model: LanguageModel | Any,
    prompt: str,
    config: SweepConfig | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """Read a prompt's activations at every layer and α, and score the descriptions.

    Example:
        >>> result = sweep(load_model(), "Red Hot Chili Peppers", progress=False)
        >>> print(result.contextualization_layer())  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes (`"smollm2"`, a hub name, ...).
        prompt: the source prompt.
        config: the settings; defaults to `SweepConfig()`.
        progress: whether to show a progress bar and, at the end, `SweepResult.caveats`.
        **settings: fields of `SweepConfig` to change in it.

    Raises:
        ValueError, TypeError: as `plan_sweep`.
        SweepInterrupted, SweepError: as `SweepPlan.run`.
    """
    plan = plan_sweep(model, prompt, config, **settings)
    if not isinstance(plan.scorer, SentenceEmbeddingScorer):
        # A scorer that returns another number of scores should not cost a sweep.
        score_texts(plan.scorer, prompt, [prompt, prompt])
    result = plan.run(progress=progress)
    if progress:
        for line in result.caveats:
            tqdm.write(f"Caveat: {line}", file=sys.stderr)
    return result


def collect(plans: Sequence[SweepPlan], *, progress: bool = True) -> SweepResult:
    """Run plans of the same model, target prompt and settings as one sweep.

    The provenance is the first plan's, with the layers, kinds and positions of all; that of several
    plans also lists their `prompts`.

    Raises:
        SweepInterrupted, SweepError: as `SweepPlan.run`.
    """
    started = time.perf_counter()
    found: dict[tuple[str, int, str, Cell], Reading] = {}

    def result(*, complete: bool) -> SweepResult:
        seconds = round(time.perf_counter() - started, 3)
        provenance = {**_common_provenance(plans), "complete": complete, "seconds": seconds}
        plan = plans[0] if len(plans) == 1 else None
        return SweepResult.from_readings(found.values(), provenance, plan)

    def stopped(why: str) -> str:
        planned = sum(len(plan.cells) for plan in plans)
        return f"{why} after {len(found)} of {planned} cells; the finished ones are in .partial"

    try:
        for batch in _with_bar(plans, progress):
            # A cell that comes once more, with its text, replaces itself.
            found.update({(r.prompt, r.draw, r.mapping, Cell.of(r)): r for r in batch})
    except KeyboardInterrupt as error:
        raise SweepInterrupted(stopped("stopped"), result(complete=False)) from error
    except Exception as error:
        if not found:
            raise
        why = stopped(f"{type(error).__name__}: {error}")
        raise SweepError(why, result(complete=False)) from error
    return result(complete=True)


def _common_provenance(plans: Sequence[SweepPlan]) -> dict[str, Any]:
    several = [plan.provenance() for plan in plans]
    provenance = several[0]
    for name in ("layers", "kinds", "positions"):
        values = (value for one in several for value in one["config"][name])
        provenance["config"][name] = list(dict.fromkeys(values))
    if len(several) > 1:
        provenance["prompts"] = list(dict.fromkeys(one["prompt"] for one in several))
    provenance["planned_cells"] = sum(one["planned_cells"] for one in several)
    return provenance


def _with_bar(plans: Sequence[SweepPlan], progress: bool) -> Iterator[list[Reading]]:
    """Yield the readings of plans batch by batch, beside a progress bar."""
    total = sum(
        len(plan.cells) + (plan.n_texts if plan.config.generate == "best" else 0) for plan in plans
    )
    with tqdm(total=total, unit="cell", disable=not progress) as bar:
        for batch in run_plans(plans):
            yield batch
            bar.update(len(batch))


def run_plans(plans: Iterable[SweepPlan]) -> Iterator[list[Reading]]:
    """Yield the readings of plans, each batch when it is finished and scored.

    The plans are of the same model, target prompt and settings, and a batch may hold cells of
    several. Unless all cells are generated, they come without a text first, plan by plan, and those
    that are generated come once more with it.
    """
    several = iter(plans)
    for first in several:
        if first.config.generate == "all":
            work = (item for plan in chain([first], several) for item in _work(plan))
            for parts in _batches(work):
                yield _generated(parts)
        else:
            yield from run_map(first)


def _work(plan: SweepPlan) -> list[Work]:
    return [(plan, *work) for work in zip(plan.cells, make_patches(plan), strict=True)]


def _batches(
    work: Iterable[Work], size: Callable[[PatchedGenerator], int] = lambda given: given.batch_size
) -> Iterator[list[Part]]:
    """Yield full batches, the cells of each plan together; memory may lower their size."""
    items = iter(work)
    for first in items:
        batch = [first, *islice(items, size(first[0].generator) - 1)]
        parts = []
        for plan, group in groupby(batch, key=lambda item: item[0]):
            _, cells, patches = zip(*group, strict=True)
            parts.append(Part(plan, cells, patches))
        yield parts


def _generated(parts: Sequence[Part], *, recovered: bool = True) -> list[Reading]:
    """Return the readings of a batch: texts, controls and, by default, shares recovered."""
    patches = [patch for part in parts for patch in part.patches]
    generations = parts[0].plan.generator.generate(patches, confidence=True)
    texts = iter(generations)
    readings = [r for part in parts for r in read(part, [next(texts) for _ in part.cells])]
    controls = [control_patches(part) for part in parts]
    readings = add_controls(parts, controls, generations, readings)
    return add_recovered(parts, controls, readings) if recovered else readings


def run_map(
    plan: SweepPlan, known: Mapping[Cell, Reading] | None = None, *, texts: int = sys.maxsize
) -> Iterator[list[Reading]]:
    """Yield the shares recovered of all cells, then the best cell of each site with its text.

    The best sites come first. There are texts with `generate="best"` alone.

    Args:
        plan: the plan of a sweep.
        known: cells of the plan whose shares are known, some with a text; they count when the best
            are chosen, and come again only with a new text.
        texts: the most texts to generate at a time; defaults to the batch size.
    """
    if not plan.cells:
        return
    there = dict(known or {})
    work = {cell: (one, cell, patch) for one, cell, patch in _work(plan.only(plan.all_cells))}
    todo = (work[cell] for cell in plan.cells if cell not in there)
    for parts in _batches(todo, lambda given: given.grown_rows(given.max_new_tokens)):
        empty = [reading for part in parts for reading in unwritten(part)]
        found = add_recovered(parts, [control_patches(part) for part in parts], empty)
        there |= {Cell.of(reading): reading for reading in found}
        yield found
    if plan.config.generate == "best":
        best = [cell for cell in best_cells(there.values()) if not there[cell].written]
        chosen = (work[cell] for cell in best)
        for parts in _batches(chosen, lambda given: min(texts, given.batch_size)):
            written = _generated(parts, recovered=False)
            yield [_joined(there[Cell.of(text)], text) for text in written]


def write_cell(plan: SweepPlan, cell: Cell, known: Reading | None = None) -> Reading:
    """Return one cell of a plan with its text, and with its share recovered where that is known."""
    (parts,) = _batches(_work(plan.only([cell])))
    (text,) = _generated(parts, recovered=known is None)
    return text if known is None else _joined(known, text)


def best_cells(readings: Iterable[Reading]) -> list[Cell]:
    """Return the cell that recovers most of each site and target layer, the best ones first."""

    def worth(reading: Reading) -> tuple[float, float]:
        share = reading.recovered
        return -math.inf if math.isnan(share) else share, -abs(reading.alpha)

    best: dict[Any, Cell] = {}
    for reading in sorted(readings, key=worth, reverse=True):
        cell = Cell.of(reading)
        best.setdefault(cell.place, cell)
    return list(best.values())


def _joined(shares: Reading, text: Reading) -> Reading:
    """Return a generated cell with its shares recovered, which are known already."""
    names = ("recovered", "own_words", "plain_nats", "unpatched_nats")
    known = {name: getattr(shares, name) for name in names}
    unchanged = shares.unchanged or text.unchanged
    controls = {**shares.controls, **text.controls}
    return replace(text, **known, unchanged=unchanged, controls=controls)


def refine(
    result: SweepResult, plan: SweepPlan | None = None, *, rounds: int = 2, progress: bool = True
) -> SweepResult:
    """Return a result with more α around the best one of each site.

    Every round adds up to two readings per site. The best score can only rise, so a control needs
    as many tries.

    Args:
        result: of a sweep, or of an earlier refinement.
        plan: its plan; defaults to `result.plan`, which a loaded result does not have.
        rounds: how often to halve the distance.
        progress: whether to show a progress bar.

    Raises:
        ValueError: fewer than one round, no plan, or a result without cells of the plan.
    """
    check_count("rounds", rounds, least=1, fix="2 is the default")
    judge = "score" if result.table["written"].all() else "recovered"
    plan = plan or result.plan
    if plan is None:
        raise bad_value("plan", "the plan of a loaded result", None, "plan=plan_sweep(...)")
    for _ in range(rounds):
        wanted = [
            Cell.at(site, target_layer, alpha)
            for site, target_layer in dict.fromkeys(cell.place for cell in plan.all_cells)
            for alpha in midpoints(_rows(result.table, plan, site, target_layer), judge)
        ]
        if not wanted:
            break
        alphas = (*plan.alphas, *(cell.alpha for cell in wanted))
        plan = plan.with_settings(alphas=alphas)
        new = plan.only(wanted).run(progress=progress).table
        table = pd.concat([result.table, new], ignore_index=True)
        config = {**result.provenance.get("config", {}), "alphas": sorted(set(table["alpha"]))}
        provenance = {**result.provenance, "config": config, "planned_cells": len(table)}
        result = SweepResult(table, provenance, plan)
    return result


def midpoints(rows: pd.DataFrame, judge: str = "score") -> list[float]:
    """Return the α to try next at one site: halfway from the best to each of its neighbours.

    The rows are in the order of α.

    >>> midpoints(pd.DataFrame({"alpha": [1, 3, 12], "score": [0.1, 0.4, 0.2]}))
    [1.732, 6.0]
    """
    alphas, scores = rows["alpha"].to_numpy(float), rows[judge].to_numpy(float)
    if np.isnan(scores).all():  # nothing was read: no place to look more closely
        return []
    best = alphas[np.nanargmax(scores)]
    around = [*alphas[alphas < best][-1:], *alphas[alphas > best][:1]]
    middle = [between(float(best), float(neighbour)) for neighbour in around]
    return [alpha for alpha in middle if alpha not in alphas]  # too near for four digits


def between(a: float, b: float) -> float:
    """Return the point halfway, to four digits; geometric for two positive numbers."""
    middle = math.sqrt(a * b) if a > 0 and b > 0 else (a + b) / 2
    return float(f"{middle:.4g}")


def _rows(table: pd.DataFrame, plan: SweepPlan, site: Site, target_layer: int) -> pd.DataFrame:
    """Return the plan's readings of one site at every α, smallest first."""
    wanted = {
        "kind": site.kind, "source_layer": site.layer, "position": site.position,
        "target_layer": target_layer, "prompt": plan.source.text, "mapping": plan.mapping_name,
        "draw": plan.config.draw,
    }  # fmt: skip
    rows = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)].sort_values("alpha")
    if rows.empty:
        fix = "pass the result of this plan"
        raise bad_value("result", f"readings of {site} by the plan", "none", fix)
    return rows
