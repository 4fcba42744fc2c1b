"""Random-weight models of seven architectures, small enough to run every cell one by one.

Nothing here uses the package: the models and the tokenizer are plain Hugging Face objects.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2", "qwen3", "gemma2", "mistral")
N_LAYERS = 6
D_MODEL = 32


@cache
def tiny_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer that puts `<s>` (id 0) in front; `</s>` is id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["Red Hot Chili Peppers: American rock band, Syria: Country in the Middle East, x"] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def tiny_hf(architecture: str, seed: int = 0) -> Any:
    """Return a random-weight Hugging Face model with 6 layers of width 32."""
    return random_hf(architecture, seed)


_SHARPER = {"embed": 10.0, "q_proj": 4.0, "o_proj": 2.0, "down_proj": 2.0, "lm_head": 8.0}


def sharp_llama() -> Any:
    """Return a random-weight Llama whose texts depend on the name in the prompt by several nats.

    So its own words are defined, as those of a trained model are; block outputs of late layers
    recover nearly all of them.
    """
    hf = tiny_hf("llama")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            for part, factor in _SHARPER.items():
                if part in name:
                    parameter.mul_(factor)
    return hf


def random_hf(
    architecture: str,
    seed: int = 0,
    *,
    n_layers: int = N_LAYERS,
    width: int = D_MODEL,
    heads: int = 4,
) -> Any:
    """Return a random-weight Hugging Face model of any size."""
    per_head = width // heads
    vocabulary = len(tiny_tokenizer())
    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    llama = {
        **shared,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
    }
    gpt2 = {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": n_layers,
        "n_head": heads,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    neox = {**llama, "intermediate_size": 4 * width}
    del neox["num_key_value_heads"]
    config = {
        "llama": lambda: transformers.LlamaConfig(**llama),
        "gpt2": lambda: transformers.GPT2Config(**gpt2),
        "neox": lambda: transformers.GPTNeoXConfig(**neox),
        "qwen2": lambda: transformers.Qwen2Config(**llama),
        "qwen3": lambda: transformers.Qwen3Config(**llama, head_dim=per_head),
        "gemma2": lambda: transformers.Gemma2Config(
            **llama,
            head_dim=per_head,
            pad_token_id=0,
            query_pre_attn_scalar=per_head,
            sliding_window=16,
        ),
        "mistral": lambda: transformers.MistralConfig(**llama, sliding_window=12),
    }[architecture]()
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Fresh models write almost the same token everywhere; larger weights make texts differ.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" in name or "wte" in name else 3.0)
    return model


def hooked_gemma2(hf: Any) -> Any:
    """Return a `HookedTransformer` of a Gemma-2 model, whose loader knows only hub names."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    c = hf.config
    cfg = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=c.max_position_embeddings,
        eps=c.rms_norm_eps,
        d_vocab=c.vocab_size,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        rotary_base=10000,
        positional_embedding_type="rotary",
        use_attn_scale=True,
        attn_scale=c.query_pre_attn_scalar**0.5,
        window_size=c.sliding_window,
        use_local_attn=True,
        attn_types=["local", "global"] * (c.num_hidden_layers // 2),
        attn_scores_soft_cap=c.attn_logit_softcapping,
        output_logits_soft_cap=c.final_logit_softcapping,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        original_architecture="Gemma2ForCausalLM",
        default_prepend_bos=True,
        init_weights=False,
        device="cpu",
        dtype=torch.float32,
    )
    lens = HookedTransformer(cfg, move_to_device=False)
    lens.load_and_process_state_dict(
        convert_gemma_weights(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens.eval()
