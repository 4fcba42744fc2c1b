"""Read vectors that no source prompt gave: parameters, steering vectors, anything (Dar 2023).

Speaking Probes ("Speaking Probes: Self-interpreting Models?", Dar 2023) patches a *parameter* over
the placeholder and lets the model say what it means. Here:

1. Get vectors of the residual stream's width: a feed-forward layer's keys or values, a difference
   of means (`directions`), the rows of a file (`vector_files`).
2. `plan_vectors` makes them the sites of a sweep, in the place of a prompt's tokens: site i is
   vector i, its token label the vector's name, its kind "vector". There is no source run.
3. `read_vectors` runs the plan in the same engine as any sweep: every vector, target layer and α
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

from superscopes_tl.engine import default_target_prompt
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment.config import check_names
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
    """Check everything and return the plans, one for each distinct reference.

    A plan is that of a sweep: `refine`, `relevancy` and the explorer's panels take it.

    Args:
        model: from `load_model`, or anything that it takes.
        vectors: a tensor or array; one vector or many.
        names: what to call them in the table; "vector 0", "vector 1", ... unless given.
        references: what each means, if that is known, to score against: one text for all, or one
            each with `None` for unknown. What has no reference has no score: NaN.
        layers: where they come from, for the table and for `target_layer="same"`: one for all, or
            one each, counted from 0; `NO_LAYER` (−1) where there is none, as unless given.
        unit: "residual", unlike in a sweep of activations: α = 1 is as long as the residual stream
            that the vector replaces. A parameter's own length says little, since the model
            multiplies it by an activation before it is added; with "vector" it is kept. With a
            `base`, v is resized before the base is taken off: f(v) = b + α·(v − b) is v at α = 1.
        **settings: the fields of `SweepConfig`, but for those that concern a source prompt.

    Raises:
        ValueError, TypeError: a bad setting, or vectors of another width.
    """
    _check_settings(settings)
    model = load_model(model)
    rows = _checked(vectors, model)
    shown = _names(names, len(rows))
    resize = unit == "residual" and settings.get("base") is not None
    config: dict[str, Any] = {
        "vectors": GivenVectors(rows, resize), "unit": "vector" if resize else unit,
        "target_layer": 0, **settings,
    }  # fmt: skip
    sources = _sources(layers, len(rows), model)
    if NO_LAYER in sources and config.get("target_layer") == "same":
        raise bad_value(
            "target_layer", "layers, as there are vectors that come from none", "same",
            "say where they come from: layers=...",
        )  # fmt: skip
    meanings = _one_each("references", references, len(rows)) or [None] * len(rows)
    for meaning in dict.fromkeys(meanings):
        if meaning is not None:
            check_text(meaning, "references")
    if not any(meanings):
        config["scorer"] = unscored
    # A plan wants a source prompt; any will do, since it is replaced at once.
    asked = config.get("target_prompt")
    text = default_target_prompt(asked, chat=bool(config.get("chat"))).text
    first = plan_sweep(model, text, layers=0, kinds=model.kinds[0], **config)
    return [
        replace(
            first,
            source=TokenizedText(meaning or "", (), (), shown, 0, range(len(rows))),
            sites=tuple(
                Site(KIND, sources[i], i) for i in range(len(rows)) if meanings[i] == meaning
            ),
            scorer=first.scorer if meaning else unscored,
            abouts={},
        )
        # Known meanings first: the provenance of the whole has the first plan's scorer.
        for meaning in sorted(dict.fromkeys(meanings), key=lambda meaning: meaning is None)
    ]


def read_vectors(
    model: LanguageModel | Any, vectors: Any, *, progress: bool = True, **settings: Any
) -> SweepResult:
    """Let the model say what each vector means, at every target layer and α.

    Example:
        >>> values = mlp_values(model, 4)[:8]  # doctest: +SKIP
        >>> read_vectors(model, values, controls="random_direction").table  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes.
        vectors: a tensor or array, `[n d_model]` or `[d_model]`, such as `mlp_values`,
            `difference_of_means` and `load_vectors` return.
        progress: whether to show a progress bar.
        **settings: those of `plan_vectors`: names, references, layers, unit, alphas,
            target_layer, target_prompt, controls, ...

    Returns:
        A row per cell, in the order of the vectors: `token` is the vector's name, `position` its
        number, `prompt` its reference or empty, `score` NaN without one. What needs no reference
        (`entropy`, `log_probability`, the opt-in control "unpatched_log_probability") is there.

    Raises:
        ValueError, TypeError: a bad setting, or vectors of another width.
        SweepInterrupted, SweepError: it broke off; finished cells are in its `partial`.
    """
    plans = plan_vectors(model, vectors, **settings)
    result = collect(plans, progress=progress)
    table = result.table.sort_values("position", kind="stable", ignore_index=True)
    return SweepResult(table, result.provenance)


def read_vector(
    model: LanguageModel | Any, v: Any, *, name: str = "vector", **settings: Any
) -> SweepResult:
    """Let the model say what one vector means: `read_vectors` for a single one.

    Args:
        model: from `load_model`, or anything that it takes.
        v: a tensor or array, `[d_model]`.
        name: what to call it in the table.
        **settings: those of `read_vectors`.

    Raises:
        ValueError, TypeError: several vectors, or a bad setting.
    """
    dims = getattr(v, "ndim", 1)
    if dims != 1:
        raise bad_value(
            "v", "one vector, of shape [d_model]", f"shape {list(v.shape)}",
            "use read_vectors, or choose a row",
        )  # fmt: skip
    return read_vectors(model, v, names=[name], **settings)


def unscored(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score nothing: the scorer of texts whose truth is not known."""
    return [float("nan")] * len(candidates)


@dataclass(frozen=True, repr=False)
class GivenVectors:
    """Source: the vector of each site, by its number.

    Attributes:
        rows: the vectors.
        resize: whether each is scaled to the norm of the residual stream that it replaces.
        digest: identifies the vectors.
    """

    rows: Float[Tensor, "n d_model"] = field(compare=False)
    resize: bool
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = zlib.crc32(self.rows.numpy().tobytes())
        object.__setattr__(self, "digest", f"{digest:08x}")

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return the vectors of some places."""
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
        raise bad_value(
            "vectors", f"shape [n {model.d_model}], the width of {model.name}",
            f"shape {list(rows.shape)}", "transpose them: vectors.T" if turned else fix,
        )  # fmt: skip
    if not torch.isfinite(rows).all():
        raise bad_value("vectors", "finite numbers", "NaN or infinity", fix)
    return rows.reshape(-1, model.d_model)


def _names(names: Sequence[str] | None, n: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"vector {i}" for i in range(n))
    given = _one_each("names", [names] if isinstance(names, str) else list(names), n) or []
    for name in given:
        check_text(name, "names")
    if len(set(given)) < n:
        raise bad_value("names", "a name of its own for each", given, "number them")
    return tuple(given)


def _sources(layers: Any, n: int, model: LanguageModel) -> list[int]:
    """Return the layer that each vector comes from, or `NO_LAYER`."""
    given = [NO_LAYER] * n if layers is None else _one_each("layers", layers, n) or []
    checked = [
        NO_LAYER if one == NO_LAYER else check_layers([one], model.n_layers)[0] for one in given
    ]
    # Were −2 the last layer but one, −1 would be taken for the last one, not for no layer.
    if backwards := [one for one in given if one < NO_LAYER]:
        raise bad_value(
            "layers", f"layers counted from 0, or NO_LAYER, {NO_LAYER}", backwards,
            "count from 0",
        )  # fmt: skip
    return checked


def _one_each(argument: str, given: Any, n: int) -> list[Any] | None:
    """Return one entry per vector; a single one stands for all."""
    if given is None:
        return None
    if isinstance(given, str | int):
        return [given] * n
    several = list(given)
    if len(several) != n:
        raise bad_value(
            argument, f"one for each of {n} vectors", f"{len(several)}",
            "give as many",
        )  # fmt: skip
    return several


_OF_A_PROMPT = ("kinds", "positions", "source_template", "about", "vectors", "target_model")


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that mean nothing where there is no source prompt."""
    check_names(settings)
    if senseless := [name for name in settings if name in _OF_A_PROMPT]:
        raise bad_type(
            "settings", "settings that need no source prompt", senseless,
            "leave them out",
        )  # fmt: skip
    controls = settings.get("controls", ())
    if "other_prompt" in ((controls,) if isinstance(controls, str) else controls):
        raise bad_value(
            "controls", "controls that need no source prompt", "other_prompt",
            "random_direction and shuffled_dimensions keep the norm",
        )  # fmt: skip
