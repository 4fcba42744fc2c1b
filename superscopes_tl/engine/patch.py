"""What is written over a placeholder, and the hooks that write it.

1. A `Patch` says which vector goes where, and how much of the residual stream stays.
2. `patch_hooks` makes one hook per *distinct* layer of a batch: it writes each row's vector over
   the block output (`hook_resid_post`) at the placeholder's tokens, so that the rows of a batch
   may be patched at different layers, and one row at several.
3. Vectors are cast to the model's number type here, and refused where it cannot hold them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import bad_value
from superscopes_tl.model import Hook, LanguageModel, check_layers, hook_name


@dataclass(frozen=True, eq=False)
class Patch:
    """One cell's work: write `vector` over the placeholder at the output of `target_layer`.

    Attributes:
        vector: f(v), `Float[Tensor, " d_model"]`, the same at every placeholder token; or one
            vector for each of them, `Float[Tensor, "placeholders d_model"]`. The vectors of one
            call are on one device.
        target_layer: block number from 0, or several, to write at each of them; `None` leaves the
            target prompt unpatched.
        guidance: w of u + w·(c − u), the logits between unpatched (0) and patched (1), or beyond.
        seed: draw the text at temperature 1 from it; the likeliest tokens unless given.
        keep: the share of the residual stream that stays, new = keep·old + vector: 0 replaces it
            (the paper, section 3.1), 1 adds to it.
    """

    vector: Float[Tensor, " d_model"] | Float[Tensor, "placeholders d_model"]
    target_layer: int | tuple[int, ...] | None
    guidance: float = 1.0
    seed: int | None = None
    keep: float = 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        """Where the vector is written; nowhere if nothing is patched."""
        if self.target_layer is None:
            return ()
        return self.target_layer if isinstance(self.target_layer, tuple) else (self.target_layer,)

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the text: patches with equal keys are written once."""
        # A digest, not the numbers: thousands of patches are told apart at a time.
        digest = hashlib.blake2b(self.vector.float().cpu().contiguous().numpy().tobytes())
        vector = (self.vector.shape, digest.digest()) if self.layers else ()
        return self.layers, self.guidance, self.seed, self.keep, vector

    @property
    def norm(self) -> float:
        """The length of the vector; of several, the mean of their lengths."""
        return float(self.vector.norm(dim=-1).mean())


def check_patch(model: LanguageModel, patch: Patch) -> None:
    """Check a patch's layers and share, before anything is generated.

    Raises:
        ValueError: a layer that the model does not have, or a share that is no finite number.
    """
    if patch.target_layer is not None:
        check_layers(patch.target_layer, model.n_layers, "target_layer")
    if not math.isfinite(patch.keep):
        raise bad_value("keep", "a finite number", patch.keep, "0 replaces, 1 adds")


def patch_hooks(
    model: LanguageModel, patches: Sequence[Patch], positions: Sequence[int]
) -> list[tuple[str, Hook]]:
    """Return the hooks that write a batch's patches.

    Args:
        model: the model that is asked.
        patches: one per row.
        positions: the placeholder's tokens, counted from the first one that is run.

    Raises:
        ValueError: vectors of another shape, or with numbers that the model cannot hold.
    """
    rows_of: dict[int, list[int]] = {}
    for row, patch in enumerate(patches):
        for layer in dict.fromkeys(layer % model.n_layers for layer in patch.layers):
            rows_of.setdefault(layer, []).append(row)
    return [
        (
            hook_name("resid_post", layer),
            _writer(
                torch.tensor(rows),
                torch.tensor(positions),
                _cast(model, [patches[row].vector for row in rows], len(positions)),
                torch.tensor([patches[row].keep for row in rows]),
            ),
        )
        for layer, rows in rows_of.items()
    ]


def _cast(
    model: LanguageModel, vectors: Sequence[Tensor], placeholders: int
) -> Float[Tensor, "rows placeholders d_model"]:
    """Return the vectors of some rows in the model's number type, on its device."""
    for vector in vectors:
        if vector.shape not in ((model.d_model,), (placeholders, model.d_model)):
            raise bad_value(
                "vector",
                f"{model.d_model} numbers, the width of {model.name}, or as many for "
                f"each of {placeholders} placeholder tokens",
                f"shape {tuple(vector.shape)}",
                "read the vector from the same model, or map it to this one's width",
            )
    stacked = torch.stack([vector.float().expand(placeholders, -1) for vector in vectors])
    return cast_for(model, stacked, "vector")


def cast_for(model: LanguageModel, vectors: Tensor, argument: str) -> Tensor:
    """Return vectors in the model's number type, on its device.

    Raises:
        ValueError: numbers that the type cannot hold.
    """
    cast = vectors.to(model.dtype)
    if not torch.isfinite(cast).all():
        raise bad_value(
            argument,
            f"numbers that {model.dtype} can hold",
            f"up to {vectors.abs().max().item():.3g}",
            "use a smaller α, or load the model with dtype='float32'",
        )
    return cast.to(model.device)


def _writer(
    rows: Int[Tensor, " rows"],
    positions: Int[Tensor, " placeholders"],
    vectors: Float[Tensor, "rows placeholders d_model"],
    keep: Float[Tensor, " rows"],
) -> Hook:
    at = (rows[:, None], positions[None, :])

    def write(
        block_output: Float[Tensor, "batch pos d_model"], hook: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        patched = block_output.clone()  # an edit in place would reach other users of the tensor
        new = vectors.to(patched.device)
        if keep.any():
            share = keep[:, None, None].to(patched.device)
            mixed = (share * patched[at].float() + new.float()).to(patched.dtype)
            # A row that keeps nothing is not touched: 0 · old is not 0 where old overflowed.
            new = torch.where(share != 0, mixed, new)
        patched[at] = new
        return patched

    return write
