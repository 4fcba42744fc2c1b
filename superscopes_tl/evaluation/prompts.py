"""The experiments of the paper's section 4, live and over many prompts.

1. Make a plan per prompt (and per extra draw); leave out the cells that the file already holds.
2. Fill batches across prompts, generate, score, and compute the controls that are asked for.
3. Write each finished batch to the file; a stopped run goes on where it was.
4. `methods` names the parts of the table that are compared: Patchscopes is α = 1, Superscopes any
   other α, and Patchscopes with equal budget has as many readings as Superscopes, one greedy and
   the others drawn.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from tqdm.auto import tqdm

from superscopes_tl.engine import PAPER_PROMPTS
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.evaluation.shares import Outline, Share, outline, read_shares
from superscopes_tl.evaluation.spread import Spread, Workers
from superscopes_tl.evaluation.store import Evaluation, EvaluationFile
from superscopes_tl.evaluation.workers import Loader
from superscopes_tl.experiment import CONTROLS, Generate, Reading, SweepConfig, plan_sweep
from superscopes_tl.model import LanguageModel
from superscopes_tl.vectors import PAPER_MAPPING

MLP_OUTPUTS = SweepConfig(layers=range(1, 8), kinds="mlp_out", target_layer="same", score_on="text")
"""Section 4.1: MLP outputs of layers 1 to 7, patched into the same layer; the default."""

FINE_ALPHAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15)

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
    executor: Workers | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Read many prompts as one sweep would read each of them.

    With a `path`, finished batches are written to that file, and cells that it holds already are
    not computed again: call it once more to go on with a run that was stopped, or with more
    prompts, layers, α or mappings to extend it. The result holds everything in the file. The file
    knows mappings, bases and scorers by their names: give your own ones names that tell them apart.

    With an `executor`, other processes read the cells, on this machine or on others, and this one
    keeps the file; the table is the same but for the order of its rows. Each worker loads the model
    once and runs one task at a time: a batch, filled across prompts, or, of a run with fewer than
    eight batches, an eighth of the cells; a smaller `batch_size` makes more tasks. An executor with
    one worker per GPU, with one thread for tasks, is what to aim at. With a SLURM queue
    (`dask-jobqueue`), where all machines find the model under the same name:

        cluster = dask_jobqueue.SLURMCluster(
            cores=1, job_cpu=4, memory="64GB", job_extra_directives=["--gres=gpu:1"]
        )
        cluster.scale(jobs=8)
        evaluate("org/name", path="run.sqlite", executor=cluster.get_client().get_executor())

    Dask replaces a worker that dies and does its task again, three times unless its setting
    `distributed.scheduler.allowed-failures` says otherwise; it gives its workers one thread for
    arithmetic unless `distributed.nanny.pre-spawn-environ` does.

    For Ray, pass an object of your own whose `submit(function, *arguments)` returns
    `ray.remote(function).remote(*arguments).future()`; such a task of Ray's may land in another
    process each time, with the model to load again. A model that is larger than one GPU is loaded
    by `partial(load_model, name, backend="bridge", device_map="auto")`: `load_model` hands a
    `device_map` to Hugging Face and leaves the parts where that put them.

    Example:
        >>> found = evaluate(load_model(), PAPER_PROMPTS[:8])  # doctest: +SKIP
        >>> compare(methods(found)).lines()  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes, or a function of no arguments that
            returns one of these. With an `executor`, what every worker can load for itself: a name,
            a directory, what `load_model` made of one, or such a function of a module.
        prompts: the source prompts; the paper's 48 unless given.
        path: the file of the experiment; kept in memory alone unless given.
        config: the settings; those of section 4.1 unless given.
        draws: that many more readings of α = 1, drawn at temperature 1: the equal-budget baseline.
            As many as give α = 1 the budget of all other α of the file, unless given; 0 for none,
            and unless all cells are written out.
            Another mapping than the paper's has none.
        executor: a `concurrent.futures.Executor`, or what acts like one, or a function that starts
            one, such as `local_workers(2)`, which is called anew when its workers have died. A
            script that starts processes needs `if __name__ == "__main__":`.
        progress: whether to show a progress bar.
        **settings: fields of `SweepConfig` to change in `config`.

    Raises:
        ValueError, TypeError: a bad setting, or a file of another experiment.
        OSError: the file cannot be written; what it holds is kept.
        ChildProcessError: the executor's workers died, again and again where a function starts it.
            What is finished is in the file: call once more to go on.
    """
    several = check_prompts(prompts)
    if draws is not None:
        check_count("draws", draws, least=0, fix="4 more readings make 5, as many as the paper's α")
    config = SweepConfig.of(config, settings)
    with contextlib.ExitStack() as stack:
        if executor is None:
            first = plan_sweep(_loaded(model), several[0], config)
            there, read = outline(first, several), partial(read_shares, first)
        else:
            workers = stack.enter_context(Spread(executor, model, several, config))
            there = workers.outline()
            read = partial(workers.read, there)
        _check_file_settings(there, config, path)
        file = stack.enter_context(contextlib.closing(EvaluationFile(path, there.provenance)))
        if draws is None:  # without all texts there is no budget of texts to equal
            draws = _equal_budget(there, file) if config.generate == "all" else 0
        _fill(file, there, draws, read, progress, config.generate)
        return file.evaluation()


def _fill(
    file: EvaluationFile,
    there: Outline,
    draws: int,
    read: Callable[[Sequence[Share]], Generator[list[Reading], None, None]],
    progress: bool,
    generate: Generate,
) -> None:
    """Read what the file does not hold, and add it as it is finished."""
    every = list(there.shares(draws))
    left = []
    for share in every:
        finished = file.finished(share.prompt, there.mapping, share.draw, generate)
        left.append(replace(share, cells=tuple(c for c in share.cells if c not in finished)))
    total, new = (sum(len(share.cells) for share in shares) for shares in (every, left))
    with (
        tqdm(total=total, initial=total - new, unit="cell", disable=not progress) as bar,
        contextlib.closing(read(left)) as batches,  # an error here ends the work there
    ):
        for readings in batches:
            file.add(readings)
            bar.update(len(readings))


def _loaded(model: Any) -> Any:
    """Return what a function gives, where one stands for the model; anything else as it is."""
    return model() if callable(model) and not isinstance(model, torch.nn.Module) else model


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct prompts.

    Raises:
        ValueError, TypeError: none, or something that is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise bad_type("prompts", "several texts", prompts, "pass a list, or use sweep()")
    several = tuple(dict.fromkeys(prompts))
    if not several:
        raise bad_value("prompts", "at least one text", (), "PAPER_PROMPTS")
    return several


def _check_file_settings(there: Outline, config: SweepConfig, path: object) -> None:
    """Refuse what a table of many readings could not tell apart."""
    if config.about is not None:
        raise bad_value(
            "about", "nothing: each prompt is scored against itself", config.about,
            "leave it out, or write what stands around the prompts as source_template=",
        )  # fmt: skip
    if config.draw:
        raise bad_value(
            "draw", "0, the greedy texts", config.draw,
            "pass draws=4 for more readings of α = 1",
        )  # fmt: skip
    named = f"{there.mapping}, {there.scorer}"
    if path is not None and "<lambda>" in named:
        raise bad_value(
            "mapping, base or scorer", "functions with names of their own", named,
            "define it with def: the file knows it by its name",
        )  # fmt: skip


def _equal_budget(there: Outline, file: EvaluationFile) -> int:
    """Return how many draws of α = 1 make, with the greedy one, as many as there are other α."""
    if there.mapping != PAPER_MAPPING or 1 not in there.alphas:
        return 0
    others = {*there.alphas, *file.alphas(PAPER_MAPPING)} - {1}
    return max(0, len(others) - 1)


def methods(
    evaluation: Evaluation,
    *,
    kind: str | None = None,
    target_layer: int | Literal["same"] | None = None,
    position: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Return the rows of an evaluation that stand for each method, for `compare`.

    Args:
        evaluation: from `evaluate`.
        kind: which kind of activation; the only one unless given.
        target_layer: which target layer, "same" or a number; the only one unless given.
        position: the token; the rightmost one of each prompt unless given.

    Returns:
        `Patchscopes` (α = 1, greedy), `Superscopes` (every other α), the drawn readings of α = 1
        together with the greedy one as `Patchscopes, equal budget` (or, where they are not as many
        as Superscopes has, `Patchscopes, 3 readings`), the same α of every other mapping, and one
        entry per control (what was written in the place of the Superscopes cells).

    Raises:
        ValueError: several kinds or target layers to choose from, or not the one asked for; or
            cells that were not written out.
    """
    rows = _at_one_place(evaluation.table, kind, target_layer, position)
    if not rows["written"].all():  # what was chosen to be written is no fair sample
        raise bad_value(
            "evaluation", "cells that were all written out",
            f"{int((~rows['written']).sum())} without a text",
            "compare what they recover, or evaluate with generate='all'",
        )  # fmt: skip
    amplified = rows[(rows["alpha"] != 1) & (rows["draw"] == 0)]
    plain = rows[(rows["alpha"] == 1) & (rows["mapping"] == PAPER_MAPPING)]
    scaled = amplified[amplified["mapping"] == PAPER_MAPPING]
    found = {"Patchscopes": plain[plain["draw"] == 0], "Superscopes": scaled}
    cell = ["prompt", "source_layer"]
    budget = scaled.groupby(cell).size().max() if len(scaled) else math.inf
    several = plain[plain["draw"] < budget]
    if (several["draw"] > 0).any():
        sizes = several.groupby(cell).size()
        equal = set(sizes) == {budget}
        name = "equal budget" if equal else f"{sizes.min()} readings"
        found[f"Patchscopes, {name}"] = several
    for mapping, others in amplified.groupby("mapping", sort=False):
        if mapping != PAPER_MAPPING:
            found[f"Superscopes, {mapping}"] = others
    for name in CONTROLS:
        if f"{name}_text" in rows and len(scaled):
            found[name.replace("_", " ")] = scaled.assign(text=scaled[f"{name}_text"])
    return {name: part for name, part in found.items() if len(part)}


def _at_one_place(
    table: pd.DataFrame,
    kind: str | None,
    target_layer: int | Literal["same"] | None,
    position: int | None,
) -> pd.DataFrame:
    """Return the rows of one kind, target layer and token: more would be more tries."""
    kinds = list(dict.fromkeys(table["kind"]))
    if kind is None and len(kinds) == 1:
        kind = kinds[0]
    if kind not in kinds:
        raise bad_value("kind", f"one of {kinds}", kind, "choose one of these")
    rows = table[table["kind"] == kind]
    rightmost = rows.groupby("prompt")["position"].transform("max")
    rows = rows[rows["position"] == (rightmost if position is None else position)]
    if target_layer is not None:
        wanted = rows["source_layer"] if target_layer == "same" else target_layer
        rows = rows[rows["target_layer"] == wanted]
    targets = rows.groupby(["prompt", "source_layer"])["target_layer"].nunique()
    if rows.empty or targets.max() > 1:
        there = sorted({int(layer) for layer in table["target_layer"]})
        raise bad_value(
            "target_layer", f"'same' or one of {there}, for one token",
            f"{target_layer} and token {position}", "choose one target layer",
        )  # fmt: skip
    return rows
