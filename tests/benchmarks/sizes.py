"""The models of the benchmark: three sizes with random weights, or a real one.

1. A `Size` builds one Hugging Face model. Its weights come from a fixed seed, and are larger than a
   fresh model's, so that patches change what is written.
2. It has no end of text: each of its cells takes the same work.
3. `pretrained` loads a real model with its tokenizer; its texts may end early.
4. `over_the_same_weights` gives every way that wraps a model a module of its own. The weights are
   in memory once, and no way runs through another one's hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from superscopes_tl import DESCRIPTION_PROMPT, PAPER_PROMPTS
from superscopes_tl.errors import bad_value
from superscopes_tl.weights import load_pretrained, quiet

VOCABULARY = 1280


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


def _small_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=704,
        num_hidden_layers=10,
        num_attention_heads=6,
        max_position_embeddings=256,
    )


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
    "small": Size(
        "a Llama of 6 million parameters, random weights",
        lambda dtype: with_random_weights(_small_llama(), dtype),
        128,
        6,
    ),
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
            "size", expected=f"one of {', '.join(SIZES)}", got=name, fix="start with small"
        )
    return SIZES[name]


SMALL_WEIGHTS = 5 * 10**8
"""A real model with at most so many weights takes as many cells as GPT-2."""


def pretrained(model: str, dtype: torch.dtype, device: torch.device) -> tuple[Size, Any, Any]:
    """Return a real model as a size, the Hugging Face model itself, and its tokenizer.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    with quiet():
        # As it is used without the package: with the attention that transformers chooses.
        found = load_pretrained(model, None, dtype, device, {"attn_implementation": None})
    weights = sum(p.numel() for p in found.model.parameters())
    like = SIZES["gpt2" if weights <= SMALL_WEIGHTS else "1b"]
    title = f"{found.name} ({weights / 1e6:.0f} million parameters)"
    return (
        Size(title, lambda dtype: found.model, like.cells, like.slow),
        found.model,
        (found.tokenizer),
    )


@cache
def tokenizer() -> Any:
    """Return a tokenizer to which most words of the prompts are one token, as to a real model's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([DESCRIPTION_PROMPT.text, *PAPER_PROMPTS] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def over_the_same_weights(hf: Any) -> Any:
    """Return a second module with the same parameters, whose modules can be changed."""
    shared = {id(tensor): tensor for tensor in [*hf.parameters(), *hf.buffers()]}
    return copy.deepcopy(hf, shared)


def weight_bytes(hf: Any) -> int:
    """Return how much memory a copy of the weights takes."""
    return sum(p.numel() * p.element_size() for p in hf.parameters())
