"""The main job: one prompt in, a scored layer x α map out.

1. Check every setting (`plan`): bad input ends here, before any work.
2. Read the source prompt once and map the vectors, one f(v) per cell (`cells`).
3. Generate the cells in batches (`patching`), score each batch's texts (`scoring`), and hand the
   readings over as they are finished.

The order of the cells, and so of the table's rows, is position, kind, source layer, target layer,
α, as they were given.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from tqdm.auto import tqdm

from superscopes_tl.cells import Part, make_patches, read
from superscopes_tl.config import SweepConfig
from superscopes_tl.controls import add_controls
from superscopes_tl.models import LanguageModel
from superscopes_tl.patches import Patch
from superscopes_tl.plan import Cell, SweepPlan, plan_sweep
from superscopes_tl.results import Reading, SweepResult

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
    stops the sweep; no hook stays on the model.

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
        >>> result.contextualization_layer()  # doctest: +SKIP
        2

    Args:
        model: from `load_model`, or anything that it takes (`"mini"`, a hub name, ...).
        prompt: the source prompt.
        config: the settings; or give them one by one as keyword arguments.
        progress: whether to show a progress bar.
        **settings: the fields of `SweepConfig`.

    Raises:
        ValueError, TypeError: a bad setting.
        SweepInterrupted: stopped by the user (a `KeyboardInterrupt`); finished cells are in its
            `partial`.
        SweepError: broke off; finished cells are in its `partial`.
    """
    return collect([plan_sweep(model, prompt, config, **settings)], progress=progress)


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
    readings: list[Reading] = []

    def result() -> SweepResult:
        several = [plan.provenance() for plan in plans]
        provenance = several[0]
        for name in ("layers", "kinds", "positions"):
            values = (value for one in several for value in one["config"][name])
            provenance["config"][name] = list(dict.fromkeys(values))
        if len(several) > 1:
            provenance["prompts"] = list(dict.fromkeys(one["prompt"] for one in several))
        provenance["planned_cells"] = sum(one["planned_cells"] for one in several)
        provenance["complete"] = len(readings) == planned
        provenance["seconds"] = round(time.perf_counter() - started, 3)
        return SweepResult.from_readings(readings, provenance)

    def broke_off(why: str) -> str:
        return (
            f"{why} after {len(readings)} of {planned} cells; the finished ones are in "
            "this exception's .partial"
        )

    try:
        if len(plans) == 1:
            readings.extend(run_plan(plans[0], progress=progress))
        else:
            with tqdm(total=planned, unit="cell", disable=not progress) as bar:
                for batch in run_plans(plans):
                    readings += batch
                    bar.update(len(batch))
    except KeyboardInterrupt as error:
        raise SweepInterrupted(broke_off("stopped"), result()) from error
    except Exception as error:
        if not readings:
            raise
        raise SweepError(broke_off(f"{type(error).__name__}: {error}"), result()) from error
    return result()


def run_plan(plan: SweepPlan, *, progress: bool = False) -> Iterator[Reading]:
    """Yield the readings of a plan as they are finished."""
    for batch in run_batches(plan, progress=progress):
        yield from batch


def run_batches(plan: SweepPlan, *, progress: bool = False) -> Iterator[list[Reading]]:
    """Yield the readings of a plan's cells, each batch when it is finished and scored."""
    patches = make_patches(plan)
    with _progress_bar(plan, progress) as bar:
        done = 0
        for generations in plan.generator.batches(patches):
            end = done + len(generations)
            yield read_batch([Part(plan, plan.cells[done:end], patches[done:end], generations)])
            done = end
            bar.update(len(generations))


def run_plans(plans: Iterable[SweepPlan]) -> Iterator[list[Reading]]:
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


def read_batch(parts: Sequence[Part]) -> list[Reading]:
    """Return the rows of a batch, with the controls that its plans ask for."""
    readings = [reading for part in parts for reading in read(part)]
    return add_controls(parts, readings) if parts[0].plan.config.controls else readings


def _progress_bar(plan: SweepPlan, progress: bool) -> tqdm[Any]:
    if not progress:
        return tqdm(disable=True)
    seconds = plan.estimate_seconds()
    expected = f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"
    title = f"{len(plan.cells)} cells in {plan.n_batches} batches, {expected}"
    return tqdm(total=len(plan.cells), unit="cell", desc=title)
