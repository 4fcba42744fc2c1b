"""A random-weight Llama as a GGUF file, written with the package `gguf` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tiny_models import tiny_hf, tiny_tokenizer

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_tiny_gguf(
    path: Path, *, architecture: str = "llama", quantization: str = "ALL_F32"
) -> Any:
    """Write `tiny_hf("llama")` to `path`, and return the model whose numbers these are.

    Args:
        path: the file.
        architecture: what the file says that it is.
        quantization: F32, or Q8_0, which the weights are then stored in.
    """
    import gguf

    hf, config = tiny_hf("llama"), tiny_hf("llama").config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[quantization])
    _add_tokenizer(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in hf.state_dict().items():
        stored = value.float().numpy()
        for part, count in heads.items():
            stored = _interleaved(stored, count) if part in name else stored
        _add(writer, _gguf_name(name), np.ascontiguousarray(stored), quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


def _add(writer: Any, name: str, stored: Any, quantization: str) -> None:
    import gguf

    if quantization == "ALL_F32" or stored.ndim == 1:
        writer.add_tensor(name, stored)
        return
    kind = gguf.GGMLQuantizationType[quantization.removeprefix("MOSTLY_")]
    writer.add_tensor(name, gguf.quants.quantize(stored, kind), raw_dtype=kind)


def _add_tokenizer(writer: Any) -> None:
    tokenizer = tiny_tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_BLOCK[rest.removesuffix('.weight')]}.weight"


def _interleaved(weight: Any, heads: int) -> Any:
    """Order the rows of a rotated projection as llama.cpp does: pairs side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
