"""What stands in a vector's place, and how a run is corrupted, for activation patching.

1. A *replacement* has the shape of a base (`config.PlaceVectors`), `(run, places) -> vectors`, one
   vector per site, so `guided.mean_activation(model, texts)` is one, and so is any source. Of the
   run it may ask the model and the source prompt. Here: `zero`, `resampled`, `amplified` and
   `without`.
2. A *corruption* gives the runs in which the clean vectors are put back: `other_tokens`, and
   `noise` (Meng et al. 2022, section 2.1).

Both carry their names into the tables of `causal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Row, Run, capture, site_vectors
from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.hashing import stable_hash
from superscopes_tl.model import Positions, Site, check_text, covering, resolve_positions, tokenize
from superscopes_tl.vectors import MappingFamily, PlaceVectors, family_name, scale

Corruption = Callable[[Run], Sequence[Row]]
"""Gives the corrupted runs of a prompt, one or several draws, all as long as the prompt."""


def zero(run: Run, places: Sequence[tuple[Site, int]]) -> Float[Tensor, "sites d_model"]:
    """Replace by nothing: for attn_out and mlp_out, the block goes on as if it had added none."""
    return torch.zeros(len(places), run.model.d_model)


def resampled(text: str) -> PlaceVectors:
    """Return the replacement by the same site of another prompt.

    Args:
        text: the other prompt; positions are counted from its end, so that last token meets last
            token whatever the lengths.

    Raises:
        ValueError: when called, if the other prompt is too short.
    """
    check_text(text, "text")

    def other(run: Run, places: Sequence[tuple[Site, int]]) -> Float[Tensor, "sites d_model"]:
        tokens = tokenize(run.model, text, argument="text", chat=run.chat)
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

    other.__name__ = f"{text!r}"
    return other


def amplified(alpha: float, mapping: MappingFamily = scale) -> PlaceVectors:
    """Return the replacement by what a mapping function makes of the site's own vector.

    `amplified(3)` amplifies in the prompt's own run; `amplified(1, random_direction())` keeps the
    norm and nothing else.

    Args:
        alpha: the amplifier α.
        mapping: gives the mapping function of each α, as in a sweep.
    """

    def own(run: Run, places: Sequence[tuple[Site, int]]) -> Float[Tensor, "sites d_model"]:
        return mapping(alpha)(site_vectors(run.model, run.source, [site for site, _ in places]))

    own.__name__ = f"{family_name(mapping)}({alpha:g})"
    return own


def without(vectors: PlaceVectors) -> PlaceVectors:
    """Return the replacement that takes a part off: v − part, such as one head's share of attn_out.

    Args:
        vectors: the part, from `sources`: `without(head(3))` ablates one head.
    """

    def rest(run: Run, places: Sequence[tuple[Site, int]]) -> Float[Tensor, "sites d_model"]:
        own = site_vectors(run.model, run.source, [site for site, _ in places])
        return own - vectors(run, places)

    rest.__name__ = f"without {family_name(vectors)}"
    return rest


def other_tokens(text: str) -> Corruption:
    """Return the corruption that runs another prompt in place of this one.

    Args:
        text: a prompt of equally many tokens.

    Raises:
        ValueError: when called, if the lengths differ.
    """
    check_text(text, "text")

    def corrupted(run: Run) -> Sequence[Row]:
        tokens = tokenize(run.model, text, argument="text", chat=run.chat)
        if len(tokens) != len(run.source):
            raise bad_value(
                "text",
                f"{len(run.source)} tokens, as {run.source.text!r} has",
                f"{len(tokens)}: {tokens.numbered()}",
                "take a text of the same length, or noise(subject)",
            )
        return [Row(tokens.ids)]

    corrupted.__name__ = f"{text!r}"
    return corrupted


def noise(
    subject: Positions, *, strength: float = 3.0, draws: int = 10, seed: int = 0
) -> Corruption:
    """Return the corruption of Meng et al. 2022: Gaussian noise on the embeddings of a subject.

    Args:
        subject: a part of the prompt, all of whose tokens get noise; or positions, as in a sweep.
        strength: the noise's standard deviation, in those of the prompt's embeddings (the stream
            that enters block 0, without the BOS).
        draws: how many times to draw; effects are means over draws.
        seed: chooses the noise.

    Raises:
        ValueError, TypeError: no draw. When called: a subject that is not there, or twice.
    """
    check_count("draws", draws, least=1, fix="10 is the choice of Meng et al.")

    def corrupted(run: Run) -> Sequence[Row]:
        source = run.source
        positions = resolve_positions(source, subject)
        if isinstance(subject, str):  # that was its last token
            start = source.text.index(subject)
            positions = tuple(covering(source, start, start + len(subject)))
        seen = capture(run.model, source, kinds="resid_pre", layers=0)["resid_pre", 0]
        embedded = seen.float().cpu()
        size = strength * float(embedded[source.prefix :].std())
        rows = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(stable_hash(seed, draw, source.text))
            drawn = torch.randn(embedded.shape, generator=generator)
            writes = {Site("resid_pre", 0, p): embedded[p] + size * drawn[p] for p in positions}
            rows.append(Row(source.ids, writes))
        return rows

    corrupted.__name__ = f"noise on {subject!r}"
    return corrupted
