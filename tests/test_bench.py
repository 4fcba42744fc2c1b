"""The benchmark: every way writes the same, and the numbers mean what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

from superscopes_tl import PAPER_ALPHAS, PatchedGenerator, load_model, sweep
from superscopes_tl.cli.main import app as superscopes
from superscopes_tl.cli.options import OUTPUT
from tests.benchmarks import bench, maps, measure, roofline
from tests.benchmarks.__main__ import app
from tests.benchmarks.measure import Job, Row, Way
from tests.benchmarks.report import Report, rate_figure
from tests.benchmarks.roofline import (
    Roofline,
    flop_of_cell,
    flop_of_score,
    flop_per_second,
    shape_of,
)
from tests.benchmarks.sizes import (
    SIZES,
    Size,
    over_the_same_weights,
    tokenizer,
    weight_bytes,
    with_random_weights,
)
from tests.benchmarks.ways import Limit
from tests.benchmarks.work import make_cells, spread
from tests.conftest import BACKENDS
from tests.support.tiny_models import sharp_llama, tiny_hf, tiny_tokenizer

ROOT = Path(__file__).parent.parent
TINY = Size("a tiny model", lambda dtype: tiny_hf("llama").to(dtype), 30, 3)

CONFIG = LlamaConfig(
    vocab_size=1280,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=256,
)
ENDLESS = Size("no end of text", lambda dtype: with_random_weights(CONFIG, dtype), 8, 2)


class Lengths:
    """Stands in for the sentence encoder: texts as long as the prompt are most similar to it."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        angles = np.array([len(text) / 100 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No encoder is loaded, a product is timed for a moment, and every machine has all rows."""
    monkeypatch.setattr(maps, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(maps, "paper_encoder", Lengths)
    monkeypatch.setattr(roofline, "SECONDS", 0.002)


@pytest.fixture(autouse=True)
def without_nnterp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts methods on every object of the process while it runs; see its own test."""
    monkeypatch.setitem(sys.modules, "nnterp", None)


def bridged(hf: Any) -> PatchedGenerator:
    """The engine on a module of its own around a model's weights."""
    model = load_model(over_the_same_weights(hf), tiny_tokenizer(), backend="bridge")
    return PatchedGenerator(model)


@pytest.fixture(params=["llama", "gpt2"])
def tiny_bench(request: pytest.FixtureRequest) -> bench.Bench:
    """The ways around a tiny model."""
    return bench.prepare(tiny_hf(request.param), tiny_tokenizer(), TINY)


def test_all_ways_write_the_same_texts(tiny_bench: bench.Bench) -> None:
    """Token for token, on the same cells; and the texts differ from cell to cell."""
    texts = measure.write_all(tiny_bench.ways)
    hooked = [bench.HOOKED_ONE_BY_ONE, bench.HOOKED] if "hooked" in BACKENDS else []
    assert set(texts) == {bench.ONE_BY_ONE, bench.BRIDGE, bench.LIMIT, *hooked}
    assert not measure.differing(texts)
    assert measure.share_equal(texts) == 1
    assert len(texts[bench.ONE_BY_ONE]) == TINY.slow
    written = texts[bench.BRIDGE]
    assert len(written) == TINY.cells
    assert len(set(written.values())) >= 5


@pytest.mark.skipif(find_spec("nnterp") is None, reason="the extra `bench` is not installed")
def test_nnterp_writes_the_same_texts_where_it_can_express_the_cell() -> None:
    """In a process of its own: nnsight changes what every object can do while it runs."""
    code = (
        "from tests.benchmarks import bench, measure\n"
        "from tests.test_bench import TINY, tiny_hf, tiny_tokenizer\n"
        "for name in ('llama', 'gpt2'):\n"
        "    made = bench.prepare(tiny_hf(name), tiny_tokenizer(), TINY)\n"
        "    texts = measure.write_all(made.ways)\n"
        "    print(len(texts[bench.NNTERP]), len(measure.differing(texts)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.split("\n")[:2] == ["20 0", "20 0"]


def test_random_weights_are_those_of_a_seed_and_write_to_the_longest_text() -> None:
    """Each cell takes the same work; building a model leaves the caller's draws alone."""
    state = torch.random.get_rng_state()
    one, other = (ENDLESS.build(torch.bfloat16) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
    made = bench.prepare(one, tokenizer(), ENDLESS)
    for written in measure.write_all(made.ways).values():
        assert {len(tokens) for tokens in written.values()} == {10}


def test_a_way_that_writes_something_else_is_an_error(tiny_bench: bench.Bench) -> None:
    """The message names both ways and the cell; a near tie is none."""
    ways = list(tiny_bench.ways)
    wrong = Way("wrong", lambda cells: [(1, 2, 3) for _ in cells], ways[0].cells)
    texts = measure.write_all([ways[0], wrong])
    assert measure.share_equal(texts) == 0
    with pytest.raises(RuntimeError, match="wrong does not write what Hugging Face generate"):
        measure.check_equal(texts, lambda cell: 1.0, near_tie=1e-4)
    measure.check_equal(texts, lambda cell: 1e-5, near_tie=1e-4)


def test_the_cells_are_those_that_every_way_can_express_and_others() -> None:
    """α = 1 goes into its own layer; the others into all but the last; no two are alike."""
    model = load_model(tiny_hf("llama"), tiny_tokenizer(), backend="bridge")
    cells = make_cells(model, 100)
    plain = [cell for cell in cells if cell.alpha == 1]
    assert plain
    assert all(cell.same_layer for cell in plain)
    assert not any(cell.same_layer for cell in cells if cell.alpha != 1)
    assert {cell.target_layer for cell in cells} == set(range(model.n_layers - 1))
    assert {cell.alpha for cell in cells} == {1, 3, 6, 9, 12, 15}
    assert len({cell.patch.key for cell in cells}) == len(cells)
    few = spread(cells, 4)
    assert len(few) == 4
    assert few[0] is cells[0]
    assert few[-1] is cells[-1]


def test_a_way_that_memory_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HookedTransformer` copies the weights; a note says what that would take."""
    hf = tiny_hf("llama")

    class Memory:
        available = weight_bytes(hf)

    monkeypatch.setattr(bench.psutil, "virtual_memory", Memory)
    with pytest.MonkeyPatch.context() as later:
        # The engine asks too, for its batch; that much there is.
        later.setattr("superscopes_tl.engine.forced.default_batch_size", lambda model, length: 64)
        made = bench.prepare(hf, tiny_tokenizer(), TINY)
    assert [way.name for way in made.ways] == [bench.ONE_BY_ONE, bench.BRIDGE, bench.LIMIT]
    if "hooked" in BACKENDS:
        said = [note for note in made.notes if "its copy of the weights needs" in note]
        assert [note.split(" is left out")[0] for note in said] == [
            bench.HOOKED_ONE_BY_ONE,
            bench.HOOKED,
        ]


def test_ways_share_the_weights_and_nothing_else() -> None:
    """A twin costs no memory, and a hook on it does not run in the original."""
    hf = tiny_hf("gpt2")
    twin = over_the_same_weights(hf)
    for one, other in zip(hf.parameters(), twin.parameters(), strict=True):
        assert one is other
    assert not set(map(id, hf.modules())) & set(map(id, twin.modules()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_arithmetic_is_counted_as_torch_counts_it(architecture: str) -> None:
    """The formula against every product that the limit really computes for a batch."""
    hf = tiny_hf(architecture)  # eager attention: each product is one that is counted
    generator = PatchedGenerator(
        load_model(over_the_same_weights(hf), tiny_tokenizer(), backend="bridge"), max_new_tokens=7
    )
    cells = make_cells(generator.model, 5)
    loop = Limit(hf, generator, rows=5)
    with FlopCounterMode(display=False) as counter:
        loop.run(cells)
    (first,) = generator.target.positions
    tail = len(generator.target.tokens) - first
    per_cell = flop_of_cell(shape_of(hf), first, tail, 7)
    rotary = counter.get_total_flops() - 5 * per_cell
    assert 0 <= rotary <= 0.001 * counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_arithmetic_of_the_map_is_counted_as_torch_counts_it(architecture: str) -> None:
    """Each cell's blocks above its patch, and those of the one row that all of them share."""
    hf = tiny_hf(architecture)
    generator = bridged(hf)
    made = maps.make_map(generator)
    with FlopCounterMode(display=False) as counter:
        maps.scores(generator, made.cells, made.words)
    shape, (first,) = shape_of(hf), generator.target.positions
    tail, words = len(generator.target.tokens) - first, len(made.words.token_ids)
    assert len(made.cells) < generator.batch_size
    # The shared row is unembedded once, after its last token.
    shared = flop_of_score(shape, -1, first, tail, words) - 2 * shape.head * (words - 1)
    rest = counter.get_total_flops() - sum(maps.flop_of_map(hf, generator, made)) - shared
    assert 0 <= rest <= 0.001 * counter.get_total_flops()  # the rotary embedding


def test_scoring_after_the_last_block_takes_the_unembedding_alone() -> None:
    """By hand: a block per layer above the patch, for each token that is read."""
    shape = shape_of(tiny_hf("llama"))
    assert flop_of_score(shape, 5, prefix=10, tail=2, words=3) == 2 * shape.head * 3
    below = flop_of_score(shape, 3, prefix=10, tail=2, words=3) - 2 * shape.head * 3
    assert below == 2 * (2 * shape.body * 4 + 4 * shape.attention * 4 * 14) // 6


def test_the_map_is_of_every_layer_kind_and_alpha(tiny_bench: bench.Bench) -> None:
    """Into the layer that is read; the log-probabilities are those of a pass per cell."""
    made, model = tiny_bench.map, tiny_bench.generator.model
    assert len(made.sites) == 3 * model.n_layers
    assert len(made.cells) == len(PAPER_ALPHAS) * len(made.sites)
    for number, cell in enumerate(made.cells):
        site = made.sites[number // len(PAPER_ALPHAS)]
        assert (cell.layer, cell.target_layer) == (site.layer, site.layer)
        assert cell.alpha == PAPER_ALPHAS[number % len(PAPER_ALPHAS)]
    one_by_one = [maps.scores(tiny_bench.generator, [c], made.words)[0] for c in made.cells[::7]]
    assert made.nats[::7] == pytest.approx(one_by_one, abs=1e-3)
    assert made.words.token_ids
    assert made.memory >= 0


def test_what_stands_in_for_own_words_is_as_long_as_a_real_models() -> None:
    """A random model has none about the prompt; the note says so."""
    model = load_model(ENDLESS.build(torch.float32), tokenizer(), backend="bridge")
    made = maps.make_map(PatchedGenerator(replace(model, eos_token_ids=())))
    assert made.words.given
    assert len(made.words.token_ids) == 4
    assert maps.notes_of(made)[0].startswith("What stands in for own words about 'Pink Floyd'")


def test_the_best_readings_are_those_of_a_sweep() -> None:
    """The same α and the same text for every site."""
    model = bridged(sharp_llama()).model
    made = maps.make_map(PatchedGenerator(model))
    assert not made.words.undefined
    found = maps.best_readings(model, made.cells)
    table = sweep(
        model, maps.PROMPT, positions=-1, generate="best",
        scorer=lambda references, texts: [0.0 for _ in texts], score_on="text", progress=False,
    ).table  # fmt: skip
    best = table[table["written"]].set_index(["kind", "source_layer"])
    assert len(found) == len(best) == len(made.sites)
    for site, (alpha, text) in zip(made.sites, found, strict=True):
        row = best.loc[(site.kind, site.layer)]
        assert (alpha, text.text) == (row["alpha"], row["text"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_reference_chooses_among_the_same_alphas(architecture: str) -> None:
    """Of all texts of a site, those that our engine writes too, the most similar one."""
    hf, step = tiny_hf(architecture), len(PAPER_ALPHAS)
    generator = bridged(hf)
    cells = maps.make_map(generator).cells[step : 3 * step]
    found = maps.reference_readings(hf, generator, cells, Lengths())
    assert len(found) == 2
    written = generator.generate([cell.patch for cell in cells])
    for start, (alpha, text) in zip((0, step), found, strict=True):
        texts = [generation.text for generation in written[start : start + step]]
        there = [abs(len(text) - len(maps.PROMPT)) if text.strip() else 10**9 for text in texts]
        best = int(np.argmin(there))
        assert (alpha, text) == (PAPER_ALPHAS[best], texts[best])


def test_a_cell_that_chooses_one_token_reads_the_prompt_alone() -> None:
    """By hand: 2·(body·tail + head) and, per pair of tokens, 4 per number of a head."""
    shape = shape_of(tiny_hf("llama"))
    assert shape.d_mlp == 64
    assert shape.attention == 6 * 32
    assert shape.head == 32 * len(tiny_tokenizer())
    assert shape.body == 6 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)
    once = flop_of_cell(shape, prefix=10, tail=2, new=1)
    assert once == 2 * shape.body * 2 + 2 * shape.head + 4 * shape.attention * 2 * 12
    twice = flop_of_cell(shape, prefix=10, tail=2, new=2)
    assert twice - once == 2 * shape.body + 2 * shape.head + 4 * shape.attention * 13


def test_the_speed_of_a_product_is_measured() -> None:
    """Positive, finite, and what this machine could do."""
    speed = flop_per_second(shape_of(tiny_hf("llama")), 64, torch.float32, torch.device("cpu"))
    assert 1e6 < speed < 1e16
    assert Roofline(2e9, 1e10).cells_per_second == 5


def test_the_command_measures_and_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has all ways, the JSON its promised form, the page the figure."""
    monkeypatch.setitem(SIZES, "small", ENDLESS)
    monkeypatch.setattr(OUTPUT, "width", 160)  # else names are wrapped
    numbers, page = tmp_path / "bench.json", tmp_path / "bench.html"
    done = CliRunner().invoke(app, ["--rounds", "1", "--json", str(numbers), "--html", str(page)])
    assert done.exit_code == 0, done.output
    found = json.loads(numbers.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    names = list(rows)
    assert names[0] == bench.ONE_BY_ONE
    mapped = [maps.WRITTEN, maps.MAP, maps.HIGH, maps.REFERENCE, maps.READING]
    assert names[-7:] == [bench.BRIDGE, bench.LIMIT, *mapped]
    assert all(name in done.output for name in names)
    for row in rows.values():
        columns = {"name", "cells_per_second", "ratio", "against", "share_of_arithmetic"}
        assert set(row) == columns
        other = rows[row["against"]]
        assert row["ratio"] == pytest.approx(row["cells_per_second"] / other["cells_per_second"])
        assert 0 < row["share_of_arithmetic"] < 10
    held = {bench.BRIDGE: names[0], maps.MAP: maps.WRITTEN, maps.HIGH: maps.WRITTEN}
    held[maps.READING] = maps.REFERENCE
    assert all(rows[name]["against"] == other for name, other in held.items())
    assert (found["size"], found["dtype"], found["rounds"]) == ("small", "float32", 1)
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(found["versions"]) == {"torch", "transformers", "transformer_lens"}
    assert found["peak_memory_bytes"] > 10**8
    assert found["map_memory_bytes"] >= 0
    roof = found["roofline"]
    assert roof["cells_per_second"] == pytest.approx(
        roof["flop_per_second"] / roof["flop_per_cell"]
    )
    assert roof["flop_per_cell"] > 0
    assert found["equal_texts"] == 1
    assert "nnterp patchscope_generate is left out" in " ".join(done.output.split())
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


def test_a_real_model_is_measured_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own tokenizer; without an encoder the reference's way is left out, with a note."""

    def absent() -> Any:
        raise OSError("no such model")

    tiny_hf("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(maps, "paper_encoder", absent)
    report = bench.run_bench(model=str(tmp_path / "tiny"), rounds=1)
    assert report.title == "tiny (0 million parameters)"
    assert report.equal == 1
    rows = {row.name: row for row in report.rows}
    assert maps.REFERENCE not in rows
    assert rows[maps.READING].ratio == 1
    assert any(f"{maps.REFERENCE} is left out" in note for note in report.notes)


def test_the_median_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the fastest nor a disturbed round; ways take turns; ratios are within a round."""
    moments = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.25, 4.0, 54.0, 54.0, 56.0, 56.0, 58.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(moments))
    calls: list[str] = []

    def job(name: str) -> Job:
        return Job(name, lambda: calls.append(name), 2, 3.0, "a", torch.float32)

    speeds = iter([20.0, 40.0, 60.0] * 3)
    (a, b), speed = measure.in_rounds([job("a"), job("b")], 3, lambda dtype: next(speeds))
    assert (a.rate, b.rate) == (2.0, 1.0)
    assert (a.ratio, b.ratio) == (1.0, 0.5)
    # The speed beside a job is the mean of those before and after it.
    assert (a.share, b.share) == (2 * 3 / 30, 1 * 3 / 50)
    assert speed == 50
    assert calls == ["a", "b"] * 3


def test_the_memory_of_some_work_is_what_it_takes_at_most() -> None:
    """Also where it is given back before the end."""

    def work() -> None:
        taken = torch.ones(5 * 10**7)  # 200 MB
        time.sleep(0.2)
        del taken

    found = measure.memory_above(torch.device("cpu"), work)
    assert 1.5e8 < found < 4e8


def test_the_figure_has_a_bar_per_way() -> None:
    """With its rate and ratio; the limit of arithmetic is a line beside those that write cells."""
    rows = [
        Row("one", 2.0, 1.0, 0.1, "one"),
        Row("limit", 8.0, 4.0, 0.4, "one"),
        Row("best", 3.0, 1.5, 0.2, "other", "sites"),
    ]
    report = Report(
        "small", "a model", rows, "limit", Roofline(1e9, 3e10), "float32",
        "cpu", 1, 5, 64, 10**9, 10**8, 1.0,
    )  # fmt: skip
    figure = rate_figure(report)
    assert list(figure.data[0].x) == [2.0, 8.0, 3.0]
    assert list(figure.data[0].y) == ["one", "limit", "best (sites/s)"]
    assert list(figure.data[0].text) == ["2 (1.0x, 10%)", "8 (4.0x, 40%)", "3 (1.5x, 20%)"]
    (line,) = figure.layout.shapes
    assert (line.x0, line.y0, line.y1) == (30, -0.5, 1.5)
    assert ", 1 thread, median of 5 rounds" in figure.layout.title.text


def test_the_shipped_command_runs_the_benchmark_of_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its options and its exit code pass through; an installed package says what is missing."""
    from superscopes_tl.cli import application

    runs: list[Any] = []

    def recorded(command: list[str], **options: Any) -> Any:
        runs.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(application.subprocess, "run", recorded)
    done = CliRunner().invoke(superscopes, ["bench", "--size", "gpt2", "--rounds", "1"])
    assert done.exit_code == 3
    assert runs == [[sys.executable, "-m", "tests.benchmarks", "--size", "gpt2", "--rounds", "1"]]
    installed = tmp_path / "superscopes_tl" / "cli" / "application.py"
    monkeypatch.setattr(application, "__file__", str(installed))
    done = CliRunner().invoke(superscopes, ["bench"])
    assert done.exit_code == 2
    assert "Error: bench: expected a clone" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (["--size", "7b"], "size"),
        (["--model", "no-such-model"], "model"),
        (["--model", "smollm2", "--size", "gpt2"], "model"),
        (["--dtype", "int8"], "dtype"),
        (["--rounds", "0"], "rounds"),
        (["--threads", "0"], "threads"),
        (["--json", "nowhere/x.json"], "--json"),
        (["--device", "abacus"], "device"),
    ],
)
def test_bad_options_end_with_2(arguments: list[str], argument: str) -> None:
    """Before any model is built."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"Error: {argument}: expected" in " ".join(done.stderr.split())
