"""What the tests of killed and concurrent runs start as processes of their own.

They are forked from a process that has imported this module and with it torch, once.
"""

from __future__ import annotations

from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformer_lens  # noqa: F401 - slow to import: once, before the processes begin

from superscopes_tl import LanguageModel, SweepResult, TargetPrompt, evaluate, load_model
from superscopes_tl.experiment import EvaluationFile
from tests.support.scorers import half
from tests.support.tiny_models import random_hf, tiny_tokenizer

PROMPTS = ("Red Hot Chili Peppers", "Pearl Jam", "Will Smith", "Syria")


@cache
def model() -> LanguageModel:
    """Return the model, the same one to the last bit in every process."""
    return load_model(
        random_hf("llama", n_layers=3, width=16, heads=2), tiny_tokenizer(), backend="bridge"
    )


def run(path: Any, **changes: Any) -> SweepResult:
    """Evaluate in batches of two cells, so that the file is written to most of the time."""
    settings = {
        "layers": (2, 1), "alphas": (1, 3, 9), "kinds": ("mlp_out", "resid_mid", "resid_post"),
        "draws": 1, "batch_size": 2, "max_new_tokens": 3, "scorer": half, "progress": False,
        "target_prompt": TargetPrompt("Syria: a land, x"), **changes,
    }  # fmt: skip
    return evaluate(model(), PROMPTS, path, **settings)


def child(path: str, said: Connection, changes: dict[str, Any]) -> None:
    """Run an evaluation; say "ready" before it, the rows that are safe, and how it ended."""
    torch.set_num_threads(1)
    model()
    safe, add = 0, EvaluationFile.add

    def counting(self: EvaluationFile, readings: Any) -> None:
        nonlocal safe
        add(self, readings)
        safe += len(readings)
        said.send(safe)

    EvaluationFile.add = counting  # type: ignore[method-assign]
    said.send("ready")
    try:
        run(path, **changes)
    except (ValueError, OSError) as error:
        said.send(f"{type(error).__name__}: {error}")
    else:
        said.send("done")
