"""Whose words are they? A reading beside what is said without it, by a mixture, by other prompts.

A reading may say what the prompt, the model or any vector would have said. `whose_knowledge` shows
one cell beside all of them ("Do Activation Verbalization Methods Convey Privileged Information?",
arXiv 2509.13316: a verbalizer that is shown no activation often does as well):

1. Patch the cell, nothing, f(v) at α = 0, other prompts' vectors, a random direction of equal norm.
2. Generate all texts in one batch, and score the own words D of the cell's name after each patch in
   another. Beside them: what the model says with the name itself in the placeholder's place.

`mixture` puts two names into one vector and asks which is told ("the loudest concept wins"):

1. f(v₁) and f(v₂) of the same layer and kind are what a sweep would patch for either prompt.
2. Patch a·f(v₁) + (1 − a)·f(v₂) for some shares a: as they are; both scaled to their mean norm; and
   scaled, with a random direction in the place of f(v₂), which knows no name.
3. Score the own words of both names after each patch. They flip where the two shares recovered
   cross. If the louder vector wins, equal norms move that point towards a = 0.5.

`agreement` asks whether several target prompts read the same. The activation difference lens asks
with several and keeps what they share (arXiv 2510.13900): what all find is owed to no single one.

1. Sweep the same cells with each target prompt, one batch of cells after the other.
2. The agreement of a cell is the mean similarity of its descriptions, over all pairs of prompts.
3. By chance, texts in one style are somewhat alike: the mean similarity of a cell's description by
   one prompt to what another prompt makes of the same cell of another source prompt.
4. Each prompt chooses, for every site, the α that recovers most of its own words; `choices` counts
   them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from superscopes_tl.engine import (
    Generation,
    Patch,
    TargetPrompt,
    as_target_prompt,
    crop_description,
    no_patch,
)
from superscopes_tl.errors import bad_type, bad_value
from superscopes_tl.experiment import (
    SITE,
    SweepPlan,
    collect,
    make_control,
    make_patches,
    other_prompts,
    plan_sweep,
)
from superscopes_tl.model import LanguageModel, Position, load_model
from superscopes_tl.scores import OwnWords, Scorer, no_scores, score_texts, words_of
from superscopes_tl.vectors import random_direction, stable_hash

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The default shares a of the first vector."""

_OWN = ("layers", "kinds", "positions", "alphas", "controls", "generate", "scorer", "score_on",
        "score_against")  # fmt: skip
"""Settings that have an argument of their own here, or no effect."""
_CELL = [*SITE, "alpha"]
_OTHER = "other_prompt"
_ASKED = ("target_prompt", "controls", "others", "generate")
"""Settings that `agreement` makes."""


def whose_knowledge(
    model: LanguageModel | Any,
    prompt: str,
    *,
    layer: int,
    kind: str = "mlp_out",
    position: Position = -1,
    alpha: float = 1,
    **settings: Any,
) -> pd.DataFrame:
    """Show a reading beside what the model says with other vectors, and with none.

    The vector knows something of its own only as far as its row differs from those without it.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        layer: the source layer.
        kind: the kind of activation.
        position: the token: an index or a substring.
        alpha: the amplifier.
        **settings: other sweep settings, with one target layer; `others` is the number of other
            prompts.

    Returns:
        A row for each of `given`: "the vector", "the name" (the own words), "nothing" (the
        unpatched prompt), "α = 0" (a zero vector, or the base), "another prompt's vector" (several)
        and "a random direction". `of` is the prompt whose vector or name it is, `text` the
        description; of the own words of this prompt `recovered` is the share, `nats` the
        log-probability, and `gain` how much higher that is than without a patch, in nats.

    Raises:
        ValueError, TypeError: a bad setting, or several cells.
    """
    plan = _one_cell(model, prompt, layer, kind, position, alpha, settings)
    cell, own = plan.cells[0], make_patches(plan)
    about = plan.about(cell.position)
    rows = [("the vector", about, own[0]), ("nothing", "", no_patch(plan.generator.model))]
    (zero,) = make_control("alpha_zero", plan, plan.cells, own)
    (random,) = make_control("random_direction", plan, plan.cells, own)
    rows.append(("α = 0", "", zero))
    for name in other_prompts(plan, cell.position, own):
        there = plan.with_settings(positions=-1).at_prompt(name)
        rows.append(("another prompt's vector", name, make_patches(there)[0]))
    rows.append(("a random direction", "", random))
    (words,) = plan.own_words([cell.position]).values()
    (named,) = words_of(plan.generator, [about])  # unlike `words` never a reference text
    patches = [replace(patch, seed=own[0].seed) for _, _, patch in rows]
    texts, nats = _judged(plan, patches, [words])
    found = [
        (given, of, text.description, likely)
        for (given, of, _), text, (likely,) in zip(rows, texts, nats, strict=True)
    ]
    found.insert(1, ("the name", about, named.text, words.plain_nats))
    table = pd.DataFrame(found, columns=["given", "of", "text", "nats"])
    shares = [words.recovered(likely) for likely in table["nats"]]
    table.insert(3, "recovered", shares)
    return table.assign(gain=table["nats"] - words.unpatched_nats)


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a model says of mixtures of two vectors.

    Attributes:
        table: a row per way to mix and share a of the first vector: `vectors` ("as they are",
            "equal norms" or "the second random"), `share`, `recovered_1` and `recovered_2` of the
            two prompts' own words, `told`, the prompt whose own words recover more ("" if neither
            recovers any), and `text`, the description.
        flips: by way, the share at which the two shares recovered cross first, interpolated
            linearly; `None` if they never do.
        prompts: the two prompts.
        own_words: what the model says of each name itself.
        norms: of f(v₁) and f(v₂) as they are.
    """

    table: pd.DataFrame
    flips: Mapping[str, float | None]
    prompts: tuple[str, str]
    own_words: tuple[OwnWords, OwnWords]
    norms: tuple[float, float]


def mixture(
    model: LanguageModel | Any,
    prompt_1: str,
    prompt_2: str,
    *,
    layer: int,
    kind: str = "mlp_out",
    position: Position = -1,
    alpha: float = 1,
    shares: Sequence[float] = SHARES,
    **settings: Any,
) -> Mixture:
    """Read a·f(v₁) + (1 − a)·f(v₂) of two prompts over a: which is told, and where does it flip?

    Example:
        >>> mixture(load_model(), "Pink Floyd", "Amazon River", layer=12).flips  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt_1: the first source prompt.
        prompt_2: the second one.
        layer: the source layer of both.
        kind: the kind of activation of both.
        position: the token of either prompt.
        alpha: the amplifier of both.
        shares: a, the shares of the first vector, at least two; the second has 1 − a. Opposed or
            orthogonal vectors lose norm on the way: halfway, orthogonal ones of equal norm have
            0.71 of it.
        **settings: other sweep settings, with one target layer.

    Raises:
        ValueError, TypeError: a bad setting, several cells, prompts with one name, or a name whose
            share recovered is not defined.
    """
    asked = sorted({float(share) for share in shares})
    if len(asked) < 2 or not all(map(math.isfinite, asked)):
        raise bad_value("shares", "two or more finite numbers", shares, "0, 0.5 and 1, for example")
    first = _one_cell(model, prompt_1, layer, kind, position, alpha, settings)
    second = first.at_prompt(prompt_2)
    plans = (first, second)
    one, two = (make_patches(plan)[0] for plan in plans)
    names = [plan.about(plan.cells[0].position) for plan in plans]
    if names[0] == names[1]:
        raise bad_value("prompt_2", "another name than prompt_1", prompt_2, "mix two names")
    words = [_defined_words(plan, f"prompt_{n}") for n, plan in enumerate(plans, start=1)]
    mean = (one.norm + two.norm) / 2
    equal = [patch.vector * (mean / max(patch.norm, 1e-30)) for patch in (one, two)]
    random = random_direction(equal[1], stable_hash(prompt_1, prompt_2))
    ways = {
        "as they are": (one.vector, two.vector),
        "equal norms": (equal[0], equal[1]),
        "the second random": (equal[0], random),
    }
    places = [(way, share) for way in ways for share in asked]
    patches = [
        replace(one, vector=share * ways[way][0] + (1 - share) * ways[way][1])
        for way, share in places
    ]
    texts, nats = _judged(first, patches, words)
    shares_of = [
        [own.recovered(n) for own, n in zip(words, likely, strict=True)] for likely in nats
    ]
    rows = [
        (way, share, *both, _told(names, both), text.description)
        for (way, share), both, text in zip(places, shares_of, texts, strict=True)
    ]
    columns = ["vectors", "share", "recovered_1", "recovered_2", "told", "text"]
    table = pd.DataFrame(rows, columns=columns)
    difference = table["recovered_1"] - table["recovered_2"]
    flips = {way: flip_point(asked, list(difference[table["vectors"] == way])) for way in ways}
    return Mixture(table, flips, (names[0], names[1]), (words[0], words[1]), (one.norm, two.norm))


def flip_point(shares: Sequence[float], difference: Sequence[float]) -> float | None:
    """Return the first share at which a difference is 0, linear between those that are known.

    >>> flip_point([0, 0.5, 1], [-1, -0.5, 1.5])
    0.625
    """
    points = list(zip(shares, difference, strict=True))
    for (start, low), (end, high) in pairwise(points):
        if low == 0:
            return float(start)
        if low * high < 0:
            return float(start + (end - start) * low / (low - high))
    return float(points[-1][0]) if points[-1][1] == 0 else None


def _defined_words(plan: SweepPlan, argument: str) -> OwnWords:
    """Return the own words of a plan's cell, of which a share can be recovered."""
    (words,) = plan.own_words([plan.cells[0].position]).values()
    if words.undefined:
        expected = "a name whose share recovered is defined"
        raise bad_value(argument, expected, words.undefined, "mix other names")
    return words


def _told(names: Sequence[str], both: Sequence[float]) -> str:
    """Return the name whose own words recover more, if they recover anything."""
    share, name = max(zip(both, names, strict=True))
    return name if share > 0 else ""


def _one_cell(
    model: Any, prompt: str, layer: int, kind: str, position: Position, alpha: float,
    settings: Mapping[str, Any],
) -> SweepPlan:  # fmt: skip
    """Return the plan of one cell."""
    if misplaced := [name for name in _OWN if name in settings]:
        expected = "settings of how to patch and read"
        raise bad_value("settings", expected, misplaced, "say where with layer=, kind=, alpha=")
    plan = plan_sweep(
        model, prompt, layers=layer, kinds=kind, positions=position, alphas=alpha,
        scorer=no_scores, **settings,
    )  # fmt: skip
    if (n := len(plan.cells)) != 1:
        fix = "pass one layer, kind, position, alpha and target_layer"
        raise bad_value("layer", "one cell", f"{n} cells", fix)
    return plan


def _judged(
    plan: SweepPlan, patches: Sequence[Patch], words: Sequence[OwnWords]
) -> tuple[list[Generation], list[list[float]]]:
    """Return the texts of patches, and after each the log-probability of each of the own words."""
    texts = plan.generator.generate(patches)
    pairs = [(replace(patch, seed=None), one.token_ids) for patch in patches for one in words]
    likely = plan.generator.log_probabilities([p for p, _ in pairs], [ids for _, ids in pairs])
    nats = iter(sum(tokens) if tokens else math.nan for tokens in likely)
    return texts, [[next(nats) for _ in words] for _ in patches]


@dataclass(frozen=True, eq=False)
class Agreement:
    """The same cells read with several target prompts.

    Attributes:
        table: a row per cell: `agreement` and `chance`, mean similarities between -1 and 1 (NaN
            where fewer than two prompts describe anything), `recovered` and
            `other_prompt_recovered`, means over target prompts, and `choices`, how many of the
            target prompts recover most with this α.
        readings: a row per cell and target prompt, with the columns of a sweep and
            `target_prompt`.
    """

    table: pd.DataFrame
    readings: pd.DataFrame

    def best(self) -> pd.DataFrame:
        """Return, for each site, the α that most target prompts choose.

        Of equals that with the highest agreement, then the smallest |α|.
        """
        ranked = self.table.assign(size=-self.table["alpha"].abs())
        order = ["choices", "agreement", "size"]
        ranked = ranked.sort_values(order, ascending=False, na_position="last", kind="stable")
        return ranked.groupby(SITE, sort=False).head(1).sort_index().drop(columns="size")


def agreement(
    model: LanguageModel | Any,
    prompt: str,
    target_prompts: Sequence[TargetPrompt | str],
    *,
    progress: bool = True,
    **settings: Any,
) -> Agreement:
    """Read the same cells with several target prompts, and say where these agree.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        target_prompts: at least two different ones; a plain text has the placeholder `x`.
        progress: whether to show a progress bar for each.
        **settings: other sweep settings; `scorer` compares the descriptions.

    Raises:
        ValueError, TypeError: a bad setting, or fewer than two target prompts.
        SweepInterrupted, SweepError: as `SweepPlan.run`.
    """
    if isinstance(target_prompts, str | TargetPrompt):
        raise bad_type("target_prompts", "several target prompts", target_prompts, "pass a list")
    several = list(dict.fromkeys(map(as_target_prompt, target_prompts)))
    if len(several) < 2:
        fix = "ask in two ways at least"
        raise bad_value("target_prompts", "two different ones", target_prompts, fix)
    if misplaced := [name for name in _ASKED if name in settings]:
        expected = "settings other than the prompts and their controls"
        raise bad_value("settings", expected, misplaced, "leave them out")
    model = load_model(model)
    made: dict[str, Any] = {"controls": _OTHER, "others": 1, "generate": "all"}
    plans = [plan_sweep(model, prompt, target_prompt=one, **made, **settings) for one in several]
    tables = []
    for plan, one in zip(plans, several, strict=True):
        table = collect([plan], progress=progress).table
        tables.append(table.assign(target_prompt=f"{one.text} {one.answer}".strip()))
    readings = pd.concat(tables, ignore_index=True)
    alike, chance = similar_pairs(
        plans[0].scorer,
        [table["description"].tolist() for table in tables],
        [[crop_description(text) for text in table[f"{_OTHER}_text"]] for table in tables],
    )
    shares = ["recovered", f"{_OTHER}_recovered"]
    means = readings.groupby(_CELL, sort=False)[shares].mean().reset_index()
    choices = sum(_chosen(table) for table in tables)
    return Agreement(means.assign(agreement=alike, chance=chance, choices=choices), readings)


def similar_pairs(
    scorer: Scorer, texts: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return each cell's mean similarity between prompts: of its texts, and to the others' texts.

    Args:
        scorer: compares two texts; both orders count.
        texts: by target prompt, a text per cell.
        others: the same of another source prompt.
    """
    orders = list(permutations(range(len(texts)), 2))
    found = []
    for compared in (texts, others):
        one = [text for p, _ in orders for text in texts[p]]
        other = [text for _, q in orders for text in compared[q]]
        scores = np.array(score_texts(scorer, one, other), dtype=float).reshape(len(orders), -1)
        there = (~np.isnan(scores)).sum(axis=0)
        mean = np.nansum(scores, axis=0) / np.maximum(there, 1)
        found.append(np.where(there, mean, math.nan))
    return found[0], found[1]


def _chosen(table: pd.DataFrame) -> np.ndarray:
    """Return 1 for the α of each site that recovers most, of equals the smallest |α|, else 0."""
    ranked = table.assign(size=-table["alpha"].abs()).dropna(subset="recovered")
    ranked = ranked.sort_values(["recovered", "size"], ascending=False, kind="stable")
    best = ranked.groupby(SITE, sort=False).head(1).index
    return np.asarray(table.index.isin(best).astype(int))
