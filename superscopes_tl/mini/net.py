"""The training-time twin of a Hugging Face Llama, written for one CPU core.

1. Weights of all blocks are stacked, one tensor per role, so that the optimiser can treat the
   blocks together.
2. The residual stream is float32; matrix products run in bfloat16.
3. Attention takes any additive mask (training hides a name's first tokens from its description)
   and is written as two matrix products: the fused kernel's backward pass is much slower
   on a CPU when it is given a mask.
4. At chosen (row, position, block) places the block output can be replaced by a given vector.
5. `hf_state_dict` unstacks the weights under the names of `LlamaForCausalLM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, silu


@dataclass(frozen=True)
class NetConfig:
    """Shape of the model, in the terms of `LlamaConfig`."""

    vocab_size: int = 1280
    d_model: int = 160
    n_layers: int = 10
    n_heads: int = 5
    d_mlp: int = 640
    n_ctx: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def to_hf(self) -> dict[str, object]:
        """Return the keyword arguments of the equivalent `LlamaConfig`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "max_position_embeddings": self.n_ctx,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class Patches:
    """Block outputs to replace: patch i writes `vectors[i]` at one place.

    Attributes:
        rows: `[n]` row in the batch.
        positions: `[n]` token position.
        layers: One block number per patch.
        vectors: `[n d_model]` what the block output becomes.
    """

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    layers: Sequence[int]
    vectors: Float[Tensor, "n d_model"]


def causal_mask(length: int) -> Bool[Tensor, "length length"]:
    """Return which key (column) each query (row) may see."""
    return torch.tril(torch.ones(length, length, dtype=torch.bool))


class Llama(nn.Module):
    """A Llama whose state can be trained here and loaded by `LlamaForCausalLM`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: NetConfig) -> None:
        """Draw the weights from the global generator."""
        super().__init__()
        self.config = config
        layers, d, f = config.n_layers, config.d_model, config.d_mlp

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * 0.02)

        self.embed = matrix(config.vocab_size, d)
        self.qkv = matrix(layers, 3, d, d)
        self.out = nn.Parameter(torch.zeros(layers, d, d))
        self.gate_up = matrix(layers, 2, f, d)
        self.down = nn.Parameter(torch.zeros(layers, d, f))
        self.norm_attn = nn.Parameter(torch.ones(layers, d))
        self.norm_mlp = nn.Parameter(torch.ones(layers, d))
        self.norm_final = nn.Parameter(torch.ones(d))
        head = d // config.n_heads
        freq = config.rope_theta ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        angle = torch.outer(torch.arange(config.n_ctx, dtype=torch.float32), freq).repeat(1, 2)
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        allowed: Bool[Tensor, "#batch seq seq"],
        patches: Patches | None = None,
        keep: Float[Tensor, "layer 2 batch"] | None = None,
    ) -> Float[Tensor, "layer batch seq d_model"]:
        """Run the blocks.

        Args:
            ids: Tokens.
            allowed: Which key each query may see.
            patches: Block outputs to replace.
            keep: Factors of each attention and MLP output (stochastic depth); None for all 1.

        Returns:
            The output of every block, or of the last one only when gradients are on.
        """
        mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -1e9)
        x = embedding(ids, self.embed)
        outputs = []
        for layer in range(self.config.n_layers):
            attention = self._attention(x, mask.unsqueeze(1), layer)
            x = x + (attention if keep is None else attention * keep[layer, 0, :, None, None])
            mlp = self._mlp(x, layer)
            x = x + (mlp if keep is None else mlp * keep[layer, 1, :, None, None])
            if patches is not None and layer in patches.layers:
                chosen = torch.tensor([at == layer for at in patches.layers])
                where = (patches.rows[chosen], patches.positions[chosen])
                x = x.index_put(where, patches.vectors[chosen])
            outputs.append(x)
        return torch.stack(outputs) if not torch.is_grad_enabled() else x.unsqueeze(0)

    def logits(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Unembed the last block's output."""
        scores: Tensor = self._norm(x, self.norm_final) @ self.embed.bfloat16().T
        return scores.float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scale: Tensor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps)
        return (x * scale * weight).bfloat16()

    def _rotate(self, x: Tensor) -> Tensor:
        seq = x.shape[-2]
        first, second = x.chunk(2, -1)
        return x * self.cos[:seq] + torch.cat((-second, first), -1) * self.sin[:seq]

    def _attention(self, x: Tensor, mask: Tensor, layer: int) -> Tensor:
        batch, seq, d = x.shape
        heads = self.config.n_heads
        weight = self.qkv[layer].flatten(0, 1).bfloat16()
        qkv = (self._norm(x, self.norm_attn[layer]) @ weight.T).view(batch, seq, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = self._rotate(q) @ self._rotate(k).transpose(-1, -2)
        pattern = torch.softmax(scores * (d // heads) ** -0.5 + mask, -1)
        mixed: Tensor = (pattern @ v).transpose(1, 2).reshape(batch, seq, d)
        return mixed @ self.out[layer].bfloat16().T

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        weight = self.gate_up[layer].flatten(0, 1).bfloat16()
        gate, up = (self._norm(x, self.norm_mlp[layer]) @ weight.T).chunk(2, -1)
        written: Tensor = (silu(gate) * up) @ self.down[layer].bfloat16().T
        return written

    def hf_state_dict(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Return the weights under Hugging Face's names."""
        state: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed,
            "model.norm.weight": self.norm_final,
        }
        for layer in range(self.config.n_layers):
            block = f"model.layers.{layer}."
            for name, weight in zip("qkv", self.qkv[layer], strict=True):
                state[f"{block}self_attn.{name}_proj.weight"] = weight
            state[f"{block}self_attn.o_proj.weight"] = self.out[layer]
            state[f"{block}mlp.gate_proj.weight"] = self.gate_up[layer, 0]
            state[f"{block}mlp.up_proj.weight"] = self.gate_up[layer, 1]
            state[f"{block}mlp.down_proj.weight"] = self.down[layer]
            state[f"{block}input_layernorm.weight"] = self.norm_attn[layer]
            state[f"{block}post_attention_layernorm.weight"] = self.norm_mlp[layer]
        return {name: tensor.detach().to(dtype).clone() for name, tensor in state.items()}
