r"""Next-token prediction of patched prompts against the model's own (Patchscopes, section 4.1).

1. The truth at every token of a source prompt is the model's own most likely next token there,
   whatever the text continues with.
2. Every cell (site, target layer, α) is patched into the token identity prompt
   `cat -> cat\n1135 -> 1135\nhello -> hello\n?`; all prompts share their batches.
3. Precision@1 is the share of cells whose most likely next token is the truth; surprisal is −log p
   of the truth in nats.
4. Each cell is compared with its controls and with the logit lens, which unembeds the site's own
   vector without a prompt.
5. A summary weights every prompt equally, whatever its length. Its intervals are percentile
   bootstraps over prompts, because the tokens of one prompt depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.engine import IDENTITY_PROMPT, Patch, PatchedGenerator, site_vectors
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepPlan, make_control, make_patches, plan_sweep
from superscopes_tl.model import LanguageModel, Site
from superscopes_tl.neighbours.lenses import LOGIT_LENS, logit_lens
from superscopes_tl.scores import no_scores
from superscopes_tl.statistics import bootstrap

PATCHED = "patched"
"""The name, in the column `method`, of predictions by the patched prompt."""
CELL = ["method", "kind", "source_layer", "target_layer", "alpha"]
"""The columns that name what a summary averages over tokens and prompts."""

_PLACE = ["prompt", "position", "token", "kind", "source_layer", "target_layer", "alpha", "own"]
_COLUMNS = ["prompt", "position", "token", *CELL, "own", "predicted", "hit", "surprisal"]

_ROWS = 256
"""Sites unembedded together: each has a number per vocabulary token."""

_OF_TEXTS = ("scorer", "score_on", "score_against", "precision", "draw", "max_new_tokens")
"""Settings of whole texts, which do not apply to a single token."""

_Predictions: TypeAlias = tuple[Int[Tensor, " places"], Float[Tensor, " places"]]
"""The most likely token at every place, and the log-probability of the model's own."""


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Next-token predictions of patched prompts.

    Attributes:
        table: one row per source prompt, token, method and cell. `method` is "patched", the name of
            a control, or "logit lens" (with neither target layer nor α; left out with `vectors`,
            where v is not the site's own vector). `own` is the token that the model itself
            predicts, `predicted` the method's, `hit` whether they are equal, `surprisal` −log p of
            `own` under the method, in nats.
        provenance: models, target prompt, settings and prompts, as plain data.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]

    def summary(self) -> pd.DataFrame:
        """Return precision@1 and surprisal of every method and cell, with 95 % intervals.

        Returns:
            A row per method, kind, source layer, target layer and α, with `precision` and
            `surprisal` (means over prompts of each prompt's mean), the ends of their intervals
            `precision_low`, `precision_high`, `surprisal_low`, `surprisal_high` (NaN for a single
            prompt), and the number of `prompts`.
        """
        cells = self.table[CELL].drop_duplicates().reset_index(drop=True)
        number = self.table.groupby(CELL, sort=False, dropna=False).ngroup()
        means = self.table[["hit", "surprisal"]].groupby([self.table["prompt"], number]).mean()
        prompts = self.table["prompt"].nunique()
        for column, name in (("hit", "precision"), ("surprisal", "surprisal")):
            values = means[column].unstack().to_numpy(dtype=float)
            low, high = bootstrap(values)
            cells[name], cells[f"{name}_low"], cells[f"{name}_high"] = values.mean(0), low, high
        return cells.assign(prompts=prompts)


def next_tokens(model: LanguageModel | Any, prompts: Sequence[str], **settings: Any) -> NextTokens:
    """Predict the next token from patched prompts, at every cell of every source prompt.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompts: the source prompts; duplicates count once.
        **settings: the fields of `SweepConfig`, except those of whole texts. Defaults:
            `target_prompt=IDENTITY_PROMPT`, `kinds="resid_post"`, `alphas=1`,
            `target_layer="same"`, `positions=slice(None)` (every token but the BOS) and
            `controls=("unpatched", "random_direction")`.

    Raises:
        ValueError, TypeError: a bad setting, no prompts, or a `target_model` with another
            vocabulary.
    """
    distinct = [] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    if not distinct:
        raise bad_value("prompts", "at least one prompt", prompts, "PAPER_PROMPTS, for example")
    if misplaced := [name for name in _OF_TEXTS if name in settings]:
        expected = f"none of {_OF_TEXTS}, which concern whole texts"
        raise bad_value("settings", expected, misplaced, "leave them out, or use sweep")
    plans = _plans(model, distinct, settings)
    cells: list[tuple[Any, ...]] = []
    sites: list[tuple[Any, ...]] = []
    lens: list[_Predictions] = []
    for plan in plans:
        own, by_lens = _read(plan)
        truth = dict(zip(plan.sites, own.tolist(), strict=True))
        places = [(*cell.place, cell.alpha) for cell in plan.cells]
        cells += [_place(plan, *place, truth[place[0]]) for place in places]
        sites += [_place(plan, site, None, math.nan, token) for site, token in truth.items()]
        lens.append(by_lens)
    made = [make_patches(plan) for plan in plans]
    wanted = torch.tensor([cell[-1] for cell in cells])
    tables = []
    for method in (PATCHED, *plans[0].config.controls):
        patches = [
            patch
            for plan, own in zip(plans, made, strict=True)
            for patch in (own if method == PATCHED else make_control(method, plan, plan.cells, own))
        ]
        tables.append(_table(method, cells, *_predict(plans[0].generator, patches, wanted)))
    if plans[0].config.vectors is None:  # else v is not the vector at the site
        predicted, likely = map(torch.cat, zip(*lens, strict=True))
        tables.append(_table(LOGIT_LENS, sites, predicted, likely))
    table = pd.concat(tables, ignore_index=True)
    tokens = {*table["own"], *table["predicted"]}
    decoded = {token: plans[0].model.tokenizer.decode([token]) for token in tokens}
    shown = {name: table[name].map(decoded) for name in ("own", "predicted")}
    return NextTokens(table.assign(**shown)[_COLUMNS], _provenance(plans[0], distinct))


def _place(
    plan: SweepPlan, site: Site, target_layer: int | None, alpha: float, own: int
) -> tuple[Any, ...]:
    """Return `_PLACE` of one prediction; `own` is the model's own next token at the site."""
    label = plan.source.labels[site.position]
    return plan.source.text, site.position, label, site.kind, site.layer, target_layer, alpha, own


def _table(
    method: str, places: Sequence[tuple[Any, ...]], predicted: Tensor, likely: Tensor
) -> pd.DataFrame:
    """Return the rows of one method, tokens as ids."""
    table = pd.DataFrame(places, columns=_PLACE).astype({"target_layer": "Int64"})
    table = table.assign(method=method, predicted=predicted.numpy(), surprisal=-likely.numpy())
    return table.assign(hit=table["own"] == table["predicted"])


def _plans(
    model: LanguageModel | Any, texts: Sequence[str], settings: dict[str, Any]
) -> list[SweepPlan]:
    """Return a plan for each text, all with one generator."""
    defaults = {
        "target_prompt": IDENTITY_PROMPT,
        "kinds": "resid_post",
        "alphas": 1,
        "target_layer": "same",
        "positions": slice(None),
        "controls": ("unpatched", "random_direction"),
    }
    settings = {**defaults, **settings}
    plan = plan_sweep(model, texts[0], **settings, max_new_tokens=1, scorer=no_scores)
    target = plan.generator.model
    vocabulary = plan.model.tokenizer.get_vocab()
    if target is not plan.model and target.tokenizer.get_vocab() != vocabulary:
        raise bad_value(
            "target_model", f"a model with the vocabulary of {plan.model.name}", target.name,
            "next tokens of different vocabularies cannot be compared: use sweep",
        )  # fmt: skip
    if "unpatched_log_probability" in plan.config.controls:
        raise bad_value(
            "controls", "controls that predict a next token", "unpatched_log_probability",
            "the surprisal of 'unpatched' is its counterpart",
        )  # fmt: skip
    return [plan, *map(plan.at_prompt, texts[1:])]


def _read(plan: SweepPlan) -> tuple[Int[Tensor, " sites"], _Predictions]:
    """Return the model's own next token at every site, and the logit lens's predictions."""
    model, last = plan.model, plan.model.n_layers - 1
    final = [Site("resid_post", last, site.position) for site in plan.sites]
    both = site_vectors(model, plan.source, [*final, *plan.sites])
    own, best, likely = [], [], []
    for start in range(0, len(final), _ROWS):
        rows = slice(start, start + _ROWS)
        ends, vectors = both[: len(final)][rows], both[len(final) :][rows]
        own.append(logit_lens(model, ends).argmax(dim=-1))
        lens = logit_lens(model, vectors)
        best.append(lens.argmax(dim=-1))
        likely.append(lens.gather(1, own[-1][:, None])[:, 0])
    return torch.cat(own), (torch.cat(best), torch.cat(likely))


def _predict(
    generator: PatchedGenerator, patches: Sequence[Patch], wanted: Int[Tensor, " cells"]
) -> _Predictions:
    """Return the most likely next token of every patch, and the wanted one's log-probability.

    A batch at a time, because the distributions of all cells do not fit into memory. Patches that
    write nothing share one prediction.
    """
    predicted, likely = torch.empty_like(wanted), torch.empty(len(wanted))

    def note(rows: list[int], batch: Sequence[Patch]) -> None:
        found = generator.next_token(batch).expand(len(rows), -1)
        predicted[rows] = found.argmax(dim=-1)
        likely[rows] = found.gather(1, wanted[rows, None])[:, 0]

    patched = [row for row, patch in enumerate(patches) if patch.layers]
    for start in range(0, len(patched), generator.batch_size):
        rows = patched[start : start + generator.batch_size]
        note(rows, [patches[row] for row in rows])
    if unpatched := [row for row, patch in enumerate(patches) if not patch.layers]:
        note(unpatched, [patches[unpatched[0]]])
    return predicted, likely


def _provenance(plan: SweepPlan, texts: Sequence[str]) -> dict[str, Any]:
    """Return the plan's provenance without what concerns a single text."""
    whole = plan.provenance()
    of_text = (*_OF_TEXTS, "scorer_weights", "decoding", "positions")
    config = {name: value for name, value in whole["config"].items() if name not in of_text}
    kept = {k: v for k, v in whole.items() if k not in ("prompt", "tokens", "planned_cells")}
    return {**kept, "config": {**config, "mapping": plan.mapping_name}, "prompts": list(texts)}
