"""The experiments of the paper's section 4, live and over many prompts.

1. Plan each prompt once; leave out the cells that the file already holds.
2. Fill batches across prompts, generate, score, and compute the controls, in this process or in
   others (`workers`).
3. Write each completed batch to the file; a stopped run resumes where it was.
4. `methods` names the parts of the table that are compared: Patchscopes is α = 1, Superscopes any
   other α, and Patchscopes with equal budget has as many readings as Superscopes, one greedy and
   the others sampled.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from tqdm.auto import tqdm

from superscopes_tl.engine import PAPER_PROMPTS
from superscopes_tl.errors import bad_type, bad_value, check_choice, check_count
from superscopes_tl.evaluation.workers import Executors, Loader, Outline, Reader, RemoteReader
from superscopes_tl.experiment import (
    CONTROLS,
    EvaluationFile,
    SweepConfig,
    SweepResult,
    finished_cells,
    plan_sweep,
    rows_at,
)
from superscopes_tl.model import LanguageModel, PatchedLayer
from superscopes_tl.vectors import PAPER_MAPPING

MLP_OUTPUTS = SweepConfig(layers=range(1, 8), kinds="mlp_out", target_layer="same", score_on="text")
"""Section 4.1: MLP outputs of layers 1 to 7, patched into the same layer; the default."""

FINE_ALPHAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15)
"""Fifteen α, for `HIDDEN_STATES`."""

HIDDEN_STATES = SweepConfig(
    kinds="resid_post", alphas=FINE_ALPHAS, target_layer="same", score_on="text"
)
"""Section 4.2: block outputs over "a wider range" of α, at every layer."""


def evaluate(
    model: LanguageModel | Loader | Any,
    prompts: Sequence[str] = PAPER_PROMPTS,
    path: str | os.PathLike[str] | None = None,
    config: SweepConfig = MLP_OUTPUTS,
    *,
    draws: int | None = None,
    executor: Executors | None = None,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """Read many prompts as one sweep would read each of them.

    With a `path`, completed batches are written to that file, and cells that it holds already are
    not computed again: call again to resume a run that was stopped, or with more prompts, layers, α
    or mappings to extend it. The result holds everything in the file. The file identifies mappings,
    bases and scorers by their names: give your own ones names that tell them apart.

    With an `executor`, other processes read the cells, on this machine or on others, and this one
    keeps the file; the table is the same but for the order of its rows. Each worker loads the model
    once and runs one task at a time: a batch, filled across prompts, or, of a run with fewer than
    eight batches, an eighth of the cells. Use one worker per GPU, with one thread for tasks;
    notebook 06 shows local processes, Dask with SLURM, and Ray.

    Example:
        >>> found = evaluate(load_model(), PAPER_PROMPTS[:8])  # doctest: +SKIP
        >>> compare(methods(found)).lines()  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes, or a function of no arguments that
            returns one of these. With an `executor`, what every worker can load for itself: a name,
            a directory, what `load_model` made of one, or such a function of a module.
        prompts: the source prompts, such as `load_prompts` reads from a file; defaults to the
            paper's 48.
        path: the file of the evaluation; defaults to none, in memory alone.
        config: the settings; defaults to those of section 4.1.
        draws: the number of further readings of α = 1, sampled at temperature 1: the equal-budget
            baseline. Defaults to as many as give α = 1 the budget of all other α of the file, and
            to 0 with another mapping than the paper's, or unless all cells get a text.
        executor: a `concurrent.futures.Executor`, one with its `submit`, or a function that starts
            one, such as `local_workers(2)`. A script that starts processes needs
            `if __name__ == "__main__":`.
        progress: whether to show a progress bar.
        **settings: fields of `SweepConfig` to change in `config`.

    Raises:
        ValueError: a setting out of range, or a file of another evaluation.
        TypeError: an unknown setting, or one of the wrong type.
        OSError: the file cannot be written; what it holds is kept.
        ChildProcessError: the executor's workers died. Completed cells are in the file: call again
            to resume.
    """
    several = _distinct(prompts)
    if draws is not None:
        check_count("draws", draws, least=0, fix="4 more readings make 5, as many as the paper's α")
    config = SweepConfig.of(config, settings)
    with contextlib.ExitStack() as stack:
        reader: Reader | RemoteReader
        if executor is None:
            if callable(model) and not isinstance(model, torch.nn.Module):
                model = model()
            reader = Reader(plan_sweep(model, several[0], config))
        else:
            reader = stack.enter_context(RemoteReader(executor, model, several[0], config))
        there = reader.outline(several)
        _check_file_settings(there, config, path)
        file = stack.enter_context(contextlib.closing(EvaluationFile(path, there.provenance)))
        if draws is None:  # without all texts there is no budget of texts to equal
            draws = _equal_budget(there, file) if config.generate == "all" else 0
        every, left = list(there.shares(draws)), []
        for share in every:
            written = file.written(share.prompt, there.mapping, share.draw)
            done = finished_cells(written, config.generate)
            left.append(replace(share, cells=tuple(c for c in share.cells if c not in done)))
        total, new = (sum(len(share.cells) for share in shares) for shares in (every, left))
        with (
            tqdm(total=total, initial=total - new, unit="cell", disable=not progress) as bar,
            contextlib.closing(reader.read(left)) as batches,  # an error here ends the work there
        ):
            for readings in batches:
                file.add(readings)
                bar.update(len(readings))
        return SweepResult(*file.content())


def _distinct(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise bad_type("prompts", "several texts", prompts, "pass a list, or use sweep()")
    several = tuple(dict.fromkeys(prompts))
    if not several:
        raise bad_value("prompts", "at least one text", (), "pass for example PAPER_PROMPTS")
    return several


def _check_file_settings(there: Outline, config: SweepConfig, path: object) -> None:
    """Refuse settings that a table of many readings could not tell apart."""
    if isinstance(config.about, str):
        wanted = "one text by source prompt: each is scored against itself, or against its own"
        fix = "about={prompt: text}; a text around all prompts is source_template="
        raise bad_value("about", wanted, config.about, fix)
    if config.draw:
        fix = "pass draws=4 for more readings of α = 1"
        raise bad_value("draw", "0, the greedy texts", config.draw, fix)
    named = f"{there.mapping}, {there.scorer}"
    if path is not None and "<lambda>" in named:
        fix = "define it with def: the file identifies it by its name"
        raise bad_value("mapping, base or scorer", "functions with names", named, fix)


def _equal_budget(there: Outline, file: EvaluationFile) -> int:
    """Return how many samples of α = 1 make, with the greedy one, as many as there are other α."""
    if there.mapping != PAPER_MAPPING or 1 not in there.alphas:
        return 0
    others = {*there.alphas, *file.alphas(PAPER_MAPPING)} - {1}
    return max(0, len(others) - 1)


def methods(
    evaluation: SweepResult,
    *,
    kind: str | None = None,
    target_layer: PatchedLayer | Literal["same"] | None = None,
    position: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Return the rows of an evaluation that stand for each method, for `compare`.

    Args:
        evaluation: from `evaluate`.
        kind: which kind of activation; defaults to the only one.
        target_layer: which target layer, "same" or a number; defaults to the only one.
        position: the token; defaults to the rightmost one of each prompt.

    Returns:
        `Patchscopes` (α = 1, greedy), `Superscopes` (every other α), the sampled readings of α = 1
        together with the greedy one as `Patchscopes, equal budget` (or, where they are not as many
        as Superscopes has, `Patchscopes, 3 readings`), the same α of every other mapping, and one
        entry per control (the texts in the place of the Superscopes cells).

    Raises:
        ValueError: several kinds or target layers of which none was chosen, one that is not there,
            or cells without a text.
    """
    kinds = list(dict.fromkeys(evaluation.table["kind"]))
    kind = check_choice("kind", kinds[0] if kind is None and len(kinds) == 1 else kind, kinds)
    # More than one target layer would be more tries.
    rows = rows_at(evaluation.table, position=position, target_layer=target_layer, kind=kind)
    if lacking := int((~rows["written"]).sum()):  # the generated ones are no random sample
        fix = "compare the shares recovered, or evaluate with generate='all'"
        raise bad_value("evaluation", "cells that all have a text", f"{lacking} without", fix)
    amplified = rows[(rows["alpha"] != 1) & (rows["draw"] == 0)]
    plain = rows[(rows["alpha"] == 1) & (rows["mapping"] == PAPER_MAPPING)]
    scaled = amplified[amplified["mapping"] == PAPER_MAPPING]
    found = {"Patchscopes": plain[plain["draw"] == 0], "Superscopes": scaled}
    cell = ["prompt", "source_layer"]
    budget = scaled.groupby(cell).size().max() if len(scaled) else math.inf
    several = plain[plain["draw"] < budget]
    if (several["draw"] > 0).any():
        sizes = several.groupby(cell).size()
        name = "equal budget" if set(sizes) == {budget} else f"{sizes.min()} readings"
        found[f"Patchscopes, {name}"] = several
    for mapping, others in amplified.groupby("mapping", sort=False):
        if mapping != PAPER_MAPPING:
            found[f"Superscopes, {mapping}"] = others
    for name in CONTROLS:
        if f"{name}_text" in rows and len(scaled):
            found[name.replace("_", " ")] = scaled.assign(text=scaled[f"{name}_text"])
    return {name: part for name, part in found.items() if len(part)}
