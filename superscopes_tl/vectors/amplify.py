"""Mapping functions f(v): what happens to a vector between reading it and patching it.

1. A mapping function is any callable from vectors to vectors of the same shape.
2. A mapping *family* is a callable that takes the amplifier α and returns a mapping function;
   a sweep calls the family once per α. `scale` is the paper's (section 3.4): f(v) = α·v, and
   α = 1 is Patchscopes.
3. Arithmetic is done in float32, because α·v of a half-precision model can overflow float16.

Why a scale changes anything although the next block normalises its input: LN(α·v) = LN(v), but
the residual stream at the placeholder goes on as α·v + (what later blocks add). With α = 1 and a
weak v the later blocks drown it; with α = 9 it outweighs them.

A family of your own needs no registration:

    def from_mean(alpha: float) -> MappingFunction:
        return lambda v: mean + alpha * (v - mean)

    sweep(model, prompt, mapping=from_mean)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

MappingFunction: TypeAlias = Callable[[Float[Tensor, "... d_model"]], Float[Tensor, "... d_model"]]
MappingFamily: TypeAlias = Callable[[float], MappingFunction]


def scale(alpha: float) -> MappingFunction:
    """Amplify: f(v) = α·v (paper, section 3.4). α = 0 and negative α are legal."""

    def scaled(v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return v.float() * alpha

    return scaled


def random_direction(seed: int = 0) -> MappingFamily:
    """Control: the norm of α·v in a random direction.

    What a sweep reads through this family owes nothing to the meaning of v, only to how far the
    placeholder was pushed. Each vector has a direction of its own, which stays the same for every
    α, as that of v does, and in every batch: it is drawn from the seed and the signs of v.

    Args:
        seed: chooses the directions; another seed is another draw of the control.
    """

    def random_scale(alpha: float) -> MappingFunction:
        def redirect(v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            directions = torch.stack([_direction(row, seed) for row in v.reshape(-1, v.shape[-1])])
            directions = directions.reshape(v.shape).to(v.device)
            norms = v.float().norm(dim=-1, keepdim=True)
            redirected: Tensor = alpha * norms * directions / directions.norm(dim=-1, keepdim=True)
            return redirected

        return redirect

    random_scale.__name__ = f"random_direction(seed={seed})"
    return random_scale


def _direction(v: Float[Tensor, " d_model"], seed: int) -> Float[Tensor, " d_model"]:
    """Return a random direction for one vector; rounding errors of v seldom change its signs."""
    signs = (v > 0).cpu().numpy().tobytes()
    generator = torch.Generator().manual_seed(zlib.crc32(signs, seed & 0xFFFFFFFF))
    return torch.randn(v.shape, generator=generator)


@cache
def in_units_of(norm: float) -> MappingFamily:
    """Amplify to a given length: f(v) = α·norm·v/‖v‖, whatever the norm of v.

    With the norm of the residual stream at the placeholder (`PatchedGenerator.placeholder_norms`
    of the target layer), α = 1 weighs as much as what it replaces, for every kind and layer.

    Args:
        norm: the length that α = 1 stands for.
    """

    def in_units(alpha: float) -> MappingFunction:
        def resized(v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            length = v.float().norm(dim=-1, keepdim=True).clamp_min(1e-30)
            result: Tensor = v.float() * (alpha * norm / length)
            return result

        return resized

    in_units.__name__ = f"in_units_of({norm!r})"
    return in_units


def family_name(family: Callable[..., object]) -> str:
    """Return the name under which a result records a mapping family or a base."""
    return getattr(family, "__name__", None) or repr(family)


PAPER_MAPPING = family_name(scale)
"""The name under which a result records f(v) = α·v."""
