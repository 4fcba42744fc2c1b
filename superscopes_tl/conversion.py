"""A Hugging Face model in, a TransformerLens object with the same numbers out.

1. `HookedTransformer`, where the installed TransformerLens has that class and a converter for the
   architecture: copy the raw weights, then compare the logits of a few tokens with the
   original's, because some converters assume sizes that a model need not have.
2. Otherwise `TransformerBridge`, which wraps the Hugging Face model in place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from superscopes_tl.backends import decoder_for
from superscopes_tl.errors import ModelLoadError, describe

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


def to_transformer_lens(hf: Any, tokenizer: Any, backend: Backend, name: str) -> Any:
    """Return the TransformerLens object of a Hugging Face model.

    Args:
        hf: a causal language model; `TransformerBridge` wraps it in place, `HookedTransformer`
            shares weights with it.
        tokenizer: its fast tokenizer, which is left as it is.
        backend: which class, or "auto".
        name: how to call the model in messages.

    Raises:
        ModelLoadError: `backend="hooked"` and `HookedTransformer` cannot hold the model.
    """
    if backend != "bridge":
        try:
            return _hooked(hf, tokenizer)
        except Exception as error:  # whatever the converters stumble over
            if backend == "hooked":
                raise ModelLoadError(
                    describe(
                        "backend",
                        expected="a model that HookedTransformer can hold",
                        got=name,
                        fix=f"use backend='bridge' ({type(error).__name__}: {error})",
                    )
                ) from error
            _LOG.info("%s: TransformerBridge, because %s: %s", name, type(error).__name__, error)
    from transformer_lens.model_bridge import TransformerBridge

    with _saved_tokenizer(tokenizer) as (folder, copy):
        return TransformerBridge.boot_transformers(
            str(folder), hf_model=hf, tokenizer=copy, device=str(hf.device), dtype=hf.dtype
        )


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
    """Convert to a `HookedTransformer` with raw weights, and compare the logits."""
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
    lens.eval()
    _compare_logits(hf, lens)
    return lens


def _compare_logits(hf: Any, lens: Any) -> None:
    """Compare the last logits of a few tokens, run as a sweep runs them, with the original's."""
    tokens = torch.arange(1, 33, device=hf.device)[None] % hf.config.vocab_size
    decoder = decoder_for(lens)
    with torch.no_grad():
        expected = hf(tokens).logits[:, -1].float()
        cache = decoder.expand(decoder.prefill(tokens[:, :20]), 1, tokens.shape[1] - 20)
        got = decoder.step(tokens[:, 20:], cache).float()
    difference = (expected - got).abs().max().item() / expected.abs().max().item()
    tolerance = 1e-3 if hf.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise ValueError(f"its logits differ by {difference:.1e} relative to the original model's")
