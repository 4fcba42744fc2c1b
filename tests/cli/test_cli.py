"""The command: what it prints, writes, and how it ends."""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from superscopes_tl import PAPER_PROMPTS, LanguageModel, SweepResult, sweep
from superscopes_tl.cli.demonstration import CONFIG, read_share, rescue_table, run_demo
from superscopes_tl.cli.main import app
from superscopes_tl.cli.options import ERRORS, OUTPUT, parse_layers, parse_numbers
from superscopes_tl.evaluation import SECOND_LIST
from superscopes_tl.experiment import SweepConfig, SweepError, SweepInterrupted
from superscopes_tl.scores import own_words
from superscopes_tl.statistics import layer_shares, reveals_earlier

FAST = ["--layers", "5,2", "--alphas", "1,3", "--backend", "bridge", "--max-new-tokens", "6"]


def run(*arguments: str) -> Any:
    """Run the command as a user would."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell of a table is wrapped, whatever the terminal in which the tests run."""
    for console in (OUTPUT, ERRORS):
        monkeypatch.setattr(console, "width", 240)


@pytest.fixture
def use(llama_folder: Path) -> list[str]:
    """The options that choose the model."""
    return ["--model", str(llama_folder)]


def test_the_command_and_each_subcommand_explain_themselves() -> None:
    """--help names every command and what it does, and ends well."""
    top = run("--help")
    assert top.exit_code == 0
    for name in ("sweep", "evaluate", "demo", "models", "fetch", "replay", "app"):
        assert name in top.stdout
        help_text = run(name, "--help")
        assert help_text.exit_code == 0
        assert "Usage" in help_text.stdout


def test_a_sweep_prints_a_table_and_writes_both_files(tmp_path: Path, use: list[str]) -> None:
    """The run file holds all cells; the page holds the figure."""
    out, page = tmp_path / "run.zip", tmp_path / "map.html"
    done = run("sweep", *use, "Pearl Jam", *FAST, "--out", str(out), "--html", str(page))
    assert done.exit_code == 0, done.stderr
    assert "Pearl Jam" in done.stdout
    assert "resid_post" in done.stdout
    result = SweepResult.load(out)
    assert len(result) == 2 * 3 * 2
    assert sorted(result.table["source_layer"].unique()) == [2, 5]
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


def test_what_other_prompts_vectors_recover_stands_beside_the_share(
    tmp_path: Path, use: list[str]
) -> None:
    """The control that was asked for is in the row of each layer."""
    out = tmp_path / "run.zip"
    asked = ["--kinds", "mlp_out", "--controls", "other_prompt", "--out", str(out)]
    done = run("sweep", *use, "Pearl Jam", *FAST, *asked)
    assert done.exit_code == 0, done.stderr
    assert "other prompts'" in done.stdout
    best = SweepResult.load(out).by_layer()["mlp_out"]
    assert len(best) == 2
    for row in best.itertuples():
        assert f"{row.recovered:.2f} / {row.other_prompt_recovered:.2f})" in done.stdout


def test_all_cells_can_be_printed(use: list[str]) -> None:
    """--all prints a row per cell."""
    done = run("sweep", *use, "Pearl Jam", *FAST, "--kinds", "mlp_out", "--all")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("mlp_out") == 4


def test_markup_in_a_prompt_is_text(use: list[str]) -> None:
    """Brackets and colons that the terminal library would interpret are printed as they are."""
    done = run("sweep", *use, "[/b] hi :x:", *FAST, "--kinds", "mlp_out")
    assert done.exit_code == 0, done.stderr
    assert "[/b] hi :x:" in done.stdout


def test_a_page_has_a_figure_per_token(tmp_path: Path, use: list[str]) -> None:
    """All tokens of a prompt are drawn, one below the other."""
    page = tmp_path / "map.html"
    done = run("sweep", *use, "Pearl", *FAST, "--token", "all", "--html", str(page))
    assert done.exit_code == 0, done.stderr
    tokens = done.stdout.count("best reading")
    assert tokens > 1
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == tokens


def test_a_layer_by_layer_grid_is_drawn_over_target_layers(tmp_path: Path, use: list[str]) -> None:
    """Several target layers make a grid whose horizontal axis is the target layer."""
    page = tmp_path / "grid.html"
    done = run("sweep", *use, "Pearl Jam", *FAST, "--target-layer", "0,4", "--html", str(page))
    assert done.exit_code == 0, done.stderr
    assert "target layer" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (["", *FAST], "prompt"),
        (["Pearl Jam", "--alphas", "1,x"], "--alphas"),
        (["Pearl Jam", "--layers", "5-2"], "--layers"),
        (["Pearl Jam", "--layers", "2-x"], "--layers"),
        (["Pearl Jam", "--out", "nowhere/run.zip"], "--out"),
        (["Pearl Jam", "--out", "."], "--out"),
        (["Pearl Jam", "--scorer", "no/such-scorer"], "scorer"),
        (["[/b] Jam", "--layers", "99"], "layers"),
        (["Pearl Jam", "--kinds", "mlp"], "kinds"),
        (["Pearl Jam", "--target-prompt", "no place"], "target_prompt"),
        (["Pearl Jam", "--model", "./nowhere"], "model"),
        (["Pearl Jam", "--dtype", "int8"], "dtype"),
        (["Pearl Jam", "--token", "Juice"], "positions"),
        (["Pearl Jam", "--auto", "--target", "0"], "--auto"),
        (["Pearl Jam", "--auto", "--preset", "selfie"], "--auto"),
    ],
)
def test_bad_input_ends_with_two_and_says_what_to_do(
    arguments: list[str], argument: str, use: list[str]
) -> None:
    """Exit code 2, the message on the error stream, no traceback."""
    done = run("sweep", *use, *arguments)
    assert done.exit_code == 2
    text = " ".join(done.stderr.split())
    assert f"Error: {argument}: expected " in text
    assert "Fix: " in text


@pytest.mark.parametrize(("error", "code"), [(SweepInterrupted, 130), (SweepError, 1)])
def test_a_sweep_that_breaks_off_saves_what_it_has(
    error: Any,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama: LanguageModel,
    word_overlap: Any,
    use: list[str],
) -> None:
    """Exit code 130 for an interrupt, as a shell expects, and the finished cells in the file."""
    partial = sweep(llama, "Pearl Jam", layers=2, scorer=word_overlap, progress=False)

    def stopped(*args: Any, **kwargs: Any) -> SweepResult:
        raise error("stopped after 18 of 99 cells", partial)

    monkeypatch.setattr("superscopes_tl.cli.experiments.run_sweep", stopped)
    done = run("sweep", *use, "Pearl Jam", *FAST, "--out", str(tmp_path / "run.zip"))
    assert done.exit_code == code
    assert "stopped after 18 of 99 cells" in done.stderr
    assert len(SweepResult.load(tmp_path / "run.zip")) == 18


def test_models_shows_a_model_and_what_else_there_is(llama_folder: Path) -> None:
    """Name, kinds, size, and how to name another."""
    done = run("models", str(llama_folder))
    assert done.exit_code == 0, done.stderr
    for word in ("tiny-llama", "resid_mid", "fingerprint", "hub name"):
        assert word in done.stdout


def test_lists_of_layers_and_numbers() -> None:
    """Ranges include both ends; negative layers count from the last."""
    assert parse_layers("0-3,8,-1", "--layers") == [0, 1, 2, 3, 8, -1]
    assert parse_numbers("1, 2.5,-3", "--alphas") == [1.0, 2.5, -3.0]


def _cells(*rows: tuple[str, int, float, float, float]) -> pd.DataFrame:
    """Return cells of MLP outputs: name, layer, α, what it recovers and what other names do."""
    names = ("prompt", "source_layer", "alpha", "recovered", "other_prompt_recovered")
    table = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    return table.assign(
        kind="mlp_out", description=[f"said at {alpha:g}" for alpha in table["alpha"]]
    )


def test_a_cell_reads_by_what_it_recovers_above_other_names() -> None:
    """Other names that recover less than nothing do not add to it."""
    table = _cells(("Paris", 8, 1, 0.5, 0.3), ("Paris", 8, 6, 0.5, -2.0))
    assert read_share(table).tolist() == pytest.approx([0.2, 0.5])


def test_hits_and_misses_of_amplification_are_both_listed() -> None:
    """Of the sites that α = 1 does not read, those that a larger one reads come first."""
    table = _cells(
        ("Titanic", 8, 1, 0.0, 0.0), ("Titanic", 8, 6, 0.1, 0.1),
        ("Paris", 8, 1, 0.1, 0.1), ("Paris", 8, 6, 0.8, 0.2),
        ("Paris", 4, 1, 0.9, 0.1), ("Paris", 4, 6, 0.9, 0.1),
    )  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=160).print(rescue_table(table))
    shown = screen.getvalue()
    assert "(2 of 3)" in shown
    assert shown.index("Paris") < shown.index("Titanic")
    assert len(re.findall(r"not read", shown)) == 2  # the title, and Titanic
    assert "said at 6" in shown


def test_the_demo_shows_what_it_promises(llama: LanguageModel, tmp_path: Path) -> None:
    """The model, its own words, a table per name, hits and misses, a page, run files."""
    screen = io.StringIO()
    config = replace(
        CONFIG, chat=False, source_template="{}", layers=(5,), alphas=(1.0, 6.0), max_new_tokens=5,
    )  # fmt: skip
    names = ("Alexander the Great", "Titanic")
    page = run_demo(llama, tmp_path, names, Console(file=screen, width=160), config)
    shown = " ".join(screen.getvalue().split())
    assert "LanguageModel('tiny-llama'" in shown
    for name in names:
        assert f"{name} · the model's own words: {own_words(llama, name).text!r:.8}" in shown
    assert "MLP outputs that are not read at α = 1" in shown
    assert "Mean over 2 names" in shown
    assert "Found: " in shown
    assert page.name in shown
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == 2
    table = SweepResult.load(tmp_path / "demo.sqlite").table
    assert len(table) == 2 * (1 + 2)  # names x (block output, MLP output at two α)


def test_evaluate_counts_prompts_and_goes_on_where_it_was(tmp_path: Path, use: list[str]) -> None:
    """One line per method, a file that is added to, and a page with the figure."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Pearl Jam\n\nDiana, Princess of Wales\nTitanic\n", encoding="utf-8")
    command = [
        "evaluate", *use, "--prompts", str(prompts), "--layers", "5,2", "--alphas", "1,3,9",
        "--max-new-tokens", "8", "--out", str(tmp_path / "run.sqlite"),
        "--html", str(tmp_path / "run.html"), "--controls", "random_direction",
    ]  # fmt: skip
    first = run(*command)
    assert first.exit_code == 0, first.output
    for method in ("Patchscopes", "Superscopes", "Patchscopes, equal budget", "random direction"):
        assert len(re.findall(rf"^{method} \d \d$", first.output, re.MULTILINE)) == 2
    assert (tmp_path / "run.html").stat().st_size > 1_000_000
    readings = SweepResult.load(tmp_path / "run.sqlite").table
    assert len(readings) == 3 * 2 * (3 + 1)
    again = run(*command, "--layers", "5,2,4")
    assert again.exit_code == 0, again.output
    assert len(SweepResult.load(tmp_path / "run.sqlite")) == 3 * 3 * (3 + 1)


def test_a_table_of_facts_is_an_evaluation(tmp_path: Path, use: list[str]) -> None:
    """Its target prompt and facts are used; texts that contain their fact are counted per layer."""
    facts, out = tmp_path / "facts.json", tmp_path / "run.sqlite"
    several = [("Titanic", "film"), ("Pearl Jam", "band"), ("Mexico", "country")]
    rows = [{"prompt": f"{s} is a kind of", "subject": s, "attribute": f} for s, f in several]
    facts.write_text(json.dumps(rows), encoding="utf-8")
    command = ["evaluate", *use, "--prompts", str(facts), "--layers", "5,2", "--alphas", "1,3",
               "--out", str(out), "--draws", "0"]  # fmt: skip
    done = run(*command, "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    assert done.output.count(" of 3") == 4
    found = SweepResult.load(out)
    assert found.provenance["target_prompt"]["text"] == "x is a kind of"
    assert found.provenance["config"]["max_new_tokens"] == 4
    words = found.table.drop_duplicates("prompt")[["prompt", "own_words"]].to_numpy().tolist()
    assert words == [list(fact) for fact in several]
    done = run(*command, "--max-new-tokens", "4", "--target", "embed")
    assert done.output.count(" of 3") == 4, "of one target layer"
    done = run(*command, "--column", "subjects")
    assert done.exit_code == 2
    assert "'prompt', 'subject', 'attribute'" in done.output
    done = run("evaluate", *use, "--column", "subject", "--out", str(tmp_path / "other.sqlite"))
    assert done.exit_code == 2
    assert "--column" in done.output


def test_an_evaluation_can_be_a_map_first_and_texts_later(tmp_path: Path, use: list[str]) -> None:
    """Shares alone are printed as means over prompts; the best α of each site is written later."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run.sqlite"
    prompts.write_text("Pearl Jam\nAlexander the Great\nTitanic\n", encoding="utf-8")
    command = ["evaluate", *use, "--prompts", str(prompts), "--layers", "5,2", "--alphas", "1,9",
               "--target", "0", "--kinds", "resid_post", "--out", str(out)]  # fmt: skip
    first = run(*command, "--generate", "none")
    assert first.exit_code == 0, first.output
    table = SweepResult.load(out).table
    assert len(table) == 3 * 2 * 2
    assert not table["written"].any()
    shares = table.groupby(["source_layer", "alpha"])["recovered"].mean()
    for layer in (5, 2):
        line = next(x for x in first.output.splitlines() if re.match(rf"\W*{layer} \W", x))
        assert f"{shares[layer, 1.0]:.2f}" in line
        assert f"{shares[layer, 9.0]:.2f}" in line
    later = run(*command, "--generate", "best")
    assert later.exit_code == 0, later.output
    again = SweepResult.load(out).table
    assert len(again) == len(table)
    assert again.groupby(["prompt", "source_layer"])["written"].sum().eq(1).all()


def test_evaluate_prints_what_each_layer_recovers_and_what_holds(
    tmp_path: Path, use: list[str]
) -> None:
    """A table per kind and unit with intervals and tests, a sentence, and curves on the page."""
    prompts, out, page = (tmp_path / name for name in ("prompts.txt", "run.sqlite", "run.html"))
    prompts.write_text("Pearl Jam\nAlexander the Great\nTitanic\n", encoding="utf-8")
    command = ["evaluate", *use, "--prompts", str(prompts), "--layers", "5,2", "--target", "0",
               "--kinds", "mlp_out", "--controls", "other_prompt,random_direction",
               "--others", "2", "--generate", "none", "--out", str(out)]  # fmt: skip
    first = run(*command, "--alphas", "1,9")
    assert first.exit_code == 0, first.output
    done = run(*command, "--alphas", "0.5,4", "--unit", "residual", "--html", str(page))
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert shown.count("2 layers") == 2  # one sentence for each unit; so few prompts show nothing
    assert f"{use[1].rpartition('/')[2]}, Scale(), in residual norms: at none of 2 layers" in shown
    found = layer_shares(SweepResult.load(out).table, target_layer=0)
    for row in found.to_dict("records"):
        interval = f"[{row['plain_low']:.2f}, {row['plain_high']:.2f}]"
        assert f"{row['plain']:.2f} {interval}" in shown
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == 2


def test_evaluate_uses_lists_of_the_package_and_what_check_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: list[str]
) -> None:
    """`--prompts names` and `--auto` reach `evaluate`; `--auto` excludes what it chooses."""
    passed: dict[str, Any] = {}

    def caught(model: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        passed.update(settings, model=model, prompts=prompts)
        raise ValueError("enough")

    class Check:
        verdict = "readable"
        config = SweepConfig(target_layer=0, source_template="Say {}")

    monkeypatch.setattr("superscopes_tl.cli.experiments.run_evaluate", caught)
    monkeypatch.setattr("superscopes_tl.cli.experiments.kept_readability", lambda model: Check)
    out = ["--out", str(tmp_path / "run.sqlite")]
    done = run("evaluate", *use, "--prompts", "names", "--auto", *out)
    assert "readable" in done.output
    assert passed["prompts"] == SECOND_LIST
    assert (passed["target_layer"], passed["source_template"]) == (0, "Say {}")
    assert isinstance(passed["model"], LanguageModel)
    both = run("evaluate", *use, "--auto", "--target", "0", *out)
    assert both.exit_code == 2
    assert "--auto" in both.output


def test_workers_get_a_loader_that_can_be_sent_and_an_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: list[str]
) -> None:
    """What `--workers` passes on to `evaluate`, which has tests of its own."""
    passed: dict[str, Any] = {}

    def caught(load: Any, *arguments: Any, **settings: Any) -> Any:
        passed.update(settings, load=pickle.loads(pickle.dumps(load)))
        raise ValueError("enough")

    monkeypatch.setattr("superscopes_tl.cli.experiments.run_evaluate", caught)
    out = str(tmp_path / "run.sqlite")
    assert run("evaluate", *use, "--workers", "2", "--out", out).exit_code == 2
    assert callable(passed["executor"])
    assert passed["load"].args == (use[1],)
    run("evaluate", *use, "--out", out)
    assert passed["executor"] is None


def test_evaluate_of_hidden_states_lists_what_is_read_early(tmp_path: Path, use: list[str]) -> None:
    """Section 4.2: block outputs before the contextualization layer, prompt by prompt."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PAPER_PROMPTS[::6]), encoding="utf-8")
    done = run(
        "evaluate", *use, "--prompts", str(prompts), "--section", "4.2", "--layers", "1-3",
        "--alphas", "1,2,3", "--draws", "0", "--target", "0", "--score-on", "description",
        "--out", str(tmp_path / "run.sqlite"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = reveals_earlier(SweepResult.load(tmp_path / "run.sqlite").table)
    assert f"read {found['prompt'].nunique()} of 8 prompts ({len(found)} layers)" in done.output
    for row in found.to_dict("records"):
        assert f"{row['prompt']}, layer {row['source_layer']} before" in done.output


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        (["--section", "5"], "--section"),
        (["--prompts", "nowhere.txt"], "--prompts"),
        (["--target", "x"], "--target-layer"),
        (["--target", "0,3"], "--target-layer"),
        (["--controls", "luck"], "controls"),
        (["--out", "nowhere/run.sqlite"], "--out"),
        (["--workers", "0"], "workers"),
    ],
)
def test_bad_options_of_evaluate_end_with_2(
    option: list[str],
    argument: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: list[str],
) -> None:
    """The message names the option and what it expects; no file is left."""
    monkeypatch.chdir(tmp_path)
    done = run("evaluate", *use, *option)
    assert done.exit_code == 2
    assert f"Error: {argument}: expected " in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
