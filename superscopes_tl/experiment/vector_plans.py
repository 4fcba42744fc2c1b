"""Read vectors that come from no source prompt: parameters, steering vectors, anything.

Speaking Probes ("Speaking Probes: Self-interpreting Models?", Dar 2023) patches a *parameter* over
the placeholder and lets the model describe it. Here:

1. Take vectors of the residual stream's width: a feed-forward layer's keys or values, a difference
   of means, the rows of a file (all in `vectors.stored`).
2. `plan_vectors` makes them the sites of a sweep in place of a prompt's tokens: site i is vector i,
   its token label the vector's name, its kind "vector". There is no source run.
3. `read_vectors` runs the plans in the same engine as any sweep: every vector, target layer and α
   in common batches, with the same controls, guidance, mappings and table.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment.config import SweepConfig
from superscopes_tl.experiment.plan import SweepPlan, plan_sweep
from superscopes_tl.experiment.results import SweepResult
from superscopes_tl.experiment.run import collect
from superscopes_tl.model import (
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    check_text,
    load_model,
)
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import SourceRun

KIND: Any = "vector"
"""The kind of these sites: no hook point of a model."""

NO_LAYER = -1
"""The source layer of a vector that comes from no layer."""


def plan_vectors(
    model: LanguageModel | Any,
    vectors: Float[Tensor, "n d_model"] | Float[Tensor, " d_model"] | Any,
    *,
    names: Sequence[str] | None = None,
    references: str | Sequence[str | None] | None = None,
    layers: int | Sequence[int] | None = None,
    unit: Literal["vector", "residual"] = "residual",
    **settings: Any,
) -> list[SweepPlan]:
    """Return the checked plans, one for each distinct reference.

    Args:
        model: from `load_model`, or anything that it takes.
        vectors: a tensor or array; one vector or many.
        names: their token labels in the table; default to "vector 0", "vector 1", ...
        references: their known meanings, to score against: one text for all, or one each with
            `None` for unknown. A vector without a reference has the score NaN.
        layers: their source layers, for the table and for `target_layer="same"`: one for all, or
            one each, counted from 0. Defaults to `NO_LAYER` (−1), no layer.
        unit: "residual", unlike in a sweep of activations: α = 1 has the norm of the residual
            stream that the vector replaces. A parameter's own norm says little, since the model
            multiplies it by an activation before it is added; "vector" keeps it. With a `base`, v
            is scaled before the base is subtracted: f(v) = b + α·(v − b) is v at α = 1.
        **settings: the fields of `SweepConfig`, but for those that concern a source prompt.

    Raises:
        ValueError, TypeError: as `plan_sweep`; vectors of another width, or as many names,
            references or layers as there are no vectors.
    """
    _check_settings(settings)
    model = load_model(model)
    rows = _checked(vectors, model)
    labels = _names(names, len(rows))
    resize = unit == "residual" and settings.get("base") is not None
    config = SweepConfig.of(
        SweepConfig(vectors=GivenVectors(rows, resize=resize), target_layer=0),
        {"unit": "vector" if resize else unit, **settings},
    )
    sources = _sources(layers, len(rows), model)
    if NO_LAYER in sources and config.target_layer == "same":
        fix = "pass their source layers: layers=..."
        raise bad_value("target_layer", "layers, as some vectors come from none", "same", fix)
    meanings = _one_each("references", references, len(rows)) or [None] * len(rows)
    for meaning in {*meanings} - {None}:
        check_text(meaning, "references")
    if not any(meanings):
        config = replace(config, scorer=no_scores)
    # A plan needs a source prompt; any will do, since it is replaced at once.
    text = config.prompt_with_placeholder.text
    first = plan_sweep(model, text, config, layers=0, kinds=model.kinds[0])
    return [
        replace(
            first,
            source=TokenizedText(meaning or "", (), (), labels, 0, range(len(rows))),
            sites=tuple(
                Site(KIND, sources[i], i) for i in range(len(rows)) if meanings[i] == meaning
            ),
            config=replace(first.config, scorer=first.scorer if meaning else no_scores),
            abouts={},
        )
        # Known meanings first: the provenance of the whole has the first plan's scorer.
        for meaning in sorted(dict.fromkeys(meanings), key=lambda meaning: meaning is None)
    ]


def read_vectors(
    model: LanguageModel | Any, vectors: Any, *, progress: bool = True, **settings: Any
) -> SweepResult:
    """Have the model describe each vector, at every target layer and α.

    Example:
        >>> values = mlp_values(model, 4)[:8]  # doctest: +SKIP
        >>> read_vectors(model, values, controls="random_direction").table  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes.
        vectors: a tensor or array, `[n d_model]` or `[d_model]`, such as `mlp_values`,
            `difference_of_means` and `load_vectors` return.
        progress: whether to show a progress bar.
        **settings: those of `plan_vectors`.

    Returns:
        A row per cell, in the order of the vectors: `token` is the vector's name, `position` its
        number, `prompt` its reference or empty, `score` NaN without one.

    Raises:
        ValueError, TypeError: as `plan_vectors`.
        SweepInterrupted, SweepError: as `SweepPlan.run`.
    """
    plans = plan_vectors(model, vectors, **settings)
    result = collect(plans, progress=progress)
    table = result.table.sort_values("position", kind="stable", ignore_index=True)
    return SweepResult(table, result.provenance, result.plan)


def read_vector(
    model: LanguageModel | Any, v: Any, *, name: str = "vector", **settings: Any
) -> SweepResult:
    """Have the model describe one vector, `[d_model]`, with the settings of `read_vectors`.

    Raises:
        ValueError, TypeError: several vectors, or as `plan_vectors`.
    """
    if getattr(v, "ndim", 1) != 1:
        fix = "use read_vectors, or choose a row"
        raise bad_value("v", "one vector, of shape [d_model]", f"shape {list(v.shape)}", fix)
    return read_vectors(model, v, names=[name], **settings)


@dataclass(frozen=True, repr=False)
class GivenVectors:
    """A source of vectors: row i for position i.

    With `resize` each is scaled to the norm of the residual stream that it replaces. Results
    distinguish vectors by `digest`, a hash of their numbers.
    """

    rows: Float[Tensor, "n d_model"] = field(compare=False)
    resize: bool
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = zlib.crc32(self.rows.numpy().tobytes())
        object.__setattr__(self, "digest", f"{digest:08x}")

    def __call__(self, run: SourceRun, places: Sequence[tuple[Site, int]]) -> Tensor:
        """Return the vector of each site."""
        vectors = self.rows[[site.position for site, _ in places]]
        if not self.resize:
            return vectors
        norms = run.generator.placeholder_norms[[target_layer for _, target_layer in places]]
        return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-30) * norms[:, None]

    def __repr__(self) -> str:
        return f"GivenVectors(<{len(self.rows)} vectors {self.digest}>, resize={self.resize})"


def _checked(vectors: Any, model: LanguageModel) -> Float[Tensor, "n d_model"]:
    """Return the vectors in float32 on the CPU, one per row."""
    fix = "pass mlp_values(model, layer), load_vectors(path), ..."
    try:
        rows = torch.as_tensor(vectors).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_type("vectors", "a tensor or array", vectors, fix) from error
    if rows.dim() not in (1, 2) or not rows.numel() or rows.shape[-1] != model.d_model:
        turned = rows.dim() == 2 and rows.shape[0] == model.d_model
        expected = f"shape [n {model.d_model}], the width of {model.name}"
        fix = "transpose them: vectors.T" if turned else fix
        raise bad_value("vectors", expected, f"shape {list(rows.shape)}", fix)
    if not torch.isfinite(rows).all():
        raise bad_value("vectors", "finite numbers", "NaN or infinity", fix)
    return rows.reshape(-1, model.d_model)


def _names(names: Sequence[str] | None, n: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"vector {i}" for i in range(n))
    given = _one_each("names", [names] if isinstance(names, str) else names, n) or []
    for name in given:
        check_text(name, "names")
    if len(set(given)) < n:
        raise bad_value("names", "distinct names", given, "number them")
    return tuple(given)


def _sources(layers: Any, n: int, model: LanguageModel) -> list[int]:
    """Return the source layer of each vector, or `NO_LAYER`."""
    given = _one_each("layers", NO_LAYER if layers is None else layers, n) or []
    checked = [
        NO_LAYER if one == NO_LAYER else check_layers([one], model.n_layers)[0] for one in given
    ]
    if backwards := [one for one in given if one < NO_LAYER]:  # as −1 is not the last layer
        expected = f"layers counted from 0, or NO_LAYER ({NO_LAYER})"
        raise bad_value("layers", expected, backwards, "count from 0")
    return checked


def _one_each(argument: str, given: Any, n: int) -> list[Any] | None:
    """Return one entry per vector; a single one is that of all."""
    if given is None or isinstance(given, str | int):
        return None if given is None else [given] * n
    several = list(given)
    if len(several) != n:
        raise bad_value(argument, f"one for each of {n} vectors", len(several), "match them")
    return several


_OF_A_PROMPT = ("kinds", "positions", "source_template", "about", "vectors", "target_model")


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that mean nothing without a source prompt."""
    if senseless := [name for name in settings if name in _OF_A_PROMPT]:
        raise bad_type("settings", "settings that need no source prompt", senseless, "omit them")
    controls = settings.get("controls", ())
    if "other_prompt" in ((controls,) if isinstance(controls, str) else controls):
        fix = "random_direction and shuffled_dimensions keep the norm"
        raise bad_value("controls", "controls that need no source prompt", "other_prompt", fix)
