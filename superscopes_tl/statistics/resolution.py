"""Where a model resolves a name, and what amplification reads before that (paper, section 4).

1. Judge every greedy reading: by what it recovers of the model's own words, by its score, or by a
   callable that knows the entity.
2. ℓ_c is the first source layer whose `resid_post` at α = 1 reads the entity: Patchscopes says
   that the model has resolved it there.
3. Keep the layers before ℓ_c at which some other α reads the entity already (Tables 1 to 3).

A table may hold one prompt (`SweepResult.table`) or many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.model import HookKind
from superscopes_tl.scores import PAPER_THRESHOLD
from superscopes_tl.vectors import PAPER_MAPPING

_PLACE = ["prompt", "source_layer"]


def contextualization_layers(
    table: pd.DataFrame,
    *,
    reads: Callable[[str, str], bool] | None = None,
    threshold: float = PAPER_THRESHOLD,
    position: int | None = None,
    target_layer: int | None = None,
) -> pd.Series[int]:
    """Return ℓ_c of every prompt (paper, section 4.1).

    Args:
        table: cells of one prompt or of many. Only greedy readings of the mapping `scale` count.
        reads: judges `(prompt, description)` instead of the threshold.
        threshold: the score from which a description counts as reading the entity.
        position: the token; the rightmost one that was read of each prompt unless given.
        target_layer: which target layer, where there are several per source layer. With the
            target `"same"` each source layer has its own.

    Returns:
        The layer per prompt, in the table's order; `<NA>` where no layer reads the entity.

    Raises:
        ValueError: an empty table, a prompt without `resid_post` at α = 1, a token that was not
            read, or several target layers.
    """
    cells = _cells(table, "resid_post", position, target_layer)
    first = cells[_reads(cells, reads, threshold)].groupby("prompt")["source_layer"].min()
    layers = first.reindex(cells["prompt"].unique()).astype("Int64")
    return layers.rename("contextualization_layer").rename_axis("prompt")


def reveals_earlier(
    table: pd.DataFrame,
    kind: HookKind = "resid_post",
    *,
    reads: Callable[[str, str], bool] | None = None,
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
        reads: as in `contextualization_layers`; the other arguments too.
        threshold: the score from which a description counts as reading the entity.
        position: the token; the rightmost one that was read of each prompt unless given.
        target_layer: which target layer, where there are several per source layer.

    Returns:
        A row per prompt and source layer, in the table's order of prompts, with the columns
        `prompt`, `token`, `kind`, `source_layer`, `target_layer`, `hidden_state` (what
        `resid_post` of that layer says at α = 1), `at_alpha_1` (what `kind` says there), `alpha`
        and `reading` and `score` (the amplified one), `contextualization_layer` and
        `at_contextualization` (what `resid_post` says at ℓ_c). What was not computed is `<NA>`.

    Raises:
        ValueError: as `contextualization_layers`, or a prompt without `kind` at α = 1 or at any
            other α.
    """
    judge: dict[str, Any] = {"reads": reads, "threshold": threshold}
    place: dict[str, Any] = {"position": position, "target_layer": target_layer}
    layers = contextualization_layers(table, **judge, **place)
    amplified = _cells(table, kind, **place, amplified=True)
    before = amplified["source_layer"] < amplified["prompt"].map(layers)
    hits = amplified[before.fillna(False).astype(bool) & _reads(amplified, **judge)]
    hits = hits.assign(
        _size=hits["alpha"].abs(), _rank=layers.index.get_indexer(pd.Index(hits["prompt"]))
    )
    found = hits.sort_values(
        ["_rank", "source_layer", "_size", "alpha"], ascending=[*[True] * 3, False]
    )
    found = found.drop_duplicates(_PLACE).reset_index(drop=True)

    said = _said(_cells(table, "resid_post", **place))
    plain = _said(_cells(table, kind, **place))
    here = pd.MultiIndex.from_frame(found[_PLACE])
    resolved = found["prompt"].map(layers)
    there = pd.MultiIndex.from_arrays([found["prompt"], resolved.astype("int64")])
    return pd.DataFrame(
        {
            **found[["prompt", "token", "kind", "source_layer", "target_layer"]],
            "hidden_state": said.reindex(here).array,
            "at_alpha_1": plain.reindex(here).array,
            "alpha": found["alpha"],
            "reading": found["description"],
            "score": found["score"],
            "contextualization_layer": resolved.astype("int64"),
            "at_contextualization": said.reindex(there).array,
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
    at_token = _at(table, position)
    if "written" in at_token and not at_token["written"].all():
        raise bad_value(
            "table", "readings that were all written out", "some without a text",
            "read with generate='all'; SweepResult.contextualization_layer judges by recovered",
        )  # fmt: skip
    paper = (at_token["draw"] == 0) & (at_token["mapping"] == PAPER_MAPPING)
    rows = at_token[paper & (at_token["kind"] == kind)]
    rows = rows[(rows["alpha"] != 1) == amplified]
    if target_layer is not None:
        rows = rows[rows["target_layer"] == target_layer]
    lacking = set(at_token["prompt"]) - set(rows["prompt"])
    if lacking:
        there = table[table["prompt"] == min(lacking)]
        names = ("kind", "alpha", "target_layer", "mapping")
        kinds, swept, targets, mappings = (sorted(there[name].unique().tolist()) for name in names)
        wanted = "an α other than 1" if amplified else "α = 1"
        raise bad_value(
            "contextualization_layer",
            f"a sweep with kind {kind!r} and {wanted}",
            f"kinds {kinds}, alphas {swept}, target layers {targets}, mappings {mappings} of "
            f"{min(lacking)!r}",
            "sweep over these too",
        )
    if rows.duplicated([*_PLACE, "alpha"]).any():
        raise bad_value(
            "target_layer",
            f"one of {sorted(rows['target_layer'].unique().tolist())}",
            target_layer,
            "say which one to read, and pass the readings of one model alone",
        )
    return rows


def _at(table: pd.DataFrame, position: int | None) -> pd.DataFrame:
    """Return the cells of one token of each prompt."""
    if not isinstance(table, pd.DataFrame):
        raise bad_type("table", "a table of readings", table, "pass result.table")
    if table.empty:
        raise bad_value(
            "table", "at least one cell", "an empty table", "let the sweep finish a batch"
        )
    last = table.groupby("prompt")["position"].transform("max")
    rows = table[table["position"] == (last if position is None else position)]
    lacking = set(table["prompt"]) - set(rows["prompt"])
    if lacking:
        there = table.loc[table["prompt"] == min(lacking), "position"]
        raise bad_value(
            "position",
            f"one of {sorted(there.unique().tolist())}",
            position,
            "choose a token of this sweep, or sweep over it",
        )
    return rows


def _reads(
    cells: pd.DataFrame, reads: Callable[[str, str], bool] | None, threshold: float
) -> pd.Series[bool]:
    if reads is None:
        return cells["score"] >= threshold
    pairs = zip(cells["prompt"], cells["description"], strict=True)
    return pd.Series([bool(reads(*pair)) for pair in pairs], index=cells.index, dtype=bool)


def _said(cells: pd.DataFrame) -> pd.Series[str]:
    """Return what was read, by prompt and source layer."""
    return cells.set_index(_PLACE)["description"]
