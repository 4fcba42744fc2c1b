"""Put right on a `TransformerBridge` what TransformerLens 3.9 gets wrong and 4 has mended.

1. Cohere rotates neighbouring pairs of a head's numbers, the bridge its two halves. It can rotate
   pairs, if it is told to and gets the angles in the order that it expects.
2. Attention with linear biases (ALiBi: MPT, some Falcon) computes keys and values and does not put
   them into the cache.

Nothing is done to a bridge that does both by itself. Whether a model is right in the end is not
taken on trust: `verification` runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def repair_bridge(lens: Any) -> None:
    """Mend a `TransformerBridge` in place, where it needs that."""
    _rotate_pairs(lens)
    for block in lens.blocks:
        attention = getattr(block, "attn", None)
        if attention is not None and _forgets(attention):
            _keep_past(attention)


def _rotate_pairs(lens: Any) -> None:
    if not type(lens.original_model).__name__.startswith("Cohere"):
        return
    if hasattr(lens.cfg, "rotary_interleaved_cos_sin"):  # TransformerLens 4
        return

    def in_halves(module: Any, inputs: Any, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn the angles 0 0 1 1 2 2 ... of Cohere into 0 1 2 ... 0 1 2 ..."""
        return tuple(torch.cat([x[..., ::2], x[..., ::2]], dim=-1) for x in angles)

    lens.rotary_emb.register_forward_hook(in_halves)
    for block in lens.blocks:
        block.attn.config.rotary_adjacent_pairs = True


def _forgets(attention: Any) -> bool:
    """Tell whether an ALiBi attention leaves the cache alone."""
    names = [cls.__name__ for cls in type(attention).__mro__]
    if "ALiBiJointQKVAttentionBridge" not in names:
        return False
    return "_update_kv_cache" not in type(attention)._reconstruct_attention.__code__.co_names


def _keep_past(attention: Any) -> None:
    """Put keys and values into the cache as soon as they stand in heads."""
    attend, in_heads = attention._reconstruct_attention, attention._reshape_qkv_to_heads

    def attend_to_past(*args: Any, **kwargs: Any) -> Any:
        def with_past(*given: Any) -> Any:
            queries, keys, values, *sizes = in_heads(*given)
            keys, values = attention._update_kv_cache(keys, values, **kwargs)
            return queries, keys, values, *sizes

        attention._reshape_qkv_to_heads = with_past
        try:
            return attend(*args, **kwargs)
        finally:
            attention._reshape_qkv_to_heads = in_heads

    attention._reconstruct_attention = attend_to_past
