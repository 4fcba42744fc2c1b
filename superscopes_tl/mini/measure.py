"""What the bundled model can do, as counts: the numbers behind `report.py`.

1. Recall: the description after each name in plain text.
2. Readings: last-token block outputs and MLP outputs of each name at every layer, times every
   alpha, read at target layer 0. A reading is exact when the text up to the next `,` equals the
   description.
3. Contextualization: the first layer whose unscaled block output reads the description (l_c),
   and whether an earlier layer reads the last word's own meaning or another name that ends so.
4. Figure 3: MiniLM similarity between reading and source prompt, best of five alphas against
   alpha 1. Two controls: `corrected` counts a prompt when its best score exceeds the 95th
   percentile of what the other prompts' readings of the same layer and budget score against it
   (chance: 5 %), and `equal budget` gives alpha 1 five readings too, the greedy one and four
   drawn at temperature 1.
"""

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from superscopes_tl.engine import PAPER_PROMPTS
from superscopes_tl.mini.facts import Fact, held_out
from superscopes_tl.mini.reader import Reader, States
from superscopes_tl.scores import PAPER_THRESHOLD, SentenceEmbeddingScorer, similarities
from superscopes_tl.statistics import best_scores, corrected_hits

ALPHAS = (3, 6, 9, 12, 15)
TOO_LARGE = 100
EVERY_ALPHA = (1, *ALPHAS, TOO_LARGE)
Marks = Bool[np.ndarray, "layer name"]


@dataclass(frozen=True)
class Readings:
    """All readings of one kind of activation for some names.

    Attributes:
        texts: Per alpha and layer, the reading of each name.
        truth: The description of each name.
    """

    texts: Mapping[int, Sequence[Sequence[str]]]
    truth: Sequence[str]

    def exact(self, alpha: int) -> Marks:
        """Return which readings equal the description."""
        return np.array(
            [
                [t == want for t, want in zip(row, self.truth, strict=True)]
                for row in self.texts[alpha]
            ]
        )

    def any_alpha(self) -> Marks:
        """Return which names some alpha of `ALPHAS` reads, per layer."""
        found: Marks = np.any([self.exact(alpha) for alpha in ALPHAS], axis=0)
        return found


@dataclass(frozen=True)
class Curves:
    """Prompts whose reading of an MLP output counts, per layer: Figure 3 and its controls.

    Attributes:
        alpha_1: Greedy reading of the unscaled vector (Patchscopes).
        any_alpha: Best of the five amplified readings (Superscopes).
        equal_budget: Best of five readings of the unscaled vector.
    """

    alpha_1: list[int]
    any_alpha: list[int]
    equal_budget: list[int]


def read_all(reader: Reader, vectors: Float[Tensor, "layer name d_model"]) -> list[list[str]]:
    """Read every vector at target layer 0; returns texts as `[layer][name]`."""
    count = vectors.shape[1]
    flat = reader.read(vectors.flatten(0, 1))
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def groups(facts: Sequence[Fact], sample: int) -> dict[str, list[Fact]]:
    """Return the names to measure: the paper's 48, held-out ones, and all (or some of all).

    Args:
        facts: The table.
        sample: At most so many names of each group, drawn with a fixed seed; 0 for no limit.
    """
    hidden = held_out(facts)
    found = {
        "paper": [fact for fact in facts if fact.name in PAPER_PROMPTS],
        "held-out": [fact for fact in facts if fact.name in hidden],
        "all": list(facts),
    }
    rng = random.Random(0)
    return {
        title: rng.sample(group, sample) if sample and len(group) > sample else group
        for title, group in found.items()
    }


def recall(reader: Reader, facts: Sequence[Fact]) -> dict[str, bool]:
    """Return, by name, whether its description follows it in plain text."""
    texts = reader.recall([fact.name for fact in facts])
    return {fact.name: text == fact.description for text, fact in zip(texts, facts, strict=True)}


def readings(
    reader: Reader, states: States, group: Sequence[Fact], alphas: Sequence[int]
) -> dict[str, Readings]:
    """Read block outputs and MLP outputs of a group at every layer and alpha."""
    truth = [fact.description for fact in group]
    return {
        kind: Readings({alpha: read_all(reader, alpha * v) for alpha in alphas}, truth)
        for kind, v in (("resid_post", states.resid_post), ("mlp_out", states.mlp_out))
    }


def contextualization_layers(exact: Marks) -> list[int | None]:
    """Return l_c of each name: the first layer that reads it, None where no layer does.

    >>> contextualization_layers(np.array([[False, True], [False, False], [True, True]]))
    [2, 0]
    """
    return [int(column.argmax()) if column.any() else None for column in exact.T]


def last_word_first(
    facts: Sequence[Fact], group: Sequence[Fact], plain: Sequence[Sequence[str]]
) -> list[bool]:
    """Return, per name whose last word has a meaning, whether that is read before l_c.

    Args:
        facts: The table.
        group: The names that were read.
        plain: `[layer][name]` readings of the unscaled block outputs.

    Returns:
        One entry per name of several words whose last word is a word of the table: whether some
        layer before l_c reads that word's meaning or another name that ends with it.
    """
    by_last: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in facts:
        by_last[fact.name.split()[-1].lower()][fact.name] = fact.description
    words = {fact.name.lower() for fact in facts if fact.kind == "word"}
    starts = contextualization_layers(Readings({1: plain}, [f.description for f in group]).exact(1))
    marks = []
    for index, (fact, start) in enumerate(zip(group, starts, strict=True)):
        last = fact.name.split()[-1].lower()
        if " " in fact.name and last in words:
            others = {text for name, text in by_last[last].items() if name != fact.name}
            marks.append(any(row[index] in others for row in plain[:start]))
    return marks


def read_earlier(resid_post: Readings) -> list[bool]:
    """Return, per name, whether some alpha > 1 reads its block output before l_c."""
    starts = contextualization_layers(resid_post.exact(1))
    found = resid_post.any_alpha()
    return [bool(found[:start, index].any()) for index, start in enumerate(starts)]


def nearest_own(states: States, kind: str) -> Marks:
    """Return which vectors lie nearest to their own name's block output.

    The bound on any reader: where the nearest block output of the last layer but one (cosine,
    means removed) is another name's, the vector does not tell the names apart.

    Args:
        states: Of all names.
        kind: `resid_post` or `mlp_out`.
    """
    vectors: Tensor = getattr(states, kind)
    code = states.resid_post[-2]
    known = torch.nn.functional.normalize(code - code.mean(0), dim=-1)
    centred = vectors - vectors.mean(1, keepdim=True)
    nearest = torch.stack([(layer @ known.T).argmax(1) for layer in centred])
    own: Marks = (nearest == torch.arange(len(known))).numpy()
    return own


def similarity(
    layers: Sequence[Sequence[Sequence[str]]], prompts: Sequence[str]
) -> Float[np.ndarray, "layer prompt text reference"]:
    """Score every reading against every prompt with MiniLM.

    Args:
        layers: Per layer and source prompt, the texts of its budget.
        prompts: The prompts, both as sources and as references.

    Returns:
        Cosine similarities; NaN for an empty reading.
    """
    texts = sorted({text for layer in layers for budget in layer for text in budget})
    rows = dict(zip(texts, similarities(SentenceEmbeddingScorer(), texts, prompts), strict=True))
    return np.array([[[rows[text] for text in budget] for budget in layer] for layer in layers])


def count_prompts(
    scores: Float[np.ndarray, "layer prompt text reference"], *, corrected: bool
) -> list[int]:
    """Return how many prompts count at each layer.

    Args:
        scores: From `similarity`.
        corrected: Compare with the 95th percentile of the other prompts' best scores against
            the same reference instead of with the threshold of the paper.
    """
    best = best_scores(scores)  # [layer, source, reference]
    if corrected:
        return [int(corrected_hits(layer).sum()) for layer in best]
    return [int((np.diagonal(layer) > PAPER_THRESHOLD).sum()) for layer in best]


def figure_3(
    reader: Reader, states: States, mlp_out: Readings, prompts: Sequence[str], seed: int = 0
) -> dict[str, Curves]:
    """Return the curves of MLP outputs: exact, over the threshold, and corrected.

    Args:
        reader: The model.
        states: Of the prompts.
        mlp_out: Their readings.
        prompts: The prompts.
        seed: Of the drawn readings.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = states.mlp_out.flatten(0, 1)
    draws = [[t for row in mlp_out.texts[1] for t in row]]
    draws += [reader.read(flat, generator=generator) for _ in ALPHAS[1:]]
    amplified = [[t for row in mlp_out.texts[alpha] for t in row] for alpha in ALPHAS]
    budgets = {"alpha_1": draws[:1], "any_alpha": amplified, "equal_budget": draws}
    count = len(prompts)
    tables = {
        name: [
            [[texts[at + i] for texts in budget] for i in range(count)]
            for at in range(0, len(flat), count)
        ]
        for name, budget in budgets.items()
    }
    exact = {
        name: [
            sum(want in texts for texts, want in zip(layer, mlp_out.truth, strict=True))
            for layer in table
        ]
        for name, table in tables.items()
    }
    scores = {name: similarity(table, prompts) for name, table in tables.items()}
    return {
        "exact": Curves(**exact),
        **{
            title: Curves(**{n: count_prompts(s, corrected=fair) for n, s in scores.items()})
            for title, fair in (("similarity > 0.3", False), ("corrected", True))
        },
    }


def folder_size(folder: Path) -> int:
    """Return the bytes of a model folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def sweep_seconds(folder: Path, prompt: str) -> float:
    """Return how long a sweep takes: all layers, three kinds, six alphas, last token.

    Two threads; the second of two sweeps over different prompts is timed: model and scorer are
    loaded.
    """
    from superscopes_tl.experiment import sweep
    from superscopes_tl.model import load_model

    torch.set_num_threads(2)
    model = load_model(folder, backend="bridge")
    seconds = 0.0
    for text in ("Pink Floyd", prompt):
        started = time.perf_counter()
        sweep(model, text, progress=False)
        seconds = time.perf_counter() - started
    return seconds
