"""Silence, or label, what model libraries print while they load.

What they say of wrong numbers is no noise: TransformerLens warns of devices (MPS) and of rotary
positions that were not applied.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

_WRONG_NUMBERS = re.compile(r"\bMPS\b|incorrect|unreliable|not applied", re.IGNORECASE)


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Hide progress bars, and warnings of anything but wrong numbers, while a model loads.

    `bars` keeps the progress bars of downloads.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
    for said in caught:
        if _WRONG_NUMBERS.search(str(said.message)):
            warnings.warn_explicit(said.message, said.category, said.filename, said.lineno)


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
