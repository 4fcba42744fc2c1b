"""Devices that compute wrong numbers, and weights of fewer bits."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import QuantoConfig

from superscopes_tl import LanguageModel, load_model, sweep
from superscopes_tl.errors import ModelLoadError
from superscopes_tl.model import device_of
from superscopes_tl.model.language_model import weight_fingerprint
from superscopes_tl.weights import quiet
from tests.support.refusals import refused
from tests.support.tiny_models import tiny_hf, tiny_tokenizer


class Rounded(nn.Linear):
    """A linear map with weights of 8 bits, as the quantizers of transformers put into a model."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(whole, requires_grad=False), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class RoundedTogether(Rounded):
    """One that also rounds its input, by the largest number of all tokens in the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax() / 7
        return super().forward((x / step).round() * step)


def quantized(kind: type[Rounded]) -> Any:
    """Return a Llama whose MLPs are quantized."""
    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.down_proj = kind(layer.mlp.down_proj)
    hf.is_quantized, hf.config.quantization_config = True, QuantoConfig(weights="int8")
    return hf


def test_the_default_device_is_never_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac without CUDA it is the CPU; TransformerLens refuses to choose MPS as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(None) == torch.device("cpu")


@pytest.mark.transformer_lens
def test_transformer_lens_warns_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on MPS is loaded with the warning, whether named, made by hand or wrapped."""
    hf = tiny_hf("llama")
    model = load_model(hf, tiny_tokenizer(), backend="bridge")
    monkeypatch.setattr(LanguageModel, "device", property(lambda self: torch.device("mps")))
    monkeypatch.delenv("TRANSFORMERLENS_ALLOW_MPS", raising=False)
    for given in ((tiny_hf("llama"), tiny_tokenizer()), (model.tl,)):
        monkeypatch.setattr("transformer_lens.utilities.devices._mps_warned", False)
        with pytest.warns(UserWarning, match="MPS backend may produce silently incorrect results"):
            load_model(*given)


def test_only_warnings_of_wrong_numbers_pass_while_a_model_loads() -> None:
    """And they meet the filters of the user, who may have made them errors."""
    said = ["a new argument", "MPS backend may be wrong", "RoPE was NOT applied", "torch_dtype"]
    with warnings.catch_warnings(record=True) as passed:
        warnings.simplefilter("always")
        with quiet():
            for text in said:
                warnings.warn(text, UserWarning, stacklevel=1)
    assert [str(each.message) for each in passed] == said[1:3]
    assert passed[0].filename == __file__
    with pytest.raises(UserWarning, match="MPS"), quiet():
        warnings.warn(said[1], UserWarning, stacklevel=1)


@pytest.mark.transformer_lens
def test_quantized_weights_are_read_as_what_they_stand_for() -> None:
    """The readings are those of the same numbers in float32, and the provenance tells the bits."""
    plain = quantized(Rounded)
    for layer in plain.model.layers:
        rounded = layer.mlp.down_proj
        layer.mlp.down_proj = nn.Linear(rounded.in_features, rounded.out_features, bias=False)
        layer.mlp.down_proj.weight = nn.Parameter(rounded.weight * rounded.scale)
    plain.is_quantized = False
    del plain.config.quantization_config
    tables = []
    for hf in (quantized(Rounded), plain):
        model = load_model(hf, tiny_tokenizer(), backend="bridge")
        provenance = model.provenance()
        assert json.loads(json.dumps(provenance)) == provenance
        assert ("quantization" in provenance) is hf.is_quantized
        result = sweep(model, "Syria", layers=[5, 2], alphas=(1, 3), progress=False)
        tables.append(result.table)
    assert tables[0]["text"].tolist() == tables[1]["text"].tolist()
    assert tables[0]["recovered"].tolist() == pytest.approx(
        tables[1]["recovered"].tolist(), abs=1e-3, nan_ok=True
    )


@pytest.mark.transformer_lens
def test_rounding_that_depends_on_other_tokens_is_refused() -> None:
    """As bitsandbytes's 8 bits do with their outliers: a cell would depend on its batch."""
    hf, tokenizer = quantized(RoundedTogether), tiny_tokenizer()
    message = refused(lambda: load_model(hf, tokenizer, backend="bridge"), ModelLoadError, "model")
    assert "llm_int8_threshold=0" in message
    assert "load_in_4bit" in message


def test_a_fingerprint_reads_the_parts_of_a_quantized_parameter() -> None:
    """A parameter of torchao has no operation but to be taken apart; each part counts."""

    class Packed:
        shape = (2, 3)

        def __init__(self, step: float) -> None:
            self.data, self.scale = torch.arange(6).to(torch.int8), torch.tensor([1.0, step])

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["data", "scale"], None

    def fingerprint(step: float) -> str:
        return weight_fingerprint(
            SimpleNamespace(named_parameters=lambda: [("weight", Packed(step))])
        )

    assert fingerprint(2.0) == fingerprint(2.0) != fingerprint(2.5)
