"""Where v comes from: single heads and sums of sites, in place of the captured activation.

A source is any callable `(run, places) -> vectors`, one vector per (site, target layer), as the
setting `vectors` of a sweep takes it. Of the sweep it sees the `SourceRun`: model, source prompt
and generator. The sources here run the source prompt once, however many sites there are.

1. `Head(h)`: what one attention head adds to the residual stream, its mixture of values z times
   its own part of W_O. This is TransformerLens's `hook_result` at the wanted tokens only; the hook
   itself would hold every head of every token in memory. The output bias belongs to no head:
   attn_out is the sum over all heads plus b_O.
2. `Window(k)` and `Accumulated()`: a site's kind summed over several layers, at the same token. For
   "mlp_out" that is a multi-layer MLP, for "attn_out" all that attention has brought to a token.
3. `SumOf(sites)`: the sum of any sites of the source prompt.

A result names the source in its column `mapping`, so sweeps with several heads go into one table:

    parts = [sweep(model, prompt, kinds="attn_out", vectors=Head(h)) for h in range(n_heads)]
    SweepResult(pd.concat([part.table for part in parts]), parts[0].provenance).best()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import PatchedGenerator, capture, site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.model import LanguageModel, Site, TokenizedText, hook_name

HEADS_TOLERANCE = 0.05
"""Relative error up to which heads and bias must add up to attn_out; rounding stays below it."""


class SourceRun(Protocol):
    """What a source of vectors sees of a sweep; `SweepPlan` is one.

    Attributes:
        model: the source model.
        source: the source prompt, as tokens.
        generator: the patched generator for the target prompt.
    """

    @property
    def model(self) -> LanguageModel: ...  # noqa: D102
    @property
    def source(self) -> TokenizedText: ...  # noqa: D102
    @property
    def generator(self) -> PatchedGenerator: ...  # noqa: D102


PlaceVectors: TypeAlias = Callable[
    [Any, Sequence[tuple[Site, int]]], Float[Tensor, "places d_model"]
]
"""One vector for every (site, target layer) of a `SourceRun`: what is amplified in place of the
site's own activation (`SweepConfig.vectors`), or the origin that α is counted from (`.base`).
Called once per plan, with all places."""


@dataclass(frozen=True, init=False, repr=False)
class Head:
    """Source: the output of one attention head, or the sum of several.

    Heads belong to the kind "attn_out". Where a norm follows the attention (Gemma 2), attn_out is
    not the sum of the heads, and the model is refused.

    Args:
        *heads: heads of the site's layer, counted from 0; the query heads, where several of them
            share keys and values.
    """

    heads: tuple[int, ...]

    def __init__(self, *heads: int) -> None:
        if not heads:
            raise bad_value("heads", "at least one head", heads, "Head(0)")
        for head in heads:
            check_count("heads", head, least=0, fix="heads are counted from 0")
        object.__setattr__(self, "heads", tuple(sorted(set(heads))))

    def __repr__(self) -> str:
        return f"Head({', '.join(map(str, self.heads))})"

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return the heads' output at every site, from one run of the source prompt."""
        model, sites = run.model, [site for site, _ in places]
        if kinds := {site.kind for site in sites} - {"attn_out"}:
            raise bad_value("kinds", "'attn_out' for Head", sorted(kinds), "kinds='attn_out'")
        if self.heads[-1] >= (n_heads := model.tl.cfg.n_heads):
            expected = f"0 to {n_heads - 1}, the heads of a layer of {model.name}"
            raise bad_value("heads", expected, self.heads[-1], "choose one of these")
        layers = tuple(dict.fromkeys(site.layer for site in sites))
        z_names = {layer: f"blocks.{layer}.attn.hook_z" for layer in layers}
        out_names = {layer: hook_name("attn_out", layer) for layer in layers}
        seen = model.activations(
            run.source.tensor(model.device), [*z_names.values(), *out_names.values()]
        )
        found: dict[Site, Tensor] = {}
        for layer in layers:
            there = [site for site in dict.fromkeys(sites) if site.layer == layer]
            positions = [site.position for site in there]
            z = seen[z_names[layer]][0, positions].float()
            attn_out = seen[out_names[layer]][0, positions].float()
            found.update(zip(there, self._outputs(model, layer, z, attn_out), strict=True))
        return torch.stack([found[site] for site in sites])

    def _outputs(
        self,
        model: LanguageModel,
        layer: int,
        z: Float[Tensor, "positions heads d_head"],
        attn_out: Float[Tensor, "positions d_model"],
    ) -> Float[Tensor, "positions d_model"]:
        """Return z·W_O of these heads, after checking that all heads add up to `attn_out`."""
        attention = model.tl.blocks[layer].attn
        weights = attention.W_O.detach().float()  # heads, d_head, d_model
        total = torch.einsum("phd,hdm->pm", z, weights)
        if (bias := getattr(attention, "b_O", None)) is not None:
            total = total + bias.detach().float()
        # Checked, not looked up: no setting says for every model whether something follows W_O.
        if (total - attn_out).norm() > HEADS_TOLERANCE * attn_out.norm():
            raise bad_value(
                "heads",
                "a model whose attn_out is the sum of its heads and the output bias",
                f"{model.name}, where something else, such as a norm, follows",
                "read the kind 'attn_out' as a whole",
            )
        heads = list(self.heads)
        return torch.einsum("phd,hdm->pm", z[:, heads], weights[heads]).cpu()


@dataclass(frozen=True)
class Window:
    """Source: a site's kind summed over the last layers up to its own.

    Attributes:
        length: number of layers; 1 is the site itself. Fewer are added near layer 0.
    """

    length: int

    def __post_init__(self) -> None:
        check_count("length", self.length, least=1, fix="1 is the site's own layer")

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return the sum at every site."""
        return _summed(run, [(site, max(0, site.layer + 1 - self.length)) for site, _ in places])


@dataclass(frozen=True)
class Accumulated:
    """Source: a site's kind summed over all layers from 0 to its own.

    For "attn_out" and "mlp_out" together this is, with the embedding, the residual stream.
    """

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return the sum at every site."""
        return _summed(run, [(site, 0) for site, _ in places])


def _summed(
    run: SourceRun, from_layers: Sequence[tuple[Site, int]]
) -> Float[Tensor, "places d_model"]:
    """Return each site's kind, summed from the layer given up to its own, in float32."""
    layers = {n for site, first in from_layers for n in range(first, site.layer + 1)}
    kinds = tuple(dict.fromkeys(site.kind for site, _ in from_layers))
    seen = capture(run.model, run.source, kinds=kinds, layers=sorted(layers))
    sums = [
        torch.stack(
            [
                seen[site.kind, layer][site.position].float().cpu()
                for layer in range(first, site.layer + 1)
            ]
        ).sum(dim=0)
        for site, first in from_layers
    ]
    return torch.stack(sums)


@dataclass(frozen=True)
class SumOf:
    """Source: the sum of any sites of the source prompt, the same for every cell.

    Attributes:
        sites: at least one; a negative position counts from the end, so that the sum can be taken
            of another prompt too, as a control does.
    """

    sites: Sequence[Site]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise bad_value("sites", "at least one site", self.sites, "pass Site(...)")
        for site in self.sites:
            if not isinstance(site, Site):
                raise bad_type("sites", "sites", site, "pass Site(kind, layer, position)")

    def __call__(
        self, run: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "places d_model"]:
        """Return the sum, once per place."""
        # As in a sweep, -1 is the last token of the text, not of a chat template around it.
        end = run.source.own.stop
        there = [replace(s, position=s.position + end) if s.position < 0 else s for s in self.sites]
        total = site_vectors(run.model, run.source, there).sum(dim=0)
        return total.expand(len(places), -1)
