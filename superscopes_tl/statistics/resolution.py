"""Where a model resolves a name, and what amplification reads before that (paper, section 4).

1. ℓ_c is the first source layer whose `resid_post` at α = 1 reads the entity (see
   `SweepResult.contextualization_layer`), here for every prompt of a table.
2. `reveals_earlier` keeps the layers before ℓ_c at which some other α already reads the entity
   (Tables 1 to 3).
"""

from __future__ import annotations

import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import By, Reads, contextualization, rows_at
from superscopes_tl.model import HookKind
from superscopes_tl.scores import PAPER_THRESHOLD
from superscopes_tl.vectors import PAPER_MAPPING

_PLACE = ["prompt", "source_layer"]


def contextualization_layers(
    table: pd.DataFrame,
    *,
    by: By = "score",
    reads: Reads | None = None,
    threshold: float | None = None,
    position: int | None = None,
    target_layer: int | None = None,
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
    reads: Reads | None = None,
    threshold: float = PAPER_THRESHOLD,
    position: int | None = None,
    target_layer: int | None = None,
) -> pd.DataFrame:
    """Return where an α other than 1 reads the entity before ℓ_c.

    With `mlp_out` these are the rows of the paper's Tables 1 and 2 (section 4.1), with
    `resid_post` those of Table 3 (section 4.2). A prompt without ℓ_c has no "before" and is left
    out. The smallest |α| that reads the entity is shown, a positive one before a negative one.

    Args:
        table: as in `contextualization_layers`.
        kind: what is amplified.
        reads: as in `contextualization_layers`, like the arguments that follow.
        threshold: the least score that reads the entity.
        position: the token.
        target_layer: the target layer.

    Returns:
        A row per prompt and source layer, in the table's order of prompts, with the columns
        `prompt`, `token`, `kind`, `source_layer`, `target_layer`, `hidden_state` (what
        `resid_post` of that layer reads as at α = 1), `at_alpha_1` (what `kind` reads as there),
        `alpha`, `reading` and `score` (the amplified one), `contextualization_layer` and
        `at_contextualization` (what `resid_post` reads as at ℓ_c). What was not computed is `<NA>`.

    Raises:
        ValueError: as `contextualization_layers`, or a prompt without `kind` at α = 1 or at any
            other α.
    """
    plain = _cells(table, "resid_post", position, target_layer)
    layers = contextualization_layers(
        table, reads=reads, threshold=None if reads else threshold,
        position=position, target_layer=target_layer,
    )  # fmt: skip
    amplified = _cells(table, kind, position, target_layer, amplified=True)
    before = amplified["source_layer"] < amplified["prompt"].map(layers)
    hits = amplified[before.fillna(False).astype(bool) & _reads(amplified, reads, threshold)]
    order = hits.assign(
        rank=layers.index.get_indexer(pd.Index(hits["prompt"])), size=hits["alpha"].abs()
    )
    order = order.sort_values("alpha", ascending=False)
    order = order.sort_values(["rank", "source_layer", "size"], kind="stable")
    found = order.drop_duplicates(_PLACE).reset_index(drop=True)

    hidden = plain.set_index(_PLACE)["description"]
    unscaled = _cells(table, kind, position, target_layer).set_index(_PLACE)["description"]
    here = pd.MultiIndex.from_frame(found[_PLACE])
    resolved = found["prompt"].map(layers).astype("int64")
    there = pd.MultiIndex.from_arrays([found["prompt"], resolved])
    return pd.DataFrame(
        {
            **found[["prompt", "token", "kind", "source_layer", "target_layer"]],
            "hidden_state": hidden.reindex(here).array,
            "at_alpha_1": unscaled.reindex(here).array,
            "alpha": found["alpha"],
            "reading": found["description"],
            "score": found["score"],
            "contextualization_layer": resolved,
            "at_contextualization": hidden.reindex(there).array,
        }
    )


def _cells(
    table: pd.DataFrame,
    kind: str,
    position: int | None,
    target_layer: int | None,
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
