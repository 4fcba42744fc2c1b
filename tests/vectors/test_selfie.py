"""Ways to write and relevancy, against forward hooks on plain Hugging Face and closed forms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt, plan_sweep, sweep
from superscopes_tl.experiment import plan_vectors
from superscopes_tl.figures import relevancy_heatmap
from superscopes_tl.neighbours import relevancy, token_effects
from superscopes_tl.vectors import SELFIE_PROMPT, Add, AtLayers, Both, Interpolate, PlaceholderState
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]
PROMPT = "Red Hot Chili Peppers"
SEVERAL = TargetPrompt("Syria: Country in the Middle East, x x x of x", "x")
ONE = TargetPrompt("Syria: Country in the Middle East, x")
NEAR_TIE = 5e-5
N_NEW = 4
WAYS: dict[str, Any] = {
    "replace": None,
    "add": Add(),
    "interpolate": Interpolate(),
    "at_layers": AtLayers(4, 1),
    "add at_layers": Both(Add(), AtLayers(4, 1)),
    "interpolate at_layers": Both(AtLayers(4, 1), Interpolate()),
}


def _hf_logits(
    hf: Any, ids: list[int], positions: Sequence[int], v: Tensor, way: str, alpha: float, layer: int
) -> Tensor:
    """Return all logits of one forward pass with hooks that do what `way` says, in its words."""

    def write(module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = states.clone()
        for position in positions:
            if way.startswith("add"):
                new[0, position] = states[0, position] + alpha * v
            elif way.startswith("interpolate"):
                new[0, position] = (1 - alpha) * states[0, position] + alpha * v
            else:
                new[0, position] = alpha * v
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with contextlib.ExitStack() as stack, torch.no_grad():
        for number in (4, 1) if "at_layers" in way else (layer,):
            handle = plain_hf.blocks_of(hf)[number].register_forward_hook(write)
            stack.callback(handle.remove)
        return hf(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_way_to_write_equals_hooks_on_plain_hugging_face(
    architecture: str, backend: str, way: str, tiny: Tiny
) -> None:
    """Four placeholders, two target layers, α below and above 1: the texts are the same."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    table = sweep(
        model, PROMPT, layers=(5, 2), kinds="mlp_out", alphas=(0.25, 2), target_layer=(5, 2),
        write=WAYS[way], target_prompt=SEVERAL, max_new_tokens=N_NEW, scorer=_nothing,
        progress=False,
    ).table  # fmt: skip
    target = PatchedGenerator(model, SEVERAL).target
    assert len(target.positions) == 4
    source = [0, *model.tokenizer.encode(PROMPT, add_special_tokens=False)]
    for row in table.to_dict("records"):
        v = plain_hf.source_vectors(hf, source, "mlp_out", row["source_layer"])[-1]
        new: list[int] = []
        for _ in range(N_NEW):
            ids = [*target.tokens.ids, *new]
            logits = _hf_logits(
                hf, ids, target.positions, v, way, row["alpha"], row["target_layer"]
            )
            if int(logits[-1].argmax()) == 1:
                break
            new.append(int(logits[-1].argmax()))
        if row["margin"] > NEAR_TIE:
            assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True), row
    assert len(table) == 2 * 2 * 2
    assert (table["margin"] > NEAR_TIE).sum() >= 7, "near ties must be the exception"


def _nothing(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    return [math.nan] * len(candidates)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_next_token_probabilities_of_every_way_equal_plain_hugging_face(
    backend: str, way: str, tiny: Tiny
) -> None:
    """The whole distribution, not the likeliest token alone; and the ways differ from replace."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    generator = PatchedGenerator(model, SEVERAL)
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(4)) * 4
    alphas, layer = (0.25, 2.0), 2
    write = WAYS[way] or (lambda patch, alpha: patch)
    patches = [write(Patch(alpha * v, layer), alpha) for alpha in alphas]
    ids, positions = list(generator.target.tokens.ids), generator.target.positions
    for alpha, found in zip(alphas, generator.next_token(patches), strict=True):
        expected = _hf_logits(hf, ids, positions, v, way, alpha, layer)[-1].log_softmax(dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        replaced = _hf_logits(hf, ids, positions, v, "replace", alpha, layer)[-1]
        far = (found - replaced.log_softmax(dim=-1)).abs().max()
        assert (far > 5e-3) == (way != "replace")


def _table(model: LanguageModel, write: Any, alphas: Any, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "layers": (5, 2), "kinds": ("mlp_out", "resid_post"), "target_layer": (4, 1),
        "target_prompt": ONE, "max_new_tokens": N_NEW, "scorer": _nothing, "progress": False,
    }  # fmt: skip
    return sweep(model, PROMPT, alphas=alphas, write=write, **(given | settings)).table


@pytest.mark.parametrize("target", [ONE, SEVERAL])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_ends_of_every_way_are_known(
    architecture: str, backend: str, target: TargetPrompt, tiny: Tiny
) -> None:
    """α = 0 of add and interpolate is the unpatched prompt; α = 1 of interpolate is replace."""
    model = tiny(architecture, backend)
    unpatched = PatchedGenerator(model, target, max_new_tokens=N_NEW).unpatched()
    for write in (Add(), Interpolate(), WAYS["add at_layers"], WAYS["interpolate at_layers"]):
        table = _table(model, write, 0, target_prompt=target)
        assert set(table["text"]) == {unpatched.text}
        assert table["entropy"].nunique() <= 2  # one number, but for rounding
    for layers in ((), (4, 1)):
        writes = [AtLayers(*layers)] if layers else []
        mixed = _table(model, Both(Interpolate(), *writes), 1, target_prompt=target)
        replaced = _table(model, writes[0] if writes else None, 1, target_prompt=target)
        assert_same_readings(mixed, replaced, ["text"])
        assert mixed["text"].nunique() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_interpolating_is_counting_from_the_placeholders_state(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """At one placeholder and layer, (1 − α)·old + α·v is b + α·(v − b) with b = old."""
    model = tiny(architecture, backend)
    alphas = (0.25, 0.75, 1.5)
    one = _table(model, Interpolate(), alphas)
    other = _table(model, None, alphas, base=PlaceholderState())
    assert_same_readings(one, other, ["text", "log_probability"])
    assert one["text"].nunique() > 2


def test_ways_have_names_and_are_told_apart(tiny: Tiny) -> None:
    """The column `mapping` says how a cell was written; the same way is the same object."""
    model = tiny("llama", "bridge")
    for write, name in (
        (Add(), "Scale(), by Add()"),
        (Interpolate(), "Scale(), by Interpolate()"),
        (AtLayers(5, 2), "Scale(), by AtLayers(5, 2)"),
        (Both(Add(), AtLayers(5, 2)), "Scale(), by Both(Add(), AtLayers(5, 2))"),
    ):
        plan = plan_sweep(model, PROMPT, write=write, scorer=_nothing)
        assert plan.mapping_name == name
    assert Both(Add(), AtLayers(5, 2)) == Both(Add(), AtLayers(5, 2))


def test_relevancy_takes_rows_of_its_own_sweep(tiny: Tiny) -> None:
    """Rows of another prompt are refused, and so is a result without a plan."""
    model = tiny("llama", "bridge")
    plan = plan_sweep(model, PROMPT, layers=[5, 2], scorer=_nothing)
    other = sweep(model, "Pearl Jam", layers=[5, 2], scorer=_nothing, progress=False)
    with pytest.raises(ValueError, match="rows: expected rows with prompt .* got .*Pearl Jam"):
        relevancy(plan, other.table)
    assert set(relevancy(other)["prompt"]) == {"Pearl Jam"}
    with pytest.raises(TypeError, match="^result:"):
        relevancy(replace(other, plan=None))
    with pytest.raises(TypeError, match="writes: expected ways to write, got str 'add'"):
        Both("add", AtLayers(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layers: expected whole numbers, got list \[0, 3\]"):
        AtLayers([0, 3])  # type: ignore[arg-type]


def test_bad_ways_are_refused(tiny: Tiny) -> None:
    """No layer, no such layer, a share that acts on logits."""
    bad: Any = 1.5
    with pytest.raises(ValueError, match="layers: expected at least one layer"):
        AtLayers()
    with pytest.raises(TypeError, match="layers: expected whole numbers, got float"):
        AtLayers(0, bad)
    model = tiny("llama", "bridge")
    with pytest.raises(ValueError, match="target_layer: expected layers of a model with 6"):
        _table(model, AtLayers(0, 6), 1)
    with pytest.raises(ValueError, match=r"^write: "):
        _table(model, Interpolate(), 2, guide="logits")


def test_the_prompt_has_five_placeholders(mini: LanguageModel) -> None:
    """On the bundled model too each of them is a token of its own."""
    assert len(SELFIE_PROMPT.locate(mini, 20).positions) == 5
    assert SELFIE_PROMPT.few_shot_names == ("Portugal", "Frida Kahlo", "Toyota")


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
        write=WAYS[way], target_prompt=SEVERAL, max_new_tokens=N_NEW, scorer=_nothing,
    )  # fmt: skip
    table = relevancy(plan)
    target, tokenizer = plan.generator.target, model.tokenizer
    source = [0, *tokenizer.encode(PROMPT, add_special_tokens=False)]
    texts = {(cell.source_layer, cell.alpha): g for cell, g in _written(plan)}
    for (layer, alpha), rows in table.groupby(["source_layer", "alpha"]):
        v = plain_hf.source_vectors(hf, source, "mlp_out", layer)[-1]
        new = list(texts[layer, alpha])
        ids, start = [*target.tokens.ids, *new], len(target.tokens) - 1
        with torch.no_grad():
            bare = hf(torch.tensor([ids]), use_cache=False).logits[0]
        hooked = _hf_logits(hf, ids, target.positions, v, way, alpha, 2)
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


def _written(plan: Any) -> Any:
    from superscopes_tl.experiment import make_patches

    generations = plan.generator.generate(make_patches(plan))
    return zip(plan.cells, [g.token_ids for g in generations], strict=True)


def test_what_is_not_injected_has_no_relevancy(tiny: Tiny) -> None:
    """With α = 0 of add nothing is changed: 0 for every token."""
    plan = plan_sweep(
        tiny("llama", "bridge"), PROMPT, layers=2, kinds="mlp_out", alphas=0, write=Add(),
        target_prompt=ONE, max_new_tokens=N_NEW, scorer=_nothing,
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
    with pytest.raises(ValueError, match="rows: expected cells of the plan"):
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
        target_prompt=ONE, max_new_tokens=3, scorer=_nothing,
    )  # fmt: skip
    table = relevancy(plan)
    table.loc[0, "generated_token"] = "<b>x"
    short = table.drop(index=table.index[-1])
    figure = relevancy_heatmap(short)
    (cells,) = figure.data
    assert len(cells.z) == len(cells.y) == 4
    assert cells.text[0][0] == "&lt;b&gt;x"
    assert cells.z[0][1] == pytest.approx(table["relevancy"][1])
    assert cells.z[-1][-1] is None
    assert cells.text[-1][-1] == ""
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (-1, 1)
    assert PROMPT in figure.layout.title.text
    with pytest.raises(ValueError, match="table: expected tokens, got none"):
        relevancy_heatmap(table[:0])
