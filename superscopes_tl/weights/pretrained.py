"""Load a pretrained Hugging Face model by name or path.

1. A packaged name is a fetched folder (`packaged`); a GGUF file is located and checked (`gguf`);
   anything else is a directory or a hub name.
2. transformers loads tokenizer and weights. A parameter that the checkpoint lacks is an error:
   transformers would initialise it at random.
3. `check_hugging_face`: a decoder-only causal language model with its weights in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superscopes_tl.errors import bad_model, brief
from superscopes_tl.weights.gguf import forget_quantization, locate_gguf
from superscopes_tl.weights.packaged import PACKAGED, fetched, recorded_provenance

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    "sentencepiece.bpe.model",
)
_TOKENIZER_OPTIONS = (
    *("revision", "cache_dir", "token", "trust_remote_code", "subfolder"),
    *("local_files_only", "force_download"),
)


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face model in evaluation mode, with its tokenizer and display name.

    `source` is the provenance of weights that were dequantized.
    """

    model: Any
    tokenizer: Any
    name: str
    source: dict[str, str] | None = None


def absolute(model: str | Path) -> str:
    """Return a model's name as it reads from any working folder: local paths in full."""
    path = Path(model)
    is_local = path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())
    return str(path.resolve()) if is_local else str(model)


def load_pretrained(
    model: str | Path,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> Pretrained:
    """Load model and tokenizer with transformers.

    Args:
        model: a packaged model, a directory, a GGUF file or a hub name.
        tokenizer: replaces the model's own, if given.
        dtype: of the weights.
        device: to move the weights to, unless `options` or their quantization place them.
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelLoadError: not found, not fetched, incomplete, or not a causal language model.
        ValueError: a `gguf_file` that is not a file name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, facts = Path(model), None
    shared = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
    if str(model) in PACKAGED and not path.is_dir():
        path = fetched(str(model))
        facts = recorded_provenance(path)
    where = str(path if facts else model)
    gguf = locate_gguf(where, options.get("gguf_file"), shared)
    if gguf:
        source, name, facts = gguf.source, gguf.name, gguf.provenance()
        options, shared = ({**o, "gguf_file": gguf.file} for o in (options, shared))
    elif where.strip() and path.is_dir():
        source, name = str(path), path.name
        _check_directory(path, needs_tokenizer=tokenizer is None)
    else:
        source = name = where
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        # TransformerLens exposes attention patterns, which needs the eager implementation.
        hf, report = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            **{"dtype": dtype, "attn_implementation": "eager", **options},
        )
    except Exception as error:  # whatever is wrong with name, folder, file or network
        if gguf:
            raise gguf.unreadable(error) from error
        expected = "'smollm2', a Hugging Face directory or a hub name like 'openai-community/gpt2'"
        raise bad_model("model", expected, source, _fix_for(error)) from error
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        got, fix = f"{source} without {', '.join(wrong)}", "download or save the whole model again"
        raise bad_model("model", "fitting weights for every parameter", got, fix)
    if gguf:
        hf = forget_quantization(hf)
    check_hugging_face(hf)
    placed = "device_map" in options or getattr(hf, "is_quantized", False)
    return Pretrained((hf if placed else hf.to(device)).eval(), tokenizer, name, facts)


def _fix_for(error: Exception) -> str:
    """Return what to do about an error that transformers raised while loading."""
    cause = f"({brief(error, 250)})"
    if "Unrecognized configuration class" in str(error):
        return f"name a causal language model, without an encoder {cause}"
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return f"leave out the option that transformers does not know {cause}"
    return f"check the name, the directory and the connection {cause}"


def _check_directory(path: Path, *, needs_tokenizer: bool) -> None:
    found = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in found and "config.json" not in found:
        expected, got = "a Hugging Face directory with the full model", f"{path}, an adapter"
        fix = "add it to its base model with peft, and save the result of merge_and_unload()"
        raise bad_model("model", expected, got, fix)
    for names in (("config.json",), *([_TOKENIZER_FILES] if needs_tokenizer else [])):
        if not set(names) & set(found):
            expected = f"a Hugging Face directory with {' or '.join(names)}"
            fix = f"save it there (save_pretrained writes {names[0]})"
            fix += ", or pass tokenizer=..." if names == _TOKENIZER_FILES else ""
            got = f"{path} with {', '.join(found) or 'no file'}"
            raise bad_model("model", expected, got, fix)


def check_hugging_face(model: Any) -> None:
    """Raise unless `model` is a causal language model of transformers with its weights.

    Raises:
        ModelLoadError: another library's wrapper, an adapter, a model without a language-model
            head, one with an encoder, or one with weights on the meta device.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "peft" in libraries:
        fix = "pass model.merge_and_unload()"
        raise bad_model("model", "a model with its adapter merged into the weights", kind, fix)
    if not isinstance(model, PreTrainedModel):
        expected = "a name, a directory, a TransformerLens object or a Hugging Face model"
        wrappers = ("_orig_mod", "module", "pretrained_model", "_model", "model")
        inside = [n for n in wrappers if isinstance(getattr(model, n, None), PreTrainedModel)]
        fix = "load_model() loads SmolLM2-135M, load_model(model, tokenizer) yours"
        fix += f"; the one inside yours is model.{inside[0]}" if inside else ""
        raise bad_model("model", expected, kind, fix)
    if model.config.is_encoder_decoder:
        fix = "load a causal language model such as 'openai-community/gpt2'"
        raise bad_model("model", "a decoder-only model", f"{kind}, which has an encoder", fix)
    if not model.can_generate():
        fix = "load it with AutoModelForCausalLM.from_pretrained, or pass its name"
        raise bad_model("model", "a causal language model", f"{kind}, which cannot generate", fix)
    if any(p.is_meta for p in model.parameters()):
        fix = "load them with from_pretrained, without a device_map that offloads to disk"
        got = f"{kind} with weights on the meta device"
        raise bad_model("model", "weights in memory", got, fix)
