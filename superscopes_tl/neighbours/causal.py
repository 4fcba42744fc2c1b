"""Activation patching: does the model use the vector that a reading describes?

A reading says what a vector means in another prompt; whether the model uses the vector in its own
run is another question (Meng et al. 2022, section 2.1; Heimersheim and Nanda 2024). For every site:

1. Run the source prompt: the clean log-probability of a continuation, by default its own.
2. *Ablate* (`causal_effects`): run it again with the site's vector replaced. Or *restore*
   (`causal_trace`): run a corrupted prompt with the site's clean vector patched in. Every site is
   a row of a batch.
3. Compare, per token of the continuation: the change of its log-probability, KL(clean ‖ patched)
   of the next-token distribution (both in nats), and whether the top token changes.
4. Control: patch in a random direction of equal size instead.

A *replacement* is a source of vectors (`PlaceVectors`), `(run, places) -> vectors`, one vector per
site, such as `MeanActivation(texts)`. A *corruption* returns the runs into which the clean vectors
are restored. `beside` joins effects to readings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import (
    Row,
    Run,
    capture,
    continuation_ids,
    follow_continuation,
    site_vectors,
)
from superscopes_tl.errors import bad_type, bad_value, check_callable, check_count
from superscopes_tl.model import (
    PAPER_KINDS,
    LanguageModel,
    Positions,
    Site,
    check_layers,
    check_text,
    covering,
    load_model,
    resolve_positions,
    tokenize,
)
from superscopes_tl.neighbours.lenses import divergence
from superscopes_tl.vectors import (
    MappingFamily,
    PlaceVectors,
    RandomDirection,
    Scale,
    label,
    stable_hash,
)

SITE_COLUMNS = ["prompt", "position", "token", "kind", "source_layer"]
"""The columns on which effects and readings of the same site are joined."""

Corruption = Callable[[Run], Sequence[Row]]
"""Returns the corrupted runs of a prompt, one or several samples, all as long as the prompt."""

Places = Sequence[tuple[Site, int]]


@dataclass(frozen=True)
class Zero:
    """Replace by zero: for attn_out and mlp_out, the block adds nothing."""

    def __call__(self, run: Run, places: Places) -> Float[Tensor, "sites d_model"]:
        """Return zeros."""
        return torch.zeros(len(places), run.model.d_model)


@dataclass(frozen=True)
class Resampled:
    """Replace by the same site of another prompt.

    Attributes:
        text: the other prompt; positions are counted from its end, so that the last tokens
            correspond whatever the lengths. It must not be too short for that.
    """

    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "text")

    def __call__(self, run: Run, places: Places) -> Float[Tensor, "sites d_model"]:
        """Return the other prompt's vectors."""
        tokens = tokenize(run.model, self.text, argument="text", chat=run.chat)
        shift = len(tokens) - len(run.source)
        if short := [site for site, _ in places if site.position + shift < 0]:
            raise bad_value(
                "text", f"a token for position {short[0].position} of {len(run.source)}",
                f"{len(tokens)} tokens", "positions are counted from the end: pass a longer text",
            )  # fmt: skip
        moved = [Site(site.kind, site.layer, site.position + shift) for site, _ in places]
        return site_vectors(run.model, tokens, moved)


@dataclass(frozen=True)
class Amplified:
    """Replace by a mapping function of the site's own vector.

    `Amplified(3)` amplifies in the prompt's own run; `Amplified(1, RandomDirection())` keeps the
    norm and nothing else.

    Attributes:
        alpha: the amplifier α.
        mapping: maps α to a mapping function, as in a sweep.
    """

    alpha: float
    mapping: MappingFamily = Scale()

    def __call__(self, run: Run, places: Places) -> Float[Tensor, "sites d_model"]:
        """Return f(v)."""
        own = site_vectors(run.model, run.source, [site for site, _ in places])
        return self.mapping(self.alpha)(own)


@dataclass(frozen=True, repr=False)
class Without:
    """Replace by v − part, such as one head's share of attn_out.

    Attributes:
        vectors: the part, any source of vectors: `Without(Head(3))` ablates one head.
    """

    vectors: PlaceVectors

    def __call__(self, run: Run, places: Places) -> Float[Tensor, "sites d_model"]:
        """Return the rest of every site's vector."""
        own = site_vectors(run.model, run.source, [site for site, _ in places])
        return own - self.vectors(run, places)

    def __repr__(self) -> str:
        return f"Without({label(self.vectors)})"


@dataclass(frozen=True)
class OtherTokens:
    """Corrupt by running another prompt in place of this one.

    Attributes:
        text: a prompt of equally many tokens.
    """

    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "text")

    def __call__(self, run: Run) -> Sequence[Row]:
        """Return the run of the other prompt."""
        tokens = tokenize(run.model, self.text, argument="text", chat=run.chat)
        if len(tokens) != len(run.source):
            raise bad_value(
                "text", f"{len(run.source)} tokens, as {run.source.text!r} has",
                f"{len(tokens)}: {tokens.numbered()}",
                "pass a text of the same length, or Noise(subject)",
            )  # fmt: skip
        return [Row(tokens.ids)]


@dataclass(frozen=True)
class Noise:
    """Corrupt by Gaussian noise on the embeddings of a subject (Meng et al. 2022).

    Attributes:
        subject: a part of the prompt, all of whose tokens get noise; or positions, as in a sweep.
        strength: the standard deviation of the noise, in units of that of the prompt's embeddings
            (the stream that enters block 0, without the BOS).
        draws: number of samples; effects are means over them.
        seed: selects the noise.
    """

    subject: Positions
    strength: float = 3.0
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("draws", self.draws, least=1, fix="10 is the choice of Meng et al.")

    def __call__(self, run: Run) -> Sequence[Row]:
        """Return one run per sample of the noise."""
        source = run.source
        positions = resolve_positions(source, self.subject)
        if isinstance(self.subject, str):  # that was its last token
            start = source.text.index(self.subject)
            positions = tuple(covering(source, start, start + len(self.subject)))
        seen = capture(run.model, source, kinds="resid_pre", layers=0)["resid_pre", 0]
        embedded = seen.float().cpu()
        size = self.strength * float(embedded[source.prefix :].std())
        rows = []
        for draw in range(self.draws):
            generator = torch.Generator().manual_seed(stable_hash(self.seed, draw, source.text))
            noise = torch.randn(embedded.shape, generator=generator)
            writes = {Site("resid_pre", 0, p): embedded[p] + size * noise[p] for p in positions}
            rows.append(Row(source.ids, writes))
        return rows


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
    """Ablate each site in the prompt's own run and measure the effect on the continuation.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        kinds: kinds of activation.
        layers: defaults to every layer.
        positions: tokens, as in a sweep.
        replacement: replaces the vector: `Zero()`, `Resampled(text)`, `MeanActivation(texts)`,
            `Amplified(3)`, `Without(Head(3))`, or your own.
        continuation: how many tokens of the model's own greedy continuation, or a text that
            continues the prompt.
        window: how many layers around the site's to replace at once.
        chat: put the prompt into the model's chat template, as a sweep with `chat` does; a
            continuation is then the beginning of the model's answer.
        seed: of the control, a random change of equal size: v + r with ‖r‖ = ‖new − v‖.
        batch_size: rows per batch; defaults to what fits into memory.

    Returns:
        A row per site, in nats per token of the continuation: `effect`, the
        `patched_log_probability` minus the `clean_log_probability`, negative where the vector
        supports the continuation; `kl` and `top_changed` (at any token); `top_tokens`, the most
        likely token at each step; `control_effect` and `control_kl`.

    Raises:
        ValueError, TypeError: a bad prompt, kind, layer, position, replacement or continuation.
    """
    model = load_model(model)
    fix = "pass Zero(), Resampled(text), ..."
    check_callable("replacement", replacement, expected="a replacement", fix=fix)
    run, sites, tokens = _prepare(model, prompt, kinds, layers, positions, continuation, chat)
    windows = _windows(model, sites, window)
    places = list(dict.fromkeys(chain.from_iterable(windows)))
    own = site_vectors(model, run.source, places)
    new = replacement(run, [(site, site.layer) for site in places])
    if not isinstance(new, Tensor) or new.shape != own.shape:
        raise bad_value(
            "replacement", f"vectors of shape {tuple(own.shape)}, one per site",
            tuple(new.shape) if isinstance(new, Tensor) else new, fix,
        )  # fmt: skip
    new = new.float().cpu()
    random = own + RandomDirection(seed)(1.0)(new - own)
    clean = _clean(run, tokens)
    base = Row(run.source.ids)
    rows = [*_rows(base, windows, places, new), *_rows(base, windows, places, random)]
    found = _compare(model, rows, tokens, clean, batch_size)
    patched, control = found.iloc[: len(sites)], found.iloc[len(sites) :].reset_index(drop=True)
    likely = _mean_log_probability(clean, tokens)
    return _site_columns(run, sites, tokens, replacement=label(replacement)).assign(
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
    """Restore each site's clean vector in a corrupted run and measure how much that recovers.

    Arguments as in `causal_effects`, with a `corruption` in place of the replacement:
    `Noise(subject)`, `OtherTokens(text)`, or your own. Meng et al. restore a `window` of 10 layers
    of MLP or attention outputs. The control is a random direction with the clean vector's norm.

    Returns:
        A row per site, means over the corruption's draws, in nats per token of the continuation:
        `effect`, the `patched_log_probability` minus the `corrupted_log_probability`, positive
        where the vector carries what was destroyed; `restored`, the effect as a share of the
        corruption's cost; `kl` from the clean distribution; `top_restored`, the share of draws
        with the clean run's top tokens; `control_effect` and `control_kl`.

    Raises:
        ValueError, TypeError: a bad prompt, kind, layer, position, corruption or continuation.
    """
    model = load_model(model)
    fix = "pass Noise(subject), OtherTokens(text), ..."
    check_callable("corruption", corruption, expected="a corruption", fix=fix)
    run, sites, tokens = _prepare(model, prompt, kinds, layers, positions, continuation, chat)
    windows = _windows(model, sites, window)
    places = list(dict.fromkeys(chain.from_iterable(windows)))
    own = site_vectors(model, run.source, places)
    random = RandomDirection(seed)(1.0)(own)
    draws = corruption(run)
    rows = list(draws)
    for vectors in (own, random):
        rows += [row for draw in draws for row in _rows(draw, windows, places, vectors)]
    clean = _clean(run, tokens)
    found = _compare(model, rows, tokens, clean, batch_size).drop(columns="top_tokens")
    corrupted = found["log_probability"][: len(draws)].mean()
    means = found.iloc[len(draws) :].astype(float).to_numpy()
    means = means.reshape(2, len(draws), len(sites), -1).mean(axis=1)  # over the draws
    restored, control = (pd.DataFrame(mean, columns=found.columns) for mean in means)
    likely = _mean_log_probability(clean, tokens)
    effect, cost = restored["log_probability"] - corrupted, likely - corrupted
    return _site_columns(run, sites, tokens, corruption=label(corruption)).assign(
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
    """Return the readings with the effects at the same sites.

    Args:
        readings: rows of `SweepResult.table`, such as `result.best()`.
        effects: from `causal_effects` or `causal_trace`; one row per site.

    Returns:
        The readings in their order, followed by the columns that only the effects have; NaN where
        a site has no effect.

    Raises:
        TypeError: something other than tables.
        ValueError: no table of effects, several effects at one site, or effects at other sites.
    """
    for argument, table in (("readings", readings), ("effects", effects)):
        if not isinstance(table, pd.DataFrame):
            raise bad_type(argument, "a table", table, "pass result.table or result.best()")
    if missing := [name for name in SITE_COLUMNS if name not in effects.columns]:
        raise bad_value(
            "effects", f"the columns {SITE_COLUMNS}", f"a table without {missing}",
            "pass what causal_effects or causal_trace returned",
        )  # fmt: skip
    if effects.duplicated(SITE_COLUMNS).any():
        raise bad_value(
            "effects", "one row per site", "several rows at a site",
            "join one replacement, corruption and continuation at a time",
        )  # fmt: skip
    own = [name for name in effects.columns if name not in readings.columns]
    joined = readings.merge(
        effects[[*SITE_COLUMNS, *own]], on=SITE_COLUMNS, how="left", indicator="_found"
    )
    if len(joined) and (joined["_found"] == "left_only").all():
        raise bad_value(
            "effects",
            f"effects at sites of the readings, such as {readings[SITE_COLUMNS].iloc[0].to_dict()}",
            effects[SITE_COLUMNS].head(1).to_dict("records"),
            "pass the same prompt, positions, kinds, layers and chat",
        )
    return joined.drop(columns="_found")


def _prepare(
    model: LanguageModel,
    prompt: str,
    kinds: str | Iterable[str],
    layers: int | Iterable[int] | None,
    positions: Positions,
    continuation: str | int,
    chat: bool,
) -> tuple[Run, list[Site], tuple[int, ...]]:
    """Return the run, its sites and the continuation's tokens."""
    checked = model.checked_kinds(kinds)
    numbers = check_layers(layers, model.n_layers)
    run = Run.of(model, prompt, chat=chat)
    sites = [
        Site(kind, layer, position)
        for position in resolve_positions(run.source, positions)
        for kind in checked
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


def _rows(
    base: Row,
    windows: Sequence[Sequence[Site]],
    places: Sequence[Site],
    vectors: Float[Tensor, "places d_model"],
) -> list[Row]:
    """Return the base row once per window, with these vectors patched in there."""
    vector_of = dict(zip(places, vectors, strict=True))
    return [
        Row(base.ids, {**base.writes, **{site: vector_of[site] for site in around}})
        for around in windows
    ]


def _clean(run: Run, tokens: Sequence[int]) -> Float[Tensor, "steps vocab"]:
    """Return the log-probabilities of the clean run at each token of the continuation."""
    row = Row(run.source.ids)
    return follow_continuation(run.model, [row], tokens, lambda likely, step: likely)[0]


def _compare(
    model: LanguageModel,
    rows: Sequence[Row],
    tokens: Sequence[int],
    clean: Float[Tensor, "steps vocab"],
    batch_size: int | None,
) -> pd.DataFrame:
    """Compare the continuation in each row with the clean run; means over its tokens."""

    def look(likely: Float[Tensor, "rows vocab"], step: int) -> Float[Tensor, "rows 3"]:
        kl = divergence(clean[step].to(likely.device), likely).clamp_min(0)
        return torch.stack([likely[:, tokens[step]], kl, likely.argmax(dim=-1).float()], dim=-1)

    found = follow_continuation(model, rows, tokens, look, batch_size=batch_size)
    tops = found[..., 2].long()
    return pd.DataFrame(
        {
            "log_probability": found[..., 0].mean(dim=1).tolist(),
            "kl": found[..., 1].mean(dim=1).tolist(),
            "top_changed": (tops != clean.argmax(dim=-1)).any(dim=1).tolist(),
            "top_tokens": [_text(model, ids) for ids in tops.tolist()],
        }
    )


def _mean_log_probability(clean: Float[Tensor, "steps vocab"], tokens: Sequence[int]) -> float:
    return float(clean.gather(1, torch.tensor(tokens)[:, None]).mean())


def _site_columns(
    run: Run, sites: Sequence[Site], tokens: Sequence[int], **how: str
) -> pd.DataFrame:
    """Return the columns that name the sites as a sweep's table does, the patch and the text."""
    return pd.DataFrame(
        {
            "prompt": run.source.text,
            "position": [site.position for site in sites],
            "token": [run.source.labels[site.position] for site in sites],
            "kind": [site.kind for site in sites],
            "source_layer": [site.layer for site in sites],
            **how,
            "continuation": _text(run.model, tokens),
        }
    )


def _text(model: LanguageModel, ids: Sequence[int]) -> str:
    text: str = model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
