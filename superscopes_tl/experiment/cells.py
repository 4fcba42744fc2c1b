"""The patches of a plan's cells, and the rows of the table for their texts.

1. Read the source prompt once (`capture`): v of every site, in float32, or the plan's `vectors`
   in its place; these may be several for a site, one for each placeholder token.
2. Map it: f(v) = b + mapping(α)(v − b), with b = 0 unless the plan has a base, and v − b in units
   of the residual norm with `unit="residual"`, that of each placeholder token where each has its
   own v. Where α acts on the logits, f(v) is that of α = 1. The plan's `write` may replace the
   patch.
3. Score the texts of a batch (`scores`) and make the rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Generation, Patch, is_echo
from superscopes_tl.errors import bad_type, bad_value, check_callable
from superscopes_tl.experiment.config import Generate
from superscopes_tl.experiment.plan import Cell, SweepPlan, target_layers
from superscopes_tl.experiment.store import Reading
from superscopes_tl.model import Site, layer_name
from superscopes_tl.scores import score_texts
from superscopes_tl.vectors import PlaceVectors, stable_hash


@dataclass(frozen=True, eq=False)
class Part:
    """Some cells of one plan, with their patches; a batch may hold several plans' cells."""

    plan: SweepPlan
    cells: Sequence[Cell]
    patches: Sequence[Patch]


def make_patches(plan: SweepPlan) -> list[Patch]:
    """Return the patch of each of the plan's cells.

    Vectors are mapped for all sites, whichever cells are to be computed: a mapping function may
    treat the rows of a batch together.
    """
    if not plan.cells:
        return []
    targets = zip(*(target_layers(site, plan.target_layer) for site in plan.sites), strict=True)
    places = [place for into in targets for place in zip(plan.sites, into, strict=True)]
    vectors = _vectors(plan, plan.config.vectors or _captured, places, "vectors")
    base = torch.zeros_like(vectors)
    if plan.config.base is not None:
        base = _vectors(plan, plan.config.base, places, "base")
    if vectors.ndim != base.ndim:  # one for all placeholder tokens beside one for each
        vectors, base = (v if v.ndim == 3 else v[:, None] for v in (vectors, base))
    moved = vectors - base
    if plan.config.unit == "residual":  # scaled to the norm of the state that is replaced
        states = plan.generator.placeholder_states[[target for _, target in places]]
        norms = states.norm(dim=-1, keepdim=True)
        norms = norms if moved.ndim == 3 else norms.mean(dim=1)
        moved = moved / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30) * norms
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


def _patch(plan: SweepPlan, cell: Cell, vector: Float[Tensor, "*placeholders d_model"]) -> Patch:
    guidance, seed = cell.alpha if plan.config.guide == "logits" else 1.0, None
    if plan.config.draw:  # the same seed in every run and every batch
        seed = stable_hash(plan.config.draw, plan.source.text, (*cell.place, cell.alpha))
    patch = Patch(vector, layer_name(cell.target_layer), guidance=guidance, seed=seed)
    if plan.config.write is None:
        return patch
    written = plan.config.write(patch, cell.alpha)
    if not isinstance(written, Patch):
        raise bad_type("write", "a Patch", written, "return dataclasses.replace(patch, ...)")
    return written


def _captured(
    plan: SweepPlan, places: Sequence[tuple[Site, int]]
) -> Float[Tensor, "places d_model"]:
    """Return the activation of every site."""
    row = {site: number for number, site in enumerate(plan.sites)}
    return plan.activations[[row[site] for site, _ in places]]


def _vectors(
    plan: SweepPlan, source: PlaceVectors, places: Sequence[tuple[Site, int]], argument: str
) -> Float[Tensor, "places *placeholders d_model"]:
    """Return one vector per place, or one for each of its placeholder tokens, checked."""
    vectors = source(plan, places)
    n, width = len(places), plan.generator.model.d_model
    several = (n, len(plan.generator.target.positions), width)
    if not isinstance(vectors, Tensor) or vectors.shape not in ((n, width), several):
        expected = f"vectors of shape {(n, width)}, one per site and target layer, or {several}"
        got = tuple(vectors.shape) if isinstance(vectors, Tensor) else vectors
        raise bad_value(argument, expected, got, "see superscopes_tl.vectors.PlaceVectors")
    return vectors.float().cpu()


def _map(
    plan: SweepPlan,
    alpha: float,
    base: Float[Tensor, "sites *placeholders d_model"],
    vectors: Float[Tensor, "sites *placeholders d_model"],
) -> Float[Tensor, "sites *placeholders d_model"]:
    """Return f(v) of every site for one α, checked before anything is generated."""
    function, name = plan.config.mapping(alpha), f"mapping({alpha:g})"
    fix = "pass a function of α that returns it: mapping=lambda alpha: lambda v: ..."
    check_callable(name, function, expected="a function from vectors to vectors", fix=fix)
    mapped = function(vectors)
    if not isinstance(mapped, Tensor) or mapped.shape != vectors.shape:
        expected = f"vectors of shape {tuple(vectors.shape)}, that of its argument"
        shape = tuple(mapped.shape) if isinstance(mapped, Tensor) else mapped
        raise bad_value(name, expected, shape, "return one vector per vector")
    mapped, dtype = base + mapped.float(), plan.generator.model.dtype
    fits = torch.isfinite(mapped.to(dtype)).flatten(1).all(dim=1)
    if not fits.all():
        got = f"up to {mapped.abs().max():.3g} at {plan.sites[int(fits.int().argmin())]}"
        fix = "use a smaller α, or load the model with dtype='float32'"
        raise bad_value(name, f"numbers that {dtype} can hold", got, fix)
    return mapped


def read(part: Part, generations: Sequence[Generation]) -> list[Reading]:
    """Score the texts of some cells and return their rows."""
    scores = score_generations(part, generations)
    generator = part.plan.generator
    names = generator.target.prompt.few_shot_names
    # A sampled text differs from the unpatched one by chance.
    unpatched = None if part.plan.config.draw else generator.unpatched().token_ids
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
            unchanged=generation.token_ids == unpatched,
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
                norm_outlier=plan.norm_outliers.get(cell.site, math.nan),
                draw=plan.config.draw,
                written=False,
                about=plan.about(cell.position),
            )
        )
    return rows


def finished_cells(written: Mapping[Cell, bool], generate: Generate) -> frozenset[Cell]:
    """Return the cells that need no more work under `SweepConfig.generate`.

    Given are the computed cells of one prompt, and whether each has a text.
    """
    texts = frozenset(cell for cell, has_text in written.items() if has_text)
    places = {cell.place for cell in texts}
    best = frozenset(cell for cell in written if cell.place in places)
    return {"none": frozenset(written), "all": texts, "best": best}[generate]


def mean(numbers: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def score_generations(part: Part, generations: Sequence[Generation]) -> list[float]:
    """Score the generated texts of some cells."""
    texts, descriptions = [g.text for g in generations], [g.description for g in generations]
    return score_readings(part.plan, part.cells, texts, descriptions)


def score_readings(
    plan: SweepPlan, cells: Sequence[Cell], texts: Sequence[str], descriptions: Sequence[str]
) -> list[float]:
    """Score the texts of some cells, whole or cropped, against what each is about."""
    judged = descriptions if plan.config.score_on == "description" else texts
    references = {cell.position: plan.about(cell.position) for cell in cells}
    if plan.config.score_against == "own words":
        references = {at: words.text for at, words in plan.own_words(references).items()}
    return score_texts(plan.scorer, [references[cell.position] for cell in cells], judged)
