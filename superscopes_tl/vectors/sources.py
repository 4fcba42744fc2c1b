"""Where v comes from: heads, sums, spans, another model; in place of the captured activation.

A source is any callable `(run, places) -> vectors` that returns one vector per (site, target
layer), or one for each placeholder token: the setting `vectors` of a sweep. The sources here take
one forward pass of the source prompt per model, however many sites there are.

1. `Head(h)`: what one attention head adds to the residual stream, z·W_O. This is TransformerLens's
   `hook_result`, computed at the wanted tokens only to save memory. The output bias belongs to no
   head: attn_out is the sum over all heads plus b_O.
2. `Window(k)` and `Accumulated()`: a site's kind summed over several layers, at the same token.
3. `SumOf(sites)`: the sum of any sites of the source prompt.
4. `Span()`: the tokens up to the site, each at a placeholder of its own, as activation oracles do
   (Karvonen et al. 2025, arXiv 2512.15674).
5. `MinusModel(base)`: the site's activation minus that of another model at the same tokens, such as
   fine-tuned minus base (activation difference lens, arXiv 2510.13900).

The column `mapping` names the source, so sweeps of several heads can share a table:

    parts = [sweep(model, prompt, kinds="attn_out", vectors=Head(h)) for h in range(n_heads)]
    SweepResult(pd.concat([part.table for part in parts]), parts[0].provenance).best()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import PatchedGenerator, capture, site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.model import LanguageModel, Site, TokenizedText, hook_name, load_model

HEADS_TOLERANCE = 0.05
"""Relative error up to which heads and bias must add up to attn_out; above rounding errors."""


class SourceRun(Protocol):
    """What a source of vectors sees of a sweep: source model, source prompt, target prompt."""

    @property
    def model(self) -> LanguageModel: ...  # noqa: D102
    @property
    def source(self) -> TokenizedText: ...  # noqa: D102
    @property
    def generator(self) -> PatchedGenerator: ...  # noqa: D102


Places: TypeAlias = Sequence[tuple[Site, int]]
"""Source sites, each with a target layer."""
PlaceVectors: TypeAlias = Callable[[Any, Places], Float[Tensor, "places *placeholders d_model"]]
"""Returns one vector for every (site, target layer) of a `SourceRun`, or one for each placeholder
token: v in place of the captured activation (`SweepConfig.vectors`), or the base
(`SweepConfig.base`). Called once per plan."""


@dataclass(frozen=True, init=False, repr=False)
class Head:
    """Source: the output of one attention head, or the sum of several.

    Only for the kind "attn_out", and not for models that normalise it (Gemma 2).

    Args:
        *heads: query heads of the site's layer, counted from 0.
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

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the heads' summed output at every site."""
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
        # Checked numerically: no config says for every model whether something follows W_O.
        if (total - attn_out).norm() > HEADS_TOLERANCE * attn_out.norm():
            expected = "a model whose attn_out is the sum of its heads and the output bias"
            raise bad_value("heads", expected, model.name, "read the kind 'attn_out' as a whole")
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

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the sum at every site."""
        return _summed(run, [(site, max(0, site.layer + 1 - self.length)) for site, _ in places])


@dataclass(frozen=True)
class Accumulated:
    """Source: a site's kind summed over all layers from 0 to its own."""

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the sum at every site."""
        return _summed(run, [(site, 0) for site, _ in places])


def _summed(run: SourceRun, from_layers: Places) -> Float[Tensor, "places d_model"]:
    """Return each site's kind, summed from a first layer up to its own, in float32."""
    layers = {n for site, first in from_layers for n in range(first, site.layer + 1)}
    kinds = tuple(dict.fromkeys(site.kind for site, _ in from_layers))
    seen = capture(run.model, run.source, kinds=kinds, layers=sorted(layers))
    sums = []
    for site, first in from_layers:
        to_here = range(first, site.layer + 1)
        parts = [seen[site.kind, layer][site.position].float().cpu() for layer in to_here]
        sums.append(torch.stack(parts).sum(dim=0))
    return torch.stack(sums)


@dataclass(frozen=True)
class SumOf:
    """Source: the sum of any sites of the source prompt, the same for every cell.

    Attributes:
        sites: at least one; negative positions count from the end, which suits any prompt.
    """

    sites: Sequence[Site]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise bad_value("sites", "at least one site", self.sites, "pass Site(...)")
        for site in self.sites:
            if not isinstance(site, Site):
                raise bad_type("sites", "sites", site, "pass Site(kind, layer, position)")

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the sum, once per place."""
        # As in a sweep, -1 is the last token of the text, not of the chat template.
        end = run.source.own.stop
        there = [replace(s, position=s.position + end) if s.position < 0 else s for s in self.sites]
        total = site_vectors(run.model, run.source, there).sum(dim=0)
        return total.expand(len(places), -1)


@dataclass(frozen=True)
class Span:
    """Source: the last tokens up to the site, one for each placeholder token of the target prompt.

    With K placeholders, a site at token i gives the activations of tokens i − K + 1 to i of its
    kind and layer. For a span in a longer prompt, let its last token be the position and give the
    target prompt as many placeholders as the span has tokens.
    """

    def __call__(
        self, run: SourceRun, places: Places
    ) -> Float[Tensor, "places placeholders d_model"]:
        """Return the vectors of every site's span, in the order of the tokens."""
        count, start = len(run.generator.target.positions), run.source.own.start
        for site, _ in places:
            if (tokens := site.position + 1 - start) < count:
                expected = f"a token with {count - 1} before it, for {count} placeholders"
                got = f"token {tokens} of {run.source.text!r}"
                fix = "use a target prompt with fewer placeholders, or a longer source prompt"
                raise bad_value("positions", expected, got, fix)
        sites = [
            replace(site, position=site.position + 1 - back)
            for site, _ in places
            for back in range(count, 0, -1)
        ]
        found = site_vectors(run.model, run.source, sites)
        return found.view(len(places), count, -1)


@dataclass(frozen=True, repr=False)
class MinusModel:
    """Source: the activation of the model minus that of another one, at the same site and tokens.

    What fine-tuning changed, if the other one is the base model. The two need the same kinds,
    layers, width and vocabulary.

    Attributes:
        base: the model that is subtracted: from `load_model`, or anything that it accepts.
        fingerprint: of its weights.
    """

    base: LanguageModel | Any = field(compare=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", load_model(self.base))
        object.__setattr__(self, "fingerprint", self.base.fingerprint)

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the difference at every site; one forward pass of either model."""
        model, base, ids = run.model, self.base, list(run.source.ids)
        shapes = [(one.n_layers, one.d_model, len(one.tokenizer)) for one in (model, base)]
        tokens = [one.tokenizer.convert_ids_to_tokens for one in (model, base)]
        if shapes[0] != shapes[1] or tokens[0](ids) != tokens[1](ids):
            layers, width, n = shapes[0]
            expected = f"a model of the same {layers} layers, width {width} and {n} tokens"
            got = "{} of {} layers, width {} and {} tokens".format(base.name, *shapes[1])
            raise bad_value("base", expected, got, f"pass what {model.name} was trained from")
        sites = [site for site, _ in places]
        mine, other = (site_vectors(one, run.source, sites) for one in (model, base))
        return mine - other

    def __reduce__(self) -> tuple[Any, ...]:
        """Be sent to another process as what loads the model there."""
        if self.base.origin is None:
            expected = "a model that another process can load"
            raise bad_value("base", expected, self.base, "pass its name or folder to load_model")
        return _minus, (self.base.origin,)

    def __repr__(self) -> str:
        return f"MinusModel({self.base.name!r}, {self.fingerprint})"


def _minus(load: Callable[[], LanguageModel]) -> MinusModel:
    return MinusModel(load())
