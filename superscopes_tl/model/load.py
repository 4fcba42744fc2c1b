"""Load a model: anything that is one becomes a `LanguageModel`.

1. A name or a directory is loaded with Hugging Face transformers, as raw weights.
2. A Hugging Face model is turned into a TransformerLens object (`conversion`), which must compute
   what the model computes (`verification`).
3. A TransformerLens object is used as it is, if its cached passes agree with its whole ones.
4. The result states everything that the rest of the package needs to know of the model.

Weights are not processed (no folding of layer norms, no centring), so a vector read here is the
vector that the Hugging Face model computes.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from superscopes_tl.errors import ModelLoadError, bad_value, brief, describe
from superscopes_tl.model import gguf as gguf_files
from superscopes_tl.model.conversion import (
    Backend,
    check_hugging_face,
    quiet,
    to_transformer_lens,
    verified,
)
from superscopes_tl.model.language_model import LanguageModel, describe_model, weight_fingerprint
from superscopes_tl.model.packaged import PACKAGED, fetched
from superscopes_tl.model.verification import probe

DEFAULT_MODEL = "smollm2"
_MINI = Path(str(resources.files("superscopes_tl") / "mini" / "model"))

BUNDLED_MODEL = "mini"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


_TOKENIZER_OPTIONS = (
    "revision",
    "cache_dir",
    "token",
    "trust_remote_code",
    "subfolder",
    "local_files_only",
    "force_download",
)


def load_model(
    model: Any = DEFAULT_MODEL,
    tokenizer: Any = None,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    prepend_bos: bool | None = None,
    check: bool = True,
    **from_pretrained: Any,
) -> LanguageModel:
    """Return `model` as a `LanguageModel`.

    Args:
        model: a packaged model (`"smollm2"`, `"gemma-3-270m"`, after `superscopes fetch`), `"mini"`
            (the bundled model), a hub name, a local Hugging Face directory, a GGUF file or a folder
            with one, a `HookedTransformer`, a `TransformerBridge`, a Hugging Face causal language
            model (with its `tokenizer`; the bridge wraps it in place), or a `LanguageModel`.
        tokenizer: goes with a Hugging Face model, or replaces the tokenizer of any other.
        backend: the TransformerLens class to use. `"auto"` takes `HookedTransformer` where it is
            installed and can hold the model; `"bridge"` is the faster choice.
        dtype: number type of the weights; float32 unless given.
        device: cuda, else mps, else cpu unless given.
        prepend_bos: whether prompts start with the BOS token alone, or with nothing. Unless given:
            with what the tokenizer puts in front by itself, or as a TransformerLens object is
            configured.
        check: whether to run the model on a few tokens: its logits must stay what they are in
            Hugging Face, and behind a cached prompt. Without it a kind of activation may be
            offered that is not there.
        **from_pretrained: passed to `AutoModelForCausalLM.from_pretrained` (`revision`,
            `device_map`, `cache_dir`, ...). With `gguf_file`, that file of a folder or hub name.

    Raises:
        ModelLoadError: not a model, not fetched, no tokenizer, or a backend that cannot hold it
            or does not compute what it does (a model object that the bridge was to wrap is spoilt
            then).
        ValueError: an argument that does not go with the model.
    """
    _refuse_other_spellings(from_pretrained)
    if backend not in ("auto", "hooked", "bridge"):
        raise bad_value(
            "backend",
            "'auto', 'hooked' or 'bridge'",
            backend,
            "leave it out, or choose 'bridge' for speed",
        )
    if isinstance(model, LanguageModel):
        given = {"tokenizer": tokenizer, "prepend_bos": prepend_bos, **from_pretrained}
        _refuse_load_options(backend, dtype, device, given)
        return model
    if _transformer_lens_class(model):
        _refuse_load_options(backend, dtype, device, from_pretrained)
        return _wrap(model, tokenizer, prepend_bos=prepend_bos, check=check)
    if device is not None and "device_map" in from_pretrained:
        raise bad_value(
            "device", "no device beside a device_map", device, "leave one of the two out"
        )
    number_type, place = _dtype(dtype), device_of(device)
    origin = source = None
    if isinstance(model, str | Path) and tokenizer is None:
        options = {"dtype": dtype, "device": device, "prepend_bos": prepend_bos, **from_pretrained}
        options["check"] = check
        origin = partial(load_model, absolute(model), backend=backend, **options)
    with quiet(bars=isinstance(model, str) and model not in (BUNDLED_MODEL, *PACKAGED)):
        if isinstance(model, str | Path):
            hf, tokenizer, name, source = _from_pretrained(
                model, tokenizer, number_type, place, from_pretrained
            )
        else:
            name = _check_hugging_face(model, tokenizer)
            _refuse_load_options("auto", dtype, device, from_pretrained)
            hf = model.eval()  # dropout would make every run read something else
        _check_tokenizer(tokenizer, name)
        prefix = _prefix(tokenizer, prepend_bos)
        fingerprint = weight_fingerprint(hf)  # before the bridge renames the parameters
        lens, seen = to_transformer_lens(hf, tokenizer, backend, name, check=check)
    return describe_model(
        lens,
        tokenizer,
        name=name,
        hf=hf,
        prefix=prefix,
        processing="none",
        fingerprint=fingerprint,
        origin=origin,
        source=source,
        seen=seen,
    )


def absolute(model: str | Path) -> str:
    """Return a model's name as every folder understands it: what lies here by its full path."""
    path = Path(model)
    here = path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())
    is_name = str(model) == BUNDLED_MODEL or not here
    return str(model) if is_name else str(path.resolve())


def _check_hugging_face(model: Any, tokenizer: Any) -> str:
    """Return how to call a Hugging Face model that the user made."""
    check_hugging_face(model)
    if tokenizer is None:
        raise ModelLoadError(
            describe(
                "tokenizer",
                "the tokenizer of the Hugging Face model",
                "None",
                "load_model(model, tokenizer)",
            )
        )
    return str(model.config.name_or_path or type(model).__name__)


_SPELLINGS = {
    "torch_dtype": "pass dtype=... in its place",
    "load_in_8bit": "pass quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "pass quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
}
"""Options of older releases of transformers, which newer ones drop or do not know."""


def _refuse_other_spellings(options: dict[str, Any]) -> None:
    for name, fix in _SPELLINGS.items():
        if name in options:
            raise bad_value(name, "an option that transformers 5 has", options[name], fix)


def _prefix(tokenizer: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    """Return what prompts start with: what the tokenizer puts there, the BOS alone, or nothing."""
    if prepend_bos and tokenizer.bos_token_id is None:
        raise bad_value(
            "prepend_bos",
            "False or None for a tokenizer without a BOS token",
            prepend_bos,
            "set tokenizer.bos_token, or leave prepend_bos out",
        )
    if prepend_bos is None:
        return _own_prefix(tokenizer)
    return (tokenizer.bos_token_id,) if prepend_bos else ()


def _own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return what a tokenizer puts in front of a text by itself."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise bad_value("dtype", "float32, bfloat16 or float16", dtype, "leave it out for float32")
    return found


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device of a name: cuda, else mps, else cpu unless given.

    Raises:
        ValueError: this torch or this machine lacks it.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)  # fails where this torch or this machine lacks it
        except (RuntimeError, TypeError, AssertionError) as error:
            raise bad_value(
                "device",
                "a device of this machine such as 'cuda', 'mps' or 'cpu'",
                device,
                f"leave it out for the best there is ({error})",
            ) from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _refuse_load_options(
    backend: str, dtype: object, device: object, others: dict[str, Any]
) -> None:
    given = {"backend": None if backend == "auto" else backend, "dtype": dtype, "device": device}
    given.update(others)
    for name, value in given.items():
        if value is not None:
            raise bad_value(
                name,
                "no such argument with a model that is already loaded",
                value,
                f"load the model with this {name} in the first place, "
                "or pass its name instead of the object",
            )


def _transformer_lens_class(model: object) -> str | None:
    """Return the name of the TransformerLens class of `model`, without importing it."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformer_lens") and cls.__name__ in (
            "HookedTransformer",
            "TransformerBridge",
        ):
            return cls.__name__
    return None


def _from_pretrained(
    model: str | Path,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> tuple[Any, Any, str, dict[str, str] | None]:
    """Return model and tokenizer of a name or path, how to call it, and the file it came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, facts = _MINI if str(model) == BUNDLED_MODEL else Path(model), None
    shared = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
    if str(model) in PACKAGED and not path.is_dir():
        path, facts = fetched(str(model))
    place = str(path if path == _MINI or facts else model)
    found = gguf_files.locate(place, options.get("gguf_file"), shared)
    if found:
        source, name, facts = found.source, found.name, gguf_files.source_of(found.path)
        options, shared = ({**o, "gguf_file": found.file} for o in (options, shared))
    elif str(model).strip() and path.is_dir():
        source, name = str(path), BUNDLED_MODEL if path == _MINI else path.name
        _check_directory(path, needs_tokenizer=tokenizer is None)
    else:
        source = name = str(model)
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        # TransformerLens exposes attention patterns, which needs the plain implementation.
        hf, report = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            **{"dtype": dtype, "attn_implementation": "eager", **options},
        )
    except Exception as error:  # whatever is wrong with a name, a folder, a file or the network
        if found:
            raise gguf_files.unreadable(found, error) from error
        raise ModelLoadError(
            describe(
                "model",
                f"{DEFAULT_MODEL!r}, a local Hugging Face directory or a hub name "
                "such as 'openai-community/gpt2'",
                source,
                _advice(error),
            )
        ) from error
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ModelLoadError(
            describe(
                "model",
                "weights for every parameter (a missing one would be random)",
                f"{source} without fitting {', '.join(wrong)}",
                "download or save the model again, complete",
            )
        )
    if found:
        hf = gguf_files.as_ordinary(hf)
    check_hugging_face(hf)
    # Quantized weights stay where their library has put them.
    placed = "device_map" in options or getattr(hf, "is_quantized", False)
    return (hf if placed else hf.to(device)).eval(), tokenizer, name, facts


def _advice(error: Exception) -> str:
    """Return what to do about an error of transformers while it loads a model."""
    said = f"({brief(error, 250)})"
    if "Unrecognized configuration class" in str(error):
        return f"name a causal language model: one with an encoder is none {said}"
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return f"leave out the option that transformers does not know {said}"
    return f"check the name, the directory and the connection {said}"


def _check_directory(path: Path, *, needs_tokenizer: bool) -> None:
    found = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in found and "config.json" not in found:
        raise ModelLoadError(
            describe(
                "model",
                "a Hugging Face directory with the whole model",
                f"{path} with an adapter alone",
                "load its base model, add the adapter with peft, and save_pretrained what "
                "merge_and_unload() returns",
            )
        )
    wanted: list[tuple[str, ...]] = [("config.json",)]
    if needs_tokenizer:
        wanted.append(_TOKENIZER_FILES)
    for names in wanted:
        if not any(n in found for n in names):
            raise ModelLoadError(
                describe(
                    "model",
                    f"a Hugging Face directory with {' or '.join(names)}",
                    f"{path} with {', '.join(found) or 'no file'}",
                    f"save it there (save_pretrained writes {names[0]})"
                    + (", or pass tokenizer=..." if names == _TOKENIZER_FILES else ""),
                )
            )


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(
            describe(
                "tokenizer",
                "a fast tokenizer, which knows the characters of each token",
                f"{type(tokenizer).__name__} of {name}",
                "convert it to tokenizer.json, or pass a PreTrainedTokenizerFast",
            )
        )


def _wrap(lens: Any, tokenizer: Any, *, prepend_bos: bool | None, check: bool) -> LanguageModel:
    """Describe a TransformerLens object that the user made."""
    lens.eval()
    own = tokenizer if tokenizer is not None else lens.tokenizer
    name = str(lens.cfg.model_name or type(lens).__name__)
    if own is None:
        raise ModelLoadError(
            describe(
                "tokenizer",
                f"a tokenizer on {name} or beside it",
                "None",
                "load_model(model, tokenizer)",
            )
        )
    _check_tokenizer(own, name)
    if hasattr(lens, "original_model"):
        hf = lens.original_model
        processed = bool(getattr(lens, "compatibility_mode", False))
        processing = "compatibility mode" if processed else "none"
    else:
        hf = None
        normalization = lens.cfg.normalization_type
        processing = "folded layer norms" if str(normalization).endswith("Pre") else "as given"
    if prepend_bos is None:
        has_bos = own.bos_token_id is not None
        prepend_bos = bool(lens.cfg.default_prepend_bos) and (has_bos or None)
    with quiet():
        device = next(iter(lens.parameters())).device
        given = probe(own, lens.cfg.d_vocab, lens.cfg.n_ctx, device) if check else None
        seen = verified(lens, given, brief(name, 60)) if given else None
    return describe_model(
        lens,
        own,
        name=name,
        hf=hf,
        prefix=_prefix(own, prepend_bos),
        processing=processing,
        fingerprint=weight_fingerprint(lens),
        seen=seen,
    )
