"""What is put in a vector's place, and how a run is corrupted, for activation patching.

1. A *replacement* is a source of vectors (`PlaceVectors`), `(run, places) -> vectors`, one vector
   per site, such as `MeanActivation(texts)`; of the run it sees the model and the prompt. Here:
   `Zero()`, `Resampled(text)`, `Amplified(3)` and `Without(Head(3))`.
2. A *corruption* returns the runs in which the clean vectors are restored: `OtherTokens(text)`, and
   `Noise(subject)` (Meng et al. 2022, section 2.1).

The tables of `causal` name both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Row, Run, capture, site_vectors
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.hashing import stable_hash
from superscopes_tl.model import Positions, Site, check_text, covering, resolve_positions, tokenize
from superscopes_tl.vectors import MappingFamily, PlaceVectors, Scale, label

Corruption = Callable[[Run], Sequence[Row]]
"""Returns the corrupted runs of a prompt, one or several samples, all as long as the prompt."""


@dataclass(frozen=True)
class Zero:
    """Replace by zero: for attn_out and mlp_out, the block adds nothing."""

    def __call__(
        self, run: Run, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        """Return zeros."""
        return torch.zeros(len(places), run.model.d_model)


@dataclass(frozen=True)
class Resampled:
    """Replace by the same site of another prompt.

    Attributes:
        text: the other prompt; positions are counted from its end, so that the last tokens
            correspond whatever the lengths. It must not be too short for that.
    """

    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "text")

    def __call__(
        self, run: Run, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        """Return the other prompt's vectors."""
        tokens = tokenize(run.model, self.text, argument="text", chat=run.chat)
        shift = len(tokens) - len(run.source)
        if short := [site for site, _ in places if site.position + shift < 0]:
            raise bad_value(
                "text",
                f"a token for position {short[0].position} of {len(run.source)}",
                f"{len(tokens)} tokens",
                "positions are counted from the end: take a longer text",
            )
        moved = [Site(site.kind, site.layer, site.position + shift) for site, _ in places]
        return site_vectors(run.model, tokens, moved)


@dataclass(frozen=True)
class Amplified:
    """Replace by a mapping function of the site's own vector.

    `Amplified(3)` amplifies in the prompt's own run; `Amplified(1, RandomDirection())` keeps the
    norm and nothing else.

    Attributes:
        alpha: the amplifier α.
        mapping: maps α to a mapping function, as in a sweep.
    """

    alpha: float
    mapping: MappingFamily = Scale()

    def __call__(
        self, run: Run, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        """Return f(v)."""
        own = site_vectors(run.model, run.source, [site for site, _ in places])
        return self.mapping(self.alpha)(own)


@dataclass(frozen=True, repr=False)
class Without:
    """Replace by v − part, such as one head's share of attn_out.

    Attributes:
        vectors: the part, any source of vectors: `Without(Head(3))` ablates one head.
    """

    vectors: PlaceVectors

    def __call__(
        self, run: Run, places: Sequence[tuple[Site, int]]
    ) -> Float[Tensor, "sites d_model"]:
        """Return what is left of every site."""
        own = site_vectors(run.model, run.source, [site for site, _ in places])
        return own - self.vectors(run, places)

    def __repr__(self) -> str:
        return f"Without({label(self.vectors)})"


@dataclass(frozen=True)
class OtherTokens:
    """Corrupt by running another prompt in place of this one.

    Attributes:
        text: a prompt of equally many tokens.
    """

    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "text")

    def __call__(self, run: Run) -> Sequence[Row]:
        """Return the run of the other prompt."""
        tokens = tokenize(run.model, self.text, argument="text", chat=run.chat)
        if len(tokens) != len(run.source):
            raise bad_value(
                "text",
                f"{len(run.source)} tokens, as {run.source.text!r} has",
                f"{len(tokens)}: {tokens.numbered()}",
                "take a text of the same length, or Noise(subject)",
            )
        return [Row(tokens.ids)]


@dataclass(frozen=True)
class Noise:
    """Corrupt by Gaussian noise on the embeddings of a subject (Meng et al. 2022).

    Attributes:
        subject: a part of the prompt, all of whose tokens get noise; or positions, as in a sweep.
        strength: the standard deviation of the noise, in units of that of the prompt's embeddings
            (the stream that enters block 0, without the BOS).
        draws: number of samples; effects are means over them.
        seed: selects the noise.
    """

    subject: Positions
    strength: float = 3.0
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("draws", self.draws, least=1, fix="10 is the choice of Meng et al.")

    def __call__(self, run: Run) -> Sequence[Row]:
        """Return one run per sample of the noise."""
        source = run.source
        positions = resolve_positions(source, self.subject)
        if isinstance(self.subject, str):  # that was its last token
            start = source.text.index(self.subject)
            positions = tuple(covering(source, start, start + len(self.subject)))
        seen = capture(run.model, source, kinds="resid_pre", layers=0)["resid_pre", 0]
        embedded = seen.float().cpu()
        size = self.strength * float(embedded[source.prefix :].std())
        rows = []
        for draw in range(self.draws):
            seed = stable_hash(self.seed, draw, source.text)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(embedded.shape, generator=generator)
            writes = {Site("resid_pre", 0, p): embedded[p] + size * noise[p] for p in positions}
            rows.append(Row(source.ids, writes))
        return rows
