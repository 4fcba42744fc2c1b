"""Sample readings to be judged one by one, and put the judgements beside the scores.

    python notebooks/judging.py sample FOLDER      cells.csv, and blind.csv without any score
    python notebooks/judging.py join FOLDER        notebooks/results/judgements.csv

1. Read 12 names of many kinds in both models: MLP outputs and block outputs of every third layer,
   α = 1, 3, 6, with the paper's target prompt.
2. Sample ten cells of each fifth of `recovered` (below 0, to 0.25, to 0.5, to 0.75, above), per
   model, by a seed; shuffle them.
3. Each judge gets the name, the model's own words about it and the reading, and writes 1 where the
   reading describes the entity as the own words do, else 0, into `judge_1.csv`, `judge_2.csv`
   (columns id, right).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from superscopes_tl import PAPER_PROMPTS, load_model, plan_sweep
from superscopes_tl.evaluation import SECOND_LIST
from superscopes_tl.experiment import Cell, collect
from superscopes_tl.scores import SentenceEmbeddingScorer
from superscopes_tl.statistics import alpha_signals, self_explaining

MODELS = ("smollm2", "gemma-3-270m")
BINS = (-1e9, 0, 0.25, 0.5, 0.75, 1e9)
PER_BIN = 10
SIGNALS = ["self_similarity", "first_entropy", "kl_unpatched", "self_explaining"]
COLUMNS = ["model", "prompt", "kind", "source_layer", "alpha", "own_words", "description",
           "recovered", "specific", "score", "own_similarity", "entropy",
           "log_probability", *SIGNALS]  # fmt: skip


def sample(folder: Path) -> None:
    """Write the sampled cells with and without their scores."""
    chosen = random.Random(0)
    names = [*chosen.sample(PAPER_PROMPTS, 4), *chosen.sample(SECOND_LIST, 8)]
    table = pd.concat([_cells(name, names) for name in MODELS], ignore_index=True)
    scorer = SentenceEmbeddingScorer()
    table["own_similarity"] = scorer(list(table["own_words"]), list(table["description"]))
    table = table.sample(frac=1, random_state=0)[COLUMNS].reset_index(drop=True)
    table.index.name = "id"
    folder.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(folder / "cells.csv")
    table[["prompt", "own_words", "description"]].to_csv(folder / "blind.csv")


def _cells(name: str, prompts: Sequence[str]) -> pd.DataFrame:
    """Return the sampled cells of a model, with their texts."""
    model = load_model(name, backend="bridge")
    plan = plan_sweep(
        model, prompts[0], layers=range(1, model.n_layers, 3), kinds=("mlp_out", "resid_post"),
        alphas=(1, 3, 6), controls="other_prompt", generate="none", precision="high",
    )  # fmt: skip
    plans = {prompt: plan.at_prompt(prompt) for prompt in prompts}
    shares = collect(list(plans.values())).table.merge(alpha_signals(plans.values()))
    shares["self_explaining"] = self_explaining(shares)
    shares = shares[shares["recovered"].notna()]
    fifth = pd.cut(shares["recovered"], BINS)
    # A few more than needed: some have no text.
    some = shares.sample(frac=1, random_state=0)
    some = some.groupby(fifth[some.index], observed=True).head(PER_BIN + 4)
    found = []
    for row in some.itertuples():
        cell = Cell.of(row)
        text = plans[row.prompt].with_settings(generate="all", controls=()).only([cell])
        read = text.run(progress=False).table
        known = {name: getattr(row, name) for name in ("specific", *SIGNALS)}
        found.append(read.assign(**known, fifth=str(fifth[row.Index])))
    table = pd.concat(found)
    there = table[table["description"].str.strip() != ""].groupby("fifth").head(PER_BIN)
    return there.assign(model=name)


def join(folder: Path) -> None:
    """Put the judgements beside the scores."""
    table = pd.read_csv(folder / "cells.csv", index_col="id")
    for number in (1, 2):
        judged = pd.read_csv(folder / f"judge_{number}.csv", index_col="id")["right"]
        table[f"judge_{number}"] = judged.reindex(table.index).astype(int)
    path = Path(__file__).parent / "results" / "judgements.csv"
    path.parent.mkdir(exist_ok=True)
    table.to_csv(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("sample", "join"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    {"sample": sample, "join": join}[given.step](given.folder)
