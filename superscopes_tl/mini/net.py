"""The training-time twin of a Hugging Face Llama, written for one CPU core.

1. Weights of all blocks are stacked, one tensor per role, so that the optimiser can treat the
   blocks together.
2. The residual stream is float32; matrix products run in bfloat16 where the processor has
   instructions for it (elsewhere it would be emulated, twenty times slower), else in float32.
3. Attention takes any additive mask (training hides a name's first tokens from its description)
   and is written as two matrix products: the fused kernel's backward pass is much slower
   on a CPU when it is given a mask.
4. At chosen (row, position, block) places the block output can be replaced by a given vector,
   or noise added to it.
5. `hf_state_dict` unstacks the weights under the names of `LlamaForCausalLM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

_HAS = torch.cpu.get_capabilities()
COMPUTE = torch.bfloat16 if _HAS.get("avx512_bf16") or _HAS.get("amx_bf16") else torch.float32
"""The number type of matrix products."""


@dataclass(frozen=True)
class NetConfig:
    """Shape of the model, in the terms of `LlamaConfig`."""

    vocab_size: int = 1280
    d_model: int = 192
    n_layers: int = 10
    n_heads: int = 6
    n_kv_heads: int = 6
    d_mlp: int = 704
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
            "num_key_value_heads": self.n_kv_heads,
            "max_position_embeddings": self.n_ctx,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class Writes:
    """Vectors for block outputs: number i belongs to one row, position and block.

    Attributes:
        rows: `[n]` row in the batch.
        positions: `[n]` token position.
        layers: One block number per vector.
        vectors: `[n d_model]` what to write there.
    """

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    layers: Sequence[int]
    vectors: Float[Tensor, "n d_model"]

    def at(self, layer: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the places (rows and positions) and vectors of one block."""
        chosen = torch.tensor([number == layer for number in self.layers])
        return (self.rows[chosen], self.positions[chosen]), self.vectors[chosen]


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
        head = d // config.n_heads
        self.query = matrix(layers, d, d)
        self.key_value = matrix(layers, 2, head * config.n_kv_heads, d)
        self.out = nn.Parameter(torch.zeros(layers, d, d))
        self.gate_up = matrix(layers, 2, f, d)
        self.down = nn.Parameter(torch.zeros(layers, d, f))
        self.norm_attn = nn.Parameter(torch.ones(layers, d))
        self.norm_mlp = nn.Parameter(torch.ones(layers, d))
        self.norm_final = nn.Parameter(torch.ones(d))
        freq = config.rope_theta ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        angle = torch.outer(torch.arange(config.n_ctx, dtype=torch.float32), freq).repeat(1, 2)
        self.register_buffer("cos", angle.cos().to(COMPUTE), persistent=False)
        self.register_buffer("sin", angle.sin().to(COMPUTE), persistent=False)

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        allowed: Bool[Tensor, "#batch seq seq"],
        patches: Writes | None = None,
        noise: Writes | None = None,
        every_layer: bool = False,
    ) -> Float[Tensor, "layer batch seq d_model"]:
        """Run the blocks.

        Args:
            ids: Tokens.
            allowed: Which key each query may see.
            patches: Block outputs to replace.
            noise: What to add to block outputs, as multiples of their norm.
            every_layer: Return the output of every block, not of the last one alone.

        Returns:
            Block outputs; the first axis has length 1 unless `every_layer`.
        """
        mask = torch.zeros(allowed.shape, dtype=COMPUTE).masked_fill(~allowed, -1e9)
        x = embedding(ids, self.embed)
        outputs = []
        for layer in range(self.config.n_layers):
            x = x + self._attention(x, mask[:, None, None], layer)
            x = x + self._mlp(x, layer)
            if patches is not None and layer in patches.layers:
                places, vectors = patches.at(layer)
                x = x.index_put(places, vectors)
            if noise is not None and layer in noise.layers:
                places, vectors = noise.at(layer)
                norms = x[places].detach().norm(dim=-1, keepdim=True)
                x = x.index_put(places, norms * vectors, accumulate=True)
            if every_layer:
                outputs.append(x)
        return torch.stack(outputs) if every_layer else x.unsqueeze(0)

    def logits(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Unembed the last block's output."""
        scores: Tensor = self._norm(x, self.norm_final) @ self.embed.to(COMPUTE).T
        return scores.float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scale: Tensor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps)
        return (x * scale * weight).to(COMPUTE)

    def _rotate(self, x: Tensor) -> Tensor:
        seq = x.shape[-2]
        first, second = x.chunk(2, -1)
        return x * self.cos[:seq] + torch.cat((-second, first), -1) * self.sin[:seq]

    def _attention(self, x: Tensor, mask: Tensor, layer: int) -> Tensor:
        batch, seq, d = x.shape
        heads, groups = self.config.n_heads, self.config.n_kv_heads
        normed = self._norm(x, self.norm_attn[layer])
        # Heads that share a key and value lie side by side, as in Hugging Face's Llama.
        q = (normed @ self.query[layer].to(COMPUTE).T).view(batch, seq, groups, heads // groups, -1)
        kv = normed @ self.key_value[layer].flatten(0, 1).to(COMPUTE).T
        k, v = kv.view(batch, seq, 2, groups, -1).permute(2, 0, 3, 1, 4)
        q = self._rotate(q.permute(0, 2, 3, 1, 4)).flatten(2, 3)
        scores = (q @ self._rotate(k).mT).view(batch, groups, -1, seq, seq)
        pattern = torch.softmax(scores * (d // heads) ** -0.5 + mask, -1)
        mixed: Tensor = (pattern.flatten(2, 3) @ v).view(batch, groups, heads // groups, seq, -1)
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(batch, seq, d)
        return mixed @ self.out[layer].to(COMPUTE).T

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        weight = self.gate_up[layer].flatten(0, 1).to(COMPUTE)
        gate, up = (self._norm(x, self.norm_mlp[layer]) @ weight.T).chunk(2, -1)
        written: Tensor = (silu(gate) * up) @ self.down[layer].to(COMPUTE).T
        return written

    def hf_state_dict(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Return the weights under Hugging Face's names."""
        state: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed,
            "model.norm.weight": self.norm_final,
        }
        for layer in range(self.config.n_layers):
            block = f"model.layers.{layer}."
            state[f"{block}self_attn.q_proj.weight"] = self.query[layer]
            for name, weight in zip("kv", self.key_value[layer], strict=True):
                state[f"{block}self_attn.{name}_proj.weight"] = weight
            state[f"{block}self_attn.o_proj.weight"] = self.out[layer]
            state[f"{block}mlp.gate_proj.weight"] = self.gate_up[layer, 0]
            state[f"{block}mlp.up_proj.weight"] = self.gate_up[layer, 1]
            state[f"{block}mlp.down_proj.weight"] = self.down[layer]
            state[f"{block}input_layernorm.weight"] = self.norm_attn[layer]
            state[f"{block}post_attention_layernorm.weight"] = self.norm_mlp[layer]
        return {name: tensor.detach().to(dtype).clone() for name, tensor in state.items()}
