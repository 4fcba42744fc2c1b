"""Measure the bundled model: `python -m superscopes_tl.mini.report`.

1. Recall: the description after each name in plain text.
2. Patchscopes: block outputs of a name's last token, unscaled, read at target layer 0.
3. Contextualization: the first layer whose block output reads the description (l_c), and what
   the layers before it read.
4. Superscopes: MLP outputs and block outputs scaled by alpha.

A reading counts when the text up to the next `,` equals the description.
"""

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from superscopes_tl.mini import MODEL_DIR
from superscopes_tl.mini.facts import PAPER_PROMPTS, Fact, held_out, load_facts
from superscopes_tl.mini.reader import Reader

ALPHAS = (3, 6, 9, 12, 15)
TOO_LARGE = 100


def read_layers(reader: Reader, vectors: Tensor) -> list[list[str]]:
    """Read `[layer text d_model]` at target layer 0; returns texts as `[layer][text]`."""
    count = vectors.shape[1]
    flat = reader.read(vectors.flatten(0, 1))
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def hits(texts: Sequence[Sequence[str]], truth: Sequence[str]) -> list[list[bool]]:
    """Return, per layer and text, whether the reading equals the description."""
    return [[text == want for text, want in zip(row, truth, strict=True)] for row in texts]


def percent(marks: Sequence[bool]) -> str:
    """Format a share as a whole percentage."""
    return f"{100 * sum(marks) / max(1, len(marks)):3.0f}"


def print_rows(title: str, rows: Sequence[Sequence[bool]]) -> None:
    """Print one percentage per layer."""
    print(f"{title:34s}" + " ".join(percent(row) for row in rows), flush=True)


def first_layers(marks: Sequence[Sequence[bool]]) -> list[int | None]:
    """Return the first layer that reads each text, None where no layer does."""
    columns = zip(*marks, strict=True)
    return [next((at for at, hit in enumerate(column) if hit), None) for column in columns]


def print_contextualization(
    title: str, facts: Sequence[Fact], group: Sequence[Fact], texts: list[list[str]]
) -> None:
    """Print how l_c spreads, and how often an earlier layer reads the last word instead."""
    starts = first_layers(hits(texts, [fact.description for fact in group]))
    found = [start for start in starts if start is not None]
    spread = " ".join(f"{at}:{count}" for at, count in sorted(Counter(found).items()))
    print(f"l_c, {title}: {spread}; median {median(found) if found else None}")
    by_last: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in facts:
        by_last[fact.name.split()[-1].lower()][fact.name] = fact.description
    words = {fact.name.lower() for fact in facts if fact.kind == "word"}
    total = earlier = 0
    for index, (fact, start) in enumerate(zip(group, starts, strict=True)):
        last = fact.name.split()[-1].lower()
        if " " not in fact.name or last not in words:
            continue
        total += 1
        others = {text for name, text in by_last[last].items() if name != fact.name}
        before = range(start if start is not None else len(texts))
        earlier += any(texts[at][index] in others for at in before)
    print(f"  last word read before l_c: {earlier} of {total} names whose last word has a meaning")


def print_patchscopes(reader: Reader, facts: Sequence[Fact], sample: int) -> None:
    """Print recall and unscaled block outputs: the paper's, held-out and other names."""
    hidden = held_out(facts)
    groups = {
        "paper": [fact for fact in facts if fact.name in PAPER_PROMPTS],
        "held-out": [fact for fact in facts if fact.name in hidden],
        "others": [fact for fact in facts if fact.name not in hidden],
    }
    rng = random.Random(0)
    recalled = reader.recall([fact.name for fact in facts])
    right = {f.name: text == f.description for f, text in zip(facts, recalled, strict=True)}
    for title, group in {"all": facts, **groups}.items():
        count = sum(right[fact.name] for fact in group)
        print(f"recall from plain text, {title}: {count} of {len(group)}", flush=True)
    for title, group in groups.items():
        if sample and len(group) > sample:
            group = sorted(rng.sample(group, sample), key=lambda fact: fact.name)
        states = reader.states([fact.name for fact in group])
        texts = read_layers(reader, states.resid_post)
        truth = [fact.description for fact in group]
        print_rows(f"resid_post alpha 1, {title} ({len(group)})", hits(texts, truth))
        print_contextualization(title, facts, group, texts)


def print_superscopes(reader: Reader, facts: Sequence[Fact]) -> None:
    """Print what amplification reads from MLP outputs and block outputs of the 48 prompts."""
    described = {fact.name: fact.description for fact in facts}
    truth = [described[name] for name in PAPER_PROMPTS]
    states = reader.states(PAPER_PROMPTS)
    for kind, vectors in (("mlp_out", states.mlp_out), ("resid_post", states.resid_post)):
        texts = {alpha: read_layers(reader, alpha * vectors) for alpha in (1, *ALPHAS, TOO_LARGE)}
        marks = {alpha: hits(rows, truth) for alpha, rows in texts.items()}
        for alpha in (1, *ALPHAS, TOO_LARGE):
            print_rows(f"{kind} alpha {alpha}, paper", marks[alpha])
        layers = range(reader.n_layers)
        best = [
            [any(marks[alpha][at][i] for alpha in ALPHAS) for i in range(len(truth))]
            for at in layers
        ]
        print_rows(f"{kind} best of {ALPHAS}", best)
        if kind == "resid_post":
            starts = first_layers(marks[1])
            gained = sum(
                any(best[at][i] for at in range(reader.n_layers if start is None else start))
                for i, start in enumerate(starts)
            )
            print(f"some alpha > 1 reads resid_post before l_c: {gained} of {len(truth)} names")
        else:
            print_cases(texts, truth)


def print_cases(texts: dict[int, list[list[str]]], truth: Sequence[str]) -> None:
    """Print readings of MLP outputs that are right amplified and wrong as they are."""
    for index, name in enumerate(PAPER_PROMPTS):
        for layer, plain in enumerate(texts[1]):
            right = [alpha for alpha in ALPHAS if texts[alpha][layer][index] == truth[index]]
            if right and plain[index] != truth[index]:
                print(f"  {name}, layer {layer}: alpha 1 {plain[index]!r}; right at {right}")


def main() -> None:
    """Parse the options and print the report."""
    parser = argparse.ArgumentParser(description="Measure the bundled model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the model folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sample", type=int, default=400, help="names per group; 0 for all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = load_facts()
    reader = Reader(args.model)
    print("exact readings in per cent, one column per layer, target layer 0")
    print_patchscopes(reader, facts, args.sample)
    print_superscopes(reader, facts)


if __name__ == "__main__":
    main()
