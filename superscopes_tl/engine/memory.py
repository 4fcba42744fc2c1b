"""How many rows to compute at a time, and what to do when memory runs out."""

from __future__ import annotations

import gc

import psutil
import torch

from superscopes_tl.model import LanguageModel

CACHE_SHARE = 0.25
"""Share of the free memory that the KV cache of one batch may take."""

FEWEST_ROWS, MOST_ROWS = 64, 1024
WORK_PER_STEP = 2**35
"""Rows times parameters of a step on a CPU: progress and cancelling wait for a batch."""

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def default_batch_size(model: LanguageModel, length: int, free: int | None = None) -> int:
    """Return how many rows to compute at a time: as many as memory and responsiveness allow.

    The tokens that all rows have in common are cached once and do not count.

    Args:
        model: the target model.
        length: tokens that each row caches for itself.
        free: bytes; defaults to the free memory of the model's device.
    """
    rows = MOST_ROWS
    if model.device.type == "cpu":
        work = WORK_PER_STEP // sum(p.numel() for p in model.tl.parameters())
        rows = min(MOST_ROWS, max(FEWEST_ROWS, work))
    room = CACHE_SHARE * (free_bytes(model.device) if free is None else free)
    return max(1, min(rows, int(room) // bytes_per_row(model, length)))


def bytes_per_row(model: LanguageModel, length: int) -> int:
    """Return the size of the KV cache of `length` tokens."""
    cfg = model.tl.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    return int(2 * length * cfg.n_layers * heads * cfg.d_head * model.dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free, on a GPU or in this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed; not every device has an error class of its own."""
    named = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)
    return named or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free_memory() -> None:
    """Release unreferenced memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
