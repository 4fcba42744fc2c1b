r"""What a patched prompt predicts next, against the model's own prediction (Patchscopes, 4.1).

1. The source run of a text has, at every token, a next token that the model itself finds the
   likeliest: the truth here, whatever the text goes on with.
2. Every cell of the text (site, target layer, α) is patched into the token identity prompt
   `cat -> cat\n1135 -> 1135\nhello -> hello\n?`; all texts share their batches.
3. Precision@1 is the share of cells whose likeliest next token is the truth; surprisal is how
   unlikely the truth is, −log p in nats.
4. Beside each cell stand the same numbers of its controls, and those of the logit lens: the site's
   own vector handed to the unembedding, without a prompt.
5. A summary's means weigh every text alike, whatever its length. Their interval is the percentile
   bootstrap over texts, because the tokens of one text depend on each other.
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
CELL = ["method", "kind", "source_layer", "target_layer", "alpha"]
"""The columns that name what a summary averages over tokens and texts."""

_ROWS = 256
"""Sites whose predictions are held at a time: each has as many numbers as there are tokens."""

_OF_TEXTS = ("scorer", "score_on", "draw", "max_new_tokens")
"""Settings that concern the text of a reading; one token has none."""

_Truths: TypeAlias = dict[Site, int]
"""The model's own next token at every site of a text."""

_Place: TypeAlias = tuple[int, Site, int | None, float]
"""The number of a text, a site, a target layer and an α."""

_Predictions: TypeAlias = tuple[Int[Tensor, " places"], Float[Tensor, " places"]]
"""The likeliest token at every place, and the log-probability of the model's own."""


@dataclass(frozen=True, eq=False)
class NextTokens:
    """What patched prompts predict next.

    Attributes:
        table: one row per source prompt, token, method and cell. `method` is "patched", the name of
            a control, or "logit lens" (with neither target layer nor α; left out where `vectors`
            says what v is). `own` is the token that the model itself predicts there, `predicted`
            the method's, `hit` whether the two are one, and `surprisal` −log p of `own` under the
            method, in nats.
        provenance: models, target prompt, settings and texts, as plain data.
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
    """Ask patched prompts for the next token, at every cell of every text.

    Args:
        model: from `load_model`, or anything that it takes.
        prompts: the source prompts; each counts once.
        **settings: the fields of `SweepConfig`, but those of whole texts. Unless given:
            `target_prompt=IDENTITY_PROMPT`, `kinds="resid_post"`, `alphas=1`,
            `target_layer="same"`, `positions=slice(None)` (every token but the BOS) and
            `controls=("unpatched", "random_direction")`.

    Raises:
        ValueError, TypeError: a bad setting, no texts, or a `target_model` with other tokens.
    """
    distinct = [] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    if not distinct:
        raise bad_value("prompts", "at least one prompt", prompts, "PAPER_PROMPTS, for example")
    if misplaced := [name for name in _OF_TEXTS if name in settings]:
        raise bad_value(
            "settings",
            f"none of {_OF_TEXTS}, which concern whole texts",
            misplaced,
            "leave them out, or use sweep",
        )
    plans = _plans(model, distinct, settings)
    own, lens = zip(*map(_read, plans), strict=True)
    truths: list[_Truths] = [
        dict(zip(plan.sites, tokens.tolist(), strict=True))
        for plan, tokens in zip(plans, own, strict=True)
    ]
    cells: list[_Place] = [
        (text, *cell.place, cell.alpha) for text, plan in enumerate(plans) for cell in plan.cells
    ]
    sites: list[_Place] = [
        (text, site, None, math.nan) for text, plan in enumerate(plans) for site in plan.sites
    ]
    wanted = torch.tensor([truths[text][site] for text, site, *_ in cells])
    made = [make_patches(plan) for plan in plans]
    parts = []
    for method in (PATCHED, *plans[0].config.controls):
        patches = [
            patch
            for plan, own_patches in zip(plans, made, strict=True)
            for patch in _patches(method, plan, own_patches)
        ]
        found = _predict(plans[0].generator, patches, wanted)
        parts.append(_rows(method, plans, truths, cells, found))
    if plans[0].config.vectors is None:  # else v is not what the lens reads at the site
        by_lens = torch.cat([one[0] for one in lens]), torch.cat([one[1] for one in lens])
        parts.append(_rows(LOGIT_LENS, plans, truths, sites, by_lens))
    return NextTokens(pd.concat(parts, ignore_index=True), _provenance(plans[0], distinct))


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
    first = plan_sweep(
        model, texts[0], **{**defaults, **settings}, max_new_tokens=1, scorer=no_scores
    )
    _check_plan(first)
    return [first, *map(first.at_prompt, texts[1:])]


def _check_plan(plan: SweepPlan) -> None:
    asked = plan.generator.model
    if asked is not plan.model and asked.tokenizer.get_vocab() != plan.model.tokenizer.get_vocab():
        raise bad_value(
            "target_model",
            f"a model with the tokens of {plan.model.name}",
            asked.name,
            "a next token of one cannot be compared with one of the other: use sweep",
        )
    if "unpatched_log_probability" in plan.config.controls:
        raise bad_value(
            "controls",
            "controls that predict a next token",
            "unpatched_log_probability",
            "the surprisal of 'unpatched' is its counterpart",
        )


def _read(plan: SweepPlan) -> tuple[Int[Tensor, " sites"], _Predictions]:
    """Return the model's own next token at every site, and what the logit lens says there."""
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


def _patches(method: str, plan: SweepPlan, own: list[Patch]) -> list[Patch]:
    return own if method == PATCHED else make_control(method, plan, plan.cells, own)


def _predict(
    generator: PatchedGenerator, patches: Sequence[Patch], wanted: Int[Tensor, " cells"]
) -> _Predictions:
    """Return the likeliest next token of every patch, and how likely the wanted one is.

    A batch at a time: the probabilities of every token at every cell could not all be kept. What
    patches nothing is the same everywhere and asked for once.
    """
    predicted, likely = torch.empty_like(wanted), torch.empty(len(wanted))

    def note(rows: list[int], asked: Sequence[Patch]) -> None:
        found = generator.next_token(asked).expand(len(rows), -1)
        predicted[rows] = found.argmax(dim=-1)
        likely[rows] = found.gather(1, wanted[rows, None])[:, 0]

    patched = [row for row, patch in enumerate(patches) if patch.layers]
    for start in range(0, len(patched), generator.batch_size):
        rows = patched[start : start + generator.batch_size]
        note(rows, [patches[row] for row in rows])
    if unpatched := [row for row, patch in enumerate(patches) if not patch.layers]:
        note(unpatched, [patches[unpatched[0]]])
    return predicted, likely


def _rows(
    method: str,
    plans: Sequence[SweepPlan],
    truths: Sequence[_Truths],
    places: Sequence[_Place],
    found: _Predictions,
) -> pd.DataFrame:
    """Return the rows of one method."""
    texts, sites, target_layers, alphas = zip(*places, strict=True)
    own = [truths[text][site] for text, site in zip(texts, sites, strict=True)]
    predicted = found[0].tolist()
    tokenizer = plans[0].model.tokenizer
    shown = {token: tokenizer.decode([token]) for token in {*own, *predicted}}
    sources = [plans[text].source for text in texts]
    return pd.DataFrame(
        {
            "prompt": [source.text for source in sources],
            "position": [site.position for site in sites],
            "token": [
                source.labels[site.position] for source, site in zip(sources, sites, strict=True)
            ],
            "method": method,
            "kind": [site.kind for site in sites],
            "source_layer": [site.layer for site in sites],
            "target_layer": pd.array(target_layers, dtype="Int64"),
            "alpha": alphas,
            "own": [shown[token] for token in own],
            "predicted": [shown[token] for token in predicted],
            "hit": [a == b for a, b in zip(own, predicted, strict=True)],
            "surprisal": -found[1].numpy(),
        }
    )


def _provenance(plan: SweepPlan, texts: Sequence[str]) -> dict[str, Any]:
    """Return where the numbers come from: the plan's provenance without what is of one text."""
    whole = plan.provenance()
    of_text = (*_OF_TEXTS, "scorer_weights", "decoding", "positions")
    config = {name: value for name, value in whole["config"].items() if name not in of_text}
    kept = {k: v for k, v in whole.items() if k not in ("prompt", "tokens", "planned_cells")}
    return {**kept, "config": {**config, "mapping": plan.mapping_name}, "prompts": list(texts)}
