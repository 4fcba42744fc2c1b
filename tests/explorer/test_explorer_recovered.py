"""The Explorer on what is recovered: columns, texts that are not written, settings, the code."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superscopes_tl import (
    CHAT_PROMPT,
    DESCRIPTION_PROMPT,
    Explorer,
    LanguageModel,
    SweepConfig,
    SweepResult,
    TargetPrompt,
    heatmap,
    load_model,
    plan_sweep,
    sweep,
)
from superscopes_tl.evaluation import Readability
from superscopes_tl.experiment import Cell
from superscopes_tl.explorer.background import BackgroundSweep
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.figures import MARKS, value_range
from tests.figures.test_plots import heatmaps, marks, reading, result_of
from tests.model.test_chat import TEMPLATES, with_template
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

PROMPT = "Red Hot Chili Peppers"
WAIT = 120
NAN = math.nan


@pytest.fixture(scope="module")
def chatty() -> LanguageModel:
    """A tiny model with a chat template."""
    tokenizer = with_template(tiny_tokenizer(), TEMPLATES["chatml"])
    return load_model(tiny_hf("llama"), tokenizer, backend="bridge")


@pytest.fixture(scope="module")
def best(mini: LanguageModel, word_overlap: Any) -> Iterator[Explorer]:
    """An Explorer of the bundled model that wrote the best α of each site."""
    made = Explorer(
        mini, PROMPT, layers=(3, 6), kinds=("mlp_out", "resid_post"), alphas=(1, 6),
        generate="best", controls=("other_prompt", "random_direction"), scorer=word_overlap,
        max_new_tokens=4,
    )  # fmt: skip
    made.run()
    assert made.wait(WAIT)
    yield made
    made.cancel()
    assert made.wait(WAIT)


@pytest.fixture(autouse=True)
def recovered_again(request: pytest.FixtureRequest) -> None:
    """Show what is recovered, whatever the test before chose."""
    if "best" in request.fixturenames:
        request.getfixturevalue("best").view.colour.value = "recovered"


def unwritten(layer: int, alpha: float, share: float) -> Any:
    """Return a cell without a text."""
    cell = reading(layer, alpha, NAN)
    return replace(cell, text="", written=False, recovered=share, own_words="American band")


def colours(explorer: Explorer) -> list[float]:
    """Return the numbers of the map, panel by panel."""
    figure = explorer.view.stage.children[0]
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    return [value for trace in heat for row in trace.z for value in row if value is not None]


def carried(explorer: Explorer, name: str) -> int:
    """Return how many cells of the map carry a mark."""
    figure = explorer.view.stage.children[0]
    return sum(len(trace.x) for trace in figure.data if trace.name == name)


def test_the_map_shows_what_is_recovered_until_score_is_chosen(best: Explorer) -> None:
    """Colours, range and title are of the chosen column; unwritten cells are marked."""
    table = best.result.table  # type: ignore[union-attr]
    assert best.state == "done"
    assert sorted(colours(best)) == sorted(table["recovered"])
    scale = best.view.stage.children[0].layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (0, 1, "recovered")
    assert [carried(best, name) for name in MARKS] == [0, 0, 0, 0]
    best.view.colour.value = "score"
    assert sorted(colours(best)) == sorted(table["score"].dropna())
    assert (scale.cmin, scale.colorbar.title.text) == (0, "score")
    assert carried(best, "not written out") == (~table["written"]).sum() == 4
    assert "– not written out" in best.view.caption.value


def test_the_best_cell_is_that_of_the_shown_column(best: Explorer) -> None:
    """After the run the cell that recovers most is chosen."""
    table = best.result.table  # type: ignore[union-attr]
    best._panel.select_best()
    assert best.selection == Cell.of(table.loc[table["recovered"].idxmax()])


def test_the_panel_says_what_is_recovered_and_by_what_else(best: Explorer) -> None:
    """Own words, other prompts' and random shares stand beside the cell's own."""
    best._panel.select_best()
    row = best.result.table.loc[best.result.table["recovered"].idxmax()]  # type: ignore[union-attr]
    shown = best.view.detail.value
    assert f"<bdi>{row['own_words']}</bdi>" in shown
    for name in ("recovered", "other_prompt_recovered", "random_direction_recovered", "specific"):
        assert f">{row[name]:.2f}</span>" in shown


def test_a_cell_that_was_not_written_says_so(best: Explorer) -> None:
    """It has its share and no text, in the panel, in the ladder and under the mouse."""
    table = best.result.table  # type: ignore[union-attr]
    row = table[~table["written"]].iloc[0]
    chosen = Cell.of(row)
    best.select(kind=chosen.kind, layer=chosen.source_layer, alpha=chosen.alpha)
    for shown in (best.view.detail.value, best.view.ladder.value):
        assert "<i>not written out</i>" in shown
        assert f">{row['recovered']:.2f}</span>" in shown
    assert "<i>no description</i>" not in best.view.detail.value
    figure = best.view.stage.children[0]
    hover = [
        text for t in figure.data if t.type == "heatmap" for line in t.customdata for text in line
    ]
    assert sum("(not written out)" in text for text in hover) == (~table["written"]).sum()
    assert best.wait(WAIT)
    assert "data-probe='done'" in best.view.probe.value


def test_the_other_views_and_files_know_it_too(best: Explorer, tmp_path: Path) -> None:
    """Best α, decomposition, pins, page and picture take the shown column."""
    table = best.result.table  # type: ignore[union-attr]
    best.pin()
    for column in ("score", "recovered"):
        best.view.colour.value = column
        best.view.show.value = "best"
        shown = best.view.stage.children[1].value
        top = best.result.best(by=column)  # type: ignore[union-attr,arg-type]
        assert all(f"{value:.2f}</span>" in shown for value in top[column])
        best.view.show.value = "parts"
        assert "role='alert'" not in best.view.status.value
        best.view.show.value = "all"
        for suffix in (".html", ".png"):
            assert best.export(tmp_path / f"{column}{suffix}").stat().st_size
    best.view.best_alpha.value = 6.0
    best.view.show.value = "best"
    assert best.view.stage.children[1].value.count("not written out") == sum(
        not row for row in table[table["alpha"] == 6]["written"]
    )
    best.view.best_alpha.value = "best"
    best.view.show.value = "all"
    best.unpin()


def test_a_map_alone_writes_nothing(mini: LanguageModel, tmp_path: Path) -> None:
    """Write none: every cell has a share and no text, and files are still made."""
    made = Explorer(mini, PROMPT, layers=(3, 6), kinds="resid_post", alphas=(1, 6))
    made.view.write.value = "none"
    assert made.config.generate == "none"
    assert ", 0 to write out" in made.view.estimate.value
    made.run()
    assert made.wait(WAIT)
    table = made.result.table  # type: ignore[union-attr]
    assert not table["written"].any()
    assert sorted(colours(made)) == sorted(table["recovered"])
    for suffix in (".html", ".png", ".zip"):
        assert made.export(tmp_path / f"map{suffix}").stat().st_size


def test_progress_counts_texts_apart(mini: LanguageModel) -> None:
    """With the best α of each site, cells and texts have counts of their own."""
    plan = plan_sweep(
        mini, PROMPT, layers=(3, 6), kinds="resid_post", alphas=(1, 6), generate="best",
        max_new_tokens=2, scorer=lambda references, candidates: [0.5] * len(candidates),
    )  # fmt: skip
    run = BackgroundSweep(lambda: plan).start()
    assert run.wait(WAIT)
    progress = run.progress
    assert (progress.done, progress.total, progress.written, progress.to_write) == (4, 4, 2, 2)


def test_a_finished_run_says_its_layer_and_its_doubts(best: Explorer) -> None:
    """The line is that of the shown token; doubts are the result's own."""
    result = best.result
    shown = best.view.findings.value
    assert f"layer {result.contextualization_layer().layer}" in shown  # type: ignore[union-attr]
    assert shown.count("<li>") == len(result.caveats) <= 3  # type: ignore[union-attr]
    saved = Explorer.from_result(result)  # type: ignore[arg-type]
    assert saved.view.findings.value == shown


def test_doubts_are_escaped(best: Explorer) -> None:
    """They quote what a model wrote."""
    table = best.result.table.assign(own_words="<b>x</b>", about="<b>x</b>", prompt="<b>x</b>")  # type: ignore[union-attr]
    shown = Explorer.from_result(SweepResult(table, best.result.provenance))  # type: ignore[union-attr]
    for value in (shown.view.findings.value, shown.view.detail.value):
        assert "&lt;b&gt;x" in value
        assert "<b>x" not in value


def test_undefined_shares_leave_the_score(chatty: LanguageModel, word_overlap: Any) -> None:
    """Where nothing can be recovered the map shows the score, until the reader chooses."""
    result = sweep(
        chatty, PROMPT, layers=(1, 2), alphas=1, scorer=word_overlap, max_new_tokens=2,
        progress=False,
    )  # fmt: skip
    table = result.table.assign(recovered=NAN, score=0.4, description="x")
    shown = Explorer.from_result(SweepResult(table, result.provenance))
    assert shown.view.colour.value == "score"
    shown.view.colour.value = "recovered"
    assert carried(shown, "not defined") == len(table)
    assert "◇ not defined" in shown.view.caption.value


def test_a_map_without_any_number_opens(chatty: LanguageModel) -> None:
    """Nothing recovered and nothing written: every cell is marked, and one is chosen."""
    made = Explorer(chatty, PROMPT, layers=(1, 2), kinds="resid_post", alphas=1, generate="none")
    made.run()
    assert made.wait(WAIT)
    result = made.result
    table = result.table.assign(recovered=NAN)  # type: ignore[union-attr]
    shown = Explorer.from_result(SweepResult(table, result.provenance))  # type: ignore[union-attr]
    assert shown.view.colour.value == "recovered"
    assert carried(shown, "not defined") == 2
    assert shown.selection is not None
    assert "data-state='done'" in made.view.status.value


def test_the_constructor_takes_a_sweeps_keywords(chatty: LanguageModel) -> None:
    """They are checked as `sweep` checks them; both ways at once are refused."""
    made = Explorer(chatty, PROMPT, kinds="mlp_out", layers=range(0, 6, 2), chat=True)
    config = made.config
    assert (config.kinds, config.layers, config.chat) == (("mlp_out",), (0, 2, 4), True)
    assert (config.target_prompt, config.asked) == (None, CHAT_PROMPT)
    assert (made.view.layers.value, made.view.step.value) == ((0, 4), 2)
    assert made.view.target_preset.value == "question (chat)"
    with pytest.raises(ValueError, match="either config or single settings"):
        Explorer(chatty, PROMPT, SweepConfig(), alphas=1)
    with pytest.raises(TypeError, match="settings: expected settings out of"):
        Explorer("no/such-model", PROMPT, kind="mlp_out")


@pytest.mark.parametrize("layers", [(4,), (1, 5), (0, 3), (2, 3, 4), (1, 3, 5)])
def test_every_kth_layer_comes_back(chatty: LanguageModel, layers: tuple[int, ...]) -> None:
    """A range with a step is what the two controls show."""
    assert Explorer(chatty, PROMPT, layers=layers).config.layers == layers


def test_all_settings_with_a_control_come_back(chatty: LanguageModel) -> None:
    """What is read from the controls is what was given, for a config and after another prompt."""
    config = SweepConfig(
        layers=(1, 3), alphas=(1, 2), positions="Hot", source_template="Tell me about {}",
        reference="a band", generate="best", chat=True, unit="residual",
    )  # fmt: skip
    made = Explorer(chatty, PROMPT, config)
    plans = [plan_sweep(chatty, PROMPT, replace(c, scorer=len)) for c in (config, made.config)]  # type: ignore[arg-type]
    assert plans[0].sites == plans[1].sites
    assert plans[0].abouts == plans[1].abouts
    again = made.config
    for name in ("source_template", "reference", "generate", "chat", "unit", "target_prompt"):
        assert getattr(again, name) == getattr(config, name)
    assert again.about == "Hot"
    made.config = again
    assert made.config == again
    made.prompt = "Syria"
    assert (made.config.about, made.config.reference) == (None, None)
    several = {PROMPT: "a band", "Syria": "a country"}
    made.config = SweepConfig(reference=several)
    assert made.view.reference.value == "a country"
    assert made.view.reference.disabled
    assert made.config.reference == several


def test_the_chat_control_changes_tokens_and_question(chatty: LanguageModel) -> None:
    """A tick puts both prompts in the template and asks the question; own texts stay."""
    made = Explorer(chatty, PROMPT)
    view = made.view
    assert (made.config.target_prompt, made.config.asked) == (None, DESCRIPTION_PROMPT)
    plain = len(view.tokens.options)
    view.tokens.value -= 1
    label = view.tokens.label
    view.chat.value = True
    assert view.tokens.label.strip("·") == label.strip("·")
    assert made.config.asked == CHAT_PROMPT
    assert len(view.tokens.options) > plain
    assert "role='alert'" not in view.status.value
    view.chat.value = False
    assert made.config.asked == DESCRIPTION_PROMPT
    assert len(view.tokens.options) == plain
    view.target_preset.value = "own"
    view.target_text.value = "Who is x?"
    view.chat.value = True
    assert made.config.target_prompt == TargetPrompt("Who is x?")
    view.template.value = "Tell me about"
    assert "source_template: expected a text with one {}" in view.status.value
    view.template.value = "Tell me about {}"
    assert "role='status'" in view.status.value
    assert made.config.source_template == "Tell me about {}"


def test_a_model_without_a_template_offers_none(mini: LanguageModel) -> None:
    """Neither the tick nor the question is there."""
    made = Explorer(mini, PROMPT)
    assert made.view.chat.layout.display == "none"
    assert "question (chat)" not in made.view.target_preset.options


def found_at(layer: Any) -> Readability:
    """Return a check that found something."""
    config = SweepConfig(
        target_prompt=TargetPrompt("Syria: a country, x"), target_layer=layer,
        source_template="Tell me about {}",
    )  # fmt: skip
    return Readability("m", True, "readable <b>", config, pd.DataFrame(), pd.DataFrame(), {})


def test_find_sets_the_controls(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting that was found is shown with its verdict; what it does not name stays."""
    made = Explorer(chatty, PROMPT, alphas=(1, 2), kinds="mlp_out", layers=(1, 2))
    assert made.wait(WAIT)
    asked: list[Any] = []

    def check(model: LanguageModel, *, progress: bool) -> Readability:
        asked.append((model, made.state, made.view.run.disabled))
        with pytest.raises(ValueError, match="run: expected no run or search under way"):
            made.run()
        return found_at(2)

    monkeypatch.setattr("superscopes_tl.explorer.desk.kept_readability", check)
    made.view.find.click()
    assert made.wait(WAIT)
    assert asked == [(chatty, "finding", True)]
    config = made.config
    assert (config.target_layer, config.source_template) == (2, "Tell me about {}")
    assert config.asked == TargetPrompt("Syria: a country, x")
    assert (config.alphas, config.kinds, config.layers) == ((1, 2), ("mlp_out",), (1, 2))
    assert "readable &lt;b&gt;" in made.view.found.value
    assert made.check is not None
    assert made.state == "idle"
    assert not made.view.run.disabled


def test_find_shows_what_went_wrong(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is shown as every other one, and everything can be pressed again."""

    def check(model: LanguageModel, *, progress: bool) -> Readability:
        raise RuntimeError("no <memory>")

    monkeypatch.setattr("superscopes_tl.explorer.desk.kept_readability", check)
    made = Explorer(chatty, PROMPT)
    made.find().wait(WAIT)
    assert "role='alert'" in made.view.status.value
    assert "no &lt;memory&gt;" in made.view.status.value
    assert made.check is None
    assert not made.view.find.disabled


def ran_again(code: str) -> Any:
    """Run some code; return what it leaves."""
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, space)
    return space["table"].iloc[0]


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_a_local_model_runs_as_it_stands(
    chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word_overlap: Any
) -> None:
    """From another folder, with every setting of both prompts, it reads the same cell."""
    folder = tmp_path / "models" / "mine"
    tiny_hf("llama").save_pretrained(folder)
    with_template(tiny_tokenizer(), TEMPLATES["chatml"]).save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "models")
    model = load_model("mine", backend="bridge", local_files_only=True)
    made = Explorer(
        model, PROMPT, layers=(1, 3), kinds="resid_post", alphas=(1, 2), positions="Hot",
        source_template="Tell me about {}", reference="American rock band", chat=chat,
        generate="none", max_new_tokens=3,
    )  # fmt: skip
    made.run()
    assert made.wait(WAIT)
    assert made.state == "done"
    row = made.result.table.iloc[1]  # type: ignore[union-attr]
    chosen = Cell.of(row)
    made.select(kind=chosen.kind, layer=chosen.source_layer, alpha=chosen.alpha)
    monkeypatch.chdir(tmp_path)
    assert repr(str(folder)) in made.code
    again = ran_again(made.code)
    assert again["about"] == row["about"] == "Hot"
    assert again["recovered"] == pytest.approx(row["recovered"], abs=1e-3, nan_ok=True)
    assert again["plain_nats"] == pytest.approx(row["plain_nats"], abs=1e-2)
    assert again["written"]
    saved = code_for(made.result, chosen)  # type: ignore[arg-type]
    assert str(folder) not in saved
    assert "give the path if the model came from a folder" in saved


def test_the_code_keeps_how_the_model_was_loaded(mini: LanguageModel) -> None:
    """A file of a folder and the number type are in it, an access token is not."""
    origin: Any = mini.origin
    options = {**origin.keywords, "gguf_file": "a.gguf", "token": "secret"}
    model = replace(mini, origin=type(origin)(origin.func, "some/name", **options))
    plan = plan_sweep(model, PROMPT, layers=3, alphas=1, generate="none")
    result = sweep(model, PROMPT, layers=3, alphas=1, generate="none", progress=False)
    code = code_for(result, Cell.of(result.table.iloc[0]), plan)
    assert "load_model('some/name', backend='bridge'" in code
    assert "gguf_file='a.gguf'" in code
    assert "secret" not in code
    memory = replace(plan, model=replace(mini, origin=None))
    assert "made in memory" in code_for(result, Cell.of(result.table.iloc[0]), memory)


def test_the_static_map_has_fixed_colours_and_explains_its_marks() -> None:
    """Shares run from 0 to 1 and scores over at least 0 to 0.6; each mark is in the legend."""
    result = result_of(
        replace(reading(2, 1, 0.2), recovered=0.1), reading(2, 3, NAN), unwritten(5, 1, 0.3)
    )
    scores, shares = heatmap(result), heatmap(result, value="recovered")
    limits = [(f.layout.coloraxis.cmin, f.layout.coloraxis.cmax) for f in (scores, shares)]
    assert limits == [(0, 0.6), (0, 1)]
    assert marks(scores, "not written out") == [("x", "1", "5")]
    assert marks(scores, "no description") == marks(shares, "no description") == [("x", "3", "2")]
    assert marks(scores, "not computed") == marks(shares, "not computed") == [("x", "3", "5")]
    assert marks(shares, "not written out") == []
    assert all(t.showlegend for f in (scores, shares) for t in f.data if t.type == "scatter")
    hover = heatmaps(scores)[0].customdata[1][0]
    assert "(not written out)" in hover
    assert "recovers 0.30" in hover
    assert value_range(result.table.assign(score=0.83), "score") == (0, 0.9)
    assert value_range(result.table, "norm_ratio") == ()
