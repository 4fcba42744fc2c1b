"""Patches, and the hooks that write vectors over activations.

1. A `Patch` says which vector replaces the block output at which layers, or the input embedding,
   and which share of the residual stream is kept.
2. `patch_hooks` makes one hook per *distinct* layer of a batch: it writes each row's vector over
   the block output (`hook_resid_post`) at the placeholder's tokens, so that the rows of a batch
   may be patched at different layers, and one row at several.
3. Below the first layer at which it is patched, a row of a prompt is like every other. With
   `growing_hooks` they are one row there, and the batch grows on its way up: the hook on a block
   output returns a larger batch, with the rows that are patched at that layer. Rows that are
   patched at the input embedding are there from the start.
4. `write_hooks` is the one place where vectors are written; `runs` uses it for every kind.
5. Vectors are cast to the model's dtype here, and refused where it cannot hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superscopes_tl.errors import bad_value
from superscopes_tl.model import EMBED, Hook, HookKind, LanguageModel, PatchedLayer, hook_name


@dataclass(frozen=True, eq=False)
class Patch:
    """One row of a batch: `vector` replaces the output of `target_layer` at the placeholder.

    Attributes:
        vector: f(v), the same at every placeholder token, or one vector for each of them.
        target_layer: block number from 0, or "embed" for the input embedding, or several, to
            patch each of them; `None` leaves the target prompt unpatched.
        guidance: w of u + w·(c − u), the logits between unpatched (0) and patched (1), or beyond.
        seed: sample the text at temperature 1 with this seed; defaults to greedy decoding.
        keep: the share of the residual stream that is kept, new = keep·old + vector: 0 replaces it
            (the paper, section 3.1), 1 adds to it.
    """

    vector: Float[Tensor, " d_model"] | Float[Tensor, "placeholders d_model"]
    target_layer: PatchedLayer | tuple[PatchedLayer, ...] | None
    guidance: float = 1.0
    seed: int | None = None
    keep: float = 0.0

    @property
    def layers(self) -> tuple[PatchedLayer, ...]:
        """The patched layers; none if nothing is patched."""
        if self.target_layer is None:
            return ()
        return self.target_layer if isinstance(self.target_layer, tuple) else (self.target_layer,)

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the text: of patches with equal keys one is generated."""
        # A digest, not the numbers: thousands of patches are compared at a time.
        digest = hashlib.blake2b(self.vector.float().cpu().contiguous().numpy().tobytes())
        vector = (self.vector.shape, digest.digest()) if self.layers else ()
        return self.layers, self.guidance, self.seed, self.keep, vector

    @property
    def norm(self) -> float:
        """The norm of the vector; of several, the mean of their norms."""
        return float(self.vector.norm(dim=-1).mean())


def no_patch(model: LanguageModel) -> Patch:
    """Return what leaves a row unpatched."""
    return Patch(torch.zeros(model.d_model), None)


def patch_hooks(
    model: LanguageModel, patches: Sequence[Patch], positions: Sequence[int]
) -> list[tuple[str, Hook]]:
    """Return the hooks that apply a batch's patches, one per row.

    The positions are those of the placeholder, counted from the first token that is run.

    Raises:
        ValueError: vectors of another shape, or with numbers that the model cannot hold.
    """
    rows_of: dict[int, list[int]] = {}
    for row, patch in enumerate(patches):
        for layer in layer_numbers(model, patch):
            rows_of.setdefault(layer, []).append(row)
    return [
        hook
        for layer, rows in rows_of.items()
        for hook in write_hooks(
            "resid_post",
            layer,
            (torch.tensor(rows)[:, None], torch.tensor(positions)[None, :]),
            _cast(model, [patches[row].vector for row in rows], len(positions)),
            keep=torch.tensor([patches[row].keep for row in rows])[:, None, None],
        )
    ]


def growing_hooks(
    model: LanguageModel, patches: Sequence[Patch], origins: Sequence[int], positions: Sequence[int]
) -> tuple[list[int], list[tuple[str, Hook]], list[int]]:
    """Return what a batch starts with, the hooks under which it grows, and each patch's row in it.

    It starts with the unpatched rows, and a copy of one for each patch at the input embedding.

    Args:
        model: the target model.
        patches: of the rows that are added.
        origins: the unpatched row, from 0, that each patch changes; a patch without a layer is
            that row itself.
        positions: as in `patch_hooks`.

    Raises:
        ValueError: as `patch_hooks`.
    """
    layers = [layer_numbers(model, patch) for patch in patches]
    order = sorted((n for n, own in enumerate(layers) if own), key=lambda n: min(layers[n]))
    unpatched = 1 + max(origins)
    row_of = {number: row for row, number in enumerate(order, start=unpatched)}
    added: dict[int, list[int]] = {EMBED: []}
    for number in order:
        added.setdefault(min(layers[number]), []).append(origins[number])
    starts = [*range(unpatched), *added.pop(EMBED)]
    hooks: list[tuple[str, Hook]] = [
        (hook_name("resid_post", layer), partial(_append_rows, origins=torch.tensor(rows)))
        for layer, rows in added.items()
    ]
    rows = [*[no_patch(model)] * unpatched, *(patches[number] for number in order)]
    return (
        starts,
        [*hooks, *patch_hooks(model, rows, positions)],
        [row_of.get(number, origin) for number, origin in enumerate(origins)],
    )


def layer_numbers(model: LanguageModel, patch: Patch) -> tuple[int, ...]:
    """Return the numbers of the patched layers; none if nothing is patched."""
    named = (EMBED if layer == "embed" else layer % model.n_layers for layer in patch.layers)
    return tuple(dict.fromkeys(named))


def _append_rows(
    activation: Float[Tensor, "batch pos d_model"], hook: Any, origins: Int[Tensor, " added"]
) -> Float[Tensor, "grown pos d_model"]:
    """Append copies of unpatched rows."""
    return torch.cat([activation, activation[origins.to(activation.device)]])


def write_hooks(
    kind: HookKind,
    layer: int,
    at: tuple[Int[Tensor, "*writes"], Int[Tensor, "*writes"]],
    vectors: Float[Tensor, "*writes d_model"],
    *,
    keep: Float[Tensor, "*writes 1"] | None = None,
) -> list[tuple[str, Hook]]:
    """Return the hooks that write vectors over an activation at some rows and positions.

    `resid_mid` is written through the attention, attn_out := v − resid_pre: in a
    `TransformerBridge` the output of a hook on `resid_mid` itself reaches the MLP alone, and not
    the residual stream. `keep` is the share of the old activation that is kept, by default 0.
    """
    before: list[Tensor] = []

    def remember(activation: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        before.append(activation[at])

    def write(
        activation: Float[Tensor, "batch pos d_model"], hook: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        patched = activation.clone()  # an edit in place would reach other users of the tensor
        new = vectors.to(patched.device)
        if kind == "resid_mid":
            new = new - before.pop()
        if keep is not None and keep.any():
            share = keep.to(patched.device)
            mixed = (share * patched[at].float() + new.float()).to(patched.dtype)
            # A row that keeps nothing is not touched: 0 · old is not 0 where old overflowed.
            new = torch.where(share != 0, mixed, new)
        patched[at] = new
        return patched

    if kind == "resid_mid":
        return [(hook_name("resid_pre", layer), remember), (hook_name("attn_out", layer), write)]
    return [(hook_name(kind, layer), write)]


def _cast(
    model: LanguageModel, vectors: Sequence[Tensor], placeholders: int
) -> Float[Tensor, "rows placeholders d_model"]:
    """Return the vectors of some rows in the model's dtype, on its device."""
    for vector in vectors:
        if vector.shape not in ((model.d_model,), (placeholders, model.d_model)):
            raise bad_value(
                "vector",
                f"{model.d_model} numbers, the width of {model.name}, or {placeholders} such rows",
                f"shape {tuple(vector.shape)}",
                "read the vector from the same model, or map it to this one's width",
            )
    stacked = torch.stack([vector.float().expand(placeholders, -1) for vector in vectors])
    return cast_for(model, stacked, "vector")


def cast_for(model: LanguageModel, vectors: Tensor, argument: str) -> Tensor:
    """Return vectors in the model's dtype, on its device.

    Raises:
        ValueError: numbers that the dtype cannot hold.
    """
    cast = vectors.to(model.dtype)
    if not torch.isfinite(cast).all():
        most = f"up to {vectors.abs().max().item():.3g}"
        fix = "use a smaller α, or load the model with dtype='float32'"
        raise bad_value(argument, f"numbers that {model.dtype} can hold", most, fix)
    return cast.to(model.device)
