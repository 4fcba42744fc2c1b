"""Activation patching: does the vector that is read matter for what the model goes on to write?

A reading says what a vector can be made to mean in another prompt; whether the model uses the
vector in its own run is another question (Meng et al. 2022, section 2.1; Heimersheim and Nanda
2024). It is asked of the same sites:

1. Run the source prompt: the clean log-probability of a continuation, its own unless given.
2. *Ablate* (`causal_effects`): run it again with the site's vector replaced. Or *restore*
   (`causal_trace`): run a corrupted prompt with the site's clean vector put back. Every site is a
   row of a batch (`interventions`).
3. Compare, per token of the continuation: the change of its log-probability, the divergence
   KL(clean ‖ patched) of what could follow (both in nats), and whether another token comes first.
4. Beside each site a control: a random direction instead of the vector, of equal size.

What replaces and what corrupts is in `replacements`. `beside` puts the effects next to readings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Row, Run, continuation_ids, follow_continuation, site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_callable, check_count
from superscopes_tl.model import (
    PAPER_KINDS,
    LanguageModel,
    Positions,
    Site,
    check_layers,
    load_model,
    resolve_positions,
)
from superscopes_tl.neighbours.lenses import divergence
from superscopes_tl.neighbours.replacements import Corruption, Zero
from superscopes_tl.vectors import PlaceVectors, RandomDirection, label

SITE_COLUMNS = ["prompt", "position", "token", "kind", "source_layer"]
"""The columns by which effects and readings of the same site find each other."""


def causal_effects(
    model: LanguageModel | Any,
    prompt: str,
    *,
    kinds: str | Iterable[str] = PAPER_KINDS,
    layers: int | Iterable[int] | None = None,
    positions: Positions = -1,
    replacement: PlaceVectors = Zero(),
    continuation: str | int = 1,
    window: int = 1,
    chat: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Ablate each site in the prompt's own run, and say what that does to the continuation.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        kinds: kinds of activation.
        layers: layers, counted from 0; every layer unless given.
        positions: tokens, as in a sweep; the last one unless given.
        replacement: what is written in the vector's place: `Zero()`, `Resampled(text)`,
            `MeanActivation(texts)`, `Amplified(3)`, `Without(Head(3))`, or your own.
        continuation: what the model is asked for: its own likeliest next tokens, so many, or a text
            that goes on where the prompt ends.
        window: how many layers around the site's to replace at once.
        chat: put the prompt into the model's chat template, as a sweep with `chat` does; a
            continuation is then how the model's answer begins.
        seed: of the control, a random change of equal size: v + r with ‖r‖ = ‖new − v‖.
        batch_size: rows per batch; chosen by memory unless given.

    Returns:
        A row per site, in nats per token of the continuation: `effect`, the
        `patched_log_probability` minus the `clean_log_probability`, negative where the vector
        supports the continuation; `kl` and `top_changed` (at any token); `top_tokens`, what would
        come first at each; `control_effect` and `control_kl`.

    Raises:
        ValueError, TypeError: a bad prompt, kind, layer, position, replacement or continuation.
    """
    model = load_model(model)
    fix = "pass Zero(), Resampled(text), ..."
    check_callable("replacement", replacement, expected="a replacement", fix=fix)
    run, sites, told = _asked(model, prompt, kinds, layers, positions, continuation, chat)
    windows = _windows(model, sites, window)
    places = list(dict.fromkeys(place for around in windows for place in around))
    own = site_vectors(run.model, run.source, places)
    new = _checked(replacement(run, [(site, site.layer) for site in places]), own)
    random = own + RandomDirection(seed)(1.0)(new - own)
    rows = [*_rows(Row(run.source.ids), windows, places, new)]
    rows += _rows(Row(run.source.ids), windows, places, random)
    clean = _clean(run, told)
    found = _compare(model, rows, told, clean, batch_size)
    patched, control = found.iloc[: len(sites)], found.iloc[len(sites) :].reset_index(drop=True)
    table = _site_columns(run, sites, "replacement", label(replacement), told)
    likely = _mean_log_probability(clean, told)
    return table.assign(
        clean_log_probability=likely,
        patched_log_probability=patched["log_probability"],
        effect=patched["log_probability"] - likely,
        kl=patched["kl"],
        top_changed=patched["top_changed"],
        top_tokens=patched["top_tokens"],
        control_effect=control["log_probability"] - likely,
        control_kl=control["kl"],
    )


def causal_trace(
    model: LanguageModel | Any,
    prompt: str,
    *,
    corruption: Corruption,
    kinds: str | Iterable[str] = PAPER_KINDS,
    layers: int | Iterable[int] | None = None,
    positions: Positions = -1,
    continuation: str | int = 1,
    window: int = 1,
    chat: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Put each site's clean vector into a corrupted run, and say what that brings back.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        corruption: `Noise(subject)`, `OtherTokens(text)`, or your own.
        kinds: kinds of activation.
        layers: layers, counted from 0; every layer unless given.
        positions: tokens, as in a sweep; the last one unless given.
        continuation: of the clean prompt, as in `causal_effects`.
        window: how many layers around the site's to restore at once (Meng et al. took 10 for MLP
            and attention outputs).
        chat: as in `causal_effects`.
        seed: of the control, a random direction with the norm of the clean vector.
        batch_size: rows per batch; chosen by memory unless given.

    Returns:
        A row per site, means over the corruption's draws, in nats per token of the continuation:
        `effect`, the `patched_log_probability` minus the `corrupted_log_probability`, positive
        where the vector carries what was destroyed; `restored`, the same as a share of what the
        corruption cost; `kl` from the clean distribution; `top_restored`, the share of draws in
        which the same tokens come first as in the clean run;
        `control_effect` and `control_kl`.

    Raises:
        ValueError, TypeError: a bad prompt, kind, layer, position, corruption or continuation.
    """
    model = load_model(model)
    fix = "pass Noise(subject), OtherTokens(text), ..."
    check_callable("corruption", corruption, expected="a corruption", fix=fix)
    run, sites, told = _asked(model, prompt, kinds, layers, positions, continuation, chat)
    windows = _windows(model, sites, window)
    places = list(dict.fromkeys(place for around in windows for place in around))
    own = site_vectors(run.model, run.source, places)
    random = RandomDirection(seed)(1.0)(own)
    draws = corruption(run)
    rows = list(draws)
    for vectors in (own, random):
        rows += [row for draw in draws for row in _rows(draw, windows, places, vectors)]
    clean = _clean(run, told)
    found = _compare(model, rows, told, clean, batch_size)
    corrupted = found["log_probability"][: len(draws)].mean()
    # One mean per site and per control, over the draws.
    means = found.iloc[len(draws) :].drop(columns="top_tokens").astype(float).to_numpy()
    means = means.reshape(2, len(draws), len(sites), -1).mean(axis=1)
    restored, control = (pd.DataFrame(m, columns=found.columns.drop("top_tokens")) for m in means)
    likely = _mean_log_probability(clean, told)
    effect, cost = restored["log_probability"] - corrupted, likely - corrupted
    return _site_columns(run, sites, "corruption", label(corruption), told).assign(
        clean_log_probability=likely,
        corrupted_log_probability=corrupted,
        patched_log_probability=restored["log_probability"],
        effect=effect,
        restored=effect / cost if cost else math.nan,
        kl=restored["kl"],
        top_restored=1 - restored["top_changed"],
        control_effect=control["log_probability"] - corrupted,
        control_kl=control["kl"],
    )


def beside(readings: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """Return the readings with the effects at the same sites: said, and used.

    Args:
        readings: rows of `SweepResult.table`, such as `result.best()`.
        effects: from `causal_effects` or `causal_trace`; one row per site.

    Returns:
        The readings in their order, and behind them the columns that only the effects have; NaN
        where a site has no effect.

    Raises:
        TypeError: something other than tables.
        ValueError: no table of effects, several effects at one site, or effects at other sites.
    """
    for argument, table in (("readings", readings), ("effects", effects)):
        if not isinstance(table, pd.DataFrame):
            raise bad_type(argument, "a table", table, "pass result.table or result.best()")
    if missing := [name for name in SITE_COLUMNS if name not in effects.columns]:
        raise bad_value(
            "effects",
            f"the columns {SITE_COLUMNS}",
            f"a table without {missing}",
            "pass what causal_effects or causal_trace returned",
        )
    if effects.duplicated(SITE_COLUMNS).any():
        raise bad_value(
            "effects",
            "one row per site",
            f"{len(effects)} rows at {len(effects.drop_duplicates(SITE_COLUMNS))} sites",
            "join one replacement, corruption and continuation at a time",
        )
    own = [name for name in effects.columns if name not in readings.columns]
    joined = readings.merge(
        effects[[*SITE_COLUMNS, *own]], on=SITE_COLUMNS, how="left", indicator="_found"
    )
    if len(joined) and (joined["_found"] == "left_only").all():
        raise bad_value(
            "effects",
            f"effects at sites of the readings, such as {readings[SITE_COLUMNS].iloc[0].to_dict()}",
            effects[SITE_COLUMNS].head(1).to_dict("records"),
            "ask for the same prompt, positions, kinds, layers and chat",
        )
    return joined.drop(columns="_found")


def _asked(
    model: LanguageModel,
    prompt: str,
    kinds: str | Iterable[str],
    layers: int | Iterable[int] | None,
    positions: Positions,
    continuation: str | int,
    chat: bool,
) -> tuple[Run, list[Site], tuple[int, ...]]:
    """Return the run, its sites and the continuation's tokens, checked."""
    wanted = model.checked_kinds(kinds)
    numbers = check_layers(layers, model.n_layers)
    run = Run.of(model, prompt, chat=chat)
    sites = [
        Site(kind, layer, position)
        for position in resolve_positions(run.source, positions)
        for kind in wanted
        for layer in numbers
    ]
    return run, sites, continuation_ids(run, continuation)


def _windows(model: LanguageModel, sites: Sequence[Site], window: int) -> list[list[Site]]:
    """Return, for every site, the same kind and token at the layers around it."""
    check_count("window", window, least=1, fix="1 is the site alone")
    before, after = (window - 1) // 2, window // 2
    return [
        [
            Site(site.kind, layer, site.position)
            for layer in range(site.layer - before, site.layer + after + 1)
            if 0 <= layer < model.n_layers
        ]
        for site in sites
    ]


def _checked(new: Tensor, own: Float[Tensor, "sites d_model"]) -> Float[Tensor, "sites d_model"]:
    if not isinstance(new, Tensor) or new.shape != own.shape:
        raise bad_value(
            "replacement",
            f"vectors of shape {tuple(own.shape)}, one per site",
            tuple(new.shape) if isinstance(new, Tensor) else new,
            "see superscopes_tl.neighbours.replacements",
        )
    return new.float().cpu()


def _rows(
    base: Row,
    windows: Sequence[Sequence[Site]],
    places: Sequence[Site],
    vectors: Float[Tensor, "places d_model"],
) -> list[Row]:
    """Return a row per window that writes these vectors there, over what the base row writes."""
    vector_of = dict(zip(places, vectors, strict=True))
    return [
        Row(base.ids, {**base.writes, **{site: vector_of[site] for site in around}})
        for around in windows
    ]


def _clean(run: Run, told: Sequence[int]) -> Float[Tensor, "steps vocab"]:
    """Return the log-probabilities of the clean run at each token of the continuation."""
    return follow_continuation(run.model, [Row(run.source.ids)], told, lambda likely, step: likely)[
        0
    ]


def _compare(
    model: LanguageModel,
    rows: Sequence[Row],
    told: Sequence[int],
    clean: Float[Tensor, "steps vocab"],
    batch_size: int | None,
) -> pd.DataFrame:
    """Return what becomes of the continuation in each row; numbers are means over its tokens."""

    def look(likely: Float[Tensor, "rows vocab"], step: int) -> Float[Tensor, "rows 3"]:
        kl = divergence(clean[step].to(likely.device), likely).clamp_min(0)
        return torch.stack([likely[:, told[step]], kl, likely.argmax(dim=-1).float()], dim=-1)

    found = follow_continuation(model, rows, told, look, batch_size=batch_size)
    tops = found[..., 2].long()
    return pd.DataFrame(
        {
            "log_probability": found[..., 0].mean(dim=1).tolist(),
            "kl": found[..., 1].mean(dim=1).tolist(),
            "top_changed": (tops != clean.argmax(dim=-1)).any(dim=1).tolist(),
            "top_tokens": [_text(model, ids) for ids in tops.tolist()],
        }
    )


def _mean_log_probability(clean: Float[Tensor, "steps vocab"], told: Sequence[int]) -> float:
    return float(clean.gather(1, torch.tensor(told)[:, None]).mean())


def _site_columns(
    run: Run, sites: Sequence[Site], how: str, name: str, told: Sequence[int]
) -> pd.DataFrame:
    """Return the columns that say what was done where, named as in a sweep's table."""
    return pd.DataFrame(
        {
            "prompt": run.source.text,
            "position": [site.position for site in sites],
            "token": [run.source.labels[site.position] for site in sites],
            "kind": [site.kind for site in sites],
            "source_layer": [site.layer for site in sites],
            how: name,
            "continuation": _text(run.model, told),
        }
    )


def _text(model: LanguageModel, ids: Sequence[int]) -> str:
    text: str = model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
