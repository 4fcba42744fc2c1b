"""How α acts: mapping families f(v), and the base that α is counted from.

1. A mapping function is any callable from vectors to vectors of the same shape.
2. A mapping *family* maps the amplifier α to a mapping function; a sweep calls it once per α.
   `Scale()` is the paper's (section 3.4): f(v) = α·v, and α = 1 is Patchscopes. `RandomDirection()`
   is its control.
3. With a base b, a sweep patches f(v) = b + α·(v − b). The paper has b = 0, but notes the analogy
   to classifier-free guidance (section 3.5), which amplifies the *difference* to an unconditional
   prediction, and that a better base may exist (section 6). A base is a source of vectors:
   - `MeanActivation(texts)`: α amplifies what distinguishes this prompt from the average.
   - `ResidMid()`: the residual stream before the block's MLP. For kind `resid_post`, v − b is the
     MLP output: α = 1 is the block output, and a larger α amplifies the MLP's update.
   - `PlaceholderState()`: the unpatched state of the placeholder; α = 0 is the unpatched prompt.
4. Arithmetic is in float32, because α·v of a half-precision model can overflow float16.

Why does α matter at all, when the next block normalises its input? LN(α·v) = LN(v), but the
residual stream at the placeholder continues as α·v + (what later blocks add). At α = 1 the later
blocks drown out a weak v; at α = 9 it outweighs them.

A family of your own needs no registration:

    def from_mean(alpha: float) -> MappingFunction:
        return lambda v: mean + alpha * (v - mean)

    sweep(model, prompt, mapping=from_mean)

Guidance on the logits, u + α·(c − u), is the setting `guide="logits"`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import capture, site_vectors
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.model import LanguageModel, tokenize
from superscopes_tl.vectors.sources import Places, SourceRun

MappingFunction: TypeAlias = Callable[[Float[Tensor, "... d_model"]], Float[Tensor, "... d_model"]]
"""f(v): a mapping of vectors, applied before they are patched."""
MappingFamily: TypeAlias = Callable[[float], MappingFunction]
"""Returns the mapping function f(v) of an amplifier α (section 3.4)."""


@dataclass(frozen=True)
class Scale:
    """Amplify: f(v) = α·v (paper, section 3.4). α = 0 and negative α are legal."""

    def __call__(self, alpha: float) -> MappingFunction:
        """Return f for one α."""
        return lambda v: v.float() * alpha


@dataclass(frozen=True)
class RandomDirection:
    """Control: a random direction with the norm of α·v.

    Readings through it depend on the norm of the patched vector, not on the meaning of v. Each v
    has its own direction, the same for every α and batch: it is sampled from the seed and the signs
    of v.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0, fix="RandomDirection(0)")

    def __call__(self, alpha: float) -> MappingFunction:
        """Return f for one α."""

        def redirect(v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            # Signs, because rounding errors of v seldom change them.
            rows = [
                random_direction(row, zlib.crc32((row > 0).cpu().numpy().tobytes(), self.seed))
                for row in v.float().reshape(-1, v.shape[-1])
            ]
            return alpha * torch.stack(rows).reshape(v.shape)

        return redirect


def random_direction(v: Float[Tensor, "... d_model"], seed: int) -> Float[Tensor, "... d_model"]:
    """Return random directions with the norms of `v`."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(v.shape, generator=generator).to(v.device)
    redirected: Tensor = direction * (
        v.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
    )
    return redirected


def label(setting: Callable[..., object]) -> str:
    """Return the display name of a mapping, source, base or write: `__name__` or the repr."""
    return getattr(setting, "__name__", None) or repr(setting)


def stable_hash(*parts: object) -> int:
    """Return 32 bits of the parts' `repr`, the same in every process: a seed, or a digest."""
    return zlib.crc32(repr(parts).encode())


PAPER_MAPPING = label(Scale())
"""Display name of f(v) = α·v."""


@dataclass(frozen=True)
class MeanActivation:
    """Base: the mean activation over texts, at their last tokens.

    Attributes:
        texts: at least two; the more diverse, the better.
        chat: whether they are rendered in the chat template, as in a sweep with `chat=True`.
    """

    texts: Sequence[str]
    chat: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or len(self.texts) < 2:
            raise bad_value("texts", "at least two texts", self.texts, "for example PAPER_PROMPTS")
        object.__setattr__(self, "texts", tuple(self.texts))

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the mean at every site; one forward pass per text and model."""
        known = _MEANS.setdefault(run.model, {})
        if self not in known:
            known[self] = self._means(run.model)
        return torch.stack([known[self][site.kind, site.layer] for site, _ in places])

    def __repr__(self) -> str:
        chat = ", chat=True" if self.chat else ""
        return f"MeanActivation(<{len(self.texts)} texts {stable_hash(*self.texts):08x}>{chat})"

    def _means(self, model: LanguageModel) -> dict[tuple[str, int], Float[Tensor, " d_model"]]:
        rows: dict[tuple[str, int], list[Tensor]] = {}
        for text in self.texts:
            tokens = tokenize(model, text, chat=self.chat)
            seen = capture(model, tokens, kinds=model.kinds)
            for kind in model.kinds:
                for layer in range(model.n_layers):
                    last = seen[kind, layer][tokens.own.stop - 1]
                    rows.setdefault((kind, layer), []).append(last.float())
        return {place: torch.stack(found).mean(dim=0) for place, found in rows.items()}


_MEANS: WeakKeyDictionary[LanguageModel, dict[MeanActivation, dict[tuple[str, int], Tensor]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class ResidMid:
    """Base: the residual stream before the MLP, at the same layer and token.

    Models that compute attention and MLP in parallel have none (`UnavailableKindError`).
    """

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return `resid_mid` at every site's layer and token."""
        sites = [replace(site, kind="resid_mid") for site, _ in places]
        return site_vectors(run.model, run.source, sites)


@dataclass(frozen=True)
class PlaceholderState:
    """Base: what the placeholder has at the target layer when nothing is patched."""

    def __call__(self, run: SourceRun, places: Places) -> Float[Tensor, "places d_model"]:
        """Return the state of the placeholder at every target layer; the mean of several."""
        states = run.generator.placeholder_states.mean(dim=1)
        return torch.stack([states[target_layer] for _, target_layer in places])
