"""What a plan's cells patch, and the rows of the table that come of it.

1. Read the source prompt once (`capture`): v of every site, in float32, or what the plan's
   `vectors` returns in its place.
2. Map it: f(v) = b + mapping(α)(v − b), with b = 0 unless the plan has a base, and v − b in units
   of the residual norm with `unit="residual"`. Where α acts on the logits, f(v) is that of α = 1.
   The plan's `write` may change how it is patched.
3. Score the texts of a batch (`scores`) and make the rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Generation, Patch, is_echo, site_vectors
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment.config import Generate
from superscopes_tl.experiment.plan import Cell, SweepPlan, target_layers
from superscopes_tl.experiment.store import Reading
from superscopes_tl.hashing import stable_hash
from superscopes_tl.model import Site
from superscopes_tl.scores import score_texts
from superscopes_tl.vectors import PlaceVectors


@dataclass(frozen=True, eq=False)
class Part:
    """The cells of one plan in a batch, which may hold cells of several plans.

    Attributes:
        plan: the plan.
        cells: some of its cells.
        patches: what they patch.
    """

    plan: SweepPlan
    cells: Sequence[Cell]
    patches: Sequence[Patch]


def make_patches(plan: SweepPlan) -> list[Patch]:
    """Return the patch of each of the plan's cells.

    Vectors are read and mapped for all sites, whichever cells are to be computed: a mapping
    function may treat the rows of a batch together.
    """
    if not plan.cells:
        return []
    places = [
        (site, target)
        for targets in zip(
            *(target_layers(site, plan.target_layer) for site in plan.sites), strict=True
        )
        for site, target in zip(plan.sites, targets, strict=True)
    ]
    vectors = _vectors(plan, plan.config.vectors or _captured, places, "vectors")
    base = torch.zeros_like(vectors)
    if plan.config.base is not None:
        base = _vectors(plan, plan.config.base, places, "base")
    moved = _in_units(plan, vectors - base, [target for _, target in places])
    on_logits = plan.config.guide == "logits"
    mapped: dict[tuple[Site, int, float], Tensor] = {}
    for start in range(0, len(places), len(plan.sites)):
        rows = slice(start, start + len(plan.sites))  # a mapping sees the sites of one target layer
        for alpha in (1.0,) if on_logits else plan.alphas:
            found = _map(plan, alpha, base[rows], moved[rows])
            mapped |= {(*place, alpha): v for place, v in zip(places[rows], found, strict=True)}
    return [
        _patch(plan, cell, mapped[*cell.place, 1.0 if on_logits else cell.alpha])
        for cell in plan.cells
    ]


def _patch(plan: SweepPlan, cell: Cell, vector: Float[Tensor, " d_model"]) -> Patch:
    guidance = cell.alpha if plan.config.guide == "logits" else 1.0
    patch = Patch(vector, cell.target_layer, guidance=guidance, seed=_seed(plan, cell))
    if plan.config.write is None:
        return patch
    written = plan.config.write(patch, cell.alpha)
    if not isinstance(written, Patch):
        raise bad_type("write", "a Patch", written, "return dataclasses.replace(patch, ...)")
    return written


def _seed(plan: SweepPlan, cell: Cell) -> int | None:
    """Return the seed of a sampled text: the same in every run and every batch."""
    if plan.config.draw == 0:
        return None
    return stable_hash(plan.config.draw, plan.source.text, (*cell.place, cell.alpha))


def _captured(
    plan: SweepPlan, places: Sequence[tuple[Site, int]]
) -> Float[Tensor, "places d_model"]:
    """Return the activation of every site."""
    return site_vectors(plan.model, plan.source, [site for site, _ in places])


def _vectors(
    plan: SweepPlan, source: PlaceVectors, places: Sequence[tuple[Site, int]], argument: str
) -> Float[Tensor, "places d_model"]:
    """Return one vector per place, checked."""
    vectors = source(plan, places)
    shape = (len(places), plan.generator.model.d_model)
    if not isinstance(vectors, Tensor) or vectors.shape != shape:
        raise bad_value(
            argument,
            f"vectors of shape {shape}, one per site and target layer",
            tuple(vectors.shape) if isinstance(vectors, Tensor) else vectors,
            "see superscopes_tl.vectors.PlaceVectors",
        )
    return vectors.float().cpu()


def _in_units(
    plan: SweepPlan, vectors: Float[Tensor, "sites d_model"], targets: Sequence[int]
) -> Float[Tensor, "sites d_model"]:
    """Return the vectors, with `unit="residual"` scaled to the norm of what they replace."""
    if plan.config.unit == "vector":
        return vectors
    lengths = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    resized: Tensor = vectors / lengths * plan.generator.placeholder_norms[list(targets), None]
    return resized


def _map(
    plan: SweepPlan,
    alpha: float,
    base: Float[Tensor, "sites d_model"],
    vectors: Float[Tensor, "sites d_model"],
) -> Float[Tensor, "sites d_model"]:
    """Return f(v) of every site for one α, checked before anything is generated."""
    function = plan.config.mapping(alpha)
    name = f"mapping({alpha:g})"
    if not callable(function):
        raise bad_type(
            name,
            "a mapping function, from vectors to vectors",
            function,
            "mapping takes α and returns the function: mapping=lambda alpha: lambda v: ...",
        )
    mapped = function(vectors)
    if not isinstance(mapped, Tensor) or mapped.shape != vectors.shape:
        raise bad_value(
            name,
            f"vectors of shape {tuple(vectors.shape)}, that of its argument",
            tuple(mapped.shape) if isinstance(mapped, Tensor) else mapped,
            "return one vector per vector",
        )
    mapped = base + mapped.float()
    dtype = plan.generator.model.dtype
    fits = torch.isfinite(mapped.to(dtype)).all(dim=-1)
    if not fits.all():
        raise bad_value(
            name,
            f"numbers that {dtype} can hold",
            f"up to {mapped.abs().max():.3g} at {plan.sites[int(fits.int().argmin())]}",
            "use a smaller α, or load the model with dtype='float32'",
        )
    return mapped


def read(part: Part, generations: Sequence[Generation]) -> list[Reading]:
    """Score the texts of some cells and return their rows."""
    plan = part.plan
    scores = score_readings(
        plan, part.cells, [g.text for g in generations], [g.description for g in generations]
    )
    names = plan.generator.target.prompt.few_shot_names
    return [
        replace(
            empty,
            text=generation.text,
            description=generation.description,
            score=score,
            few_shot_copy=any(name.lower() in generation.description.lower() for name in names),
            n_tokens=len(generation.token_ids),
            margin=generation.margin,
            entropy=mean(generation.entropies[: generation.n_description_tokens]),
            log_probability=mean(generation.log_probabilities[: generation.n_description_tokens]),
            written=True,
            echo=is_echo(generation.description, empty.about),
        )
        for empty, generation, score in zip(unwritten(part), generations, scores, strict=True)
    ]


def unwritten(part: Part) -> list[Reading]:
    """Return the rows of some cells without a text."""
    plan, norms = part.plan, part.plan.generator.placeholder_norms
    rows = []
    for cell, patch in zip(part.cells, part.patches, strict=True):
        norm = patch.norm
        rows.append(
            Reading(
                prompt=plan.source.text,
                position=cell.position,
                token=plan.source.labels[cell.position],
                kind=cell.kind,
                source_layer=cell.source_layer,
                target_layer=cell.target_layer,
                mapping=plan.mapping_name,
                alpha=cell.alpha,
                vector_norm=norm,
                norm_ratio=norm / float(norms[cell.target_layer]),
                text="",
                description="",
                score=math.nan,
                few_shot_copy=False,
                n_tokens=0,
                margin=math.nan,
                draw=plan.config.draw,
                written=False,
                about=plan.about(cell.position),
            )
        )
    return rows


def finished_cells(written: Mapping[Cell, bool], generate: Generate) -> frozenset[Cell]:
    """Return the cells that need no more work.

    Args:
        written: the computed cells of one prompt, and whether each has a text.
        generate: which cells are to have one, as in `SweepConfig`.
    """
    if generate == "none":
        return frozenset(written)
    texts = frozenset(cell for cell, has_text in written.items() if has_text)
    if generate == "all":
        return texts
    places = {cell.place for cell in texts}
    return frozenset(cell for cell in written if cell.place in places)


def mean(numbers: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(numbers) / len(numbers) if numbers else float("nan")


def score_readings(
    plan: SweepPlan, cells: Sequence[Cell], texts: Sequence[str], descriptions: Sequence[str]
) -> list[float]:
    """Score the texts of some cells, whole or cropped, against what each is about."""
    judged = descriptions if plan.config.score_on == "description" else texts
    return score_texts(plan.scorer, [plan.about(cell.position) for cell in cells], judged)
