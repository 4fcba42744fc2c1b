"""What makes the result of a sweep doubtful, said by the sweep itself.

1. Each rule looks at the table for one thing that misleads, and returns a line or nothing: an
   attention sink, words that nothing recovers, own words that say nothing, vectors of another
   length than what they replace, texts that are all the same, texts that repeat the name.
2. The first three lines count, the gravest first; each ends with a setting to try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pandas as pd

from superscopes_tl.engine import is_echo
from superscopes_tl.model import KINDS
from superscopes_tl.scores import LEAST_GAP

MOST_LINES = 3
LEAST_RECOVERED = 0.2
"""A map whose best unamplified block output recovers less than this reads nothing."""
USUAL_RATIO = (0.1, 10.0)
"""Norms of α·v, in units of the residual stream, between which a reading is nothing unusual."""

Rule: TypeAlias = Callable[[pd.DataFrame, Mapping[str, Any]], str]


def doubts(table: pd.DataFrame, provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what makes a result doubtful and what to try, at most three lines.

    Args:
        table: the cells of one prompt.
        provenance: of their sweep.
    """
    if table.empty:
        return ()
    config = provenance.get("config", {})
    lines = (rule(table, config) for rule in _RULES)
    return tuple(line for line in lines if line)[:MOST_LINES]


def _sink(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that the first token of the whole text was read."""
    # A vector that no prompt gave has a number for a position.
    read = table["kind"].isin(KINDS)
    rows = table[read & (table["position"] == 0) & (table["alpha"] == 1)]
    if rows.empty:
        return ""
    return (
        f"token {rows['token'].iloc[0]!r} is the first of its text, where attention sinks: its "
        f"norm is up to {rows['vector_norm'].max():,.0f}, and it says little of the name. "
        "Try source_template='Tell me about {}'."
    )


def _nothing_recovered(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that no layer recovers the model's own words at α = 1."""
    rows = _plain(table)
    rows = rows[rows["kind"] == "resid_post"]
    best = rows["recovered"].max()
    if pd.isna(best) or best >= LEAST_RECOVERED or rows["source_layer"].nunique() < 3:
        return ""
    return (
        f"no unamplified block output recovers more than {best:.2f} of the model's own words "
        f"({rows['own_words'].iloc[0]!r}): this setting may not read this model. Try "
        + ("" if config.get("target_layer") == "same" else "target_layer='same', or ")
        + "`superscopes check MODEL`."
    )


def _own_words(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that the model's own words are no yardstick."""
    said = table.drop_duplicates("about")
    gap = said["plain_nats"] - said["unpatched_nats"]
    none = said[(said["about"] != "") & ~(gap >= LEAST_GAP)]
    if len(none):
        return (
            f"recovered is not defined for {none['about'].iloc[0]!r}: with the name in the target "
            f"prompt the model says {none['own_words'].iloc[0]!r}, hardly likelier than without. "
            "Try another target prompt, or reference='a true fact'."
        )
    for about, words in zip(said["about"], said["own_words"], strict=True):
        if is_echo(words, about):
            return (
                f"the model's own words of {about!r} repeat the name ({words!r}): recovered then "
                "measures copying. Try another target prompt, or reference='a true fact'."
            )
    return ""


def _norms(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that v is far longer or shorter than what it replaces."""
    rows = _plain(table)
    ratio = rows["norm_ratio"].median()
    if pd.isna(ratio) or USUAL_RATIO[0] <= ratio <= USUAL_RATIO[1]:
        return ""
    return (
        f"at α = 1 the vectors are {ratio:.3g} times as long as the residual stream that they "
        "replace (median). Try unit='residual', or a target layer near the source."
    )


def _alike(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that most unamplified texts are the same, or empty."""
    rows = _plain(table)
    texts = rows.loc[rows["written"], "description"]
    if len(texts) < 4 or not 2 * (count := int(texts.value_counts().iloc[0])) > len(texts):
        return ""
    return (
        f"{count} of {len(texts)} unamplified cells of {rows['kind'].iloc[0]} read as "
        f"{texts.value_counts().index[0]!r}. Try "
        + ("another target prompt." if config.get("target_layer") == "same" else
           "target_layer='same'.")
    )  # fmt: skip


def _echoes(table: pd.DataFrame, config: Mapping[str, Any]) -> str:
    """Say that many of the texts that score well repeat the name."""
    scored = table[table["score"] >= table["score"].quantile(0.9)]
    count = int(scored["echo"].sum())
    if len(scored) < 3 or 3 * count < len(scored):
        return ""
    return (
        f"{count} of the {len(scored)} texts that score best repeat the name: similarity rewards "
        "that. Try the column recovered."
    )


_RULES: tuple[Rule, ...] = (_sink, _nothing_recovered, _own_words, _norms, _alike, _echoes)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the unamplified block outputs; of a sweep without them, all that is unamplified."""
    plain = table[table["alpha"] == 1]
    outputs = plain[plain["kind"] == "resid_post"]
    return outputs if len(outputs) else plain
