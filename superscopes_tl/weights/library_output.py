"""Silence, or label, what model libraries print while they load."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Hide warnings and progress bars while a model loads; `bars` keeps those of downloads."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def dequantization_bar(description: str, *, shown: bool) -> Iterator[None]:
    """Label or hide transformers' progress bar over the tensors of a GGUF file."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as library

    def bar(tensors: Any, **_: Any) -> Any:
        return tqdm(tensors, desc=description, disable=not shown, unit=" tensors", leave=False)

    original = getattr(library, "tqdm", None)
    if original is None:  # another release of transformers, with other bars
        yield
        return
    library.tqdm = bar
    try:
        yield
    finally:
        library.tqdm = original
