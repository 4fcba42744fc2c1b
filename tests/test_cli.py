"""The command: what it prints, writes, and how it ends."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from superscopes_tl import (
    PAPER_PROMPTS,
    Evaluation,
    LanguageModel,
    SweepError,
    SweepInterrupted,
    SweepResult,
    reveals_earlier,
    sweep,
)
from superscopes_tl.cli import app
from superscopes_tl.demo import count_right, known_facts, rescues, run_demo
from superscopes_tl.metric import exact
from superscopes_tl.shell import parse_layers, parse_numbers
from tests.same import assert_same_readings

FAST = ["--layers", "5,2", "--alphas", "1,3", "--backend", "bridge", "--max-new-tokens", "6"]


def run(*arguments: str) -> Any:
    """Run the command as a user would."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def test_the_command_and_each_subcommand_explain_themselves() -> None:
    """--help names every command and what it does, and ends well."""
    top = run("--help")
    assert top.exit_code == 0
    for name in ("sweep", "demo", "models", "fetch", "replay"):
        assert name in top.stdout
        help_text = run(name, "--help")
        assert help_text.exit_code == 0
        assert "Usage" in help_text.stdout


def test_a_sweep_prints_a_table_and_writes_both_files(tmp_path: Path) -> None:
    """The run file holds all cells; the page holds the figure."""
    out, page = tmp_path / "run.zip", tmp_path / "map.html"
    done = run("sweep", "Pearl Jam", *FAST, "--out", str(out), "--html", str(page))
    assert done.exit_code == 0, done.stderr
    assert "Pearl Jam" in done.stdout
    assert "resid_post" in done.stdout
    result = SweepResult.load(out)
    assert len(result) == 2 * 3 * 2
    assert sorted(result.table["source_layer"].unique()) == [2, 5]
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


def test_all_cells_can_be_printed() -> None:
    """--all prints a row per cell."""
    done = run("sweep", "Pearl Jam", *FAST, "--kinds", "mlp_out", "--all")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("mlp_out") == 4


def test_markup_in_a_prompt_is_text() -> None:
    """Brackets and colons that the terminal library would interpret are printed as they are."""
    done = run("sweep", "[/b] hi :x:", *FAST, "--kinds", "mlp_out")
    assert done.exit_code == 0, done.stderr
    assert "[/b] hi :x:" in done.stdout


def test_a_page_has_a_figure_per_token(tmp_path: Path) -> None:
    """All tokens of a prompt are drawn, one below the other."""
    page = tmp_path / "map.html"
    done = run("sweep", "Pearl", *FAST, "--token", "all", "--html", str(page))
    assert done.exit_code == 0, done.stderr
    tokens = done.stdout.count("best reading")
    assert tokens > 1
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == tokens


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    """A long sweep must not find out at its end that it cannot be saved."""
    done = run("sweep", "Pearl Jam", *FAST, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "expected a file in a folder that exists" in " ".join(done.stderr.split())


def test_a_layer_by_layer_grid_is_drawn_over_target_layers(tmp_path: Path) -> None:
    """Several target layers make a grid whose horizontal axis is the target layer."""
    page = tmp_path / "grid.html"
    done = run("sweep", "Pearl Jam", *FAST, "--target-layer", "0,4", "--html", str(page))
    assert done.exit_code == 0, done.stderr
    assert "target layer" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", *FAST], "prompt: expected"),
        (["Pearl Jam", "--alphas", "1,x"], "--alphas: expected numbers"),
        (["Pearl Jam", "--layers", "5-2"], "--layers: expected numbers such as 0-5,8"),
        (["Pearl Jam", "--out", "nowhere/run.zip"], "expected a file in a folder that exists"),
        (["Pearl Jam", "--scorer", "no/such-scorer"], "scorer: expected the name or directory"),
        (["[/b] Jam", "--layers", "99"], "layers: expected"),
        (["Pearl Jam", "--layers", "2-x"], "--layers: expected numbers such as 0-5,8"),
        (["Pearl Jam", "--layers", "99"], "layers: expected layers of a model with"),
        (["Pearl Jam", "--kinds", "mlp"], "kinds: expected"),
        (["Pearl Jam", "--target-prompt", "no place"], "target_prompt: expected"),
        (["Pearl Jam", "--model", "./nowhere"], "model: expected"),
        (["Pearl Jam", "--dtype", "int8"], "dtype: expected"),
        (["Pearl Jam", "--token", "Juice"], "positions: expected a substring"),
    ],
)
def test_bad_input_ends_with_two_and_says_what_to_do(arguments: list[str], message: str) -> None:
    """Exit code 2, the message on the error stream, no traceback."""
    done = run("sweep", *arguments)
    assert done.exit_code == 2
    text = " ".join(done.stderr.split())
    assert message in text
    assert "Fix:" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("error", "code"), [(SweepInterrupted, 130), (SweepError, 1)])
def test_a_sweep_that_breaks_off_saves_what_it_has(
    error: Any,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mini: LanguageModel,
    word_overlap: Any,
) -> None:
    """Exit code 130 for an interrupt, as a shell expects, and the finished cells in the file."""
    partial = sweep(mini, "Pearl Jam", layers=2, scorer=word_overlap, progress=False)

    def stopped(*args: Any, **kwargs: Any) -> SweepResult:
        raise error("stopped after 18 of 99 cells", partial)

    monkeypatch.setattr("superscopes_tl.sweep", stopped)
    done = run("sweep", "Pearl Jam", *FAST, "--out", str(tmp_path / "run.zip"))
    assert done.exit_code == code
    assert "stopped after 18 of 99 cells" in done.stderr
    assert len(SweepResult.load(tmp_path / "run.zip")) == 18


def test_models_shows_the_bundled_model_and_what_else_there_is() -> None:
    """Name, kinds, size, and how to name another."""
    done = run("models", "mini")
    assert done.exit_code == 0, done.stderr
    for word in ("mini", "resid_mid", "fingerprint", "hub name"):
        assert word in done.stdout


def test_lists_of_layers_and_numbers() -> None:
    """Ranges include both ends; negative layers count from the last."""
    assert parse_layers("0-3,8,-1", "--layers") == [0, 1, 2, 3, 8, -1]
    assert parse_numbers("1, 2.5,-3", "--alphas") == [1.0, 2.5, -3.0]


def _rows(*cells: tuple[str, int, float, str]) -> pd.DataFrame:
    table = pd.DataFrame(cells, columns=["prompt", "source_layer", "alpha", "description"])
    return table.assign(kind="mlp_out")


FACTS = {"Pearl Jam": "American rock band", "Syria": "country"}


def test_right_means_the_fact_word_for_word_up_to_the_next_entry() -> None:
    """A comma ends the entry; anything else that differs is not the fact."""
    table = _rows(
        ("Pearl Jam", 2, 1, "American rock band"),
        ("Pearl Jam", 2, 1, "American rock band, Oman"),
        ("Pearl Jam", 2, 1, "American rock"),
        ("Syria", 2, 1, "American rock band"),
        ("Syria", 2, 1, ""),
    )
    assert exact(table, FACTS).tolist() == [True, True, False, False, False]


def test_a_rescue_is_wrong_at_one_and_right_at_the_smallest_larger_alpha() -> None:
    """Only sites that α = 1 misreads count, with the first α that reads them."""
    table = _rows(
        ("Pearl Jam", 5, 1, "fruit"),
        ("Pearl Jam", 5, 9, "American rock band"),
        ("Pearl Jam", 5, 3, "American rock band"),
        ("Pearl Jam", 2, 1, "American rock band"),
        ("Pearl Jam", 2, 3, "American rock band"),
        ("Syria", 5, 1, "fruit"),
        ("Syria", 5, 3, "fruit"),
    )
    found = list(rescues(table, FACTS))
    assert [(r.prompt, r.layer, r.before, r.alpha) for r in found] == [("Pearl Jam", 5, "fruit", 3)]


def test_the_counts_stand_beside_their_controls(mini: LanguageModel) -> None:
    """On a few prompts: what is read right is neither random nor another prompt's fact."""
    prompts = PAPER_PROMPTS[:4]
    counts = count_right(mini, known_facts(), prompts).set_index("cells")
    assert counts.loc["resid_post, α = 1", "right"] >= 3
    assert counts["random vector"].max() == 0
    assert counts["other prompt"].astype(float).max() <= 1


def test_the_demo_shows_what_it_promises(mini: LanguageModel, tmp_path: Path) -> None:
    """Tables, an MLP output rescued by amplification, counts, a page, run files."""
    screen = io.StringIO()
    page = run_demo(mini, tmp_path, PAPER_PROMPTS[:3], Console(file=screen, width=160))
    shown = screen.getvalue()
    assert "Red Hot Chili Peppers" in shown
    assert "✓" in shown, "at least one reading is the fact, word for word"
    assert "MLP outputs that only amplification reads" in shown
    assert "random vector" in shown
    assert str(page) in shown
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == 5
    assert len(list(tmp_path.glob("*.zip"))) == 5


def test_evaluate_counts_prompts_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """One line per method, a file that is added to, and a page with the figure."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Pearl Jam\n\nDiana, Princess of Wales\nTitanic\n", encoding="utf-8")
    command = [
        "evaluate", "--prompts", str(prompts), "--layers", "5,2", "--alphas", "1,3,9",
        "--max-new-tokens", "8", "--out", str(tmp_path / "run.sqlite"),
        "--html", str(tmp_path / "run.html"), "--controls", "random_direction",
    ]  # fmt: skip
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    for method in ("Patchscopes", "Superscopes", "Patchscopes, equal budget", "random direction"):
        assert len(re.findall(rf"^{method} \d \d$", first.output, re.MULTILINE)) == 2
    assert (tmp_path / "run.html").stat().st_size > 1_000_000
    readings = Evaluation.load(tmp_path / "run.sqlite").table
    assert len(readings) == 3 * 2 * (3 + 1)
    again = CliRunner().invoke(app, [*command, "--layers", "5,2,7"])
    assert again.exit_code == 0, again.output
    assert len(Evaluation.load(tmp_path / "run.sqlite")) == 3 * 3 * (3 + 1)


def test_evaluate_by_workers_fills_the_same_file(tmp_path: Path) -> None:
    """Two processes read and count what one does."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Pearl Jam\nDiana, Princess of Wales\nTitanic\n", encoding="utf-8")
    key, found = ["prompt", "source_layer", "alpha"], []
    for name, extra in (("several", ["--workers", "2"]), ("alone", [])):
        out = tmp_path / f"{name}.sqlite"
        run = CliRunner().invoke(
            app,
            ["evaluate", "--prompts", str(prompts), "--layers", "5,2", "--alphas", "1,9",
             "--max-new-tokens", "3", "--backend", "bridge", "--draws", "0", "--out", str(out),
             *extra],
        )  # fmt: skip
        assert run.exit_code == 0, run.output
        table = Evaluation.load(out).table.sort_values(key, ignore_index=True)
        found.append((table, run.stdout.replace(name, "")))
    (several, said), (alone, also) = found
    assert len(several) == 3 * 2 * 2
    assert_same_readings(several, alone)
    assert said == also


def test_evaluate_of_hidden_states_lists_what_is_read_early(tmp_path: Path) -> None:
    """Section 4.2: block outputs before the contextualization layer, prompt by prompt."""
    run = CliRunner().invoke(
        app,
        ["evaluate", "--section", "4.2", "--layers", "1-3", "--alphas", "1,2,3", "--draws", "0",
         "--target", "0", "--score-on", "description", "--out", str(tmp_path / "run.sqlite")],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    found = reveals_earlier(Evaluation.load(tmp_path / "run.sqlite").table)
    assert f"read {found['prompt'].nunique()} of 48 prompts ({len(found)} layers)" in run.output
    for row in found.to_dict("records"):
        assert f"{row['prompt']}, layer {row['source_layer']} before" in run.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--section", "5"], "--section: expected 4.1 or 4.2, got 5"),
        (["--prompts", "nowhere.txt"], "--prompts: expected a text file"),
        (["--target", "x"], "--target-layer: expected numbers such as 0-5,8, got x"),
        (["--controls", "luck"], "controls: expected controls out of"),
        (["--out", "nowhere/run.sqlite"], "--out: expected a file in a folder that exists"),
        (["--workers", "0"], "workers: expected 1 or more, got 0"),
    ],
)
def test_bad_options_of_evaluate_end_with_2(
    option: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the option and what it expects; no file is left."""
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["evaluate", *option])
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())
    assert not list(tmp_path.iterdir())
