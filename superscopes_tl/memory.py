"""How much fits into memory, and what to do when it runs out."""

from __future__ import annotations

import gc

import psutil
import torch

from superscopes_tl.models import LanguageModel

CACHE_SHARE = 0.25
"""Share of the free memory that the keys and values of one batch may take."""

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def rows_that_fit(model: LanguageModel, length: int) -> int:
    """Return how many rows of `length` tokens may have their keys and values in memory; 1 or more.

    A row takes 2 · length · layers · key-value heads · d_head numbers.
    """
    cfg = model.lens.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    row = 2 * length * cfg.n_layers * heads * cfg.d_head * torch.finfo(model.dtype).bits // 8
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(1, int(free * CACHE_SHARE) // int(row))


def out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation failed; not every device has an error class of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _WORDS)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
