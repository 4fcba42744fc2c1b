"""Read the activations of a source prompt, all of them in one forward pass.

1. Tokenise the prompt.
2. Run the model once with hooks on the requested hook points.
3. Index the vectors by kind and layer *number* (never by position in a list of layers).
4. `usual_norms` says how long the activations of a kind and layer usually are: the median over the
   tokens of one text, read once per model. A first token is left out: it is an attention sink in
   most models, hundreds of times as long (Sun et al. 2024, "Massive Activations").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine.target_prompt import DESCRIPTION_PROMPT
from superscopes_tl.errors import bad_value
from superscopes_tl.model import (
    PAPER_KINDS,
    HookKind,
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    hook_name,
    load_model,
    tokenize,
)

Norms = dict[tuple[HookKind, int], float]
_USUAL: WeakKeyDictionary[LanguageModel, Norms] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Activations:
    """The activations of one run.

    Attributes:
        tokens: the source prompt.
        vectors: `(kind, layer)` to `Float[Tensor, "pos d_model"]`, in the model's dtype.
    """

    tokens: TokenizedText
    vectors: Mapping[tuple[HookKind, int], Float[Tensor, "pos d_model"]]

    def __getitem__(self, place: tuple[HookKind, int]) -> Float[Tensor, "pos d_model"]:
        """Return the vectors of a kind and layer at every position: `activations["mlp_out", 5]`.

        Raises:
            ValueError: that kind and layer were not captured.
        """
        if place not in self.vectors:
            fix = "name it in capture(kinds=..., layers=...)"
            raise bad_value("activations", f"one of {sorted(self.vectors)}", place, fix)
        return self.vectors[place]

    def at(self, site: Site) -> Float[Tensor, " d_model"]:
        """Return the vector of one site.

        Raises:
            ValueError: the site was not captured.
        """
        vectors = self[site.kind, site.layer]
        if not -len(vectors) <= site.position < len(vectors):
            fix = f"choose from {self.tokens.numbered()}"
            raise bad_value("position", f"0 to {len(vectors) - 1}", site.position, fix)
        return vectors[site.position]


def capture(
    model: LanguageModel | Any,
    prompt: str | TokenizedText,
    *,
    kinds: str | Iterable[str] = PAPER_KINDS,
    layers: int | Iterable[int] | None = None,
) -> Activations:
    """Run `prompt` once and return its activations at every position.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt, as text or already tokenised.
        kinds: out of `KINDS`.
        layers: layer numbers, counted from 0; defaults to every layer.

    Raises:
        ValueError: an empty prompt, an unknown kind, or a layer out of range.
    """
    model = load_model(model)
    kinds, numbers = model.checked_kinds(kinds), check_layers(layers, model.n_layers)
    tokens = tokenize(model, prompt) if isinstance(prompt, str) else prompt
    if not len(tokens):
        fix = "leave out what needs one, such as base=ResidMid()"
        raise bad_value("prompt", "at least one token to run", "no source prompt", fix)
    names = {(kind, layer): hook_name(kind, layer) for kind in kinds for layer in numbers}
    seen = model.activations(tokens.tensor(model.device), list(names.values()))
    # A copy: some backends return views of buffers that a later run may overwrite.
    vectors = {place: seen[name][0].clone() for place, name in names.items()}
    return Activations(tokens, MappingProxyType(vectors))


def site_vectors(
    model: LanguageModel, source: TokenizedText, sites: Sequence[Site]
) -> Float[Tensor, "sites d_model"]:
    """Return the activations at some sites, in float32 on the CPU, from one forward pass.

    Raises:
        ValueError: a kind that the model lacks, or a layer or position out of range.
    """
    seen = capture(
        model,
        source,
        kinds=dict.fromkeys(site.kind for site in sites),
        layers=dict.fromkeys(site.layer for site in sites),
    )
    return torch.stack([seen.at(site).float().cpu() for site in sites])


def usual_norms(model: LanguageModel, kinds: Iterable[HookKind]) -> Norms:
    """Return the median norm of some kinds at every layer, over the tokens of a usual text.

    The text is that of the paper's target prompt. A model that cannot hold it has no usual norms.
    """
    norms = _USUAL.setdefault(model, {})
    if missing := [kind for kind in dict.fromkeys(kinds) if (kind, 0) not in norms]:
        try:
            text = tokenize(model, DESCRIPTION_PROMPT.text)
        except ValueError:  # a context or vocabulary that is too small
            return {}
        seen = capture(model, text, kinds=missing).vectors
        norms |= {place: float(v[1:].float().norm(dim=-1).median()) for place, v in seen.items()}
    return norms
