"""Signals of a good α, measured without generating."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from superscopes_tl import LanguageModel, Patch, TargetPrompt, plan_sweep
from superscopes_tl.engine import PatchedGenerator, crop_description, no_patch
from superscopes_tl.experiment import SweepPlan, make_patches
from superscopes_tl.statistics import alpha_signals
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.plain_hf import blocks_of, tensor_of
from tests.support.spies import spied
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]

SOURCE = "Red Hot Chili Peppers"
PROMPTS = {
    "last": TargetPrompt("Syria: Country in the Middle East, x"),
    "middle": TargetPrompt("Syria: Country, x is a band in the East"),
}
PROBE = 4


def planned(model: LanguageModel, **settings: Any) -> SweepPlan:
    """Return the plan of a small map."""
    usual: dict[str, Any] = {
        "layers": [5, 2], "kinds": "resid_post", "alphas": (3, 0.5), "target_layer": (3, 0),
        "target_prompt": PROMPTS["last"], "max_new_tokens": 4, "generate": "none",
    }  # fmt: skip
    return plan_sweep(model, SOURCE, **(usual | settings))


def outputs(
    hf: Any, ids: list[int], patch: tuple[tuple[int, ...], Tensor, int] | None
) -> tuple[Tensor, Tensor]:
    """Return the output of the probed block and the log-probabilities, from one whole pass."""
    seen: list[Tensor] = []
    handle = blocks_of(hf)[PROBE].register_forward_hook(lambda m, i, o: seen.append(tensor_of(o)))
    try:
        if patch is None:
            with torch.no_grad():
                logits = hf(torch.tensor([ids]), use_cache=False).logits[0]
        else:
            logits = plain_hf.patched_logits(hf, ids, *patch)
    finally:
        handle.remove()
    return seen[0][0], logits.log_softmax(dim=-1)


@pytest.mark.parametrize("place", PROMPTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_signals_equal_plain_hugging_face(
    architecture: str, backend: str, place: str, tiny: Tiny
) -> None:
    """Cell for cell, from the formulas and whole forward passes without a cache."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    plan = planned(model, target_prompt=PROMPTS[place])
    found = alpha_signals(plan, probe_layer=PROBE)
    ids, positions = list(plan.generator.target.tokens.ids), plan.generator.target.positions
    text = plain_hf.generate_cached(hf, ids, None, n_new=4, eos=(1,))
    steps = range(len(ids) - 1, len(ids) - 1 + len(text))
    pieces = [model.tokenizer.decode(text[: n + 1]) for n in range(len(text))]
    first = next(n for n, piece in zip(steps, pieces, strict=True) if crop_description(piece))
    state0, likely0 = outputs(hf, [*ids, *text], None)
    source = plan.source.ids
    expected = []
    for row in found.to_dict("records"):
        v = plain_hf.source_vectors(hf, list(source), row["kind"], row["source_layer"])[-1]
        patch = (positions, row["alpha"] * v, row["target_layer"])
        state, likely = outputs(hf, [*ids, *text], patch)
        after = positions[-1] + 1
        similar = [torch.cosine_similarity(s[after], v, dim=0) for s in (state, state0)]
        entropies = [float(torch.distributions.Categorical(x[first].exp()).entropy())
                     for x in (likely, likely0)]  # fmt: skip
        kl = [torch.nn.functional.kl_div(likely0[n], likely[n], log_target=True, reduction="sum")
              for n in steps]  # fmt: skip
        expected.append(
            [float(similar[0] - similar[1]), entropies[0] - entropies[1], np.quantile(kl, 0.95)]
        )
    np.testing.assert_allclose(found.iloc[:, -3:], expected, rtol=1e-3, atol=1e-4)
    assert found["self_similarity"].abs().max() > 1e-3


def test_a_table_joins_its_signals(llama: LanguageModel) -> None:
    """One row per cell of every prompt, in the columns of the table; also in residual norms."""
    plan = planned(llama, alphas=(1, 2), unit="residual")
    plans = [plan, plan.at_prompt("Pink Floyd")]
    signals = alpha_signals(plans)
    table = pd.concat([one.run(progress=False).table for one in plans], ignore_index=True)
    joined = table.merge(signals)
    assert len(joined) == len(table) == len(signals)
    assert joined["recovered"].equals(table["recovered"])
    pd.testing.assert_frame_equal(alpha_signals(plans[1]), signals.tail(8).reset_index(drop=True))
    # Patched at the probed layer or above it, the next token has not seen the vector yet.
    above = alpha_signals(plan.with_settings(target_layer=(3, 2, 1)), probe_layer=2)
    measured = above["self_similarity"].notna()
    assert measured.tolist() == (above["target_layer"] < 2).tolist()
    assert above[["first_entropy", "kl_unpatched"]].notna().all(axis=None)


def test_a_batch_not_a_loop(llama: LanguageModel) -> None:
    """All cells and tokens are one forward pass beside the unpatched text, which is kept."""
    model, spy = spied(llama)
    plan = planned(model)
    spy.batches.clear()
    alpha_signals(plan)
    unpatched, cells = spy.batches
    assert (unpatched, cells) == (1, 1)  # it grows from one row
    spy.batches.clear()
    alpha_signals([plan, plan.at_prompt("Pink Floyd"), plan.at_prompt("Paris")])
    assert spy.batches == [1]


def test_residuals_do_not_depend_on_the_batch(llama: LanguageModel) -> None:
    """Patched, unpatched and doubly patched rows, one by one and together."""
    generator = PatchedGenerator(llama, PROMPTS["middle"], max_new_tokens=3)
    torch.manual_seed(0)
    patches = [no_patch(llama)] + [
        Patch(torch.randn(llama.d_model), layers, keep=keep)
        for layers, keep in ((5, 0.0), (2, 1.0), ((0, 3), 0.0), (2, 0.0))
    ]
    after = generator.target.positions[-1]
    places = [(2, after), (0, after + 1), (5, after + 2), (2, after + 1)]
    together = generator.residuals(patches, (4, 5), places)
    assert together.shape == (5, 4, llama.d_model)
    for patch, row in zip(patches, together, strict=True):
        (alone,) = generator.residuals([patch], (4, 5), places)
        torch.testing.assert_close(alone, row, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[4, 0], patches[4].vector, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_measured_is_refused(llama: LanguageModel) -> None:
    """No plans, plans with different generators, α on logits, a layer that is not there."""
    plan = planned(llama)
    for plans in ([], [plan, planned(llama)]):
        with pytest.raises(ValueError, match="^plans: "):
            alpha_signals(plans)
    with pytest.raises(ValueError, match="^guide: "):
        alpha_signals(plan.with_settings(guide="logits"))
    with pytest.raises(ValueError, match="^probe_layer: "):
        alpha_signals(plan, probe_layer=9)
    silent = replace(llama, eos_token_ids=tuple(range(llama.n_vocab)))
    with pytest.raises(ValueError, match="^target_prompt: "):
        alpha_signals(planned(silent))


def test_the_vectors_are_those_of_alpha_one(llama: LanguageModel) -> None:
    """The similarity is to f(v) at α = 1, with a base too, whatever α the plan has."""
    plan = planned(llama, alphas=(4, -1), target_layer=0)
    one = plan.with_settings(alphas=1)
    vector = make_patches(one)[0].vector
    found = alpha_signals(plan, probe_layer=PROBE)
    text = plan.generator.unpatched().token_ids
    place = [(PROBE, plan.generator.target.positions[-1] + 1)]
    patches = [no_patch(llama), Patch(4 * vector, 0), Patch(-vector, 0)]
    states = plan.generator.residuals(patches, text, place)[:, 0]
    similar = torch.cosine_similarity(states, vector[None], dim=-1)
    expected = (similar[1:] - similar[0]).tolist()
    assert found["self_similarity"].tolist()[:2] == pytest.approx(expected, abs=1e-5)
