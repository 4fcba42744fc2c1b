"""Where a model resolves a name, and what amplification reads before that (paper, section 4).

1. ℓ_c is the first source layer whose `resid_post` at α = 1 reads the entity (see
   `SweepResult.contextualization_layer`), here for every prompt of a table.
2. `reveals_earlier` keeps the layers before ℓ_c at which some other α already reads the entity
   (Tables 1 to 3). "Some α" has several tries at each layer; judged by `recovered` it is one, the α
   that gains most for other prompts (`cross_fitted`).
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.experiment import By, Reads, contextualization, rows_at, worth_recovered
from superscopes_tl.model import HookKind
from superscopes_tl.scores import PAPER_THRESHOLD, above_others
from superscopes_tl.statistics.shares import Target, cross_fitted
from superscopes_tl.vectors import PAPER_MAPPING

_PLACE = ["prompt", "source_layer"]


def contextualization_layers(
    table: pd.DataFrame,
    *,
    by: By = "score",
    reads: Reads | None = None,
    threshold: float | None = None,
    position: int | None = None,
    target_layer: Target = None,
) -> pd.Series[int]:
    """Return ℓ_c of every prompt (paper, section 4.1).

    Args:
        table: readings of one or many prompts. Only greedy ones of the paper's mapping count.
        by: the criterion, the paper's "score" or "recovered".
        reads: judges prompt and description instead.
        threshold: the least score that reads the entity; defaults to the paper's 0.3.
        position: the token; defaults to the rightmost one of each prompt.
        target_layer: which target layer, where there are several per source layer.

    Returns:
        The layer per prompt, in the table's order; `<NA>` where no layer reads the entity.

    Raises:
        ValueError: a prompt without `resid_post` at α = 1, a token that was not read, several
            target layers, or texts to judge that were not generated.
    """
    cells = _cells(table, "resid_post", position, target_layer)
    layers = {
        prompt: contextualization(rows, by=by, threshold=threshold, reads=reads).layer
        for prompt, rows in cells.groupby("prompt", sort=False)
    }
    found = pd.Series(layers, dtype="Int64", name="contextualization_layer")
    return found.rename_axis("prompt")


def reveals_earlier(
    table: pd.DataFrame,
    kind: HookKind = "resid_post",
    *,
    by: By = "score",
    reads: Reads | None = None,
    threshold: float | None = None,
    position: int | None = None,
    target_layer: Target = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Return where an α other than 1 reads the entity before ℓ_c.

    With `mlp_out` these are the rows of the paper's Tables 1 and 2 (section 4.1), with
    `resid_post` those of Table 3 (section 4.2). A prompt without ℓ_c has no "before" and is left
    out. The smallest |α| that reads the entity is shown, a positive one before a negative one.

    Judged by "recovered" there is a row for every prompt instead, with the first layer at which
    `kind` reads the entity at the cross-fitted α of that layer, before ℓ_c or not. Both layers
    need the share above other prompts' vectors that `contextualization` asks for: half of the
    prompt's best block output at α = 1. No texts are needed.

    Args:
        table: as in `contextualization_layers`; with the control "other_prompt" where shares judge.
        kind: what is amplified.
        by: as in `contextualization_layers`, like the arguments that follow.
        reads: judges prompt and description instead.
        threshold: the least score that reads the entity.
        position: the token.
        target_layer: the target layer.
        folds: as in `cross_fitted`, like the seed.
        seed: of the folds.

    Returns:
        A row per prompt and source layer, in the table's order of prompts, with the columns
        `prompt`, `token`, `kind`, `source_layer`, `target_layer`, `hidden_state` (what
        `resid_post` of that layer reads as at α = 1), `at_alpha_1` (what `kind` reads as there),
        `alpha`, `reading` and `score` (the amplified one), `contextualization_layer` and
        `at_contextualization` (what `resid_post` reads as at ℓ_c). What was not computed is `<NA>`.
        By "recovered", also `recovered` and `other_prompt_recovered` of the amplified cell, both
        with the ending `_at_contextualization` of ℓ_c, and `earlier`, whether the source layer
        is before ℓ_c; layers that no cell reaches are `<NA>`.

    Raises:
        ValueError: as `contextualization_layers`, or a prompt without `kind` at α = 1 or at any
            other α; by "recovered" as `cross_fitted`.
    """
    place: dict[str, Any] = {"position": position, "target_layer": target_layer}
    plain = _cells(table, "resid_post", **place)
    layers = contextualization_layers(table, by=by, reads=reads, threshold=threshold, **place)
    by_shares = by == "recovered" and reads is None
    if by_shares:
        found = _earliest(cross_fitted(table, folds=folds, seed=seed, **place), kind, plain, layers)
    else:
        least = PAPER_THRESHOLD if threshold is None else threshold
        amplified = _cells(table, kind, **place, amplified=True)
        found = _before(amplified, layers, reads, least)
    hidden, unscaled, texts = map(_texts, (plain, _cells(table, kind, **place), found))
    here = list(zip(found["prompt"], found["source_layer"], strict=True))
    resolved = found["prompt"].map(layers).astype("Int64")
    there = list(zip(found["prompt"], resolved, strict=True))
    shown = found[["prompt", "token", "kind", "source_layer", "target_layer"]].assign(
        hidden_state=[hidden.get(cell, pd.NA) for cell in here],
        at_alpha_1=[unscaled.get(cell, pd.NA) for cell in here],
        alpha=found["alpha"],
        reading=[texts.get(cell, pd.NA) for cell in here],
        score=found["score"],
        contextualization_layer=resolved,
        at_contextualization=[hidden.get(cell, pd.NA) for cell in there],
    )
    if by_shares:
        at_place = plain.set_index(_PLACE)
        for name in ("recovered", "other_prompt_recovered"):
            shares = at_place[name].to_dict()
            shown[name] = found[name]
            shown[f"{name}_at_contextualization"] = [shares.get(cell, math.nan) for cell in there]
        shown["earlier"] = (shown["source_layer"] < resolved).fillna(False).astype(bool)
    return shown


def _before(
    amplified: pd.DataFrame, layers: pd.Series[int], reads: Reads | None, threshold: float
) -> pd.DataFrame:
    """Return the smallest |α| that reads the entity at each layer before ℓ_c."""
    before = amplified["source_layer"] < amplified["prompt"].map(layers)
    hits = amplified[before.fillna(False).astype(bool) & _reads(amplified, reads, threshold)]
    order = hits.assign(
        rank=layers.index.get_indexer(pd.Index(hits["prompt"])), size=hits["alpha"].abs()
    )
    order = order.sort_values("alpha", ascending=False)
    order = order.sort_values(["rank", "source_layer", "size"], kind="stable")
    return order.drop_duplicates(_PLACE).reset_index(drop=True)


def _earliest(
    fitted: pd.DataFrame, kind: str, plain: pd.DataFrame, layers: pd.Series[int]
) -> pd.DataFrame:
    """Return each prompt's first cross-fitted cell of a kind that recovers enough to read it."""
    check_choice("kind", kind, list(dict.fromkeys(fitted["kind"])))
    least = {prompt: worth_recovered(rows)[1] for prompt, rows in plain.groupby("prompt")}
    cells = fitted[fitted["kind"] == kind]
    worth = above_others(cells["recovered"], cells["other_prompt_recovered"])
    hits = cells[worth >= cells["prompt"].map(least)].sort_values("source_layer", kind="stable")
    found = hits.drop_duplicates("prompt").set_index("prompt").reindex(layers.index).reset_index()
    tokens = plain.drop_duplicates("prompt").set_index("prompt")["token"]
    return found.assign(kind=kind, token=found["prompt"].map(tokens)).astype(
        {"source_layer": "Int64", "target_layer": "Int64"}
    )


def _texts(cells: pd.DataFrame) -> dict[Any, Any]:
    """Return the generated descriptions by prompt and layer."""
    written = cells[cells["written"].eq(True)]
    texts: dict[Any, Any] = written.set_index(_PLACE)["description"].to_dict()
    return texts


def _cells(
    table: pd.DataFrame,
    kind: str,
    position: int | None,
    target_layer: Target,
    amplified: bool = False,
) -> pd.DataFrame:
    """Return the greedy cells of one kind and token, all at α = 1 or all at any other α."""
    at_token = rows_at(table, position=position, target_layer="all")
    paper = (at_token["draw"] == 0) & (at_token["mapping"] == PAPER_MAPPING)
    rows = at_token[paper & (at_token["kind"] == kind)]
    rows = rows[(rows["alpha"] != 1) == amplified]
    if lacking := set(at_token["prompt"]) - set(rows["prompt"]):
        there = table[table["prompt"] == min(lacking)]
        alphas = "an α other than 1" if amplified else "α = 1"
        wanted = f"a sweep of {min(lacking)!r} with kind {kind!r}, {PAPER_MAPPING} and {alphas}"
        got = {name: there[name].unique().tolist() for name in ("kind", "alpha", "mapping")}
        raise bad_value("contextualization_layer", wanted, got, "sweep over these too")
    rows = rows_at(rows, position=position, target_layer=target_layer)
    if rows.duplicated([*_PLACE, "alpha"]).any():
        wanted, fix = "the readings of one model", "pass them one by one"
        raise bad_value("table", wanted, "several per cell", fix)
    return rows


def _reads(cells: pd.DataFrame, reads: Reads | None, threshold: float) -> pd.Series[bool]:
    if reads is None:
        return cells["score"] >= threshold
    pairs = zip(cells["prompt"], cells["description"], strict=True)
    return pd.Series([bool(reads(*pair)) for pair in pairs], index=cells.index, dtype=bool)
