"""Passes that need no hook run on the bare Hugging Face model, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt, load_model
from superscopes_tl.model.decoder import bare_twin
from tests.support.tiny_models import ARCHITECTURES, tiny_hf, tiny_tokenizer

TARGET = TargetPrompt("Syria: Country in the Middle East, x")


def bridge(architecture: str) -> LanguageModel:
    """A bridge of its own, which a test may change."""
    return load_model(tiny_hf(architecture), tiny_tokenizer(), backend="bridge")


def passes(module: torch.nn.Module) -> list[int]:
    """A list that grows with every forward pass of a module."""
    forward, seen = module.forward, []

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        return forward(*arguments, **options)

    module.forward = counted
    return seen


def texts(model: LanguageModel) -> list[tuple[int, ...]]:
    """What a few patches write."""
    vectors = torch.randn(6, model.d_model, generator=torch.Generator().manual_seed(5))
    patches = [Patch(5 * v, layer) for v, layer in zip(vectors, (5, 2, 0, 3, 1, 4), strict=True)]
    generator = PatchedGenerator(model, TARGET, max_new_tokens=6)
    return [generation.token_ids for generation in generator.generate(patches)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_steps_but_the_patched_one_run_on_the_bare_model(architecture: str) -> None:
    """One pass through the bridge per batch; the texts are those of the bridge alone."""
    model = bridge(architecture)
    bare, whole = passes(model.decoder._plain), passes(model.tl.original_model)
    found = texts(model)
    assert len(whole) == 1
    assert len(bare) >= 3
    model.decoder._plain = None
    assert texts(model) == found
    assert len(whole) >= 5


def _hook_point(model: LanguageModel) -> Callable[[], None]:
    point = model.tl.blocks[2].hook_resid_post
    point.add_hook(lambda value, hook: -value, is_permanent=True)
    return lambda: point.remove_hooks(including_permanent=True)


def _module(model: LanguageModel) -> Callable[[], None]:
    module = model.tl.original_model.model.layers[2]
    return module.register_forward_hook(lambda *seen: -seen[-1]).remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("add", [_hook_point, _module])
def test_a_hook_of_the_user_s_runs_at_every_step(add: Any) -> None:
    """With it the bare model is not used; without it, it is again."""
    model = bridge("llama")
    before = texts(model)
    remove = add(model)
    hooked = texts(model)
    assert hooked != before
    plain, model.decoder._plain = model.decoder._plain, None
    assert texts(model) == hooked
    model.decoder._plain = plain
    remove()
    assert texts(model) == before


def _changed_in_place(model: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in model.tl.blocks.parameters():
            parameter.mul_(-3)


def _replaced(model: LanguageModel) -> None:
    head = model.tl.unembed.original_component
    head.weight = torch.nn.Parameter(-head.weight.detach())


@pytest.mark.parametrize("change", [_changed_in_place, _replaced])
@pytest.mark.parametrize("architecture", ["llama", "neox", "gpt2"])
def test_changed_weights_are_those_of_every_step(architecture: str, change: Any) -> None:
    """Also where the bridge computes with copies of them: texts are those of the bridge alone."""
    model = bridge(architecture)
    before = texts(model)
    change(model)
    after = texts(model)
    assert after != before
    model.decoder._plain = None
    assert texts(model) == after


def test_a_hook_on_the_unembedding_reaches_known_texts() -> None:
    """However many patches share a text, it is as likely as in a pass of its own."""
    model = bridge("llama")
    vectors = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(5))
    patches = [Patch(5 * v, layer) for v, layer in zip(vectors, (5, 2, 0), strict=True)]
    generator = PatchedGenerator(model, TARGET)
    before = generator.log_probabilities(patches, [[7, 40]] * 3)
    model.tl.unembed.hook_out.add_hook(lambda value, hook: -value, is_permanent=True)
    together = generator.log_probabilities(patches, [[7, 40]] * 3)
    for patch, unhooked, found in zip(patches, before, together, strict=True):
        (alone,) = generator.log_probabilities([patch], [[7, 40]])
        assert found == pytest.approx(alone, abs=1e-3)
        assert found != pytest.approx(unhooked, abs=1e-1)


def test_a_bridge_in_compatibility_mode_is_run_itself() -> None:
    """Its processed weights are not the bare model's."""
    model = bridge("gpt2")
    model.tl.enable_compatibility_mode()
    seen = passes(model.decoder._plain)
    texts(model)
    assert not seen


def test_the_twin_has_the_same_parameters_and_one_operation_for_gpt2_s_activation() -> None:
    """It costs no memory; its logits are the model's."""
    hf = tiny_hf("gpt2")
    twin = bare_twin(hf)
    own = {id(parameter) for parameter in hf.parameters()}
    assert all(id(parameter) in own for parameter in twin.parameters())
    assert not any(type(m).__name__ == "NewGELUActivation" for m in twin.modules())
    assert any(type(m).__name__ == "NewGELUActivation" for m in hf.modules())
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.allclose(twin(ids).logits, hf(ids).logits, atol=1e-4)


def test_a_model_that_cannot_be_copied_has_no_twin() -> None:
    """Nor has one whose weights are quantised: their scales would be copied."""
    hf = tiny_hf("llama")
    hf.is_quantized = True
    assert bare_twin(hf) is None
    hf.is_quantized = False
    hf.__deepcopy__ = lambda memo: 1 / 0
    assert bare_twin(hf) is None


def test_a_twin_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs through its hook points then."""

    def wrong(hf: Any) -> Any:
        twin = bare_twin(hf)
        twin.lm_head.weight = torch.nn.Parameter(-twin.lm_head.weight.detach())
        return twin

    monkeypatch.setattr("superscopes_tl.model.load.bare_twin", wrong)
    model = bridge("llama")
    assert model.decoder._plain is None
    assert texts(model)
