"""What each layer recovers: at α = 1, amplified, and by vectors that know nothing of the prompt.

1. The candidates of a site (kind, source layer, target layer) are the α of one mapping, and α = 1
   of the paper's mapping, Patchscopes: the baseline *plain*. The worth of a cell is its share
   recovered above other prompts' vectors (`above_others`), and its gain that minus the plain worth.
2. Prompts are divided into folds. The prompts of a fold get the candidate with the highest mean
   gain over the prompts of the other folds. A prompt that helped to choose its own α would be
   used twice (Kriegeskorte et al. 2009, "Circular analysis in systems neuroscience: the dangers of
   double dipping"; Stone 1974, "Cross-Validatory Choice and Assessment of Statistical
   Predictions").
3. Per site, take means over prompts, with percentile bootstrap intervals (`bootstrap`).
4. Test the mean gain by `sign_flip_test`. The folds choose by one another's gains, so that gains
   of different folds are not independent: α is chosen anew after every flip. Correct for the
   number of sites of a kind (Benjamini and Hochberg 1995, "Controlling the False Discovery Rate").

A baseline below zero reads nothing, just as zero does, and is no merit of amplification: for the
plain worth, a share below 0 counts as 0. Where own and other prompts' shares are exchangeable the
expected gain is then at most 0: it is 0 where shares are positive, and below 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from superscopes_tl.errors import bad_value, check_choice, check_count
from superscopes_tl.experiment import rows_at
from superscopes_tl.model import PatchedLayer
from superscopes_tl.scores import above_others
from superscopes_tl.statistics.chance import (
    Weights,
    bootstrap,
    mean_defined,
    q_values,
    sign_flip_test,
    total,
)
from superscopes_tl.statistics.comparison import DISCOVERY
from superscopes_tl.vectors import PAPER_MAPPING

Target: TypeAlias = PatchedLayer | Literal["same", "all"] | None
Gains = Float[np.ndarray, "prompt site candidate"]
Has = Bool[np.ndarray, "site candidate"]
Fold = Int[np.ndarray, " prompt"]
Held = Bool[np.ndarray, " prompt"]

MEASURES = (
    "plain", "amplified", "other_prompt", "random_direction", "specific", "above_others",
    "plain_above_others", "gain", "gain_nats",
)  # fmt: skip
"""The means of `layer_shares`; each has the ends `_low` and `_high`."""
SHARES = ("recovered", "other_prompt_recovered", "plain_nats", "unpatched_nats")
"""The columns of a sweep with `controls="other_prompt"` that the statistics need."""

_SITE = ["kind", "source_layer", "target_layer"]


def cross_fitted(
    table: pd.DataFrame,
    *,
    mapping: str = PAPER_MAPPING,
    folds: int = 5,
    seed: int = 0,
    position: int | None = None,
    target_layer: Target = None,
) -> pd.DataFrame:
    """Return each prompt's row at the α that gains most for the prompts of the other folds.

    Example:
        >>> found = evaluate(load_model(), controls="other_prompt")  # doctest: +SKIP
        >>> cross_fitted(found.table).groupby(["kind", "source_layer"])["recovered"].mean()
        ... # doctest: +SKIP

    Args:
        table: greedy readings of many prompts, with the control "other_prompt".
        mapping: whose α are the candidates beside α = 1 of the paper's mapping.
        folds: how many; with fewer prompts, one prompt each.
        seed: divides the prompts into folds, which depend on nothing but the list of prompts.
        position: the token; defaults to the rightmost one of each prompt.
        target_layer: a target layer, or "same" as the source layer. Defaults to the only one per
            source layer; "all" treats each as a site of its own.

    Returns:
        One row of the table per prompt and site. A prompt whose share is undefined at some
        candidate, or that lacks one, is left out of that site.

    Raises:
        ValueError: no shares or no control in the table, no α = 1, an unknown mapping or token, or
            several target layers of which none was chosen.
    """
    grid = _Grid.of(table, mapping, position, target_layer)
    chosen = grid.chosen(grid.folds(folds, seed))
    cells = grid.at(chosen)[grid.complete]
    return grid.rows.iloc[np.sort(cells)].reset_index(drop=True)


def layer_shares(
    table: pd.DataFrame,
    *,
    mapping: str = PAPER_MAPPING,
    alpha: float | None = None,
    folds: int = 5,
    seed: int = 0,
    position: int | None = None,
    target_layer: Target = None,
    resamples: int = 10_000,
) -> pd.DataFrame:
    """Return what each kind and source layer recovers, with 95 % intervals and a paired test.

    Args:
        table: as in `cross_fitted`, like the arguments that are not described here.
        mapping: whose α amplify.
        alpha: one α for all prompts and layers, chosen beforehand on other prompts; defaults to
            the cross-fitted α of each layer.
        folds: of the prompts.
        seed: of the folds, the bootstrap and the test.
        position: the token.
        target_layer: the target layer.
        resamples: of the bootstrap over prompts, and sign patterns of the test.

    Returns:
        One row per kind, source layer and target layer, with

        - `prompts`, how many have a share at every candidate, and the mean over these of
        - `plain`, recovered at α = 1 of the paper's mapping;
        - `amplified`, recovered at the chosen α, and there `other_prompt` and `random_direction`
          (NaN without that control), `specific` (own minus other prompts') and `above_others`;
        - `plain_above_others`;
        - `gain`, amplified minus plain above others, a plain share below 0 counting as 0, and so
          0 where plain was chosen;
        - `gain_nats`, the gain times what the name adds to the log-probability of its own words;

        each with the ends `_low` and `_high` of its bootstrap interval (NaN with one prompt); then
        `alpha`, the median of the chosen ones (1 also stands for plain), `p` of the one-sided test
        that the mean gain is above 0, `q`, corrected over the rows of a kind, and `holds`, whether
        amplification beats α = 1 and specifically: q is at most 0.05, and the interval of
        `above_others` is above 0.

    Raises:
        ValueError: as `cross_fitted`, or an α that the mapping does not have.
    """
    grid = _Grid.of(table, mapping, position, target_layer, alpha)
    fold = grid.folds(folds, seed)
    fixed = np.full(grid.complete.shape, len(grid.alphas) - 1)
    chosen = grid.chosen(fold) if alpha is None else fixed
    values = grid.measures(chosen)
    found = pd.DataFrame(grid.sites, columns=_SITE)
    found["prompts"] = grid.complete.sum(axis=1)
    alphas = np.where(grid.complete, np.array(grid.alphas)[chosen], np.nan)
    found["alpha"] = [_median(row) for row in alphas]
    parts = []
    for _, rows in found.groupby("kind", sort=False):  # one family, and memory for one kind
        columns = np.moveaxis(values[:, rows.index], -1, 0)  # prompt, measure, site
        low, high = bootstrap(columns, statistic=mean_defined, resamples=resamples, seed=seed)
        several = rows["prompts"].to_numpy() > 1
        ends = {
            "": mean_defined(columns, np.ones((1, len(columns))))[0],
            "_low": np.where(several, low, np.nan),
            "_high": np.where(several, high, np.nan),
        }
        for number, name in enumerate(MEASURES):
            for end, numbers in ends.items():
                rows = rows.assign(**{f"{name}{end}": numbers[number]})
        gains, statistic = columns[:, MEASURES.index("gain")], total
        if alpha is None:
            gains, has = grid.gains[:, rows.index], grid.has[rows.index]
            statistic = partial(_fitted_total, has=has, fold=fold)
        p = sign_flip_test(gains, statistic, flips=resamples, seed=seed)
        p = np.where(rows["prompts"] > 0, p, np.nan)
        q = q_values(p)
        holds = (q <= DISCOVERY) & (rows["above_others_low"] > 0)
        parts.append(rows.assign(p=p, q=q, holds=holds))
    return pd.concat(parts, ignore_index=True)


def _best(gains: Gains, has: Has, held: Held, signs: Weights) -> Int[np.ndarray, "pattern site"]:
    """Return the candidate that gains most over the prompts not held out: of equal ones the first.

    The gains of each prompt are multiplied by its sign.
    """
    totals = total(np.where(held[:, None, None], 0.0, gains), signs)
    return np.asarray(np.where(has, totals, -np.inf).argmax(axis=-1))


def _fitted_total(gains: Gains, signs: Weights, *, has: Has, fold: Fold) -> Any:
    """Return the sum of gains at cross-fitted candidates, after each pattern of signs."""
    found: Any = 0.0
    for number in np.unique(fold):
        held = fold == number
        best = _best(gains, has, held, signs)
        here = total(np.where(held[:, None, None], gains, 0.0), signs)
        found += np.take_along_axis(here, best[..., None], axis=-1)[..., 0]
    return found


@dataclass(frozen=True)
class _Grid:
    """The rows of a table by site, candidate and prompt; the first candidate is plain."""

    rows: pd.DataFrame
    sites: Sequence[tuple[str, int, int]]
    alphas: Sequence[float]
    prompts: Sequence[str]
    cell: Int[np.ndarray, "site candidate prompt"]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        mapping: str,
        position: int | None,
        target_layer: Target,
        alpha: float | None = None,
    ) -> Self:
        """Lay a table out; with `alpha`, this one is the only candidate beside plain."""
        if lacking := [name for name in SHARES if name not in table]:
            fix = "evaluate with controls='other_prompt'"
            raise bad_value("table", f"the columns {', '.join(SHARES)}", f"no {lacking}", fix)
        rows = rows_at(table, position=position, target_layer=target_layer)
        rows = rows[rows["draw"] == 0]
        check_choice("mapping", mapping, list(dict.fromkeys(rows["mapping"])))
        plain = (rows["mapping"] == PAPER_MAPPING) & (rows["alpha"] == 1)
        if not plain.any():
            there = {name: rows[name].unique().tolist() for name in ("mapping", "alpha")}
            fix = "evaluate α = 1 into the same file"
            raise bad_value("table", f"rows of {PAPER_MAPPING} at α = 1", there, fix)
        mapped = rows["mapping"] == mapping
        if alpha is not None:
            check_choice("alpha", alpha, sorted(rows.loc[mapped, "alpha"].unique().tolist()))
            mapped &= rows["alpha"] == alpha
        rows = rows[plain | mapped].reset_index(drop=True)
        plain = (rows["mapping"] == PAPER_MAPPING) & (rows["alpha"] == 1)
        amplified = sorted(rows.loc[~plain, "alpha"].unique().tolist(), key=lambda a: (abs(a), -a))
        prompts = sorted(rows["prompt"].unique().tolist())
        sites = list(rows[_SITE].drop_duplicates().itertuples(index=False, name=None))
        kinds = list(dict.fromkeys(rows["kind"]))
        sites.sort(key=lambda site: (kinds.index(site[0]), *site[1:]))
        cell = np.full((len(sites), 1 + len(amplified), len(prompts)), -1)
        candidate = 1 + pd.Index(amplified).get_indexer(pd.Index(rows["alpha"]))
        place = (
            pd.MultiIndex.from_tuples(sites).get_indexer(pd.MultiIndex.from_frame(rows[_SITE])),
            np.where(plain, 0, candidate),
            pd.Index(prompts).get_indexer(pd.Index(rows["prompt"])),
        )
        cell[place] = np.arange(len(rows))
        if np.count_nonzero(cell >= 0) < len(rows):
            fix = "pass them one by one"
            raise bad_value("table", "one model's readings", "several of the same cell", fix)
        has = np.asarray((cell >= 0).any(axis=-1))
        kept = np.flatnonzero(has[:, 0] & (has.all(axis=1) | (alpha is None)))
        return cls(rows, [sites[i] for i in kept], [1.0, *amplified], prompts, cell[kept])

    @cached_property
    def has(self) -> Has:
        """Which candidates a site has, for any prompt."""
        return np.asarray((self.cell >= 0).any(axis=-1))

    @cached_property
    def worth(self) -> Float[np.ndarray, "site candidate prompt"]:
        """The shares above others', a plain share being at least 0; NaN where there is none."""
        own, other = (self.column(self.rows[name], self.cell) for name in SHARES[:2])
        own[:, 0] = np.maximum(own[:, 0], 0)
        return np.asarray(above_others(own, other))

    @cached_property
    def complete(self) -> Bool[np.ndarray, "site prompt"]:
        """Which prompts have a share at every candidate that the site has."""
        return np.asarray((~np.isnan(self.worth) | ~self.has[..., None]).all(axis=1))

    @cached_property
    def gains(self) -> Gains:
        """The worth above that of plain; 0 for prompts that are left out."""
        gains = np.where(self.complete[:, None], self.worth - self.worth[:, :1], 0.0)
        return np.moveaxis(np.nan_to_num(gains), -1, 0)

    def folds(self, count: int, seed: int) -> Fold:
        """Return the fold of each prompt."""
        count = check_count("folds", count, least=2, fix="5 is the default")
        return np.random.default_rng(seed).permutation(len(self.prompts)) % count

    def chosen(self, fold: Fold) -> Int[np.ndarray, "site prompt"]:
        """Return each prompt's candidate, chosen by the other folds."""
        found = np.zeros(self.complete.shape, dtype=int)
        for number in np.unique(fold):
            held = fold == number
            best = _best(self.gains, self.has, held, np.ones((1, len(fold))))
            found[:, held] = best[0][:, None]
        return found

    def at(self, chosen: Int[np.ndarray, "site prompt"]) -> Int[np.ndarray, "site prompt"]:
        """Return the number of the row of each prompt's chosen candidate."""
        return np.take_along_axis(self.cell, chosen[:, None], axis=1)[:, 0]

    def column(self, values: pd.Series[float], cell: Int[np.ndarray, "*cells"]) -> Any:
        """Return the values of some cells, NaN where there is none."""
        return np.append(values.to_numpy(dtype=float), np.nan)[cell]  # -1 is the last

    def measures(
        self, chosen: Int[np.ndarray, "site prompt"]
    ) -> Float[np.ndarray, "measure site prompt"]:
        """Return `MEASURES` of every site and prompt, NaN where the prompt is left out."""
        rows, cell, plain = self.rows, self.at(chosen), self.cell[:, 0]
        nothing = pd.Series(np.nan, index=rows.index)
        own, other = (self.column(rows[name], cell) for name in SHARES[:2])
        own_plain, other_plain = (self.column(rows[name], plain) for name in SHARES[:2])
        gain = np.take_along_axis(np.moveaxis(self.gains, 0, -1), chosen[:, None], axis=1)[:, 0]
        gap = self.column(rows["plain_nats"] - rows["unpatched_nats"], plain)
        found = {
            "plain": own_plain,
            "amplified": own,
            "other_prompt": other,
            "random_direction": self.column(rows.get("random_direction_recovered", nothing), cell),
            "specific": own - other,
            "above_others": above_others(own, other),
            "plain_above_others": above_others(own_plain, other_plain),
            "gain": gain,
            "gain_nats": gain * gap,
        }
        values = np.stack([found[name] for name in MEASURES])
        return np.where(self.complete, values, np.nan)


def _median(values: Float[np.ndarray, " prompt"]) -> float:
    """Return the lower median of the defined values: one of them."""
    there = values[~np.isnan(values)]
    return float(np.quantile(there, 0.5, method="lower")) if len(there) else np.nan
