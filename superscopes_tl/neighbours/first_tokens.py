"""What a lens reads of a model's own words: the baseline of amplified readings, without an α.

1. For every prompt take the model's own words (`scores.own_words`), and of these the first
   *content* token: the first one of a word that has a letter or digit and is no article (a, an,
   the). In ": a British rock band" it is " British".
2. Run every prompt once, and read each site's vector through each lens: log-probability and rank
   of the content tokens of *all* prompts.
3. *own* is the log-probability that a vector gives to its own prompt's token. The control is what
   the *other* prompts' vectors at the same place give to it, without those prompts whose token is
   the same; and what a random direction of the same norm does.
4. specific = own - others, in nats: what the vector tells of its own prompt. Prompts are resampled
   for its interval.

A lens predicts tokens at the site itself, while own words are generated after another prompt. So
the numbers compare sites and lenses with each other, and are no share recovered. A word that
repeats the name counts, too: `LensRecovery.table` shows which one it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from superscopes_tl.engine import (
    PatchedGenerator,
    TargetPrompt,
    default_target_prompt,
    site_vectors,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.model import (
    LanguageModel,
    Position,
    Site,
    TokenizedText,
    check_layers,
    check_template,
    load_model,
    named_positions,
    tokenize,
)
from superscopes_tl.neighbours.lenses import LENSES, Lens, logit_lens, parts_of, through, token_text
from superscopes_tl.scores import words_of
from superscopes_tl.statistics import bootstrap

ARTICLES = frozenset({"a", "an", "the"})

_CELL = ["lens", "kind", "source_layer"]
_FOUND = ["own", "others", "random", "own_rank", "others_rank", "random_rank"]


@dataclass(frozen=True, eq=False)
class LensRecovery:
    """How likely lenses make the model's own words, prompt by prompt.

    Attributes:
        table: a row per lens, kind, source layer and prompt: `prompt`, `content` (the token),
            `own`, `others` (mean) and `random` (nats), and the token's rank among the vocabulary
            in each case, 1 being the most likely: `own_rank`, `others_rank` (median),
            `random_rank`.
        left_out: prompts without own words that have a content token.
    """

    table: pd.DataFrame
    left_out: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Return means over prompts, with 95 % intervals of what is specific to the prompt.

        Returns:
            A row per lens, kind and source layer: `own`, `others`, `random` (mean nats),
            `specific` (own - others) with `specific_low` and `specific_high`, `own_rank` and
            `others_rank` (medians), and the number of `prompts`.
        """
        cells = self.table[_CELL].drop_duplicates().reset_index(drop=True)
        groups = self.table.groupby(_CELL, sort=False)
        for name in ("own", "others", "random"):
            cells[name] = groups[name].mean().to_numpy()
        count = self.table["prompt"].nunique()
        gains = (self.table["own"] - self.table["others"]).to_numpy().reshape(-1, count).T
        cells["specific"] = gains.mean(axis=0)
        cells["specific_low"], cells["specific_high"] = bootstrap(gains)
        for name in ("own_rank", "others_rank"):
            cells[name] = groups[name].median().to_numpy()
        return cells.assign(prompts=count)


def lens_recovery(
    model: LanguageModel | Any,
    prompts: Sequence[str],
    *,
    kinds: str | Iterable[str] = ("mlp_out", "resid_post"),
    layers: int | Iterable[int] | None = None,
    position: Position = -1,
    lenses: Mapping[str, Lens] = LENSES,
    target_prompt: TargetPrompt | str | None = None,
    chat: bool = False,
    source_template: str = "{}",
    max_new_tokens: int | None = None,
) -> LensRecovery:
    """Read the model's own words about many prompts out of their vectors, through lenses.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompts: the source prompts; duplicates count once.
        kinds: out of `KINDS`.
        layers: defaults to every layer.
        position: the token of each prompt.
        lenses: by name, such as `{**LENSES, "Jacobian lens": lens}`.
        target_prompt: of the own words, as in `SweepConfig`; so are the following.
        chat: whether prompts are put into the model's chat template.
        source_template: the text around each prompt.
        max_new_tokens: most tokens of the own words.

    Raises:
        ValueError: no two prompts with own words of different content tokens, a bad kind, layer or
            position, or a lens that cannot read them.
    """
    model = load_model(model)
    check_template(source_template)
    chosen, numbers = model.checked_kinds(kinds), check_layers(layers, model.n_layers)
    distinct = [] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    sources = [tokenize(model, text, chat=chat, template=source_template) for text in distinct]
    places = [next(iter(named_positions(tokens, position).items())) for tokens in sources]
    target = default_target_prompt(target_prompt, chat=chat)
    generator = PatchedGenerator(model, target, max_new_tokens=max_new_tokens, chat=chat)
    words = words_of(generator, [about for _, about in places])
    found = [content_token(model, own.token_ids) for own in words]
    kept = [number for number, token in enumerate(found) if token is not None]
    tokens = torch.tensor([found[number] or 0 for number in kept])
    if len(set(tokens.tolist())) < 2:
        expected = "at least two prompts whose own words begin differently"
        got = {text: own.text for text, own in zip(distinct, words, strict=True)}
        raise bad_value("prompts", expected, got or prompts, "add prompts about other things")
    sites = [Site(kind, layer, 0) for kind in chosen for layer in numbers]
    vectors = torch.cat([_vectors(model, sources[n], sites, places[n][0]) for n in kept])
    names = [(distinct[n], token_text(model, int(t))) for n, t in zip(kept, tokens, strict=True)]
    tables = []
    rows: dict[bool, tuple[Tensor, Tensor]] = {}
    for lens, random, moved in through(model, lenses, vectors, sites * len(kept), control=True):
        rows[random] = _read(model, moved, tokens)
        if random:
            tables.append(_table(lens, sites, names, tokens, rows))
    table = pd.concat(tables, ignore_index=True)
    left = tuple(text for number, text in enumerate(distinct) if number not in kept)
    return LensRecovery(table, left)


def content_token(model: LanguageModel, token_ids: Sequence[int]) -> int | None:
    """Return the first token of the first word that is no article; `None` if there is none.

    An article that goes on in the next token, as "a" of "apple" may, is none.
    """
    texts = [token_text(model, token) for token in token_ids]
    for number, (token, text) in enumerate(zip(token_ids, texts, strict=True)):
        if not any(character.isalnum() for character in text):
            continue
        following = "".join(texts[number + 1 : number + 2])
        if text.strip().casefold() not in ARTICLES or following[:1].isalnum():
            return token
    return None


def _vectors(
    model: LanguageModel, source: TokenizedText, sites: Sequence[Site], position: int
) -> Float[Tensor, "sites d_model"]:
    at = [Site(site.kind, site.layer, position) for site in sites]
    return site_vectors(model, source, at)


def _read(
    model: LanguageModel, moved: Float[Tensor, "rows d_model"], tokens: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
    """Return log-probability and rank of every token at every row."""
    nats, ranks = [], []
    for part in parts_of(moved):
        likely = logit_lens(model, part)
        nats.append(likely[:, tokens])
        above = [(likely > one[:, None]).sum(dim=1) for one in nats[-1].T]
        ranks.append(1.0 + torch.stack(above, dim=1))
    return torch.cat(nats), torch.cat(ranks)


def _table(
    lens: str,
    sites: Sequence[Site],
    names: Sequence[tuple[str, str]],
    tokens: Int[Tensor, " prompts"],
    rows: Mapping[bool, tuple[Tensor, Tensor]],
) -> pd.DataFrame:
    """Return one lens's rows, prompt by prompt at each site, from those of v and of random ones."""
    count = len(names)
    apart: Bool[Tensor, "vector token"] = tokens[:, None] != tokens
    columns = []
    for number, median in ((0, False), (1, True)):  # nats, ranks
        of, of_random = (rows[random][number].view(count, -1, count) for random in (False, True))
        others = of.masked_fill(~apart[:, None], torch.nan)
        control = others.nanquantile(0.5, dim=0) if median else others.nanmean(dim=0)
        own, random = (found.diagonal(dim1=0, dim2=2) for found in (of, of_random))
        columns += [found.reshape(-1).double().numpy() for found in (own, control, random)]
    place = [
        (lens, site.kind, site.layer, prompt, content)
        for site in sites
        for prompt, content in names
    ]
    table = pd.DataFrame(place, columns=[*_CELL, "prompt", "content"])
    return table.assign(**dict(zip(_FOUND, columns, strict=True)))
