"""The KV cache of a batch whose rows share a prefix, stored once.

1. The target prompt up to the placeholder is the same in every row of a batch. Its KV cache entries
   are stored once, as `shared`; those from the placeholder on are each row's `own`.
2. `RowBuffer` holds both for one layer and grows in place at each step.
3. `SharedPrefix` is what attention sees: a tensor that stands for the concatenation of both. A
   product with it becomes two products, the one with the shared part a single matrix product for
   all rows. With 69 shared tokens and 10 own ones, attention reads 10 keys per row instead of 79,
   and only these take memory in a larger batch.
4. Any other operation on a `SharedPrefix` gets the materialised tensor: an unusual architecture is
   slower, never wrong. With gradients it is materialised before autograd records the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Prefix: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of a prompt per layer, each `Float[Tensor, "1 heads pos d_head"]`."""


class SharedPrefix(Tensor):
    """Stands for `cat([shared.expand(batch, ...), own], axis)` without materialising it.

    Args:
        shared: the part common to all rows, with a batch of 1.
        own: the rest, with the batch as its first axis.
        axis: axis of the concatenation, negative.
    """

    shared: Tensor
    own: Tensor
    axis: int

    @staticmethod
    def __new__(cls, shared: Tensor, own: Tensor, axis: int) -> Self:  # noqa: D102
        size = list(own.shape)
        size[axis] += shared.shape[axis]
        made: Self = Tensor._make_wrapper_subclass(cls, size, dtype=own.dtype, device=own.device)
        made.shared, made.own, made.axis = shared, own, axis
        return made

    def whole(self) -> Tensor:
        """Materialise the tensor."""
        size = list(self.own.shape)
        size[self.axis] = self.shared.shape[self.axis]
        return torch.cat([self.shared.expand(size), self.own], dim=self.axis)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute by parts where possible; leave the rest to `__torch_dispatch__`."""
        if func in _BY_PARTS:
            found = _BY_PARTS[func](*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        if torch.is_grad_enabled() and not _is_attribute(func):
            return func(*_whole(args), **_whole(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute with the materialised tensor."""
        return func(*_whole(args), **_whole(kwargs or {}))


def _is_attribute(func: Any) -> bool:
    """Whether an operation reads an attribute of a tensor, such as its shape."""
    return getattr(func, "__name__", "") == "__get__"


def _whole(value: Any) -> Any:
    """Materialise every `SharedPrefix` among arguments."""
    if isinstance(value, SharedPrefix):
        return value.whole()
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    return value


def _product(left: Any, right: Any) -> Any:
    """Multiply by parts: queries with keys, or attention pattern with values."""
    if not isinstance(right, SharedPrefix) or isinstance(left, SharedPrefix) or left.ndim != 4:
        return NotImplemented
    if right.axis == -1:
        return torch.cat([_with_one(left, right.shared), left @ right.own], dim=-1)
    if right.axis == -2:
        length = right.shared.shape[-2]
        found = _with_one(left[..., :length], right.shared)
        return found + left[..., length:] @ right.own
    return NotImplemented


def _with_one(
    left: Float[Tensor, "batch heads a b"], right: Float[Tensor, "1 heads b c"]
) -> Float[Tensor, "batch heads a c"]:
    """Return `left @ right` as one product per head for all rows at once."""
    batch, heads, a, b = left.shape
    rows = left.transpose(0, 1).reshape(heads, batch * a, b)
    return (rows @ right[0]).view(heads, batch, a, right.shape[-1]).transpose(0, 1)


def _permute(x: SharedPrefix, *axes: Any) -> Any:
    order = tuple(axes[0] if isinstance(axes[0], Sequence) else axes)
    if order[0] != 0:  # the batch stays first
        return NotImplemented
    axis = [place % x.own.ndim for place in order].index(x.axis % x.own.ndim) - x.own.ndim
    return SharedPrefix(x.shared.permute(order), x.own.permute(order), axis)


def _transpose(x: SharedPrefix, a: int, b: int) -> Any:
    order = list(range(x.own.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(x, order)


def _unsqueeze_heads(x: SharedPrefix, index: Any) -> Any:
    """Index `x[:, :, None, :, :]`, the first step of repeating grouped keys."""
    everything = slice(None)
    if x.axis != -2 or index != (everything, everything, None, everything, everything):
        return NotImplemented
    return SharedPrefix(x.shared[index], x.own[index], x.axis)


def _resized(how: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return `how` (expand or reshape) by parts, with each part's own rows and positions."""

    def resize(x: SharedPrefix, *size: Any) -> Any:
        sizes = list(size[0] if isinstance(size[0], Sequence) else size)
        if x.axis != -2 or (sizes[0], sizes[-2], sizes[-1]) != (x.shape[0], *x.shape[-2:]):
            return NotImplemented
        parts = [
            how(part, (part.shape[0], *sizes[1:-2], part.shape[-2], sizes[-1]))
            for part in (x.shared, x.own)
        ]
        return SharedPrefix(parts[0], parts[1], x.axis)

    return resize


def _repeat(x: SharedPrefix, repeats: int, dim: int) -> Any:
    """Repeat grouped keys along the head axis."""
    if dim % x.ndim in (0, x.axis % x.ndim):
        return NotImplemented
    shared, own = (torch.repeat_interleave(part, repeats, dim=dim) for part in (x.shared, x.own))
    return SharedPrefix(shared, own, x.axis)


_BY_PARTS: dict[Any, Callable[..., Any]] = {
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
    Tensor.transpose: _transpose,
    Tensor.permute: _permute,
    Tensor.__getitem__: _unsqueeze_heads,
    Tensor.expand: _resized(Tensor.expand),
    Tensor.reshape: _resized(Tensor.reshape),
    torch.repeat_interleave: _repeat,
    Tensor.repeat_interleave: _repeat,
}


class RowBuffer:
    """Keys and values of one layer, allocated at the first step, for as many rows as it has.

    Args:
        shared: keys and values of the prefix.
        batch: number of rows.
        room: number of tokens that each row may append.
    """

    def __init__(self, shared: tuple[Tensor, Tensor], batch: int, room: int) -> None:
        self.shared = shared
        self._room = room
        self._added = 0
        self._own = tuple(part[:, :, :0].expand(batch, -1, -1, -1) for part in shared)

    @property
    def length(self) -> int:
        """Number of tokens in each row."""
        return self.shared[0].shape[2] + self._added

    def append(
        self, keys: Float[Tensor, "batch heads pos d_head"], values: Tensor
    ) -> tuple[SharedPrefix, SharedPrefix]:
        """Append the keys and values of a step, and return all keys and all values."""
        end = self._added + keys.shape[2]
        assert end <= self._room, "more tokens than there is room for"
        if not self._added:  # never read before it is written; the batch may have grown since
            size = (keys.shape[0], keys.shape[1], self._room, keys.shape[3])
            self._own = tuple(part.new_empty(size) for part in self.shared)
        for buffer, new in zip(self._own, (keys, values), strict=True):
            buffer[:, :, self._added : end] = new
        self._added = end
        return self.all()

    def all(self) -> tuple[SharedPrefix, SharedPrefix]:
        """Return all keys and all values."""
        keys, values = (
            SharedPrefix(shared, own[:, :, : self._added], -2)
            for shared, own in zip(self.shared, self._own, strict=True)
        )
        return keys, values

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all other rows."""
        self._own = tuple(own[rows] for own in self._own)
