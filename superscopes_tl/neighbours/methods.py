"""The neighbouring methods side by side: one site, all methods, one table.

A method is a set of sweep settings, so that all share the engine, the scores and the controls:

1. Make a plan per method for the one site. Methods with the same target prompt share its prefix and
   their batches.
2. Keep the best-scoring reading of each method, with the number of readings to choose from
   (`tries`) and the best of as many readings of the same cells in a random direction (`control`).
3. Add the methods without generation: lenses (most likely next tokens) and the ablation of the
   vector in the model's own run (activation patching).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pandas as pd

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment import Cell, SweepPlan, collect, plan_sweep
from superscopes_tl.model import LanguageModel, Position, load_model
from superscopes_tl.neighbours.causal import causal_effects
from superscopes_tl.neighbours.lenses import LENSES, Lens, lens_label, lens_table
from superscopes_tl.vectors import (
    PRESETS,
    SELFIE_PROMPT,
    Accumulated,
    Add,
    AffineMap,
    AtLayers,
    Both,
    Interpolate,
    Mapped,
    PlaceholderState,
)

CONTROL = "random_direction"
_FIXED = {"layers", "kinds", "positions", "controls"}
"""Settings shared by all methods, so that their rows can be compared."""
OWN_TOKENS = 10
"""Length in tokens of the continuation on which an ablation is measured."""

NEIGHBOURS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Patchscopes": PRESETS["patchscopes"],
        "Superscopes": {},
        "Superscopes, α in residual norms": {"unit": "residual", "alphas": (0.5, 1, 2, 4, 8)},
        "guidance on vectors": {"base": PlaceholderState()},
        "guidance on logits": {"guide": "logits", "alphas": (1.5, 2, 3, 5)},
        "SelfIE, five placeholders": {"target_prompt": SELFIE_PROMPT},
        "SelfIE, added": {"write": Add()},
        "SelfIE, added at layers 0 and 1": {
            "write": Both(Add(), AtLayers(0, 1)),
            "target_layer": 0,
        },
        "SelfIE, interpolated": {"write": Interpolate(), "alphas": (0.25, 0.5, 0.75, 0.9)},
        "as activation oracles": PRESETS["oracle"],
        "self-explaining features": PRESETS["self-explaining"],
        "the kind summed over layers": {"vectors": Accumulated()},
    }
)
"""Sweep settings by the name of the method; pass a mapping of your own to compare others."""


def side_by_side(
    model: LanguageModel | Any,
    prompt: str,
    *,
    layer: int,
    kind: str = "mlp_out",
    position: Position = -1,
    methods: Mapping[str, Mapping[str, Any]] = NEIGHBOURS,
    maps: Sequence[AffineMap] = (),
    lenses: Mapping[str, Lens] = LENSES,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Read one site by all methods.

    Example:
        >>> side_by_side(load_model(), "Red Hot Chili Peppers", layer=4)  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        layer: the source layer.
        kind: the kind of activation.
        position: the token: an index or a substring.
        methods: sweep settings by the name of the method; `{**NEIGHBOURS, "mine": {...}}` adds one.
            For a `target_model` of another width, only methods with `vectors=Mapped(...)`.
        maps: affine maps from the site's layer, from `fit_affine`, added as one more method.
        lenses: as in `lens_table`.
        progress: whether to show a progress bar.
        **settings: sweep settings of all methods, such as `target_layer` or `scorer`.

    Returns:
        A row per method: `method`, `description`, `alpha`, `target_layer`, `score`, `control` (the
        best score of as many readings in one random direction per site, so that methods which
        write it identically share their control) and `tries`. A lens has no score; its description
        is its most likely tokens with their probabilities. The last row is the change of the log-
        probability of the prompt's own continuation (ten tokens) under ablation, in nats per token,
        and under a random change of equal size.

    Raises:
        ValueError, TypeError: a bad setting.
    """
    model = load_model(model)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise bad_type("layer", "one layer", layer, "sweep() reads several")
    if not methods:
        raise bad_value("methods", "at least one method", methods, "leave it out for NEIGHBOURS")
    for name, own in {"settings": settings, **methods}.items():
        if misplaced := sorted(_FIXED & own.keys()):
            raise bad_value(
                name, "settings that leave site and control alone", misplaced,
                "say where to read with layer=, kind= and position=",
            )  # fmt: skip
    site = {"layers": layer, "kinds": kind, "positions": position, "controls": CONTROL}
    if settings.get("target_model") is not None:  # once, not once per method
        settings["target_model"] = load_model(settings["target_model"])
    if maps:
        into = {"vectors": Mapped(maps), "target_layer": sorted({m.target_layer for m in maps})}
        methods = {**methods, "affine map": into}
    plans = {
        name: plan_sweep(model, prompt, **{**settings, **own, **site})
        for name, own in methods.items()
    }
    first = next(iter(plans.values()))
    # Before the readings, which take longer: a lens may refuse the layer.
    tokens = lens_table(model, first.source, first.sites, lenses=lenses, top_k=3)
    rows = [row for group in _groups(plans) for row in _read(group, progress=progress)]
    order = list(methods)
    rows.sort(key=lambda row: order.index(row["method"]))
    rows += [
        {"method": lens_label(str(name), bool(random)), "description": _tokens(found)}
        for (name, random), found in tokens.groupby(["lens", "control"], sort=False)
    ]
    framed = first.config.source_template.replace("{}", prompt)
    effects = causal_effects(
        model, framed, kinds=kind, layers=layer, positions=first.sites[0].position,
        continuation=OWN_TOKENS, chat=first.config.chat,
    ).iloc[0]  # fmt: skip
    rows.append({"method": "ablated in its own run", "description": _effect(effects)})
    columns = ["method", "description", "alpha", "target_layer", "score", "control", "tries"]
    return pd.DataFrame(rows, columns=columns).astype({"tries": "Int64", "target_layer": "Int64"})


def _groups(plans: Mapping[str, SweepPlan]) -> Iterator[dict[str, SweepPlan]]:
    """Yield the plans that can share batches, with one generator for all of them."""
    left = dict(plans)
    while left:
        first = next(iter(left.values()))
        group = {
            name: replace(plan, generator=first.generator)
            for name, plan in left.items()
            if _shared(plan) == _shared(first)
        }
        left = {name: plan for name, plan in left.items() if name not in group}
        yield group


def _shared(plan: SweepPlan) -> tuple[Any, ...]:
    return plan.generator.model.tl, plan.generator.target, plan.generator.max_new_tokens


def _read(plans: Mapping[str, SweepPlan], *, progress: bool) -> Iterator[dict[str, Any]]:
    """Yield the best reading of each method of one target prompt."""
    table = collect(list(plans.values()), progress=progress).table
    keys = [(row.mapping, Cell.of(row)) for row in table.itertuples()]
    for name, plan in plans.items():
        own = {(plan.mapping_name, cell) for cell in plan.cells}
        cells = table[[key in own for key in keys]]  # methods may share a cell
        ranked = cells.sort_values("score", ascending=False, na_position="last", kind="stable")
        row: Any = ranked.iloc[0]
        best = {column: row[column] for column in ("description", "alpha", "target_layer", "score")}
        yield {"method": name, **best, "control": cells[CONTROL].max(), "tries": len(cells)}


def _tokens(found: pd.DataFrame) -> str:
    """Return a lens's most likely tokens as one line."""
    pairs = zip(found["top_token"], found["probability"], strict=True)
    return ", ".join(f"{token!r} {probability:.2f}" for token, probability in pairs)


def _effect(row: pd.Series) -> str:
    return (
        f"own continuation {row['effect']:+.2g} nats per token, "
        f"{row['control_effect']:+.2g} with a random change of equal size"
    )
