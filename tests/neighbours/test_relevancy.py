"""Relevancy: how much an injected vector raises each generated token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, plan_sweep, sweep
from superscopes_tl.experiment import make_patches, plan_vectors
from superscopes_tl.figures import relevancy_heatmap
from superscopes_tl.neighbours import relevancy, token_effects
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import Add
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf
from tests.vectors.test_selfie import N_NEW, ONE, PROMPT, SEVERAL, WAYS, hooked_logits

Tiny = Callable[[str, str], LanguageModel]


@pytest.mark.parametrize("way", ["replace", "add at_layers"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_relevancy_is_the_difference_of_two_plain_runs(
    architecture: str, backend: str, way: str, tiny: Tiny
) -> None:
    """p(token | injected) − p(token | not), from one hooked and one bare forward pass."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    plan = plan_sweep(
        model, PROMPT, layers=(5, 2), kinds="mlp_out", alphas=(1, 6), target_layer=2,
        write=WAYS[way], target_prompt=SEVERAL, max_new_tokens=N_NEW, scorer=no_scores,
    )  # fmt: skip
    table = relevancy(plan)
    target, tokenizer = plan.generator.target, model.tokenizer
    source = [0, *tokenizer.encode(PROMPT, add_special_tokens=False)]
    generated = plan.generator.generate(make_patches(plan))
    texts = {
        (cell.source_layer, cell.alpha): generation.token_ids
        for cell, generation in zip(plan.cells, generated, strict=True)
    }
    for (layer, alpha), rows in table.groupby(["source_layer", "alpha"]):
        v = plain_hf.source_vectors(hf, source, "mlp_out", layer)[-1]
        new = list(texts[layer, alpha])
        ids, start = [*target.tokens.ids, *new], len(target.tokens) - 1
        with torch.no_grad():
            bare = hf(torch.tensor([ids]), use_cache=False).logits[0]
        hooked = hooked_logits(hf, ids, target.positions, v, way, alpha, 2)
        chosen = torch.arange(len(new)), torch.tensor(new)
        with_it, without = (
            logits[start : start + len(new)].softmax(dim=-1)[chosen] for logits in (hooked, bare)
        )
        assert list(rows["step"]) == list(range(len(new)))
        for column, expected in (
            ("probability", with_it),
            ("unpatched_probability", without),
            ("relevancy", with_it - without),
        ):
            torch.testing.assert_close(
                torch.tensor(rows[column].to_numpy()).float(), expected, rtol=1e-3, atol=1e-5
            )
        assert "".join(rows["generated_token"]) == tokenizer.decode(new)
    assert table["relevancy"].abs().max() > 1e-3
    assert len(table.groupby(["source_layer", "alpha"])) == 4


def test_what_is_not_injected_has_no_relevancy(tiny: Tiny) -> None:
    """With α = 0 of add nothing is changed: 0 for every token."""
    plan = plan_sweep(
        tiny("llama", "bridge"), PROMPT, layers=2, kinds="mlp_out", alphas=0, write=Add(),
        target_prompt=ONE, max_new_tokens=N_NEW, scorer=no_scores,
    )  # fmt: skip
    assert relevancy(plan)["relevancy"].abs().max() < 1e-4


def test_relevancy_of_chosen_rows_and_of_vectors(tiny: Tiny) -> None:
    """Rows of the table choose cells; a vector without a source prompt has them too."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {
        "alphas": (1, 6), "target_layer": (4, 1), "target_prompt": ONE, "max_new_tokens": 3,
    }  # fmt: skip
    vectors = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(1))
    (plan,) = plan_vectors(model, vectors, **settings)
    every = relevancy(plan)
    chosen = every[(every["alpha"] == 6) & (every["position"] == 1)]
    some = relevancy(plan, chosen)
    numbers = ["probability", "unpatched_probability", "relevancy"]
    left, right = some.drop(columns=numbers), chosen.drop(columns=numbers)
    assert left.equals(right.reset_index(drop=True))
    torch.testing.assert_close(
        torch.tensor(some[numbers].to_numpy()), torch.tensor(chosen[numbers].to_numpy()),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    assert set(some["token"]) == {"vector 1"}
    with pytest.raises(ValueError, match="^rows:"):
        relevancy(plan, chosen.assign(alpha=7.0))


def test_token_effects_follow_guidance(tiny: Tiny) -> None:
    """With w = 0 the logits are the unpatched ones: no token is raised."""
    model = tiny("llama", "bridge")
    generator = PatchedGenerator(model, ONE, max_new_tokens=3)
    patch = Patch(torch.ones(model.d_model), 2, guidance=0.0)
    (effects,) = token_effects(generator, [patch], [(5, 9, 7)])
    assert [effect.relevancy for effect in effects] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [effect.raised for effect in effects] == pytest.approx([0, 0, 0], abs=1e-4)


def test_the_figure_shows_tokens_as_text(tiny: Tiny) -> None:
    """A line per cell, escaped, with nothing where a text has ended."""
    plan = plan_sweep(
        tiny("llama", "bridge"), PROMPT, layers=(5, 2), kinds="mlp_out", alphas=(1, 6),
        target_prompt=ONE, max_new_tokens=3, scorer=no_scores,
    )  # fmt: skip
    table = relevancy(plan)
    table.loc[0, "generated_token"] = "<b>x"
    short = table.drop(index=table.index[-1])
    figure = relevancy_heatmap(short)
    (cells,) = figure.data
    assert len(cells.z) == len(cells.y) == 4
    assert ">&lt;b&gt;x<" in cells.text[0][0]
    assert cells.z[0][1] == pytest.approx(table["relevancy"][1])
    assert cells.z[-1][-1] is None
    assert cells.text[-1][-1] == ""
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (-1, 1)
    assert PROMPT in figure.layout.title.text
    with pytest.raises(ValueError, match="^table:"):
        relevancy_heatmap(table[:0])


def test_relevancy_takes_rows_of_its_own_sweep(tiny: Tiny) -> None:
    """Rows of another prompt are refused, and so is a result without a plan."""
    model = tiny("llama", "bridge")
    plan = plan_sweep(model, PROMPT, layers=[5, 2], scorer=no_scores)
    other = sweep(model, "Pearl Jam", layers=[5, 2], scorer=no_scores, progress=False)
    with pytest.raises(ValueError, match="^rows:"):
        relevancy(plan, other.table)
    assert set(relevancy(other)["prompt"]) == {"Pearl Jam"}
    with pytest.raises(TypeError, match="^result:"):
        relevancy(replace(other, plan=None))
