"""Cells per second of the engine beside one Hugging Face `generate` call per cell.

Both ways compute the same cells of the same weights in the same run, in turns, and the median of
the rounds counts. The ratio is what to look at: seconds depend on the machine.

    python -m tests.benchmarks.cells_per_second
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from superscopes_tl import PAPER_ALPHAS, Patch, PatchedGenerator, capture, load_model, scale
from superscopes_tl.mini import MODEL_DIR
from tests.conftest import BACKENDS
from tests.plain_hf import blocks_of

PROMPT = "Red Hot Chili Peppers"
ROUNDS = 5
ONE_BY_ONE = 18
"""Cells per round of the slow way; it is slow."""


def one_generate_per_cell(generator: PatchedGenerator) -> Callable[[list[Patch]], list[str]]:
    """Return the usual way: a forward hook that patches during the prompt, then `generate`."""
    hf: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer, ids = generator.model.tokenizer, torch.tensor([generator.target.tokens.ids])
    position = generator.target.positions[0]

    def run(patches: list[Patch]) -> list[str]:
        texts = []
        for patch in patches:

            def write(module: Any, inputs: Any, output: Any, patch: Patch = patch) -> Any:
                if output.shape[1] == ids.shape[1]:
                    output[0, position] = patch.vector
                return output

            handle = blocks_of(hf)[patch.target_layer].register_forward_hook(write)
            with torch.no_grad():
                out = hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=generator.max_new_tokens,
                    do_sample=False,
                    pad_token_id=1,
                )
            handle.remove()
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    return run


def main() -> None:
    """Measure and print the table."""
    ways: dict[str, tuple[Callable[[list[Patch]], Any], list[Patch]]] = {}
    texts: dict[str, list[str]] = {}
    for backend in BACKENDS[::-1]:
        model = load_model("mini", backend=backend, device="cpu")
        vectors = capture(model, PROMPT)
        patches = [
            Patch(scale(alpha)(rows[-1]), 0)
            for rows in vectors.vectors.values()
            for alpha in PAPER_ALPHAS
        ]
        generator = PatchedGenerator(model)
        if not ways:
            few = patches[:: len(patches) // ONE_BY_ONE][:ONE_BY_ONE]
            way = one_generate_per_cell(generator)
            ways["one Hugging Face generate per cell"] = (way, few)
            texts["one"] = way(few)
        ways[f"superscopes_tl, {backend}"] = (generator.generate, patches)
        texts[backend] = [g.text for g in generator.generate(few)]
    for backend in BACKENDS:
        assert texts[backend] == texts["one"], f"{backend} writes other texts than generate"

    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (way, patches) in ways.items():
            started = time.perf_counter()
            way(patches)
            rates[name].append(len(patches) / (time.perf_counter() - started))
    table = Table(
        title=f"bundled model, float32, {torch.get_num_threads()} threads, {ROUNDS} rounds"
    )
    for column in ("way", "cells per second (median)", "ratio"):
        table.add_column(column, justify="left" if column == "way" else "right")
    baseline = statistics.median(next(iter(rates.values())))
    for name, measured in rates.items():
        rate = statistics.median(measured)
        table.add_row(name, f"{rate:.1f}", f"{rate / baseline:.1f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
