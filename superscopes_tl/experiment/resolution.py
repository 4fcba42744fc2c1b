"""ℓ_c of one token: the first layer that reads the entity (paper, section 4.1).

1. Judge its unamplified block outputs: by what they recover of the model's own words, by their
   score, or by a callable that knows the entity.
2. ℓ_c is the first source layer that reads the entity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd

from superscopes_tl.errors import bad_value
from superscopes_tl.scores import PAPER_THRESHOLD, above_others

By: TypeAlias = Literal["score", "recovered"]

LEAST_READ = 0.2
"""Where no layer recovers this much, none reads the entity: half of nothing is noise."""


@dataclass(frozen=True)
class Contextualization:
    """The contextualization layer ℓ_c of one token, with what is read there.

    Attributes:
        layer: the first source layer that reads the entity; `None` if none does. What follows is
            then of the layer that comes nearest.
        position: the token, counted from 0.
        token: that token, with visible white space.
        about: what the readings are held against.
        by: what judged: "recovered", "score", or "reads" for a callable.
        description: what `resid_post` says at α = 1.
        score: how alike that is to `about`.
        recovered: the share of the model's own words that it recovers.
        others: what other prompts' vectors recover there; NaN without that control.
        own_words: the model's own words.
        echo: whether the description repeats the name.
    """

    layer: int | None
    position: int
    token: str
    about: str
    by: str
    description: str
    score: float
    recovered: float
    others: float
    own_words: str
    echo: bool

    def __str__(self) -> str:
        where = "no layer" if self.layer is None else f"layer {self.layer}"
        parts = [f"contextualization layer of {self.about!r} (token {self.token!r}): {where}"]
        if self.description:
            parts.append(repr(self.description) + (" (repeats the name)" if self.echo else ""))
        if not math.isnan(self.score):
            parts.append(f"score {self.score:.2f}")
        if not math.isnan(self.recovered):
            others = "" if math.isnan(self.others) else f", other names' vectors {self.others:.2f}"
            parts.append(f"recovers {self.recovered:.2f} of {self.own_words!r}{others}")
        return "; ".join([*parts, f"judged by {self.by}"])


def contextualization(
    rows: pd.DataFrame,
    *,
    by: By | None = None,
    threshold: float | None = None,
    reads: Callable[[str], bool] | None = None,
) -> Contextualization:
    """Return ℓ_c of one token from its unamplified block outputs, a row per source layer.

    Args:
        rows: the rows of `resid_post` at α = 1.
        by: "recovered" or "score"; unless given the former where it is defined, unless a
            threshold is given.
        threshold: with the score.
        reads: judges a description instead.

    Raises:
        ValueError: nothing to judge by.
    """
    rows = rows.sort_values("source_layer")
    if by == "recovered" and threshold is not None:
        raise bad_value(
            "threshold", "none beside by='recovered'", threshold,
            "leave it out, or judge by='score'",
        )  # fmt: skip
    if by is None:
        defined = bool(rows["recovered"].notna().any())
        written = bool(rows["written"].all())
        # Neither a share nor a text: nothing is read, and that is the answer.
        shares = threshold is None and reads is None and (defined or not written)
        by = "recovered" if shares else "score"
    needs_texts = by == "score" or reads is not None
    if by not in ("score", "recovered") or (needs_texts and not rows["written"].all()):
        raise bad_value(
            "by",
            "'recovered'" + (" or 'score'" if rows["written"].all() else
                                      ", as not all cells are written out"),
            by, "leave it out, or sweep with generate='all'",
        )  # fmt: skip
    if reads is not None:
        worth = rows["description"].map(lambda text: float(reads(text)))
        least = 1.0
    elif by == "score":
        worth, least = rows["score"], PAPER_THRESHOLD if threshold is None else threshold
    else:
        worth = rows["recovered"]
        if "other_prompt_recovered" in rows:
            worth = above_others(worth, rows["other_prompt_recovered"])
        least = worth.max() / 2 if worth.max() >= LEAST_READ else math.inf
    hits = rows[worth >= least]
    nearest = rows.loc[[worth.idxmax()]] if worth.notna().any() else rows.head(1)
    row = (hits if len(hits) else nearest).iloc[0]
    return Contextualization(
        layer=int(row["source_layer"]) if len(hits) else None,
        position=int(row["position"]),
        token=str(row["token"]),
        about=str(row["about"]) or str(row["prompt"]),
        by=by if reads is None else "reads",
        description=str(row["description"]),
        score=float(row["score"]),
        recovered=float(row["recovered"]),
        others=float(row.get("other_prompt_recovered", math.nan)),
        own_words=str(row["own_words"]),
        echo=bool(row["echo"]),
    )
