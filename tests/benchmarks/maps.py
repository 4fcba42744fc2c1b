"""The map of what each cell recovers of the model's own words, and the best reading per site.

1. Read one token of one prompt at every layer and kind of the paper; patch each vector, with each
   of its α, into the layer that it was read from. The own words D are known beforehand.
2. The map is log p(D) after every patch. It is held against writing the same cells out.
3. A site's best reading is the text of its best α. The reference's way writes the text of every α
   with one `generate` call each and takes the one that is most similar to the prompt. Ours finds D,
   computes the map, and writes one text per site.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from superscopes_tl import PAPER_ALPHAS, PAPER_PROMPTS, LanguageModel, Patch, PatchedGenerator
from superscopes_tl.engine import Generation, site_vectors
from superscopes_tl.engine.forced import multiplies_bfloat16
from superscopes_tl.errors import brief
from superscopes_tl.model import PAPER_KINDS, Site, tokenize
from superscopes_tl.scores import (
    PAPER_SCORER,
    OwnWords,
    SentenceEmbeddingScorer,
    packaged_scorer,
    score_texts,
    words_of,
)
from superscopes_tl.vectors import Scale
from superscopes_tl.weights import quiet
from tests.benchmarks import ways
from tests.benchmarks.measure import Job, memory_above
from tests.benchmarks.roofline import flop_of_cell, flop_of_score, shape_of
from tests.benchmarks.ways import Tokens
from tests.benchmarks.work import Cell, spread

WRITTEN = "the same cells written out"
MAP = "recovered map"
HIGH = "recovered map, high"
REFERENCE = "best reading per site, the reference's way"
READING = "best reading per site"

PROMPT = PAPER_PROMPTS[0]
STAND_IN = "Country in the"
"""Takes the place of the own words where a model has none, as most with random weights: as many
tokens as a real model's words, four."""


@dataclass(frozen=True, eq=False)
class Map:
    """What is read and scored.

    Attributes:
        sites: every kind and layer at the prompt's last token.
        cells: of each site one per α, in this order.
        words: the own words.
        seconds: how long it takes to find these.
        nats: log p of the own words after each cell's patch.
        memory: bytes that the map took at most above the loaded model.
    """

    sites: Sequence[Site]
    cells: Sequence[Cell]
    words: OwnWords
    seconds: float
    nats: Sequence[float]
    memory: int


def make_map(generator: PatchedGenerator) -> Map:
    """Return the map of a model, computed once."""
    model = generator.model
    own_words(generator)  # nothing is timed cold
    started = time.perf_counter()
    words = own_words(PatchedGenerator(model))
    seconds = time.perf_counter() - started
    source = tokenize(model, PROMPT)
    kinds = [kind for kind in PAPER_KINDS if kind in model.kinds]
    sites = [
        Site(kind, layer, len(source) - 1) for kind in kinds for layer in range(model.n_layers)
    ]
    cells = [
        Cell(PROMPT, site.layer, alpha, Patch(Scale()(alpha)(vector), site.layer))
        for site, vector in zip(sites, site_vectors(model, source, sites), strict=True)
        for alpha in PAPER_ALPHAS
    ]
    nats: list[float] = []
    memory = memory_above(model.device, lambda: nats.extend(scores(generator, cells, words)))
    return Map(sites, cells, words, seconds, nats, memory)


def own_words(generator: PatchedGenerator) -> OwnWords:
    """Return the model's own words about the prompt, or what stands in for them."""
    (found,) = words_of(generator, [PROMPT])
    if found.undefined:
        (found,) = words_of(generator, [PROMPT], STAND_IN)
    return found


def scores(generator: PatchedGenerator, cells: Sequence[Cell], words: OwnWords) -> list[float]:
    """Return log p of the own words after each cell's patch, in nats."""
    patches = [cell.patch for cell in cells]
    found = generator.log_probabilities(patches, [words.token_ids] * len(patches))
    return [sum(nats) for nats in found]


def best_cells(cells: Sequence[Cell], worth: Sequence[float]) -> list[int]:
    """Return the number of each site's best cell; of equal ones the first."""
    step = len(PAPER_ALPHAS)
    return [
        max(range(start, start + step), key=worth.__getitem__)
        for start in range(0, len(cells), step)
    ]


def best_readings(model: LanguageModel, cells: Sequence[Cell]) -> list[tuple[float, Generation]]:
    """Our way: the α and the text of each site whose own words are most likely."""
    generator = PatchedGenerator(model)  # which knows no own words yet
    chosen = best_cells(cells, scores(generator, cells, own_words(generator)))
    texts = generator.generate([cells[number].patch for number in chosen])
    return [(cells[number].alpha, text) for number, text in zip(chosen, texts, strict=True)]


def reference_readings(
    hf: Any, generator: PatchedGenerator, cells: Sequence[Cell], encoder: Any
) -> list[tuple[float, str]]:
    """The reference's way: the α and the text of each site that is most similar to the prompt."""
    one_by_one = ways.one_generate_per_cell(hf, generator)
    texts = [generator.text_of(tokens) for tokens in one_by_one(cells)]
    scorer = SentenceEmbeddingScorer(encoder)  # which has embedded no text yet
    found = np.nan_to_num(score_texts(scorer, PROMPT, texts), nan=-np.inf).tolist()
    return [(cells[number].alpha, texts[number]) for number in best_cells(cells, found)]


def paper_encoder() -> Any:
    """Return the sentence encoder of the paper's scorer."""
    from sentence_transformers import SentenceTransformer

    with quiet():
        return SentenceTransformer(str(packaged_scorer() or PAPER_SCORER))


def map_jobs(hf: Any, generator: PatchedGenerator, made: Map, notes: list[str]) -> Iterator[Job]:
    """Yield the map and what it is held against, each run once; `notes` gets more to say."""
    cells, write = made.cells, partial(ways.engine(generator), made.cells)
    texts = statistics.fmean(flop_of_texts(hf, generator, cells, write()))
    yield Job(WRITTEN, write, len(cells), texts, WRITTEN, hf.dtype)
    scored = statistics.fmean(flop_of_map(hf, generator, made))
    score = partial(scores, generator, cells, made.words)
    yield Job(MAP, score, len(cells), scored, WRITTEN, hf.dtype)
    if hf.dtype == torch.float32 and multiplies_bfloat16(hf.device.type):
        high = PatchedGenerator(generator.model, precision="high")
        score = partial(scores, high, cells, made.words)
        notes += _errors(made, score())
        yield Job(HIGH, score, len(cells), scored, WRITTEN, torch.bfloat16)


def reading_jobs(
    hf: Any, generator: PatchedGenerator, made: Map, slow: int, notes: list[str]
) -> Iterator[Job]:
    """Yield the best readings in the reference's way, of `slow` sites, and in ours, of all."""
    step, n_sites, against = len(PAPER_ALPHAS), len(made.sites), READING
    starts = [number * step for number in spread(range(n_sites), slow)]
    few = [made.cells[start + i] for start in starts for i in range(step)]
    try:
        encoder = paper_encoder()
    except (OSError, ValueError) as error:
        notes.append(f"{REFERENCE} is left out: no {PAPER_SCORER} ({brief(error)}).")
    else:
        texts = flop_of_texts(hf, generator, few, ways.engine(generator)(few), shared=False)
        work = partial(reference_readings, hf, generator, few, encoder)
        work()
        flop, against = sum(texts) / len(starts), REFERENCE
        yield Job(REFERENCE, work, len(starts), flop, against, hf.dtype, "sites")
    ours = partial(best_readings, generator.model, made.cells)
    chosen = [made.cells[number] for number in best_cells(made.cells, made.nats)]
    written = [text.token_ids for _, text in ours()]
    flop = sum(flop_of_map(hf, generator, made))
    flop += sum(flop_of_texts(hf, generator, chosen, written))
    yield Job(READING, ours, n_sites, flop / n_sites, against, hf.dtype, "sites")


def flop_of_map(hf: Any, generator: PatchedGenerator, made: Map) -> list[int]:
    """Return the floating-point operations of each cell of the map."""
    shape, (first,) = shape_of(hf), generator.target.positions
    tail, words = len(generator.target.tokens) - first, len(made.words.token_ids)
    return [flop_of_score(shape, c.target_layer, first, tail, words) for c in made.cells]


def flop_of_texts(
    hf: Any,
    generator: PatchedGenerator,
    cells: Sequence[Cell],
    written: Sequence[Tokens],
    *,
    shared: bool = True,
) -> list[int]:
    """Return the floating-point operations of writing each cell out.

    Where they are `shared`, rows that are patched at the last block choose one token for
    themselves: those that agree in it continue alike.
    """
    shape, (first,) = shape_of(hf), generator.target.positions
    tail, longest = len(generator.target.tokens) - first, generator.max_new_tokens
    lengths = [
        # A text that ends early chose its end too.
        1 if shared and cell.target_layer == shape.n_layers - 1 else min(len(ids) + 1, longest)
        for cell, ids in zip(cells, written, strict=True)
    ]
    return [flop_of_cell(shape, first, tail, new) for new in lengths]


def notes_of(made: Map) -> list[str]:
    """Return what is to be said about a map."""
    words = made.words
    return [
        f"{'What stands in for own' if words.given else 'The own'} words about {words.about!r}, "
        f"{words.text!r} ({len(words.token_ids)} tokens), took {made.seconds:.2f} s; {READING} "
        f"includes this, {MAP} does not.",
        f"Peak memory of the map above the loaded model: {made.memory / 1e9:.2f} GB, "
        f"{len(made.cells)} cells.",
    ]


def _errors(made: Map, high: Sequence[float]) -> list[str]:
    """Return the difference that the precision makes to the shares recovered, where defined."""
    if made.words.undefined:
        return []
    distances = np.abs(np.subtract(high, made.nats)) / made.words.gap
    middle, far = np.quantile(distances, [0.5, 0.99])
    return [f"With high, recovered differs by {middle:.4f} at the median, {far:.4f} at the 99th "
            "percentile."]  # fmt: skip
