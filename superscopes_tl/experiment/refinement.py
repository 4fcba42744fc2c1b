"""Coarse to fine: try the α between those of a sweep where it reads best (paper, section 4.1).

1. Take a sweep's best α of each site and the two next to it.
2. Read the site at the midpoints between them, geometric ones where both are positive: what counts
   is the ratio of α·v to the residual stream.
3. Repeat with what was found; cells that are there are not computed again.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.experiment.plan import Cell, SweepPlan
from superscopes_tl.experiment.results import SweepResult
from superscopes_tl.experiment.run import collect
from superscopes_tl.model import Site


def refine(
    plan: SweepPlan, result: SweepResult, *, rounds: int = 2, progress: bool = True
) -> SweepResult:
    """Return the result with more α around the best one of each site.

    Every round adds up to two readings per site: the best score can only rise, and with it the
    number of draws that a control has to be given.

    Args:
        plan: the plan of the sweep, from `plan_sweep`.
        result: its result, or an earlier refinement.
        rounds: how often to halve the distance.
        progress: whether to show a progress bar.

    Raises:
        ValueError: fewer than one round, or a result with no cell of the plan's sites.
    """
    check_count("rounds", rounds, least=1, fix="2 is the default")
    judge = "score" if result.table["written"].all() else "recovered"
    for _ in range(rounds):
        wanted = [
            Cell.at(site, target_layer, alpha)
            for site in plan.sites
            for target_layer in plan.target_layers(site)
            for alpha in midpoints(_site(result.table, plan, site, target_layer), judge)
        ]
        if not wanted:
            break
        alphas = tuple(dict.fromkeys([*plan.alphas, *(cell.alpha for cell in wanted)]))
        finer = replace(plan, alphas=alphas)
        todo = replace(finer, finished=frozenset(finer.all_cells) - frozenset[Cell](wanted))
        new = collect([todo], progress=progress).table
        table = pd.concat([result.table, new], ignore_index=True)
        config = {**result.provenance.get("config", {}), "alphas": sorted(set(table["alpha"]))}
        provenance = {**result.provenance, "config": config, "planned_cells": len(table)}
        result = SweepResult(table, provenance)
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


def _site(table: pd.DataFrame, plan: SweepPlan, site: Site, target_layer: int) -> pd.DataFrame:
    rows = table[
        (table["kind"] == site.kind)
        & (table["source_layer"] == site.layer)
        & (table["position"] == site.position)
        & (table["target_layer"] == target_layer)
        & (table["prompt"] == plan.source.text)
        & (table["mapping"] == plan.mapping_name)
        & (table["draw"] == plan.config.draw)
    ].sort_values("alpha")
    if rows.empty:
        raise bad_value(
            "result",
            f"readings of {site} of {plan.source.text!r} by {plan.mapping_name}",
            "none",
            "pass the result of this plan's sweep",
        )
    return rows
