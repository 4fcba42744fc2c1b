"""What arithmetic alone would allow on this machine.

1. Count the floating-point operations of a cell: two per weight of each matrix and token, two per
   number in the products of queries with keys and of patterns with values. The target prompt up to
   the placeholder is computed once for all cells, and not counted; where known words are scored,
   nor are the blocks up to the patch.
2. Time a matrix product of the model's own size: a batch's rows through the MLP's first matrix.
3. Cells per second = operations per second / operations per cell.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

SECONDS = 0.03
"""How long one of the timed repetitions of a matrix product is to take."""
REPETITIONS = 5


@dataclass(frozen=True)
class Shape:
    """What decides how much arithmetic a token takes.

    Attributes:
        body: weights in the matrices of the blocks; every token goes through them.
        head: weights of the unembedding; only tokens after which one is chosen use them.
        attention: n_layers · n_heads · d_head.
        d_model: width of the residual stream.
        d_mlp: width of the MLP.
        n_layers: number of blocks, all of the same width.
    """

    body: int
    head: int
    attention: int
    d_model: int
    d_mlp: int
    n_layers: int


@dataclass(frozen=True)
class Roofline:
    """The estimate.

    Attributes:
        flop_per_cell: floating-point operations of a cell, on average.
        flop_per_second: of a matrix product, measured.
    """

    flop_per_cell: float
    flop_per_second: float

    @property
    def cells_per_second(self) -> float:
        """What arithmetic alone would allow."""
        return self.flop_per_second / self.flop_per_cell


def shape_of(hf: Any) -> Shape:
    """Return the shape of a Hugging Face model."""
    config, head = hf.config, hf.get_output_embeddings()
    matrices = [
        module
        for module in hf.modules()
        # GPT-2's own name for a linear layer.
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
    ]
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Shape(
        body=sum(matrix.weight.numel() for matrix in matrices),
        head=head.weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * d_head,
        d_model=config.hidden_size,
        d_mlp=d_mlp or 4 * config.hidden_size,
        n_layers=config.num_hidden_layers,
    )


def flop_of_cell(shape: Shape, prefix: int, tail: int, new: int) -> int:
    """Return the floating-point operations of one cell.

    Args:
        shape: of the model.
        prefix: tokens before the placeholder, which are computed already.
        tail: the prompt's other tokens.
        new: how many tokens are chosen, the one that ends the text included. The last one is not
            read.
    """
    pairs = tail * (prefix + tail) + sum(prefix + tail + i for i in range(1, new))
    tokens = tail + new - 1
    return 2 * shape.body * tokens + 2 * shape.head * new + 4 * shape.attention * pairs


def flop_of_score(shape: Shape, layer: int, prefix: int, tail: int, words: int) -> int:
    """Return the floating-point operations of scoring known words after one patch.

    Only the blocks above the patch differ from cell to cell.

    Args:
        shape: of the model.
        layer: whose output is patched; -1 counts every block.
        prefix: tokens before the placeholder, which are computed already.
        tail: the prompt's other tokens.
        words: known tokens. The last one is not read.
    """
    tokens, above = tail + words - 1, shape.n_layers - 1 - layer
    blocks = 2 * shape.body * tokens + 4 * shape.attention * tokens * (prefix + tokens)
    return above * blocks // shape.n_layers + 2 * shape.head * words


def flop_per_second(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the measured speed of a product of `rows` rows with a matrix d_model x d_mlp."""
    states = torch.randn(rows, shape.d_model, device=device).to(dtype)
    weight = torch.randn(shape.d_mlp, shape.d_model, device=device).to(dtype)
    times = max(1, int(SECONDS / _seconds(states, weight, _times(states, weight))))
    found = statistics.median(_seconds(states, weight, times) for _ in range(REPETITIONS))
    return 2 * rows * shape.d_model * shape.d_mlp / found


def _times(states: torch.Tensor, weight: torch.Tensor) -> int:
    """Return how many products are enough to estimate the time of one."""
    return max(1, int(SECONDS / 10 / _seconds(states, weight, 3)))


def _seconds(states: torch.Tensor, weight: torch.Tensor, times: int) -> float:
    """Return the time of one product, from `times` of them."""
    _wait(states.device)
    started = time.perf_counter()
    for _ in range(times):
        functional.linear(states, weight)
    _wait(states.device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
