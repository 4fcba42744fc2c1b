"""The models of the benchmark: the bundled one, and two of larger sizes with random weights.

1. A `Size` builds one Hugging Face model. Random weights come from a fixed seed, and larger
   than a fresh model's, so that patches change what is written.
2. A model with random weights has no end of text: each of its cells takes the same work.
3. `over_the_same_weights` gives every way that wraps a model a module of its own. The weights are
   in memory once, and no way runs through another one's hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from superscopes_tl.errors import bad_value
from superscopes_tl.mini import MODEL_DIR
from superscopes_tl.weights import quiet


@dataclass(frozen=True)
class Size:
    """A model and how many of its cells are computed per round.

    Attributes:
        title: what the model is.
        build: makes the Hugging Face model of a number type.
        cells: per round, of the ways that compute them in batches.
        slow: per round, of the ways that compute them one by one.
    """

    title: str
    build: Callable[[torch.dtype], Any]
    cells: int
    slow: int


def bundled(dtype: torch.dtype) -> Any:
    """Return the bundled model, with its own longest text and end of text."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype).eval()


def with_random_weights(config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a model of a shape, with weights from a seed and no end of text."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(2.0)  # a fresh model writes almost the same whatever is patched
    hf.generation_config.eos_token_id = None
    return hf


def _llama_1b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )


SIZES = {
    "mini": Size("the bundled model", bundled, 128, 6),
    "gpt2": Size(
        "GPT-2 small, random weights",
        lambda dtype: with_random_weights(GPT2Config(), dtype),
        128,
        4,
    ),
    "1b": Size(
        "a 1B Llama, random weights", lambda dtype: with_random_weights(_llama_1b(), dtype), 64, 1
    ),
}


def size_of(name: str) -> Size:
    """Return the size of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in SIZES:
        raise bad_value(
            "size", expected=f"one of {', '.join(SIZES)}", got=name, fix="start with mini"
        )
    return SIZES[name]


def tokenizer() -> Any:
    """Return the bundled model's tokenizer, which models with random weights are given too."""
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def over_the_same_weights(hf: Any) -> Any:
    """Return a second module with the same parameters, whose modules can be changed."""
    shared = {id(tensor): tensor for tensor in [*hf.parameters(), *hf.buffers()]}
    return copy.deepcopy(hf, shared)


def weight_bytes(hf: Any) -> int:
    """Return how much memory a copy of the weights takes."""
    return sum(p.numel() * p.element_size() for p in hf.parameters())
