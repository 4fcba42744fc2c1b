"""Write a trained model as a folder that `AutoModelForCausalLM.from_pretrained` loads."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from superscopes_tl.mini.corpus import BOS, EOS, PAD, special_id
from superscopes_tl.mini.net import Llama


def write_model(folder: Path, model: Llama, tokenizer: Tokenizer, max_new_tokens: int) -> None:
    """Write weights (float16), configuration, tokenizer and generation defaults.

    Args:
        folder: Where to write; it must exist.
        model: The trained model.
        tokenizer: Its tokenizer.
        max_new_tokens: What the longest description needs.
    """
    bos, eos, pad = (special_id(tokenizer, token) for token in (BOS, EOS, PAD))
    config = LlamaConfig(
        **model.config.to_hf(), bos_token_id=bos, eos_token_id=eos, pad_token_id=pad
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float16
    config.save_pretrained(folder)
    save_file(model.hf_state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model.config.n_ctx,
    ).save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    ).save_pretrained(folder)
