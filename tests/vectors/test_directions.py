"""Keys, values and differences of means of a model, against plain Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from superscopes_tl import LanguageModel, capture, load_model
from superscopes_tl.vectors import difference_of_means, mlp_keys, mlp_values
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]
PROMPT = "Red Hot Chili Peppers"


def _hf_weights(hf: Any, architecture: str, layer: int) -> dict[str, Tensor]:
    """Return keys and values, `[d_mlp d_model]`, from the original modules."""
    mlp = plain_hf.blocks_of(hf)[layer].mlp
    if architecture == "gpt2":  # Conv1D keeps its weight as [in, out]
        return {"in": mlp.c_fc.weight.T, "values": mlp.c_proj.weight}
    if architecture == "neox":
        return {"in": mlp.dense_h_to_4h.weight, "values": mlp.dense_4h_to_h.weight.T}
    return {
        "gate": mlp.gate_proj.weight,
        "in": mlp.up_proj.weight,
        "values": mlp.down_proj.weight.T,
    }


@pytest.mark.parametrize("layer", [5, 2, -1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma2"])
def test_keys_and_values_are_the_original_weights(
    architecture: str, backend: str, layer: int, tiny: Tiny
) -> None:
    """Row i belongs to neuron i; the keys of a gated layer default to its gate."""
    model = tiny(architecture, backend)
    weights = _hf_weights(tiny_hf(architecture), architecture, layer)
    assert torch.equal(mlp_values(model, layer), weights["values"])
    assert torch.equal(mlp_keys(model, layer, "in"), weights["in"])
    if "gate" in weights:
        assert torch.equal(mlp_keys(model, layer, "gate"), weights["gate"])
        assert not torch.equal(weights["gate"], weights["in"])
    assert torch.equal(mlp_keys(model, layer), weights.get("gate", weights["in"]))


def test_keys_and_values_make_the_mlp_output() -> None:
    """The docstring's formula, with the norm's gain on the keys, gives the captured mlp_out."""
    hf = tiny_hf("llama")
    for block in hf.model.layers:  # a gain of 1 everywhere, as in fresh models, would prove nothing
        torch.nn.init.uniform_(block.post_attention_layernorm.weight, 0.5, 2)
    model = load_model(hf, tiny_tokenizer(), backend="bridge")
    seen = capture(model, PROMPT, kinds=("resid_mid", "mlp_out"), layers=[5, 2])
    for layer in (5, 2):
        norm = hf.model.layers[layer].post_attention_layernorm
        gain = norm.weight.detach()
        stream = seen["resid_mid", layer]
        u = stream / (stream.pow(2).mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt()
        gate, up = (u @ (mlp_keys(model, layer, part) * gain).T for part in ("gate", "in"))
        written = (torch.nn.functional.silu(gate) * up) @ mlp_values(model, layer)
        torch.testing.assert_close(written, seen["mlp_out", layer], rtol=1e-4, atol=1e-4)


def test_weights_are_handed_out_as_copies(tiny: Tiny) -> None:
    """A changed key or value does not change the model."""
    model = tiny("llama", "bridge")
    for take in (mlp_keys, mlp_values):
        before = take(model, 2).clone()
        take(model, 2).zero_()
        assert torch.equal(take(model, 2), before)


def test_keys_and_values_that_are_not_there_are_refused(tiny: Tiny) -> None:
    """No gate, no such layer, no plain feed-forward layer."""
    llama = tiny("llama", "bridge")
    part: Any
    for architecture, part in (("gpt2", "gate"), ("llama", "up")):
        with pytest.raises(ValueError, match="^part:"):
            mlp_keys(tiny(architecture, "bridge"), 2, part)
    with pytest.raises(ValueError, match="^layer:"):
        mlp_values(llama, 6)
    experts = dataclasses.replace(llama, tl=SimpleNamespace(blocks=(object(),) * 6))
    for take in (mlp_keys, mlp_values):
        with pytest.raises(ValueError, match="^layer:"):
            take(experts, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "layer"), [("mlp_out", 5), ("resid_post", 2)])
def test_a_difference_of_means_is_that_of_the_last_tokens(
    kind: str, layer: int, architecture: str, backend: str, tiny: Tiny
) -> None:
    """Groups of unequal size and texts of unequal length; a minus b."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    groups = (["Red Hot Chili Peppers", "Syria", "a rock band"], ["Middle East", "Country, x"])
    means = []
    for texts in groups:
        ids = [[0, *model.tokenizer.encode(t, add_special_tokens=False)] for t in texts]
        last = [plain_hf.source_vectors(hf, i, kind, layer)[-1] for i in ids]
        means.append(sum(last) / len(last))
    found = difference_of_means(model, *groups, kind, layer)
    torch.testing.assert_close(found, means[0] - means[1], rtol=1e-4, atol=1e-4)


def test_a_difference_of_means_needs_texts(tiny: Tiny) -> None:
    """A bare string is no list of texts, and no texts have no mean."""
    model = tiny("llama", "bridge")
    bad: Any
    for bad in ("Syria", []):
        with pytest.raises(ValueError, match="^texts_b:"):
            difference_of_means(model, ["Syria"], bad, "mlp_out", 2)
    with pytest.raises(ValueError, match="^kinds:"):
        difference_of_means(model, ["Syria"], ["East"], "mlp", 2)
