"""The main job: one prompt in, a scored layer x α map out.

1. Check every setting (`plan`): bad input ends here, before any work.
2. Read the source prompt once (`capture`) and map the vectors, one f(v) per cell (`amplify`).
3. Generate the cells in batches (`patching`), score each batch's texts (`scoring`), and hand the
   readings over as they are finished.

The order of the cells, and so of the table's rows, is position, kind, source layer, target layer,
α, as they were given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from superscopes_tl.amplify import family_name
from superscopes_tl.capture import capture
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.models import LanguageModel
from superscopes_tl.patching import Generation, Patch
from superscopes_tl.plan import SweepConfig, SweepPlan, plan_sweep
from superscopes_tl.prompts import crop_description
from superscopes_tl.results import Reading, SweepResult
from superscopes_tl.scoring import score_texts
from superscopes_tl.sites import Site


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
    plan = plan_sweep(model, prompt, config, **settings)
    started = time.perf_counter()
    readings: list[Reading] = []

    def result() -> SweepResult:
        provenance = plan.provenance()
        provenance["complete"] = len(readings) == len(plan.cells)
        provenance["seconds"] = round(time.perf_counter() - started, 3)
        return SweepResult.from_readings(readings, provenance)

    def broke_off(why: str) -> str:
        return (
            f"{why} after {len(readings)} of {len(plan.cells)} cells; the finished ones are in "
            "this exception's .partial"
        )

    try:
        readings.extend(run_plan(plan, progress=progress))
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
    norms = plan.generator.placeholder_norms
    with _progress_bar(plan, progress) as bar:
        done = 0
        for generations in plan.generator.batches(patches):
            end = done + len(generations)
            cells, made = plan.cells[done:end], patches[done:end]
            yield list(_readings(plan, cells, made, generations, norms))
            done = end
            bar.update(len(generations))


def make_patches(plan: SweepPlan) -> list[Patch]:
    """Return what is patched for each of the plan's cells.

    Vectors are read and mapped for all sites, whichever cells are to be computed: a mapping
    function may treat the rows of a batch together.
    """
    if not plan.cells:
        return []
    activations = capture(
        plan.model,
        plan.source,
        kinds=tuple(dict.fromkeys(site.kind for site in plan.sites)),
        layers=tuple(dict.fromkeys(site.layer for site in plan.sites)),
    )
    vectors = torch.stack([activations.at(site).float().cpu() for site in plan.sites])
    mapped = {alpha: _map(plan, alpha, vectors) for alpha in plan.alphas}
    row_of = {site: row for row, site in enumerate(plan.sites)}
    return [
        Patch(mapped[alpha][row_of[site]], target_layer) for site, target_layer, alpha in plan.cells
    ]


def _map(
    plan: SweepPlan, alpha: float, vectors: Float[Tensor, "sites d_model"]
) -> Float[Tensor, "sites d_model"]:
    """Return f(v) of every site for one α, checked before anything is generated."""
    function = plan.config.mapping(alpha)
    name = f"mapping({alpha:g})"
    if not callable(function):
        raise bad_type(
            name,
            expected="a mapping function, from vectors to vectors",
            got=function,
            fix="mapping takes α and returns the function: mapping=lambda alpha: lambda v: ...",
        )
    mapped = function(vectors)
    if not isinstance(mapped, Tensor) or mapped.shape != vectors.shape:
        raise bad_value(
            name,
            expected=f"vectors of shape {tuple(vectors.shape)}, as it was given",
            got=tuple(mapped.shape) if isinstance(mapped, Tensor) else mapped,
            fix="return one vector per vector",
        )
    fits = torch.isfinite(mapped.to(plan.model.dtype)).all(dim=-1)
    if not fits.all():
        raise bad_value(
            name,
            expected=f"numbers that {plan.model.dtype} can hold",
            got=f"up to {mapped.abs().max():.3g} at {plan.sites[int(fits.int().argmin())]}",
            fix="use a smaller α, or load the model with dtype='float32'",
        )
    return mapped.float()


def _progress_bar(plan: SweepPlan, progress: bool) -> tqdm[Any]:
    if not progress:
        return tqdm(disable=True)
    seconds = plan.estimate_seconds()
    expected = f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"
    title = f"{len(plan.cells)} cells in {plan.n_batches} batches, {expected}"
    return tqdm(total=len(plan.cells), unit="cell", desc=title)


def _readings(
    plan: SweepPlan,
    cells: Sequence[tuple[Site, int, float]],
    patches: Sequence[Patch],
    generations: Sequence[Generation],
    norms: torch.Tensor,
) -> Iterator[Reading]:
    """Score the texts of one batch and yield its rows."""
    descriptions = [crop_description(generation.text) for generation in generations]
    texts = [generation.text for generation in generations]
    scores = score_readings(plan, texts, descriptions)
    names = plan.generator.target.prompt.few_shot_names
    mapping = family_name(plan.config.mapping)
    for (site, target_layer, alpha), patch, generation, description, score in zip(
        cells, patches, generations, descriptions, scores, strict=True
    ):
        norm = float(patch.vector.norm())
        yield Reading(
            prompt=plan.source.text,
            position=site.position,
            token=plan.source.labels[site.position],
            kind=site.kind,
            source_layer=site.layer,
            target_layer=target_layer,
            mapping=mapping,
            alpha=alpha,
            vector_norm=norm,
            norm_ratio=norm / float(norms[target_layer]),
            text=generation.text,
            description=description,
            score=score,
            few_shot_copy=any(name.lower() in description.lower() for name in names),
            n_tokens=len(generation.token_ids),
            margin=generation.margin,
        )


def score_readings(
    plan: SweepPlan, texts: Sequence[str], descriptions: Sequence[str]
) -> list[float]:
    """Score what was written, whole or cropped as the plan has it, against the source prompt."""
    judged = descriptions if plan.config.score_on == "description" else texts
    return score_texts(plan.scorer, plan.source.text, judged)
