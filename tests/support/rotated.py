"""A Llama with its residual stream rotated: another model that computes the same function.

1. Fold the gain of every RMSNorm into the weights that read behind it. A norm without gains
   divides by a length, which no rotation changes: norm(R·h) = R·norm(h).
2. What writes into the stream is multiplied by R from the left, what reads from it by Rᵀ from the
   right. Every stream is then R·h, and the logits stay the same.

So a vector means nothing to the rotated model as it is, and everything after the one linear map R.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def random_rotation(width: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(square).Q
    return rotation


def rotated_llama(hf: Any, rotation: Tensor) -> Any:
    """Return a copy of a Hugging Face Llama whose residual stream is R·h instead of h."""
    twin = copy.deepcopy(hf)
    twin.config.tie_word_embeddings = False
    twin.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
    body = twin.model

    def read(linear: Any, gain: Tensor) -> None:
        weight = linear.weight.double() * gain.double() @ rotation.T
        linear.weight.copy_(weight)

    def write(linear: Any) -> None:
        linear.weight.copy_(rotation @ linear.weight.double())

    with torch.no_grad():
        body.embed_tokens.weight.copy_(body.embed_tokens.weight.double() @ rotation.T)
        for block in body.layers:
            attention, mlp = block.self_attn, block.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                read(linear, block.input_layernorm.weight)
            for linear in (mlp.gate_proj, mlp.up_proj):
                read(linear, block.post_attention_layernorm.weight)
            for linear in (attention.o_proj, mlp.down_proj):
                write(linear)
            block.input_layernorm.weight.fill_(1)
            block.post_attention_layernorm.weight.fill_(1)
        read(twin.lm_head, body.norm.weight)
        body.norm.weight.fill_(1)
    return twin
