"""The ways to compute cells that are measured beside each other.

Each is a function from cells to the new tokens of each, without the one that ends a text. Those
that take one cell at a time patch in a hook while the prompt is run, and let the library's own
`generate` do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from superscopes_tl import PatchedGenerator
from superscopes_tl.model import hook_name
from tests.benchmarks.work import Cell
from tests.support.plain_hf import blocks_of

Tokens: TypeAlias = tuple[int, ...]
Run: TypeAlias = Callable[[Sequence[Cell]], list[Tokens]]


def until_end(ids: Sequence[int], eos: Sequence[int]) -> Tokens:
    """Return the tokens before the first one that ends a text."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])


def one_generate_per_cell(hf: Any, generator: PatchedGenerator) -> Run:
    """The usual way: a forward hook that patches during the prompt, then `generate`."""
    ids = generator.target.tokens.tensor(hf.device)
    (position,) = generator.target.positions

    def text(cell: Cell) -> Tokens:
        vector = cell.patch.vector.to(hf.device, hf.dtype)

        def write(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.shape[1] == ids.shape[1]:
                states[0, position] = vector

        handle = blocks_of(hf)[cell.target_layer].register_forward_hook(write)
        try:
            with torch.no_grad():
                out = hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=generator.max_new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
        finally:
            handle.remove()
        return until_end(out[0, ids.shape[1] :].tolist(), generator.model.eos_token_ids)

    return lambda cells: [text(cell) for cell in cells]


def one_hooked_generate_per_cell(lens: Any, generator: PatchedGenerator) -> Run:
    """`HookedTransformer.generate`, with a hook that patches during the prompt."""
    ids = generator.target.tokens.tensor(generator.model.device)
    (position,) = generator.target.positions
    eos = list(generator.model.eos_token_ids)

    def text(cell: Cell) -> Tokens:
        vector = cell.patch.vector.to(generator.model.device, generator.model.dtype)

        def write(states: Tensor, hook: Any) -> Tensor:
            if states.shape[1] == ids.shape[1]:
                states[0, position] = vector
            return states

        with lens.hooks(fwd_hooks=[(hook_name("resid_post", cell.target_layer), write)]):
            out = lens.generate(
                ids,
                max_new_tokens=generator.max_new_tokens,
                stop_at_eos=bool(eos),
                eos_token_id=eos or None,
                do_sample=False,
                return_type="tokens",
                verbose=False,
            )
        return until_end(out[0, ids.shape[1] :].tolist(), eos)

    return lambda cells: [text(cell) for cell in cells]


def nnterp_patchscope(hf: Any, tokenizer: Any, generator: PatchedGenerator) -> Run:
    """`patchscope_generate` of nnterp: same layer, hidden states, α = 1, no shared prefix.

    Raises:
        ImportError: nnterp is not installed, or does not fit what is installed.
    """
    from nnterp import StandardizedTransformer
    from nnterp.interventions import TargetPrompt, patchscope_generate

    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # it must have one; nothing here is padded
    model = StandardizedTransformer(hf, tokenizer=tokenizer)
    (position,) = generator.target.positions
    length = len(generator.target.tokens)
    target = TargetPrompt(generator.target.tokens.text, position)

    def run(cells: Sequence[Cell]) -> list[Tokens]:
        prompts = list(dict.fromkeys(cell.prompt for cell in cells))
        # The layers' states are looked up by layer number: they have to begin at 0.
        layers = list(range(1 + max(cell.layer for cell in cells)))
        found = patchscope_generate(
            model, prompts, target, max_length=generator.max_new_tokens, layers=layers
        )
        return [
            until_end(
                found[cell.layer][prompts.index(cell.prompt), length:].tolist(),
                generator.model.eos_token_ids,
            )
            for cell in cells
        ]

    return run


def engine(generator: PatchedGenerator) -> Run:
    """superscopes_tl, with default settings."""
    return lambda cells: [
        generation.token_ids for generation in generator.generate([cell.patch for cell in cells])
    ]
