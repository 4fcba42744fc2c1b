"""The memory of a sweep is known before it starts; a sweep that cannot fit is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, PatchedGenerator, plan_sweep, sweep
from superscopes_tl.engine import bytes_per_row
from superscopes_tl.engine.memory import default_batch_size
from superscopes_tl.experiment import make_patches
from superscopes_tl.experiment.plan import READING_BYTES
from tests.support.scorers import half

PROMPT = "Red Hot Chili Peppers"

Tiny = Callable[[str, str], LanguageModel]


def test_a_plan_estimates_its_memory(tiny: Tiny) -> None:
    """Vectors: sites x (3 + α) x width x 4 bytes; the patches hold no more than that."""
    model = tiny("llama", "bridge")
    plan = plan_sweep(
        model, PROMPT, layers=(5, 2), alphas=(1, 3, 9), positions=slice(None), scorer=half
    )
    sites = 2 * 3 * (len(plan.source.ids) - 1)
    assert plan.memory.vectors == sites * (3 + 3) * 32 * 4
    storages = {p.vector.untyped_storage().data_ptr(): p.vector for p in make_patches(plan)}
    held = sum(vector.untyped_storage().nbytes() for vector in storages.values())
    assert 0 < held <= plan.memory.vectors
    row = 2 * plan.generator.row_length * 6 * 2 * 8 * 4
    assert plan.memory.kv_cache == row * min(plan.generator.batch_size, sites * 3)
    assert plan.memory.readings == sites * 3 * READING_BYTES
    needed = plan.memory.vectors + plan.memory.kv_cache + plan.memory.readings
    plan.check_memory(needed)
    with pytest.raises(ValueError, match="^positions, layers, kinds, alphas:"):
        plan.check_memory(needed - 1)


def test_a_reading_takes_about_its_estimate(tiny: Tiny) -> None:
    """A reading takes less than the estimate, and more than a tenth of it."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {"scorer": half, "progress": False, "max_new_tokens": 10}
    sweep(model, PROMPT, **settings)  # imports and caches are no readings
    tracemalloc.start()
    try:
        result = sweep(model, PROMPT, layers=(5, 3, 2), positions=slice(None), **settings)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert READING_BYTES / 10 < taken / len(result) < READING_BYTES


@pytest.mark.parametrize(
    ("parameters", "rows"), [(6e6, 1024), (1.24e8, 277), (2.5e8, 137), (1e9, 64)]
)
def test_small_models_get_larger_batches(parameters: float, rows: int) -> None:
    """A step stays within 2^35 weights times rows, from 64 to 1,024 rows; memory limits both."""
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        tl=SimpleNamespace(
            cfg=SimpleNamespace(n_layers=6, n_heads=2, d_head=8),
            parameters=lambda: [torch.empty(int(parameters), device="meta")],
        ),
    )
    row = bytes_per_row(model, 20)
    assert row == 2 * 20 * 6 * 2 * 8 * 4
    assert default_batch_size(model, 20, free=10_000 * row) == rows
    assert default_batch_size(model, 20, free=4 * 5 * row + 3) == 5, "a quarter of it, five rows"
    assert default_batch_size(model, 20, free=0) == 1


def test_a_row_caches_its_tokens_from_the_placeholder_on(tiny: Tiny) -> None:
    """The tokens before the placeholder are stored once, whatever the batch size."""
    generator = PatchedGenerator(tiny("llama", "bridge"), "Syria: Country in the Middle East, x")
    assert generator.row_length == 1 + 10
