"""A Hugging Face model in, a TransformerLens object with the same numbers out.

1. Ask whether it is one: a causal language model of transformers, whole, with its weights.
2. Keep its logits for a few tokens (`verification`).
3. `HookedTransformer`, where the installed TransformerLens has that class and a converter for the
   architecture: copy the raw weights, and check the copy.
4. Otherwise, or where the copy is off, `TransformerBridge`, which wraps the Hugging Face model in
   place; check that too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from superscopes_tl.errors import ModelLoadError, brief, describe, reason
from superscopes_tl.model.decoder import decoder_for
from superscopes_tl.model.repairs import repair_bridge
from superscopes_tl.model.verification import TOKENS, Probe, Seen, probe, verify

_LOG = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Hide the deprecation notices of the libraries while a model loads.

    Args:
        bars: whether to keep their progress bars, as for a download.
    """
    from transformers.utils import logging as hf_logging

    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not bars:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()


def check_hugging_face(model: Any) -> None:
    """Raise unless `model` is a causal language model of transformers, with its weights.

    Raises:
        ModelLoadError: another library's wrapper, an adapter, a model without a head, one with an
            encoder, or one whose weights are elsewhere.
    """
    from transformers import PreTrainedModel

    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "peft" in libraries:
        raise ModelLoadError(
            describe(
                "model",
                "a model whose adapter is merged into its weights",
                type(model).__name__,
                "pass model.merge_and_unload()",
            )
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelLoadError(
            describe(
                "model",
                "a name, a directory, a HookedTransformer, a TransformerBridge or a "
                "Hugging Face model",
                type(model).__name__,
                "load_model() loads SmolLM2-135M, load_model(model, tokenizer) yours"
                + _inside(model),
            )
        )
    if model.config.is_encoder_decoder:
        raise ModelLoadError(
            describe(
                "model",
                "a model of a decoder alone, which goes on from a prompt",
                f"{type(model).__name__}, which has an encoder",
                "load a causal language model such as 'openai-community/gpt2'",
            )
        )
    if not model.can_generate():
        raise ModelLoadError(
            describe(
                "model",
                "a causal language model, which predicts the next token",
                f"{type(model).__name__}, which cannot generate",
                "load it with AutoModelForCausalLM.from_pretrained, or pass its name",
            )
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelLoadError(
            describe(
                "model",
                "weights in memory",
                f"{type(model).__name__} with weights on the meta device",
                "load them with from_pretrained; where a device_map left some on disk, use "
                "one that does not",
            )
        )


def _inside(wrapper: Any) -> str:
    """Return how to reach the Hugging Face model in another library's object, if it shows."""
    from transformers import PreTrainedModel

    for name in ("_orig_mod", "module", "pretrained_model", "_model", "model"):
        if isinstance(getattr(wrapper, name, None), PreTrainedModel):
            return f"; the one inside yours is model.{name}"
    return ""


def to_transformer_lens(
    hf: Any, tokenizer: Any, backend: Backend, name: str, *, check: bool = True
) -> tuple[Any, Seen | None]:
    """Return the TransformerLens object of a Hugging Face model, and what its hooks showed.

    Args:
        hf: a causal language model; `TransformerBridge` wraps it in place, `HookedTransformer`
            shares weights with it.
        tokenizer: its fast tokenizer, which is left as it is.
        backend: which class, or "auto".
        name: how to call the model in messages.
        check: whether to run both on a few tokens; what the hooks show is `None` if not.

    Raises:
        ModelLoadError: `backend` cannot hold the model, or computes something else.
    """
    kind = type(hf).__name__
    called = kind if kind == name else f"{brief(name, 60)} ({kind})"
    given = None
    if check:
        try:
            n_vocab = hf.get_input_embeddings().weight.shape[0]
            n_ctx = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
            given = probe(tokenizer, n_vocab, n_ctx or TOKENS, hf.device, hf)
        except Exception as error:  # whatever is wrong with the model itself
            raise ModelLoadError(
                describe(
                    "model",
                    "a language model that runs on a few tokens",
                    called,
                    f"run it with transformers first ({brief(reason(error))})",
                )
            ) from error
    if backend != "bridge":
        try:
            lens = _hooked(hf, tokenizer)
            return lens, verify(lens, decoder_for(lens), given) if given else None
        except Exception as error:  # whatever the converters stumble over
            if backend == "hooked":
                raise ModelLoadError(
                    describe(
                        "backend",
                        "a model that HookedTransformer can hold",
                        name,
                        f"use backend='bridge' ({brief(reason(error))})",
                    )
                ) from error
            _LOG.info("%s: TransformerBridge, because %s", name, reason(error))
    try:
        lens = _bridge(hf, tokenizer)
    except Exception as error:  # an architecture or a size that the bridge does not know
        raise ModelLoadError(
            describe(
                "model",
                f"an architecture that TransformerLens {version('transformer-lens')} can wrap",
                called,
                f"load another model, or install a newer release ({brief(reason(error))})",
            )
        ) from error
    return lens, verified(lens, given, called) if given else None


def verified(lens: Any, given: Probe, called: str) -> Seen:
    """Return what `verify` does, in this package's form of an error.

    Args:
        lens: the `HookedTransformer` or `TransformerBridge`.
        given: from `probe`.
        called: how to call the model in the message.

    Raises:
        ModelLoadError: it does not compute what it should.
    """
    try:
        return verify(lens, decoder_for(lens), given)
    except ValueError as error:
        raise ModelLoadError(
            describe(
                "model",
                "a model whose numbers stay the same in TransformerLens and behind a cached prompt",
                f"{called}: {brief(error, 130)}",
                "load another model, or install another release of TransformerLens; "
                "check=False loads this one, wrong as it is",
            )
        ) from error


def _bridge(hf: Any, tokenizer: Any) -> Any:
    """Wrap a Hugging Face model in place."""
    from transformer_lens.model_bridge import TransformerBridge

    if not hf.config.architectures:  # written by save_pretrained, and read by the bridge
        hf.config.architectures = [type(hf).__name__]
    with _saved_tokenizer(tokenizer) as (folder, copy):
        lens = TransformerBridge.boot_transformers(
            str(folder), hf_model=hf, tokenizer=copy, device=str(hf.device), dtype=hf.dtype
        )
    repair_bridge(lens)
    return lens


@contextlib.contextmanager
def _saved_tokenizer(tokenizer: Any) -> Iterator[tuple[Path, Any]]:
    """Yield a folder with the tokenizer, and a copy of it loaded from there.

    TransformerLens changes the tokenizer that it gets and re-reads it from its `name_or_path`.
    The folder has a neutral name because TransformerLens also guesses the architecture from
    words such as "llama" in the path.
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
    if "n_positions" in config:  # GPT-2: the converter reads the older name
        config.setdefault("n_ctx", config["n_positions"])
    with _saved_tokenizer(tokenizer) as (folder, copy):
        (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(folder), hf_cfg=config, device=str(hf.device), dtype=hf.dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(
            str(folder), cfg, hf, dtype=hf.dtype
        )
        lens = HookedTransformer(cfg, copy, move_to_device=False)
    # Its own loader walks the whole model once per weight and copies each.
    lens.load_state_dict(state, strict=False, assign=True)
    lens.move_model_modules_to_device()
    return lens.eval()
