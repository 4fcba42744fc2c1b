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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from superscopes_tl.amplify import PAPER_MAPPING
from superscopes_tl.cells import Part, make_patches
from superscopes_tl.config import CONTROLS, SweepConfig, check_names
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.evaluation import Evaluation, EvaluationFile
from superscopes_tl.models import LanguageModel
from superscopes_tl.patches import Patch
from superscopes_tl.plan import Cell, SweepPlan, plan_sweep
from superscopes_tl.prompts import PAPER_PROMPTS
from superscopes_tl.results import Reading
from superscopes_tl.scoring import scorer_name
from superscopes_tl.sweep import read_batch

MLP_OUTPUTS = SweepConfig(layers=range(1, 8), kinds="mlp_out", target_layer="same", score_on="text")
"""Section 4.1: MLP outputs of layers 1 to 7, patched into the same layer; the default."""

FINE_ALPHAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 15)

HIDDEN_STATES = SweepConfig(
    kinds="resid_post", alphas=FINE_ALPHAS, target_layer="same", score_on="text"
)
"""Section 4.2: block outputs over "a wider range" of α, at every layer."""

Work = tuple[SweepPlan, Cell, Patch]


def evaluate(
    model: LanguageModel | Any,
    prompts: Sequence[str] = PAPER_PROMPTS,
    path: str | os.PathLike[str] | None = None,
    config: SweepConfig = MLP_OUTPUTS,
    *,
    draws: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Read many prompts as one sweep would read each of them.

    With a `path`, finished batches are written to that file, and cells that it holds already are
    not computed again: call it once more to go on with a run that was stopped, or with more
    prompts, layers, α or mappings to extend it. The result holds everything in the file. The file
    knows mappings, bases and scorers by their names: give your own ones names that tell them apart.

    Example:
        >>> found = evaluate("mini", PAPER_PROMPTS[:8])  # doctest: +SKIP
        >>> compare(methods(found)).lines()  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes.
        prompts: the source prompts; the paper's 48 unless given.
        path: the file of the experiment; kept in memory alone unless given.
        config: the settings; those of section 4.1 unless given.
        draws: that many more readings of α = 1, drawn at temperature 1: the equal-budget baseline.
            As many as give α = 1 the budget of all other α of the file, unless given; 0 for none.
            Another mapping than the paper's has none.
        progress: whether to show a progress bar.
        **settings: fields of `SweepConfig` to change in `config`.

    Raises:
        ValueError, TypeError: a bad setting, or a file of another experiment.
        OSError: the file cannot be written; what it holds is kept.
    """
    several = check_prompts(prompts)
    check_names(settings)
    if draws is not None:
        check_count("draws", draws, least=0, fix="4 more readings make 5, as many as the paper's α")
    first = plan_sweep(model, several[0], replace(config, **settings))
    _check_file_settings(first, path)
    with contextlib.closing(EvaluationFile(path, first)) as file:
        if draws is None:
            draws = _equal_budget(first, file)
        plans = [
            replace(plan, finished=file.finished(plan))
            for prompt in several
            for plan in _plans(first, prompt, draws)
        ]
        left = sum(len(plan.cells) for plan in plans)
        done = sum(len(plan.all_cells) for plan in plans) - left
        with tqdm(total=left + done, initial=done, unit="cell", disable=not progress) as bar:
            for readings in _run(plans):
                file.add(readings)
                bar.update(len(readings))
        return file.evaluation()


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct prompts.

    Raises:
        ValueError, TypeError: none, or something that is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise bad_type(
            "prompts", expected="several texts", got=prompts, fix="pass a list, or use sweep()"
        )
    several = tuple(dict.fromkeys(prompts))
    if not several:
        raise bad_value("prompts", expected="at least one text", got=(), fix="PAPER_PROMPTS")
    return several


def _check_file_settings(plan: SweepPlan, path: object) -> None:
    """Refuse what a table of many readings could not tell apart."""
    if plan.config.draw:
        raise bad_value(
            "draw", expected="0, the greedy texts", got=plan.config.draw,
            fix="pass draws=4 for more readings of α = 1",
        )  # fmt: skip
    named = f"{plan.mapping_name}, {scorer_name(plan.scorer)}"
    if path is not None and "<lambda>" in named:
        raise bad_value(
            "mapping, base or scorer", expected="functions with names of their own", got=named,
            fix="define it with def: the file knows it by its name",
        )  # fmt: skip


def _equal_budget(plan: SweepPlan, file: EvaluationFile) -> int:
    """Return how many draws of α = 1 make, with the greedy one, as many as there are other α."""
    if plan.mapping_name != PAPER_MAPPING or 1 not in plan.alphas:
        return 0
    others = {*plan.alphas, *file.alphas(PAPER_MAPPING)} - {1}
    return max(0, len(others) - 1)


def _plans(first: SweepPlan, prompt: str, draws: int) -> Iterator[SweepPlan]:
    """Yield what is to be read of one prompt: the sweep, and the draws of α = 1."""
    plan = first.at_prompt(prompt)
    yield plan
    for draw in range(1, draws + 1):
        yield replace(plan, alphas=(1.0,), config=replace(plan.config, draw=draw))


def _run(plans: Iterable[SweepPlan]) -> Iterator[list[Reading]]:
    """Yield the readings of all plans, batch by batch; a batch may hold several plans' cells."""
    for batch in _batches(plans):
        generator = batch[0][0].generator
        generations = iter(generator.generate([patch for _, _, patch in batch]))
        parts = []
        for plan, work in groupby(batch, key=lambda work: work[0]):
            cells, patches = zip(*((cell, patch) for _, cell, patch in work), strict=True)
            parts.append(Part(plan, cells, patches, [next(generations) for _ in cells]))
        yield read_batch(parts)


def _batches(plans: Iterable[SweepPlan]) -> Iterator[list[Work]]:
    waiting: list[Work] = []
    for plan in plans:
        waiting += [
            (plan, cell, patch) for cell, patch in zip(plan.cells, make_patches(plan), strict=True)
        ]
        size = plan.generator.batch_size
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


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
        ValueError: several kinds or target layers to choose from, or not the one asked for.
    """
    rows = _at_one_place(evaluation.table, kind, target_layer, position)
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
        raise bad_value("kind", expected=f"one of {kinds}", got=kind, fix="choose one of these")
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
            "target_layer", expected=f"'same' or one of {there}, for one token",
            got=f"{target_layer} and token {position}", fix="choose one target layer",
        )  # fmt: skip
    return rows
