"""Fit an adapter, f(v) = s·v/‖v‖ + b, and measure what it brings (arXiv 2602.10352).

1. Read v of every name's last token, and the model's own words D about it (`scores`).
2. Minimise −log p(D | target prompt with f(v) at the placeholder), the mean over D's tokens and
   over names, with Adam on log s and b and a learning rate that decays to 0. s begins where the
   first names' words are likeliest, at one of `UNTRAINED` times the norm of what is replaced, b as
   0, learned in units of that s. The target prompt up to the placeholder is run once; no weight of
   the model gets a gradient.
3. `adapter_shares` says what it brings on names that it was not fitted on, beside b alone, other
   names' vectors, and the untrained α·‖h‖·v/‖v‖ at its best α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from superscopes_tl.engine import Patch
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.experiment import SweepConfig, SweepPlan, collect, make_patches, plan_sweep
from superscopes_tl.model import LanguageModel, PatchedLayer, load_model
from superscopes_tl.scores import no_scores, words_of
from superscopes_tl.statistics import bootstrap
from superscopes_tl.vectors import ADAPTER_SETTINGS, Adapter, Scale

UNTRAINED = (1, 4, 16, 32, 64, 128, 256)
"""The α, in norms of what is replaced, among which the untrained vector is given its best."""


def fit_adapter(
    model: LanguageModel | Any,
    names: Sequence[str],
    *,
    layer: int,
    kind: str = "resid_post",
    target_layer: PatchedLayer = "embed",
    steps: int = 60,
    batch_size: int = 16,
    learning_rate: float = 0.03,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Adapter:
    """Fit s and b on names and the model's own words about them.

    Example:
        >>> adapter = fit_adapter(load_model(), ALL_NAMES, layer=12)  # doctest: +SKIP
        >>> sweep(load_model(), "Pink Floyd", **adapter.sweep)  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it accepts.
        names: of many kinds; those without own words are left out. Keep some for
            `adapter_shares`.
        layer: the source layer.
        kind: the kind of activation.
        target_layer: where f(v) is written; the paper's place is the input embedding.
        steps: steps of Adam; the progress bar states the time after the first.
        batch_size: names per step.
        learning_rate: of the first step, for log s and for b in units of the first s per root of
            the width; it decays linearly to 0.
        seed: orders the names.
        progress: whether to show a progress bar.
        **settings: of `SweepConfig` those in `ADAPTER_SETTINGS`, which a sweep with the
            adapter needs too, and `precision`.

    Raises:
        ValueError, TypeError: a bad setting, or names of which none has own words.
    """
    check_count("steps", steps, least=1, fix="60 is the default")
    check_count("batch_size", batch_size, least=1, fix="16 is the default")
    if others := sorted(set(settings).difference(ADAPTER_SETTINGS, ["precision"])):
        expected = f"out of {', '.join((*ADAPTER_SETTINGS, 'precision'))}"
        raise bad_value("settings", expected, others, "leave them out")
    plan = _plan(model, names, layer, kind, target_layer, settings)
    units, texts, norm = _examples(plan, names)
    about = {"names": len(texts), "steps": steps, "batch_size": batch_size, "seed": seed}
    order = torch.Generator().manual_seed(seed)
    queue = torch.randperm(len(texts), generator=order).tolist()
    start = norm * _best_alpha(
        plan, units[queue[:batch_size]] * norm, [texts[n] for n in queue], target_layer
    )
    size = start / math.sqrt(units.shape[1])
    # In logarithms, so that a scale stays positive, and in units, so that one rate suits both.
    learned = [torch.tensor(math.log(start)), torch.zeros(units.shape[1])]
    adam = torch.optim.Adam([one.requires_grad_() for one in learned], lr=learning_rate)
    slower = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    bar = tqdm(range(steps), desc="adapter", unit="step", disable=not progress)
    for _ in bar:
        if len(queue) < min(batch_size, len(texts)):  # every name once, then all again
            queue += torch.randperm(len(texts), generator=order).tolist()
        batch, queue = queue[:batch_size], queue[batch_size:]
        with torch.enable_grad():
            mapped = learned[0].exp() * units[batch] + size * learned[1]
            patches = [Patch(vector, target_layer) for vector in mapped]
            loss = _loss(plan, patches, [texts[row] for row in batch])
            # Not backward(): the model's weights must not get gradients.
            gradients = torch.autograd.grad(loss, learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        slower.step()
        nats = float(loss.detach())
        bar.set_postfix_str(f"{nats:.3f} nats per token", refresh=False)
    log_scale, bias = (one.detach() for one in learned)
    return Adapter(
        scale=math.exp(float(log_scale)),
        bias=size * bias,
        model=plan.model.name,
        fingerprint=plan.model.fingerprint,
        kind=kind,
        layer=plan.sites[0].layer,
        target_layer=target_layer,
        settings=_plain(plan.config, settings),
        training={**about, "learning_rate": learning_rate, "loss": nats},
    )


def _plan(
    model: Any, names: Sequence[str], layer: int, kind: str, target_layer: Any, settings: Any
) -> SweepPlan:
    """Return the plan that reads the first name's site."""
    site = {"layers": layer, "kinds": kind, "alphas": 1, "target_layer": target_layer}
    model = load_model(model)
    return plan_sweep(model, _checked(names)[0], **{**settings, **site, "scorer": no_scores})


def _checked(names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str) or not names:
        raise bad_value("names", "a list of names", names, "for example ALL_NAMES")
    return names


def _examples(
    plan: SweepPlan, names: Sequence[str]
) -> tuple[Float[Tensor, "names d_model"], list[tuple[int, ...]], float]:
    """Return v/‖v‖ and the own words of each name that has some, and the replaced norm."""
    plans = [plan.at_prompt(name) for name in dict.fromkeys(names)]
    abouts = [one.about(one.sites[0].position) for one in plans]
    words = words_of(plan.generator, abouts)
    found = [(p, w.token_ids) for p, w in zip(plans, words, strict=True) if not w.undefined]
    if not found:
        why = words[0].undefined
        raise bad_value("names", "names that the model describes", f"none: {why}", "try others")
    vectors = torch.stack([make_patches(one)[0].vector for one, _ in found])
    norm = float(plan.generator.placeholder_norms[plan.cells[0].target_layer])
    unit: Tensor = torch.nn.functional.normalize(vectors, dim=-1)
    return unit, [ids for _, ids in found], norm


def _best_alpha(
    plan: SweepPlan,
    vectors: Float[Tensor, "names d_model"],
    texts: Sequence[Sequence[int]],
    target_layer: PatchedLayer,
) -> float:
    """Return which of `UNTRAINED` makes the texts likeliest after α·v, per token and text."""
    pairs = [
        (Patch(alpha * vector, target_layer), text)
        for alpha in UNTRAINED
        for vector, text in zip(vectors, texts, strict=False)
    ]
    patches, several = zip(*pairs, strict=True)
    likely = plan.generator.log_probabilities(patches, several)
    means = torch.tensor([sum(row) / len(row) for row in likely])
    return UNTRAINED[int(means.view(len(UNTRAINED), -1).mean(dim=1).argmax())]


def _loss(
    plan: SweepPlan, patches: Sequence[Patch], texts: Sequence[Sequence[int]]
) -> Float[Tensor, ""]:
    """Return −log p of the texts after their patches, in nats per token, the mean over texts."""
    likely = plan.generator.differentiable(patches, texts)
    lengths = torch.tensor([len(text) for text in texts], device=likely.device)
    loss: Tensor = -(likely.sum(dim=1) / lengths).mean()
    return loss.cpu()


def _plain(config: SweepConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a sweep needs to read the same way, as plain data."""
    kept = {name: settings[name] for name in ("chat", "source_template") if name in settings}
    if settings.get("max_new_tokens") is not None:
        kept["max_new_tokens"] = config.max_new_tokens
    return {**kept, "target_prompt": asdict(config.prompt_with_placeholder)}


def adapter_shares(
    model: LanguageModel | Any,
    adapter: Adapter,
    names: Sequence[str],
    *,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Return what an adapter recovers of the own words of names that it was not fitted on.

    Args:
        model: the model that it was fitted on.
        adapter: from `fit_adapter`.
        names: held out.
        progress: whether to show progress bars.
        **settings: sweep settings, such as `precision` or `others`.

    Returns:
        A row for each of "adapter", "b alone", "adapter, other names' vectors" and "untrained"
        (α·‖h‖·v/‖v‖, at the one `UNTRAINED` α that is best on these same names, an upper bound):
        `alpha`, `recovered` (the mean over names), its 95 % bootstrap interval `low` to `high`,
        and `gain`, `gain_low`, `gain_high` of the adapter over it, paired by name.

    Raises:
        ValueError, TypeError: a bad setting, or no names.
    """
    given = {**adapter.sweep, "alphas": (0, 1), "controls": "other_prompt", **settings}
    given |= {"generate": "none", "scorer": no_scores}
    plan = plan_sweep(load_model(model), _checked(names)[0], **given)
    plain = plan.with_settings(
        mapping=Scale(), unit="residual", alphas=UNTRAINED, controls=()
    )  # the same generator, so that own words are written once
    adapted, untrained = (
        collect([one.at_prompt(name) for name in dict.fromkeys(names)], progress=progress).table
        for one in (plan, plain)
    )
    adapted = adapted.set_index("prompt")
    wide = untrained.pivot(index="prompt", columns="alpha", values="recovered")
    best: Any = wide.mean().idxmax()
    whole = adapted[adapted["alpha"] == 1]
    columns: dict[str, tuple[float, pd.Series[float]]] = {
        "adapter": (1.0, whole["recovered"]),
        "b alone": (0.0, adapted.loc[adapted["alpha"] == 0, "recovered"]),
        "adapter, other names' vectors": (1.0, whole["other_prompt_recovered"]),
        "untrained": (float(best), wide[best]),
    }
    shares = pd.DataFrame({name: values for name, (_, values) in columns.items()}).dropna()
    gains = shares[["adapter"]].to_numpy() - shares.to_numpy()
    low, high = bootstrap(shares.to_numpy())
    gain_low, gain_high = bootstrap(gains)
    return pd.DataFrame(
        {
            "method": shares.columns,
            "alpha": [alpha for alpha, _ in columns.values()],
            "recovered": shares.mean().to_numpy(),
            "low": low,
            "high": high,
            "gain": gains.mean(axis=0),
            "gain_low": gain_low,
            "gain_high": gain_high,
            "names": len(shares),
        }
    )
