"""An independent implementation of the method in plain Hugging Face, one cell at a time.

No cache, no batch, no TransformerLens: forward hooks on the model's own modules, and a whole
forward pass for every new token. Slow and simple, it is what the engine is compared with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def blocks_of(hf: Any) -> Any:
    """Return the list of transformer blocks."""
    if hasattr(hf, "transformer"):
        return hf.transformer.h
    if hasattr(hf, "gpt_neox"):
        return hf.gpt_neox.layers
    return hf.model.layers


def mlp_branch(block: Any) -> Any:
    """Return the module whose output is added to the residual stream as the MLP's."""
    if type(block).__name__.startswith(("Gemma2", "Gemma3")):
        return block.post_feedforward_layernorm
    return block.mlp


def tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _hook(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def source_vectors(hf: Any, ids: list[int], kind: str, layer: int) -> Tensor:
    """Return the activations of a kind and layer at every position, `pos d_model`."""
    block, seen = blocks_of(hf)[layer], {}
    with (
        _hook(block, lambda m, i, o: seen.__setitem__("post", tensor_of(o)[0].clone())),
        _hook(mlp_branch(block), lambda m, i, o: seen.__setitem__("mlp", tensor_of(o)[0].clone())),
        torch.no_grad(),
    ):
        hf(torch.tensor([ids]), use_cache=False)
    if kind == "resid_mid":  # the paper's h_PreMLP = h - mlp
        return seen["post"] - seen["mlp"]
    return seen[{"resid_post": "post", "mlp_out": "mlp"}[kind]]


def patched_logits(
    hf: Any, ids: list[int], positions: tuple[int, ...], vector: Tensor, layer: int
) -> Tensor:
    """Return the logits of every position after writing `vector` over a block's output."""

    def write(module: Any, inputs: Any, output: Any) -> Any:
        patched = tensor_of(output).clone()
        patched[0, list(positions)] = vector.to(patched.dtype)
        return (patched, *output[1:]) if isinstance(output, tuple) else patched

    with _hook(blocks_of(hf)[layer], write), torch.no_grad():
        return hf(torch.tensor([ids]), use_cache=False).logits[0]


def log_probability(
    hf: Any,
    ids: list[int],
    text: list[int],
    patch: tuple[tuple[int, ...], Tensor, int] | None = None,
) -> float:
    """Return log p(text) behind a prompt in nats, from one whole forward pass.

    `patch` holds positions, a vector and the layer whose output it replaces there.
    """
    whole = [*ids, *text]
    if patch is None:
        with torch.no_grad():
            logits = hf(torch.tensor([whole]), use_cache=False).logits[0]
    else:
        logits = patched_logits(hf, whole, *patch)
    likely = logits.float().log_softmax(-1)
    return sum(float(likely[len(ids) - 1 + i, token]) for i, token in enumerate(text))


def generate_cached(
    hf: Any,
    ids: list[int],
    patch: tuple[tuple[int, ...], Tensor, int] | None,
    *,
    n_new: int,
    eos: tuple[int, ...],
) -> list[int]:
    """Return greedy tokens as `generate` does, with Hugging Face's own cache: for real models."""
    new: list[int] = []
    context: Any = contextlib.nullcontext()
    if patch is not None:
        positions, vector, layer = patch

        def write(module: Any, inputs: Any, output: Any) -> Any:
            patched = tensor_of(output).clone()
            patched[0, list(positions)] = vector.to(patched.dtype)
            return (patched, *output[1:]) if isinstance(output, tuple) else patched

        context = _hook(blocks_of(hf)[layer], write)
    with torch.no_grad():
        with context:
            out = hf(torch.tensor([ids]), use_cache=True)
        for _ in range(n_new):
            token = int(out.logits[0, -1].argmax())
            if token in eos:
                break
            new.append(token)
            cache = out.past_key_values
            out = hf(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return new


def generate(
    hf: Any,
    ids: list[int],
    positions: tuple[int, ...],
    vector: Tensor,
    layer: int,
    *,
    n_new: int,
    eos: int,
) -> tuple[list[int], list[Tensor]]:
    """Return the greedy tokens of one cell and the logits that each was chosen from."""
    new: list[int] = []
    logits: list[Tensor] = []
    for _ in range(n_new):
        last = patched_logits(hf, ids + new, positions, vector, layer)[-1]
        logits.append(last)
        token = int(last.argmax())
        if token == eos:
            break
        new.append(token)
    return new, logits
