"""The command `read-vector`, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from superscopes_tl import LanguageModel, SweepResult, read_vectors
from superscopes_tl.cli.main import app
from superscopes_tl.engine import CHAT_PROMPT
from superscopes_tl.vectors import mlp_values

FAST = ["--backend", "bridge", "--device", "cpu", "--alphas", "1", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def file(llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arrays: feed-forward values of a model, and one vector."""
    path = tmp_path_factory.mktemp("vectors") / "mlp.safetensors"
    values = mlp_values(llama, 5)[:9]
    save_file({"values": values.contiguous(), "one": values[0].clone()}, path)
    return path


@pytest.fixture
def read_vector(llama_folder: Path) -> Callable[..., Any]:
    """Run the command on the random Llama."""

    def run(*arguments: Any) -> Any:
        asked = ["read-vector", "--model", llama_folder, *FAST, *arguments]
        return CliRunner().invoke(app, list(map(str, asked)))

    return run


def test_rows_of_a_file_are_read_and_saved(
    file: Path, llama: LanguageModel, tmp_path: Path, read_vector: Callable[..., Any]
) -> None:
    """The run file holds what `read_vectors` returns, named after array and row."""
    out = tmp_path / "run.zip"
    run = read_vector(file, "--name", "values", "--rows", "7,2", "--out", out)
    assert run.exit_code == 0, run.output
    table = SweepResult.load(out).table
    expected = read_vectors(
        llama, mlp_values(llama, 5)[[7, 2]], names=["values 7", "values 2"], alphas=1,
        max_new_tokens=8, controls="random_direction", progress=False,
    ).table  # fmt: skip
    assert table.equals(expected)
    for row in table.to_dict("records"):
        assert row["token"] in run.output
        assert row["description"].split()[0] in run.output
    assert "random direction" in run.output
    assert "score" not in run.output


def test_folders_and_layers_are_read_by_their_names(
    llama: LanguageModel, tmp_path: Path, read_vector: Callable[..., Any]
) -> None:
    """The folder of an SAE gives rows of its decoder, a file of one vector per layer its layers."""
    values = mlp_values(llama, 5)[:4].contiguous()
    (tmp_path / "sae").mkdir()
    parts = {"W_dec": values, "b_dec": values[0].clone()}
    save_file(parts, tmp_path / "sae" / "sae_weights.safetensors")
    run = read_vector(tmp_path / "sae", "--rows", "3,1", "--controls", "")
    assert run.exit_code == 0, run.output
    assert "W_dec 3" in run.output
    torch.save({12: values[0], 3: values[1]}, tmp_path / "v.pt")
    run = read_vector(tmp_path / "v.pt", "--controls", "")
    assert run.exit_code == 0, run.output
    assert run.output.index(" 3 ") < run.output.index(" 12 ")


def test_a_score_is_shown_where_there_is_a_reference(
    file: Path, read_vector: Callable[..., Any]
) -> None:
    """Without controls their column is not there; with a reference the score is."""
    run = read_vector(file, "--name", "one", "--reference", "rock band", "--controls", "")
    assert run.exit_code == 0, run.output
    assert "score" in run.output
    assert "random direction" not in run.output


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ([], "name"),
        (["--name", "values", "--rows", "9"], "rows"),
        (["--name", "values", "--rows", "a"], "--rows"),
        (["--name", "one", "--unit", "stream"], "unit"),
        (["--name", "one", "--controls", "other_prompt"], "controls"),
        (["--name", "one", "--out", "no/such/run.zip"], "--out"),
    ],
)
def test_bad_input_ends_with_2(
    file: Path, arguments: list[str], argument: str, read_vector: Callable[..., Any]
) -> None:
    """The message says what was expected."""
    run = read_vector(file, *arguments)
    assert run.exit_code == 2
    assert f"Error: {argument}: expected " in " ".join(run.output.split())


def test_a_vector_of_another_model_ends_with_2(
    tmp_path: Path, read_vector: Callable[..., Any]
) -> None:
    """Both widths are named."""
    save_file({"v": torch.ones(5, 7)}, tmp_path / "v.safetensors")
    run = read_vector(tmp_path / "v.safetensors")
    assert run.exit_code == 2
    text = " ".join(run.output.split())
    assert "Error: file: expected vectors of width" in text
    assert "width 7" in text
    assert "wrong file or wrong --model?" in text


def test_chat_reaches_read_vectors(
    file: Path, monkeypatch: pytest.MonkeyPatch, read_vector: Callable[..., Any]
) -> None:
    """With the question that a chat model is asked."""
    passed: dict[str, Any] = {}

    def caught(*arguments: Any, **settings: Any) -> Any:
        passed.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr("superscopes_tl.cli.neighbours.read_vectors", caught)
    assert read_vector(file, "--name", "one", "--chat").exit_code == 2
    assert passed["chat"] is True
    assert passed["target_prompt"] == CHAT_PROMPT
