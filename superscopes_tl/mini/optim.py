"""Muon for the blocks' matrices, Adam for everything else.

1. A matrix's momentum is orthogonalised by five Newton-Schulz steps (Jordan et al., 2024), so
   that rare directions, such as a name seen once in hundreds of rows, move as far as common
   ones: tables of facts are learned in far fewer steps than with Adam.
2. Embeddings and norm gains are updated by Adam.
3. All state is plain tensors: `state_tensors` goes into a safetensors file as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from superscopes_tl.mini.net import COMPUTE


@dataclass(frozen=True)
class OptimConfig:
    """Step sizes at the peak of the schedule, and decay rates."""

    lr_matrix: float = 0.02
    lr_other: float = 3e-3
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Map each matrix to a nearby matrix whose singular values are all about 1.

    Args:
        matrices: `[n rows cols]`.
        steps: Newton-Schulz iterations.

    Returns:
        `[n rows cols]`, in the number type of matrix products.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(COMPUTE)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon:
    """The optimiser; `step` takes the schedule's factor."""

    def __init__(self, params: Mapping[str, Tensor], config: OptimConfig) -> None:
        """Start with zero state.

        Args:
            params: All trainable tensors; those of three or more dimensions are stacks of
                matrices.
            config: Step sizes.
        """
        self.params = dict(params)
        self.config = config
        self.count = 0
        self.state: dict[str, Tensor] = {}
        for name, param in self.params.items():
            self.state[f"{name}.first"] = torch.zeros_like(param)
            if param.ndim < 3:
                self.state[f"{name}.second"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update every parameter from its gradient and clear the gradients.

        Args:
            factor: Multiplies the step sizes, 1 at the schedule's peak.
        """
        self.count += 1
        for name, param in self.params.items():
            if param.grad is None:
                continue
            if param.ndim >= 3:
                self._muon(name, param, param.grad, factor)
            else:
                self._adam(name, param, param.grad, factor)
            param.grad = None

    def _muon(self, name: str, param: Tensor, grad: Tensor, factor: float) -> None:
        momentum = self.state[f"{name}.first"]
        momentum.lerp_(grad, 1 - self.config.momentum)
        look_ahead = grad.lerp(momentum, self.config.momentum)
        rows, cols = param.shape[-2:]
        update = orthogonalise(look_ahead.reshape(-1, rows, cols)).to(param.dtype)
        lr = self.config.lr_matrix * factor
        param.mul_(1 - lr * self.config.weight_decay)
        param.add_(update.view_as(param), alpha=-lr * max(1.0, rows / cols) ** 0.5)

    def _adam(self, name: str, param: Tensor, grad: Tensor, factor: float) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        first, second = self.state[f"{name}.first"], self.state[f"{name}.second"]
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad * grad, 1 - beta2)
        mean = first / (1 - beta1**self.count)
        spread = (second / (1 - beta2**self.count)).sqrt_().add_(1e-8)
        param.addcdiv_(mean, spread, value=-self.config.lr_other * factor)
