"""The main job: one prompt in, a scored layer x α map out.

1. Check every setting (`plan`): bad input ends here, before any work.
2. Read the source prompt once and map the vectors, one f(v) per cell (`cells`).
3. Generate the cells in batches (`patching`), score each batch's texts (`scoring`), take what
   each cell recovers (`recovery`), and hand the readings over as they are finished.
   Where not all cells are written out, what they recover comes first and chooses those that are.

The order of the cells, and so of the table's rows, is position, kind, source layer, target layer,
α, as they were given.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

from tqdm.auto import tqdm

from superscopes_tl.engine import Patch
from superscopes_tl.experiment.cells import Part, make_patches, read, unwritten
from superscopes_tl.experiment.config import SweepConfig
from superscopes_tl.experiment.controls import add_controls
from superscopes_tl.experiment.plan import Cell, SweepPlan, plan_sweep
from superscopes_tl.experiment.recovery import add_recovered
from superscopes_tl.experiment.results import Reading, SweepResult
from superscopes_tl.model import LanguageModel, Site
from superscopes_tl.scores import SentenceEmbeddingScorer, score_texts

Work = tuple[SweepPlan, Cell, Patch]


class SweepInterrupted(KeyboardInterrupt):
    """The user stopped a sweep; `partial` holds the cells that were finished."""

    def __init__(self, message: str, partial: SweepResult) -> None:
        super().__init__(message)
        self.partial = partial


class SweepError(RuntimeError):
    """A sweep broke off; `partial` holds the cells that were finished."""

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

    Settings are checked at the call, before the first reading is asked for. Closing the iterator
    stops the sweep; no hook stays on the model. Unless all cells are written out, a cell that is
    comes twice: first with what it recovers, later with its text.

    Args:
        model: from `load_model`, or anything that it takes.
        prompt: the source prompt.
        config: the settings; or give them one by one as keyword arguments.
        progress: whether to show a progress bar.
        **settings: the fields of `SweepConfig`.

    Raises:
        ValueError, TypeError: a bad setting.
    """
    return run_plan(plan_sweep(model, prompt, config, **settings), progress=progress)


def sweep(
    model: LanguageModel | Any,
    prompt: str,
    config: SweepConfig | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """Read a prompt's activations at every layer and α, and score what they say.

    Example:
        >>> result = sweep(load_model(), "Red Hot Chili Peppers", progress=False)
        >>> print(result.contextualization_layer())  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes (`"smollm2"`, a hub name, ...).
        prompt: the source prompt.
        config: the settings; or give them one by one as keyword arguments.
        progress: whether to show a progress bar and, at the end, what makes the result misleading
            (`SweepResult.caveats`).
        **settings: the fields of `SweepConfig`.

    Raises:
        ValueError, TypeError: a bad setting.
        SweepInterrupted: stopped by the user (a `KeyboardInterrupt`); finished cells are in its
            `partial`.
        SweepError: broke off; finished cells are in its `partial`.
    """
    plan = plan_sweep(model, prompt, config, **settings)
    if not isinstance(plan.scorer, SentenceEmbeddingScorer):
        # One that returns another number of scores should not cost a sweep.
        score_texts(plan.scorer, prompt, [prompt, prompt])
    result = collect([plan], progress=progress)
    if progress:
        for line in result.caveats:
            tqdm.write(f"Caveat: {line}", file=sys.stderr)
    return result


def collect(plans: Sequence[SweepPlan], *, progress: bool = True) -> SweepResult:
    """Run plans as one sweep.

    The provenance is the first plan's, with the layers, kinds and positions of all; that of several
    plans also lists their `prompts`.

    Args:
        plans: of the same model, target prompt and settings.
        progress: whether to show a progress bar.

    Raises:
        SweepInterrupted, SweepError: as `sweep` does.
    """
    started = time.perf_counter()
    planned = sum(len(plan.cells) for plan in plans)
    found: dict[Hashable, Reading] = {}

    def result(*, complete: bool) -> SweepResult:
        several = [plan.provenance() for plan in plans]
        provenance = several[0]
        for name in ("layers", "kinds", "positions"):
            values = (value for one in several for value in one["config"][name])
            provenance["config"][name] = list(dict.fromkeys(values))
        if len(several) > 1:
            provenance["prompts"] = list(dict.fromkeys(one["prompt"] for one in several))
        provenance["planned_cells"] = sum(one["planned_cells"] for one in several)
        provenance["complete"] = complete
        provenance["seconds"] = round(time.perf_counter() - started, 3)
        return SweepResult.from_readings(found.values(), provenance)

    def broke_off(why: str) -> str:
        return (
            f"{why} after {len(found)} of {planned} cells; the finished ones are in "
            "this exception's .partial"
        )

    try:
        if len(plans) == 1 or plans[0].config.generate != "all":
            for number, plan in enumerate(plans):
                for batch in run_batches(plan, progress=progress):
                    # A cell that comes once more, with its text, takes its own place.
                    found.update({(number, Cell.of(reading)): reading for reading in batch})
        else:
            with tqdm(total=planned, unit="cell", disable=not progress) as bar:
                for batch in run_plans(plans):
                    found.update(enumerate(batch, start=len(found)))
                    bar.update(len(batch))
    except KeyboardInterrupt as error:
        raise SweepInterrupted(broke_off("stopped"), result(complete=False)) from error
    except Exception as error:
        if not found:
            raise
        why = broke_off(f"{type(error).__name__}: {error}")
        raise SweepError(why, result(complete=False)) from error
    return result(complete=True)


def run_plan(plan: SweepPlan, *, progress: bool = False) -> Iterator[Reading]:
    """Yield the readings of a plan as they are finished."""
    for batch in run_batches(plan, progress=progress):
        yield from batch


def run_batches(plan: SweepPlan, *, progress: bool = False) -> Iterator[list[Reading]]:
    """Yield the readings of a plan's cells, each batch when it is finished and scored.

    Unless all cells are written out, they come without a text first, and those that are written
    come once more with it.
    """
    patches = make_patches(plan)
    with _progress_bar(plan, progress) as bar:
        batches = _written(plan, patches) if plan.config.generate == "all" else _map(plan, patches)
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _written(plan: SweepPlan, patches: Sequence[Patch]) -> Iterator[list[Reading]]:
    """Yield every cell, written out."""
    done = 0
    for generations in plan.generator.batches(patches):
        end = done + len(generations)
        yield read_batch([Part(plan, plan.cells[done:end], patches[done:end], generations)])
        done = end


def _map(plan: SweepPlan, patches: Sequence[Patch]) -> Iterator[list[Reading]]:
    """Yield what every cell recovers, then the best cell of each site with its text."""
    size, cells = plan.generator.batch_size, plan.cells
    there: list[Reading] = []
    for start in range(0, len(cells), size):
        part = Part(plan, cells[start : start + size], patches[start : start + size], ())
        found = add_recovered([part], unwritten(plan, part.cells, part.patches))
        there += found
        yield found
    chosen = _best_of_sites(there) if plan.config.generate == "best" else []
    done = 0
    for generations in plan.generator.batches([patches[place] for place in chosen]):
        places = chosen[done : done + len(generations)]
        done += len(generations)
        part = Part(plan, [cells[p] for p in places], [patches[p] for p in places], generations)
        texts = add_controls([part], read(part)) if plan.config.controls else read(part)
        yield [_joined(there[place], text) for place, text in zip(places, texts, strict=True)]


def _best_of_sites(readings: Sequence[Reading]) -> list[int]:
    """Return the places of the cells that recover most of each site, the best sites first."""

    def worth(place: int) -> tuple[float, float]:
        share = readings[place].recovered
        return -math.inf if math.isnan(share) else share, -abs(readings[place].alpha)

    best: dict[tuple[Site, int], int] = {}
    for place, reading in enumerate(readings):
        site = Cell.of(reading).place
        if site not in best or worth(place) > worth(best[site]):
            best[site] = place
    return sorted(best.values(), key=worth, reverse=True)


def _joined(shares: Reading, text: Reading) -> Reading:
    """Return a written cell with what it recovers, which is known already."""
    return replace(
        text,
        recovered=shares.recovered,
        own_words=shares.own_words,
        plain_nats=shares.plain_nats,
        unpatched_nats=shares.unpatched_nats,
        controls={**shares.controls, **text.controls},
    )


def run_plans(plans: Iterable[SweepPlan]) -> Iterator[list[Reading]]:
    """Yield the readings of all plans, batch by batch; a batch may hold several plans' cells."""
    several = iter(plans)
    first = next(several, None)
    if first is None:
        return
    if first.config.generate != "all":
        for plan in chain([first], several):
            yield from run_batches(plan)
        return
    for batch in _batches(chain([first], several)):
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


def read_batch(parts: Sequence[Part]) -> list[Reading]:
    """Return the rows of a batch: texts, the controls that its plans ask for, shares recovered."""
    readings = [reading for part in parts for reading in read(part)]
    if parts[0].plan.config.controls:
        readings = add_controls(parts, readings)
    return add_recovered(parts, readings)


def _progress_bar(plan: SweepPlan, progress: bool) -> tqdm[Any]:
    if not progress:
        return tqdm(disable=True)
    if plan.config.generate != "all":
        texts = len(plan.sites) if plan.config.generate == "best" else 0
        return tqdm(total=len(plan.cells) + texts, unit="cell")
    seconds = plan.estimate_seconds()
    expected = f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"
    title = f"{len(plan.cells)} cells in {plan.n_batches} batches, {expected}"
    return tqdm(total=len(plan.cells), unit="cell", desc=title)
