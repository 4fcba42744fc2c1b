"""Whether and how a model can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from superscopes_tl import LanguageModel, SweepConfig, load_model, readability, sweep
from superscopes_tl.cli.main import app
from superscopes_tl.evaluation import Readability, best_config, keep, kept_readability
from superscopes_tl.figures import readability_curve
from superscopes_tl.scores import no_scores
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

NAMES = ("Alexander the Great", "Pink Floyd", "Titanic", "Will Smith")


@pytest.fixture(scope="module")
def checked(llama: LanguageModel) -> Readability:
    """The check of a random model, whose own words a vector carries as far as any."""
    return readability(llama, NAMES, progress=False)


def test_a_model_that_can_be_read_is_said_to_be(checked: Readability) -> None:
    """Own words recovered above other names' vectors, at layers that the verdict names."""
    assert checked.readable
    assert "readable: layer" in checked.verdict
    sure = checked.layers[checked.layers["specific_low"] > 0]
    assert len(sure)
    assert (sure["recovered"] > sure["others"]).all()
    first = checked.settings.iloc[0]
    assert first["recovered"] > first["others"]
    assert set(checked.settings["target_layer"]) >= {"same", "0"}
    assert set(checked.words) == set(NAMES)


def test_the_config_is_one_that_a_sweep_takes(checked: Readability, llama: LanguageModel) -> None:
    """What was found to read best is handed on as settings."""
    config = replace(checked.config, layers=5, kinds="resid_post", alphas=1, scorer=no_scores)
    table = sweep(llama, "Alexander the Great", config, progress=False).table
    assert table["recovered"].notna().all()


def test_a_model_that_says_nothing_of_a_name_is_not_readable() -> None:
    """Where every token is equally likely whatever was read, there is nothing to recover."""
    hf = tiny_hf("llama")
    hf = type(hf)(hf.config)
    torch.nn.init.zeros_(hf.lm_head.weight)
    model = load_model(hf, tiny_tokenizer(), backend="bridge", check=False)
    found = readability(model, NAMES[:3], progress=False)
    assert not found.readable
    assert "not readable" in found.verdict
    assert json.loads(json.dumps(found.to_json()))["readable"] is False


def test_a_check_goes_through_a_file(
    checked: Readability, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept by the model's weights, it is measured once; a file of another kind is replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(llama, checked)
    again = kept_readability(llama)
    assert again.verdict == checked.verdict
    assert again.config == checked.config == best_config(llama)
    assert again.layers.equals(Readability.from_json(checked.to_json()).layers)
    with pytest.raises(ValueError, match="no check of this version"):
        Readability.from_json({"format": "another"})


def test_too_few_names_are_refused(llama: LanguageModel) -> None:
    """Of two names there is no other whose words differ."""
    with pytest.raises(ValueError, match=r"^names: "):
        readability(llama, ["Titanic", "Pink Floyd"])
    with pytest.raises(ValueError, match=r"^names: "):
        readability(llama, "Titanic")


def test_the_figure_shows_own_beside_others(checked: Readability) -> None:
    """A line for the own vectors, one for those of other names, and an interval."""
    figure = readability_curve(checked)
    assert [trace.name for trace in figure.data][1:] == ["its own vector", "other names' vectors"]
    assert list(figure.data[1].y) == checked.layers["recovered"].tolist()


def test_smollm2_reads_where_the_defaults_patch(smollm2: LanguageModel) -> None:
    """With the defaults of a sweep this model's block outputs are read, and specifically."""
    assert SweepConfig().target_layer == "same"
    table = sweep(
        smollm2, "Pink Floyd", layers=(8, 12), kinds="resid_post", alphas=1, generate="none",
        controls="other_prompt", others=2, max_new_tokens=6, progress=False,
    ).table  # fmt: skip
    assert (table["target_layer"] == table["source_layer"]).all()
    assert table["recovered"].mean() > 0.3
    assert table["specific"].mean() > 0.1


def test_the_command_prints_the_verdict_and_writes_it(
    checked: Readability, llama: LanguageModel, llama_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`superscopes check`: settings, verdict, a JSON file, a page; `sweep --auto` uses it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure = create_autospec(readability, return_value=checked)
    monkeypatch.setattr("superscopes_tl.cli.models.readability", measure)
    names, out, page = (tmp_path / name for name in ("names.txt", "check.json", "check.html"))
    names.write_text("\n".join(NAMES), encoding="utf-8")
    model = ["--backend", "bridge"]
    run = CliRunner().invoke(
        app,
        ["check", str(llama_folder), *model, "--names", str(names), "--json", str(out), "--html",
         str(page)],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert tuple(measure.call_args.args[1]) == NAMES
    found = Readability.from_json(json.loads(out.read_text(encoding="utf-8")))
    assert found.verdict == checked.verdict
    assert found.verdict in run.output
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")
    keep(llama, found)
    options = ["sweep", "Titanic", "--model", str(llama_folder), *model, "--auto",
               "--layers", "5,2", "--alphas", "1", "--generate", "none"]  # fmt: skip
    swept = CliRunner().invoke(app, options, env={"COLUMNS": "400"})
    assert swept.exit_code == 0, swept.output
    assert found.verdict in swept.output
    refused = CliRunner().invoke(app, [*options, "--target-layer", "3"])
    assert refused.exit_code == 2
    assert "--auto: expected" in refused.output
