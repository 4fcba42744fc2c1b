"""What a sweep takes is known before it starts; what cannot fit is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from superscopes_tl import LanguageModel, plan_sweep, sweep
from superscopes_tl.engine.memory import default_batch_size
from superscopes_tl.experiment import make_patches
from superscopes_tl.experiment.plan import READING_BYTES

PROMPT = "Red Hot Chili Peppers"

Tiny = Callable[[str, str], LanguageModel]


def _no_scores(references: Any, candidates: Any) -> list[float]:
    return [0.5] * len(candidates)


def test_a_plan_knows_what_it_will_keep(tiny: Tiny) -> None:
    """Vectors: sites x (3 + α) x width x 4 bytes; the patches hold no more than that."""
    model = tiny("llama", "bridge")
    plan = plan_sweep(
        model, PROMPT, layers=(5, 2), alphas=(1, 3, 9), positions=slice(None), scorer=_no_scores
    )
    sites = 2 * 3 * (len(plan.source.ids) - 1)
    assert plan.memory.vectors == sites * (3 + 3) * 32 * 4
    storages = {p.vector.untyped_storage().data_ptr(): p.vector for p in make_patches(plan)}
    held = sum(vector.untyped_storage().nbytes() for vector in storages.values())
    assert 0 < held <= plan.memory.vectors
    row = 2 * plan.generator.row_length * 6 * 2 * 8 * 4
    assert plan.memory.kv_cache == row * min(plan.generator.batch_size, sites * 3)
    assert plan.memory.readings == sites * 3 * READING_BYTES


def test_readings_take_about_what_a_plan_says(tiny: Tiny) -> None:
    """A reading takes less than the estimate, and more than a tenth of it."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {"scorer": _no_scores, "progress": False, "max_new_tokens": 10}
    sweep(model, PROMPT, **settings)  # what is imported and cached is no reading
    tracemalloc.start()
    try:
        result = sweep(model, PROMPT, positions=slice(None), **settings)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert READING_BYTES / 10 < taken / len(result) < READING_BYTES


def test_a_sweep_that_cannot_fit_is_refused_before_any_work(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors, readings and, on a CPU, the KV cache count."""
    model = tiny("llama", "bridge")
    monkeypatch.setattr("superscopes_tl.experiment.plan.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="^positions, layers, kinds, alphas:"):
        plan_sweep(model, PROMPT, layers=2, scorer=_no_scores)


@pytest.mark.parametrize(
    ("parameters", "rows"), [(6e6, 1024), (1.24e8, 277), (2.5e8, 137), (1e9, 64)]
)
def test_small_models_get_larger_batches(
    parameters: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a batch stays within 2^35 weights times rows, between 64 and 1,024 rows."""

    class Model:
        device = torch.device("cpu")

        class tl:  # noqa: N801
            @staticmethod
            def parameters() -> list[torch.Tensor]:
                return [torch.empty(int(parameters), device="meta")]

    monkeypatch.setattr("superscopes_tl.engine.memory.rows_that_fit", lambda model, length: 10_000)
    assert default_batch_size(Model(), 20) == rows  # type: ignore[arg-type]
    monkeypatch.setattr("superscopes_tl.engine.memory.rows_that_fit", lambda model, length: 5)
    assert default_batch_size(Model(), 20) == 5  # type: ignore[arg-type]
