"""Cells per second of the engine beside the other ways to compute the same cells.

1. Build or load one Hugging Face model (`sizes`) and the ways around it (`ways`). A way that cannot
   be had is left out, and a note says why.
2. Compare what they write on the same cells (`work`).
3. Compute the map of what is recovered, and the best readings, in two ways each (`maps`).
4. Time all of them in turns (`measure`), and hold the rates against each other and against what
   arithmetic alone would allow (`roofline`, `report`).

    superscopes bench --size small
    superscopes bench --model smollm2
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from superscopes_tl import LanguageModel, PatchedGenerator, load_model
from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.errors import ModelLoadError, bad_value, brief, check_count, reason
from superscopes_tl.model import device_of
from tests.benchmarks import maps, measure, ways
from tests.benchmarks.maps import Map, make_map
from tests.benchmarks.measure import Job, Texts, Way
from tests.benchmarks.report import Report, show
from tests.benchmarks.roofline import Roofline, flop_per_second, shape_of
from tests.benchmarks.sizes import (
    Size,
    over_the_same_weights,
    pretrained,
    size_of,
    tokenizer,
    weight_bytes,
)
from tests.benchmarks.work import Cell, make_cells, spread

ONE_BY_ONE = "Hugging Face generate, one cell at a time"
HOOKED_ONE_BY_ONE = "HookedTransformer.generate, one cell at a time"
NNTERP = "nnterp patchscope_generate"
HOOKED = "superscopes_tl on HookedTransformer"
BRIDGE = "superscopes_tl on TransformerBridge"
LIMIT = "limit: batched Hugging Face loop"

__all__ = ["run_bench", "show"]

COPIES = 2.5
"""Weights that a conversion to `HookedTransformer` holds for a moment, beside the original's."""


@dataclass(frozen=True)
class Bench:
    """The ways of one model, why others are absent, and its map."""

    generator: PatchedGenerator
    ways: Sequence[Way]
    notes: Sequence[str]
    map: Map


def run_bench(
    size: str = "",
    *,
    model: str = "",
    dtype: str = "float32",
    rounds: int = 5,
    threads: int | None = None,
    device: str | None = None,
) -> Report:
    """Measure every way on a model.

    Args:
        size: a name of `sizes.SIZES`; defaults to small.
        model: in place of a size, a real model, as `load_model` takes its name or folder.
        dtype: float32 or bfloat16.
        rounds: of which the median counts.
        threads: CPU threads; defaults to torch's choice.
        device: where to run; defaults to the best available.

    Raises:
        ValueError: a bad setting, or a model that cannot be loaded.
        RuntimeError: in float32, two ways write different texts.
    """
    if size and model:
        raise bad_value("model", f"none beside size={size}", model, "pass one of the two")
    chosen = None if model else size_of(size or "small")
    if dtype not in ("float32", "bfloat16"):
        raise bad_value(
            "dtype", expected="float32 or bfloat16", got=dtype, fix="leave it out for float32"
        )
    check_count("rounds", rounds, least=1, fix="5 is the default")
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, least=1, fix="leave it out"))
    place, numbers = device_of(device), getattr(torch, dtype)
    if chosen is None:
        chosen, hf, tokens = pretrained(model, numbers, place)
    else:
        hf, tokens = chosen.build(numbers).to(place), tokenizer()
    return measured(model or size or "small", chosen, hf, tokens, rounds)


def measured(name: str, size: Size, hf: Any, tokens: Any, rounds: int) -> Report:
    """Compare and time the ways around a model, and return what came of it."""
    bench = prepare(hf, tokens, size)
    texts = measure.write_all(bench.ways)
    if hf.dtype == torch.float32:
        measure.check_equal(texts, lambda cell: _margin(bench.generator, cell), NEAR_TIE)
    generator, notes, shape = bench.generator, list(bench.notes), shape_of(hf)
    jobs = [
        *_jobs(bench, texts, hf),
        *maps.map_jobs(hf, generator, bench.map, notes),
        *maps.reading_jobs(hf, generator, bench.map, size.slow, notes),
    ]
    rows, speed = measure.in_rounds(
        jobs, rounds, lambda dtype: flop_per_second(shape, generator.batch_size, dtype, hf.device)
    )
    return Report(
        size=name,
        title=size.title,
        rows=rows,
        limit=LIMIT,
        roofline=Roofline(next(job.flop for job in jobs if job.name == BRIDGE), speed),
        dtype=str(hf.dtype).removeprefix("torch."),
        device=hf.device.type,
        threads=torch.get_num_threads(),
        rounds=rounds,
        batch_size=generator.batch_size,
        peak_memory=measure.peak_memory(hf.device),
        map_memory=bench.map.memory,
        equal=measure.share_equal(texts),
        notes=notes,
    )


def _jobs(bench: Bench, texts: Texts, hf: Any) -> Iterator[Job]:
    """Yield each way as a job; it is held against the first."""
    for way in bench.ways:
        written = list(texts[way.name].values())
        flop = maps.flop_of_texts(hf, bench.generator, way.cells, written, shared=False)
        work, mean = partial(way.run, way.cells), statistics.fmean(flop)
        yield Job(way.name, work, len(way.cells), mean, bench.ways[0].name, hf.dtype)


def prepare(hf: Any, tokens: Any, size: Size) -> Bench:
    """Return the ways around a model, in the order of the table."""
    notes: list[str] = []
    bridge = _load(hf, tokens, "bridge")
    generator = PatchedGenerator(bridge)
    if len(generator.target.positions) != 1:
        got, fix = generator.target.tokens.numbered(), "choose another model"
        raise bad_value("model", "one to which the placeholder is one token", got, fix)
    made = make_map(generator)  # first: its memory is told from that of nothing else
    cells = make_cells(bridge, size.cells)
    few = spread(cells, size.slow)
    hooked = None
    if not (absent := _why_not_hooked(hf)):
        try:
            hooked = _load(hf, tokens, "hooked")
        except ModelLoadError as error:
            cause = error.__cause__
            absent = brief(reason(cause if isinstance(cause, Exception) else error))
    found = [Way(ONE_BY_ONE, ways.one_generate_per_cell(hf, generator), few)]
    if hooked is None:
        notes += [f"{name} is left out: {absent}" for name in (HOOKED_ONE_BY_ONE, HOOKED)]
    else:
        one = ways.one_hooked_generate_per_cell(hooked.tl, generator)
        found.append(Way(HOOKED_ONE_BY_ONE, one, few))
    found += _nnterp(hf, tokens, generator, cells, notes)
    if hooked is not None:
        found.append(Way(HOOKED, ways.engine(PatchedGenerator(hooked)), cells))
    found.append(Way(BRIDGE, ways.engine(generator), cells))
    bound = ways.fastest(hf, generator, cells)
    found.append(Way(LIMIT, bound.run, cells))
    notes.append(f"Rows per batch: {generator.batch_size}; of the limit, {bound.rows}.")
    return Bench(generator, found, [*notes, *maps.notes_of(made)], made)


def _load(hf: Any, tokens: Any, backend: Any) -> LanguageModel:
    """Load a model for the engine; where no end of text is declared there is none."""
    own = over_the_same_weights(hf)
    own.set_attn_implementation("eager")  # as `load_model` loads a model by its name
    model = load_model(own, tokens, backend=backend)
    endless = hf.generation_config.eos_token_id is None
    return replace(model, eos_token_ids=()) if endless else model


def _why_not_hooked(hf: Any) -> str:
    """Return why there can be no `HookedTransformer`, or an empty string."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError as error:
        return f"this TransformerLens has no such class ({error})"
    needed = COPIES * weight_bytes(hf)
    if hf.device.type == "cuda":
        free = torch.cuda.mem_get_info(hf.device)[0]
    else:
        free = psutil.virtual_memory().available
    if free < needed:
        return f"its copy of the weights needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    return ""


def _nnterp(
    hf: Any, tokens: Any, generator: PatchedGenerator, cells: Sequence[Cell], notes: list[str]
) -> Iterator[Way]:
    """Yield nnterp's way with the cells that it can express, or note why it is absent."""
    try:
        own = copy.deepcopy(tokens)  # which side it pads is changed
        run = ways.nnterp_patchscope(over_the_same_weights(hf), own, generator)
    except ImportError as error:
        notes.append(f"{NNTERP} is left out: {error}. It is in the extra `bench`.")
        return
    yield Way(NNTERP, run, [cell for cell in cells if cell.same_layer])


def _margin(generator: PatchedGenerator, cell: Cell) -> float:
    return generator.generate([cell.patch])[0].margin
