"""A model that TransformerLens computes wrongly is noticed when it is loaded, not in its texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge

from superscopes_tl import LanguageModel, capture, load_model
from superscopes_tl.errors import ModelLoadError, UnavailableKindError
from superscopes_tl.model.verification import distance, tolerance
from tests.conftest import BACKENDS
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

needs_hooked = pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="this TransformerLens has no HookedTransformer"
)
Tiny = Callable[[str, str], LanguageModel]
SIZE = len(tiny_tokenizer())
COMMON = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FALCON = {
    **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
    "multi_query": False,
    "parallel_attn": False,
}
OPT = {
    **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
    "ffn_dim": 64,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": False,
}
MPT = {"vocab_size": SIZE, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}


def made(config: str, **settings: Any) -> Any:
    """Return a random model of a config class, as `from_config` leaves it in memory."""
    shape = getattr(transformers, config)(**settings)
    shape._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(shape).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" in name or "wte" in name else 3.0)
    return hf


def assert_refused(error: pytest.ExceptionInfo[ValueError], argument: str) -> None:
    """Assert the form of every refusal, and that it can be read at a glance."""
    text = str(error.value)
    assert text.startswith(f"{argument}: expected ")
    assert ", got " in text
    assert ". Fix: " in text
    assert len(text) <= 600


def spoil(lens: Any) -> Any:
    """Return a TransformerLens object after changing one matrix by three percent."""
    name, last = max(
        ((n, p) for n, p in lens.named_parameters() if "blocks.0" in n or "layers.0" in n),
        key=lambda named: named[1].numel(),
    )
    # A parameter of its own: the object may share its weights with the model.
    owner, _, leaf = name.rpartition(".")
    setattr(lens.get_submodule(owner), leaf, torch.nn.Parameter(last.detach() * 1.03))
    return lens


def test_a_bridge_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three percent on one matrix suffice, unless the check is switched off."""
    boot = TransformerBridge.boot_transformers
    monkeypatch.setattr(
        TransformerBridge, "boot_transformers", lambda *a, **options: spoil(boot(*a, **options))
    )
    with pytest.raises(ModelLoadError, match="full pass are off by") as error:
        load_model(tiny_hf("llama"), tiny_tokenizer(), backend="bridge")
    assert_refused(error, "model")
    unchecked = load_model(tiny_hf("llama"), tiny_tokenizer(), backend="bridge", check=False)
    assert unchecked.decoder.name == "bridge"


@needs_hooked
def test_where_the_copy_is_off_the_bridge_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="auto"` falls back to the bridge; a request for the copy is refused."""
    from transformer_lens import HookedTransformer

    load = HookedTransformer.load_state_dict
    monkeypatch.setattr(
        HookedTransformer,
        "load_state_dict",
        lambda lens, *a, **o: (load(lens, *a, **o), spoil(lens)),
    )
    assert load_model(tiny_hf("gpt2"), tiny_tokenizer()).decoder.name == "bridge"
    with pytest.raises(ModelLoadError, match="off by") as error:
        load_model(tiny_hf("gpt2"), tiny_tokenizer(), backend="hooked")
    assert_refused(error, "backend")


def test_a_cache_that_forgets_is_refused(tiny: Tiny, monkeypatch: Any) -> None:
    """Whole passes may be right where the cached prompt is lost."""
    decoder = type(tiny("llama", "bridge").decoder)
    prefill = decoder.prefill

    def forgetful(self: Any, tokens: Any) -> Any:
        return tuple((k, torch.zeros_like(v)) for k, v in prefill(self, tokens))

    monkeypatch.setattr(decoder, "prefill", forgetful)
    with pytest.raises(ModelLoadError, match="after a cached prompt are off by") as error:
        load_model(tiny_hf("llama"), tiny_tokenizer(), backend="bridge")
    assert_refused(error, "model")


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        pytest.param("MambaConfig", {**COMMON, "state_size": 8}, id="state-space"),
        pytest.param(
            "Lfm2Config", {**COMMON, "layer_types": ["conv", "full_attention", "conv"]}, id="hybrid"
        ),
        pytest.param("PersimmonConfig", COMMON, id="unknown"),
        pytest.param(
            "FalconConfig",
            {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True},
            id="unknown-size",
        ),
        pytest.param("BertConfig", COMMON, id="bidirectional"),
    ],
)
def test_what_cannot_be_held_is_refused(config: str, settings: dict[str, Any]) -> None:
    """States, unknown parts and looks ahead are named in one short message."""
    hf = made(config, **settings)
    with pytest.raises(ModelLoadError, match=type(hf).__name__) as error:
        load_model(hf, tiny_tokenizer())
    assert_refused(error, "model")


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        pytest.param("CohereConfig", COMMON, id="pairs-are-rotated"),
        pytest.param("Cohere2Config", {**COMMON, "sliding_window": 6}, id="pairs-on-some-layers"),
        pytest.param("MptConfig", MPT, id="alibi"),
        pytest.param("FalconConfig", {**FALCON, "alibi": True}, id="alibi-of-falcon"),
        pytest.param("BloomConfig", {**MPT, "n_layer": 3, "n_head": 4}, id="alibi-of-bloom"),
        pytest.param(
            "Gemma3TextConfig", {**COMMON, "head_dim": 8, "sliding_window": 6}, id="window"
        ),
        pytest.param("GraniteConfig", {**COMMON, "residual_multiplier": 0.2}, id="factors"),
    ],
)
def test_unusual_models_are_right_behind_a_cached_prompt(
    config: str, settings: dict[str, Any]
) -> None:
    """What stands in the cache counts as it does in Hugging Face, which keeps none here."""
    hf = made(config, **settings)
    tokens = torch.randint(2, SIZE, (3, 20), generator=torch.Generator().manual_seed(1))
    tokens[:, :9] = tokens[0, :9]
    with torch.no_grad():
        expected = copy.deepcopy(hf)(input_ids=tokens, use_cache=False).logits
        decoder = load_model(hf, tiny_tokenizer(), backend="bridge").decoder
        cache = decoder.expand(decoder.prefill(tokens[:1, :9]), 3, 11)
        for begin, end in ((9, 18), (18, 19), (19, 20)):
            got = decoder.step(tokens[:, begin:end], cache)
            torch.testing.assert_close(got, expected[:, end - 1], atol=2e-3, rtol=1e-3)


def test_a_post_norm_model_offers_only_what_is_there() -> None:
    """Where a norm stands behind the sum, nothing is the stream before the MLP."""
    model = load_model(made("OPTConfig", **OPT), tiny_tokenizer(), backend="bridge")
    assert model.kinds == ("resid_pre", "resid_post")
    with pytest.raises(UnavailableKindError, match="norm") as error:
        capture(model, "Red Hot", kinds="resid_mid")
    assert "parallel" not in str(error.value)
    with pytest.raises(ValueError, match="^model:"):
        model.decoder.unembed(torch.zeros(1, model.d_model))


def test_every_kind_that_is_missing_has_its_reason(tiny: Tiny) -> None:
    """A parallel block says so; a sequential one misses nothing."""
    assert set(tiny("neox", "bridge").absent) == {"resid_mid"}
    assert "parallel" in tiny("neox", "bridge").absent["resid_mid"]
    assert not tiny("llama", "bridge").absent


def hooked(**settings: Any) -> Any:
    """Return a small `HookedTransformer` that somebody made by hand."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=8, d_vocab=SIZE, act_fn="gelu", seed=0,
        device="cpu", **settings,
    )  # fmt: skip
    lens = HookedTransformer(cfg)
    with torch.no_grad():
        for parameter in lens.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return lens


@needs_hooked
def test_a_model_without_mlp_offers_none() -> None:
    """What is missing is missing for want of an MLP, not because it runs beside attention."""
    model = load_model(hooked(attn_only=True), tiny_tokenizer())
    assert model.kinds == ("resid_pre", "attn_out", "resid_post")
    for kind in ("mlp_out", "resid_mid"):
        with pytest.raises(UnavailableKindError, match="no MLP") as error:
            capture(model, "Red Hot", kinds=kind)
        assert "parallel" not in str(error.value)


@needs_hooked
def test_an_object_whose_tokens_look_ahead_is_refused() -> None:
    """A cached prompt cannot know what comes behind it."""
    lens = hooked(attention_dir="bidirectional")
    with pytest.raises(ModelLoadError, match="cached prompt") as error:
        load_model(lens, tiny_tokenizer())
    assert_refused(error, "model")
    assert load_model(lens, tiny_tokenizer(), check=False).tl is lens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_noise_of_half_precision_is_let_pass(
    architecture: str, dtype: torch.dtype, backend: Any
) -> None:
    """A model that is right stays right in fewer bits."""
    hf = tiny_hf(architecture).to(dtype)
    assert load_model(hf, tiny_tokenizer(), backend=backend).dtype == dtype


def test_numbers_that_are_not_finite_are_refused() -> None:
    """A model that has overflowed says nothing, in any library."""
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ModelLoadError, match="not finite") as error:
        load_model(hf, tiny_tokenizer(), backend="bridge")
    assert_refused(error, "model")


@given(st.floats(-1e3, 1e3), st.floats(1e-4, 0.5), st.integers(2, 50), st.integers(0, 2**31 - 1))
def test_distance_is_the_share_of_the_spread(
    shift: float, share: float, vocabulary: int, seed: int
) -> None:
    """A common shift changes no probability and counts nothing; a factor counts as it is."""
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)).double()
    assert distance(logits, logits + shift) < 1e-6
    assert distance(logits, logits * (1 + share) + shift) == pytest.approx(share, abs=1e-6)


def test_ruled_out_tokens_do_not_hide_a_difference() -> None:
    """Some models give tokens the lowest number there is; its size must not count."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = torch.finfo(torch.float32).min
    other = logits.clone()
    other[:, :3] *= 1.5
    assert distance(logits, logits) == 0
    assert distance(logits, other) > 0.05


def test_the_tolerance_is_tighter_in_float32() -> None:
    """What a wrong rotation costs, two percent, is never noise there."""
    assert tolerance(torch.float32) < 0.01 < tolerance(torch.bfloat16)


class Wrapper(torch.nn.Module):
    """Another library's object around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generate = model, model.config, model.generate


def merged_by_peft(hf: Any) -> Any:
    """Return what a class of peft looks like from outside."""
    return type("PeftModelForCausalLM", (Wrapper,), {"__module__": "peft.peft_model"})(hf)


def on_meta() -> Any:
    """Return a model whose weights were never loaded."""
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


def t5() -> Any:
    """Return a model with an encoder."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "word"),
    [
        pytest.param(lambda: Wrapper(tiny_hf("llama")), "model.model", id="wrapper"),
        pytest.param(
            lambda: torch.compile(tiny_hf("llama"), backend="eager"), "_orig_mod", id="compiled"
        ),
        pytest.param(lambda: merged_by_peft(tiny_hf("llama")), "merge_and_unload", id="peft"),
        pytest.param(lambda: tiny_hf("llama").model, "LlamaModel", id="headless"),
        pytest.param(t5, "encoder", id="encoder-decoder"),
        pytest.param(on_meta, "meta", id="meta"),
        pytest.param(
            lambda: transformers.BertForMaskedLM(transformers.BertConfig(**COMMON)),
            "BertForMaskedLM",
            id="masked",
        ),
    ],
)
def test_what_is_no_whole_causal_model_is_named(make: Callable[[], Any], word: str) -> None:
    """The message says what came, and how to reach the model in it where there is one."""
    with pytest.raises(ModelLoadError, match=word) as error:
        load_model(make(), tiny_tokenizer(), backend="bridge")
    assert_refused(error, "model")


def test_a_folder_with_an_encoder_is_refused_in_few_words(tmp_path: Path) -> None:
    """The list of all architectures of a library helps nobody."""
    t5().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="causal") as error:
        load_model(tmp_path)
    assert_refused(error, "model")


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    """A few low-rank matrices are no model."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="merge_and_unload") as error:
        load_model(tmp_path)
    assert_refused(error, "model")


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("torch_dtype", torch.bfloat16, "dtype="),
        ("load_in_8bit", True, "quantization_config"),
        ("load_in_4bit", True, "quantization_config"),
    ],
)
def test_options_of_older_releases_are_not_ignored(option: str, value: Any, word: str) -> None:
    """Each is answered with what has taken its place."""
    with pytest.raises(ValueError, match=word) as error:
        load_model("smollm2", backend="bridge", **{option: value})
    assert_refused(error, option)


@pytest.mark.parametrize("config", ["Olmo2Config", "GraniteConfig"])
def test_a_model_made_in_memory_needs_no_list_of_architectures(config: str) -> None:
    """`save_pretrained` writes it; a model that was never saved has none."""
    hf = made(config, **COMMON)
    assert hf.config.architectures is None
    assert load_model(hf, tiny_tokenizer(), backend="bridge").n_layers == 3
