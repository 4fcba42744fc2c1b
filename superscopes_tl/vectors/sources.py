"""Where v comes from: single heads and sums of sites, in place of the captured activation.

A source is any callable `(plan, places) -> vectors`, one vector per (site, target layer), as the
setting `vectors` of a sweep takes it. Of the plan it needs the model and the source prompt alone,
and it runs the prompt once, however many sites there are.

1. `head(h)`: what one attention head adds to the residual stream, its mixture of values z times
   its own part of W_O. This is TransformerLens's `hook_result` at the wanted tokens alone; the hook
   itself would hold every head of every token in memory. The output bias belongs to no head:
   attn_out is the sum over all heads plus b_O.
2. `window(k)` and `accumulated()`: a site's kind summed over several layers, same token. For
   "mlp_out" that is a multi-layer MLP, for "attn_out" all that attention has brought to a token.
3. `sum_of(sites)`: any sites of the source prompt, added.

A result names the source in its column `mapping`, so sweeps with several heads go into one table:

    parts = [sweep(model, prompt, kinds="attn_out", vectors=head(h)) for h in range(n_heads)]
    SweepResult(pd.concat([part.table for part in parts]), parts[0].provenance).best()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import capture, site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.model import Site, hook_name
from superscopes_tl.vectors.protocols import PlaceVectors, SourceRun

HEADS_TOLERANCE = 0.05
"""Heads and bias may miss attn_out by this share of its norm: rounding stays below it."""


def head(*numbers: int) -> PlaceVectors:
    """Return the source that is one attention head's output, or the sum of several heads'.

    Args:
        *numbers: heads of the site's layer, counted from 0; the query heads, where several of them
            share keys and values.

    Raises:
        ValueError, TypeError: no head, or none that can be counted. When called: a head that the
            model does not have, a kind other than "attn_out", or a model whose attn_out is not the
            sum of its heads because a norm follows (Gemma 2).
    """
    if not numbers:
        raise bad_value("head", "at least one head", numbers, "pass head(0)")
    for number in numbers:
        check_count("head", number, least=0, fix="heads are counted from 0")

    def of_heads(
        plan: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        sites = [site for site, _ in places]
        if kinds := {site.kind for site in sites} - {"attn_out"}:
            raise bad_value(
                "kinds",
                "'attn_out', the kind that heads add up to",
                sorted(kinds),
                "sweep with kinds='attn_out'",
            )
        n_heads = plan.model.tl.cfg.n_heads
        if max(numbers) >= n_heads:
            raise bad_value(
                "head",
                f"0 to {n_heads - 1}, the heads of a layer of {plan.model.name}",
                max(numbers),
                "choose one of these",
            )
        return _head_outputs(plan, sites, sorted(set(numbers)))

    of_heads.__name__ = f"head({', '.join(map(str, sorted(set(numbers))))})"
    return of_heads


def _head_outputs(
    plan: SourceRun, sites: Sequence[Site], numbers: Sequence[int]
) -> Float[Tensor, "sites d_model"]:
    """Return the sum of some heads' outputs at every site, from one run of the source prompt."""
    model = plan.model
    layers = tuple(dict.fromkeys(site.layer for site in sites))
    z_names = {layer: f"blocks.{layer}.attn.hook_z" for layer in layers}
    out_names = {layer: hook_name("attn_out", layer) for layer in layers}
    seen = model.activations(
        plan.source.tensor(model.device), [*z_names.values(), *out_names.values()]
    )
    found: dict[Site, Tensor] = {}
    for layer in layers:
        there = [site for site in dict.fromkeys(sites) if site.layer == layer]
        positions = [site.position for site in there]
        attention = model.tl.blocks[layer].attn
        weights = attention.W_O.detach().float()  # heads, d_head, d_model
        z = seen[z_names[layer]][0, positions].float()
        outputs = torch.einsum("phd,hdm->pm", z[:, numbers], weights[numbers])
        total = torch.einsum("phd,hdm->pm", z, weights)
        if (bias := getattr(attention, "b_O", None)) is not None:
            total = total + bias.detach().float()
        attn_out = seen[out_names[layer]][0, positions].float()
        # Checked, not looked up: no setting says for every model whether something follows W_O.
        if (total - attn_out).norm() > HEADS_TOLERANCE * attn_out.norm():
            raise bad_value(
                "head",
                "a model whose attn_out is the sum of its heads and the output bias",
                f"{model.name}, where something else, such as a norm, follows",
                "read the kind 'attn_out' as a whole",
            )
        found.update(zip(there, outputs.cpu(), strict=True))
    return torch.stack([found[site] for site in sites])


def window(length: int) -> PlaceVectors:
    """Return the source that adds a site's kind over the last layers up to its own.

    Args:
        length: how many layers; 1 is the site itself. Layers before the first do not count.

    Raises:
        ValueError, TypeError: no whole number of 1 or more.
    """
    check_count("length", length, least=1, fix="1 is the site's own layer alone")
    return _summed(f"window({length})", length)


def accumulated() -> PlaceVectors:
    """Return the source that adds a site's kind over all layers from 0 to its own.

    For "attn_out" and "mlp_out" together this is, with the embedding, the whole residual stream.
    """
    return _summed("accumulated()", None)


def _summed(name: str, length: int | None) -> PlaceVectors:
    def of_layers(
        plan: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        first = {
            site: 0 if length is None else max(0, site.layer + 1 - length) for site, _ in places
        }
        layers = sorted({n for site in first for n in range(first[site], site.layer + 1)})
        kinds = tuple(dict.fromkeys(site.kind for site in first))
        seen = capture(plan.model, plan.source, kinds=kinds, layers=layers)
        return torch.stack(
            [
                _total(
                    seen[site.kind, layer][site.position]
                    for layer in range(first[site], site.layer + 1)
                )
                for site, _ in places
            ]
        )

    of_layers.__name__ = name
    return of_layers


def sum_of(sites: Iterable[Site]) -> PlaceVectors:
    """Return the source that is the sum of any sites of the source prompt, the same for every cell.

    Args:
        sites: what to add; a negative position counts from the end, so that the sum can be taken
            of another prompt too, as a control does.

    Raises:
        ValueError, TypeError: no site, or something else. When called: a kind, layer or position
            that is not there.
    """
    terms = tuple(sites)
    if not terms:
        raise bad_value("sites", "at least one site", terms, "pass Site(...)")
    for term in terms:
        if not isinstance(term, Site):
            raise bad_type("sites", "sites", term, "pass Site(kind, layer, position)")

    def of_sites(
        plan: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        # As in a sweep, -1 is the text's last token, not that of a chat template behind it.
        end = plan.source.own.stop
        there = [replace(t, position=t.position + end) if t.position < 0 else t for t in terms]
        total = site_vectors(plan.model, plan.source, there).sum(dim=0)
        return total.expand(len(places), -1)

    named = " + ".join(f"{term.kind} {term.layer} at {term.position}" for term in terms)
    of_sites.__name__ = named
    return of_sites


def _total(rows: Iterable[Float[Tensor, " d_model"]]) -> Float[Tensor, " d_model"]:
    """Return the sum of some vectors, in float32."""
    total: Tensor = torch.stack([row.float().cpu() for row in rows]).sum(dim=0)
    return total
