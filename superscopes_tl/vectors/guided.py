"""Bases: the vector that α is counted from, f(v) = b + α·(v − b).

The paper amplifies v itself (b = 0) and notes both that this resembles classifier-free guidance
(section 3.5), which amplifies the *difference* to an unconditional prediction, and that a better
base may exist (section 6). A base is any callable `(plan, places) -> vectors`, one vector per
(site, target layer):

1. `mean_activation(model, texts)`: what the site carries on average. α then amplifies what is
   special about this prompt.
2. `resid_mid`: what the block had before its MLP. With kind `resid_post`, v − b is the MLP output:
   α = 1 is the block output, and a larger α repeats the MLP's step.
3. `placeholder_state`: what stood at the placeholder. α = 0 is then the unpatched prompt.

Guidance on the logits, u + w·(c − u), is the setting `guide="logits"`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import capture, site_vectors
from superscopes_tl.errors import bad_value
from superscopes_tl.model import LanguageModel, Site, tokenize
from superscopes_tl.vectors.protocols import PlaceVectors, SourceRun


def mean_activation(
    model: LanguageModel, texts: Sequence[str], *, chat: bool = False
) -> PlaceVectors:
    """Return the base that is the mean over some texts, at their last tokens.

    Args:
        model: from `load_model`; the same that is swept.
        texts: at least two; the more they differ, the less of any one is in the mean.
        chat: whether they stand in the model's chat template, as the sweep's prompts then do.

    Raises:
        ValueError: fewer than two texts.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise bad_value("texts", "at least two texts", texts, "PAPER_PROMPTS, for example")
    several = [tokenize(model, text, chat=chat) for text in texts]
    seen = [(capture(model, text, kinds=model.kinds), text.own.stop - 1) for text in several]

    def mean_of_texts(
        plan: SourceRun, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        means = [
            torch.stack([run[site.kind, site.layer][last].float() for run, last in seen])
            for site, _ in places
        ]
        return torch.stack(means).mean(dim=1)

    # A file of readings knows a base by its name: other texts are another base.
    digest = zlib.crc32(repr(tuple(texts)).encode())
    where = " in chat" if chat else ""
    mean_of_texts.__name__ = f"mean of {len(texts)} texts{where} {digest:08x}"
    return mean_of_texts


def resid_mid(
    plan: SourceRun, places: Sequence[tuple[Site, int]]
) -> Float[Tensor, "sites d_model"]:
    """Return the residual stream before the MLP, at the same layer and token.

    Raises:
        UnavailableKindError: attention and MLP run in parallel in this model.
    """
    sites = [replace(site, kind="resid_mid") for site, _ in places]
    return site_vectors(plan.model, plan.source, sites)


def placeholder_state(
    plan: SourceRun, places: Sequence[tuple[Site, int]]
) -> Float[Tensor, "sites d_model"]:
    """Return what the placeholder carries at the target layer when nothing is patched."""
    states = plan.generator.placeholder_states.mean(dim=1)
    return torch.stack([states[target_layer] for _, target_layer in places])
