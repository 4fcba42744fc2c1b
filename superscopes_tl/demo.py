"""The main job on the bundled model, with its controls: what `make demo` runs.

1. Sweep the prompts that the paper shows in its tables and figures over every layer, three kinds
   and the paper's alphas; print the best reading per layer and kind, write the heatmaps.
2. The bundled model's facts are known, so a reading is right when it is the fact, word for word.
   List the MLP outputs that read wrong at α = 1 and right when amplified.
3. Count right readings over all 48 prompts of the paper, beside three controls at the same
   sites and alphas: random vectors of equal norm, the readings of the other prompts, and the
   unpatched target prompt.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superscopes_tl.amplify import MappingFamily, random_direction, scale
from superscopes_tl.capture import capture
from superscopes_tl.export import write_html
from superscopes_tl.loading import load_model
from superscopes_tl.metric import exact
from superscopes_tl.mini.facts import load_facts
from superscopes_tl.models import LanguageModel
from superscopes_tl.patches import Patch
from superscopes_tl.patching import PatchedGenerator
from superscopes_tl.plots import heatmap
from superscopes_tl.prompts import PAPER_PROMPTS, crop_description, description_is_over
from superscopes_tl.results import SweepResult
from superscopes_tl.sites import HookKind
from superscopes_tl.sweep import sweep

SHOWN_PROMPTS = (
    "Red Hot Chili Peppers",
    "Saturday Night Live",
    "Back to the Future",
    "Alexander the Great",
    "Diana, Princess of Wales",
)
"""The prompts of the paper's Tables 1 to 3, Figures 1, 5 and 6 and section 3.5."""


@dataclass(frozen=True)
class Rescue:
    """An MLP output that reads wrong at α = 1 and right when amplified.

    Attributes:
        prompt: the source prompt.
        layer: the source layer.
        before: the reading at α = 1.
        alpha: the smallest α that reads the fact.
        after: the reading there, which is the fact.
    """

    prompt: str
    layer: int
    before: str
    alpha: float
    after: str


def known_facts() -> dict[str, str]:
    """Return what the bundled model was trained to say of each name."""
    return {fact.name: fact.description for fact in load_facts()}


def rescues(table: pd.DataFrame, facts: Mapping[str, str]) -> Iterator[Rescue]:
    """Yield the MLP outputs that amplification alone makes readable."""
    mlp = table[table["kind"] == "mlp_out"]
    for _, site in mlp.groupby(["prompt", "source_layer"], sort=False):
        hits = site[exact(site, facts) & (site["alpha"] > 1)].sort_values("alpha")
        plain = site[site["alpha"] == 1]
        if len(hits) and not exact(plain, facts).any():
            first = hits.iloc[0]
            prompt, before = first["prompt"], str(plain["description"].iloc[0])
            yield Rescue(prompt, first["source_layer"], before, first["alpha"], facts[prompt])


def run_demo(
    model: LanguageModel | None = None,
    output: Path = Path("output"),
    prompts: Sequence[str] = PAPER_PROMPTS,
    console: Console | None = None,
) -> Path:
    """Run the demo and return the path of the page with the heatmaps.

    Args:
        model: the bundled model unless given; another one needs to know the same facts.
        output: the folder for the page and the run files; made if missing.
        prompts: the prompts that are counted.
        console: where to print.
    """
    console = console or Console(emoji=False)
    started = time.perf_counter()
    model = model or load_model(backend="bridge")
    facts = known_facts()
    output.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{model!r}[/bold]\n")
    figures, tables = [], []
    for prompt in SHOWN_PROMPTS:
        result = sweep(model, prompt)
        result.save(output / f"{_file_name(prompt)}.zip")
        console.print(reading_table(result, facts))
        figures.append(heatmap(result))
        tables.append(result.table)
    page = write_html(figures, output / "demo.html", title="Superscopes on the bundled model")
    _print_rescues(console, list(rescues(pd.concat(tables), facts)))
    _print_counts(console, model, facts, prompts)
    console.print(f"\nHeatmaps: [bold]{page}[/bold] (run files beside it)")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")
    return page


def reading_table(result: SweepResult, facts: Mapping[str, str] | None = None) -> Table:
    """Return the best reading per layer and kind as a table for the terminal.

    Args:
        result: the sweep.
        facts: what each prompt is known to mean; readings that say it are marked.
    """
    wide = result.by_layer()
    kinds = list(wide.columns.get_level_values(0).unique())
    prompt, token = str(result.provenance["prompt"]), result.table["token"].iloc[-1]
    shown = textwrap.shorten(prompt, 60, placeholder=" …")
    legend = "α, similarity" + ("; ✓: the fact, word for word" if facts else "")
    fact = (facts or {}).get(prompt)
    token = result.table["token"].iloc[-1]
    table = Table(title=escape(f"{shown} · token {token!r} · best reading ({legend})"))
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, overflow="fold")
    for layer, row in wide.iterrows():
        cells = []
        for kind in kinds:
            reading, alpha, score = (row[kind, c] for c in ("reading", "alpha", "score"))
            mark = "[green]✓[/green] " if fact and reading.split(",")[0].strip() == fact else ""
            cells.append(f"{mark}{escape(reading)} [dim]({alpha:g}, {score:.2f})[/dim]")
        table.add_row(str(layer), *cells)
    return table


def _print_rescues(console: Console, found: Sequence[Rescue]) -> None:
    table = Table(title="MLP outputs that only amplification reads")
    for column in ("prompt", "layer", "α = 1 reads", "α", "reads"):
        table.add_column(column, overflow="fold")
    for rescue in found:
        table.add_row(
            escape(rescue.prompt),
            str(rescue.layer),
            escape(rescue.before),
            f"{rescue.alpha:g}",
            escape(rescue.after),
        )
    console.print(table if found else "No MLP output was read by amplification alone.")


COUNTED: tuple[tuple[HookKind, tuple[float, ...]], ...] = (
    ("resid_post", (1,)),
    ("mlp_out", (1,)),
    ("mlp_out", (1, 3, 9)),
)
"""What is counted over all prompts: a kind and the alphas of which one may read the fact."""

COUNT_BATCH_SIZE = 256
"""A model as small as the bundled one is faster in larger batches."""


def count_right(
    model: LanguageModel, facts: Mapping[str, str], prompts: Sequence[str]
) -> pd.DataFrame:
    """Count the prompts whose fact is read at some layer, beside two controls.

    Returns:
        A row per entry of `COUNTED` with the columns `right`, `random vector` (vectors of equal
        norm at the same sites) and `other prompt` (the same readings judged by the other
        prompts' facts, the mean over all of them).
    """
    generator = PatchedGenerator(
        model,
        max_new_tokens=_longest(model, facts, prompts),
        batch_size=COUNT_BATCH_SIZE,
        until=description_is_over,
    )
    real = _readings(generator, prompts, scale)
    random = _readings(generator, prompts, random_direction(0))
    rows = []
    for kind, alphas in COUNTED:
        mine, null = (
            table[(table["kind"] == kind) & table["alpha"].isin(alphas)] for table in (real, random)
        )
        rows.append(
            {
                "cells": f"{kind}, α = {' or '.join(f'{a:g}' for a in alphas)}",
                "right": _prompts_right(mine, facts),
                "random vector": _prompts_right(null, facts),
                "other prompt": f"{_others_right(mine, facts, prompts):.2f}",
            }
        )
    return pd.DataFrame(rows)


def _readings(
    generator: PatchedGenerator, prompts: Sequence[str], family: MappingFamily
) -> pd.DataFrame:
    """Return what the last token of every prompt reads, at every layer, in one run."""
    alphas_of: dict[HookKind, set[float]] = {}
    for kind, alphas in COUNTED:
        alphas_of.setdefault(kind, set()).update(alphas)
    activations = [capture(generator.model, prompt, kinds=alphas_of) for prompt in prompts]
    rows, patches = [], []
    for kind, wanted in alphas_of.items():
        names, vectors = [], []
        for prompt, seen in zip(prompts, activations, strict=True):
            for layer in range(generator.model.n_layers):
                names.append(prompt)
                vectors.append(seen[kind, layer][-1])
        for alpha in sorted(wanted):
            rows += [{"prompt": name, "kind": kind, "alpha": alpha} for name in names]
            patches += [Patch(vector, 0) for vector in family(alpha)(torch.stack(vectors))]
    texts = [crop_description(generation.text) for generation in generator.generate(patches)]
    return pd.DataFrame(rows).assign(description=texts)


def _longest(model: LanguageModel, facts: Mapping[str, str], prompts: Sequence[str]) -> int:
    """Return how many tokens the longest fact takes, with the colon and the comma around it."""
    texts = [f": {facts[prompt]}," for prompt in prompts]
    return max(len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"])


def _print_counts(
    console: Console, model: LanguageModel, facts: Mapping[str, str], prompts: Sequence[str]
) -> None:
    counts = count_right(model, facts, prompts)
    table = Table(title=f"Prompts read right at some layer, of the paper's {len(prompts)}")
    for column in counts.columns:
        table.add_column(column, justify="left" if column == "cells" else "right")
    for row in counts.astype(str).to_dict("records"):
        table.add_row(*row.values())
    console.print(table)
    unpatched = crop_description(PatchedGenerator(model).unpatched().text)
    console.print(
        f"Control, nothing patched: the model writes [italic]{escape(unpatched)}[/italic]"
    )


def _others_right(table: pd.DataFrame, facts: Mapping[str, str], prompts: Sequence[str]) -> float:
    """Return how many prompts are read as another prompt's fact, the mean over the others."""
    shifts = range(1, len(prompts))
    others = (
        {p: facts[prompts[(i + k) % len(prompts)]] for i, p in enumerate(prompts)} for k in shifts
    )
    return sum(_prompts_right(table, other) for other in others) / len(shifts)


def _prompts_right(table: pd.DataFrame, facts: Mapping[str, str]) -> int:
    return int(exact(table, facts).groupby(table["prompt"]).any().sum())


def _file_name(prompt: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())
