"""The Explorer without a browser: widgets are plain objects whose messages go nowhere."""

from __future__ import annotations

import base64
import html
import math
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from superscopes_tl import Explorer, LanguageModel, SweepConfig, SweepResult, TargetPrompt, sweep
from superscopes_tl.evaluation import Readability
from superscopes_tl.experiment import Cell
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.explorer.explorer import NO_WIDGETS
from superscopes_tl.figures import value_range
from tests.explorer.conftest import PROMPT, WAIT, finished, heatmaps, marked, numbers
from tests.support.hooks import hooks_on
from tests.support.same import assert_same_readings
from tests.support.scorers import by_length


def shows(explorer: Explorer) -> str:
    return str(explorer.view.status.value)


def test_run_fills_the_map_and_selects_the_best_cell(explorer: Explorer) -> None:
    """After Run every cell is there, the best one is shown, and Run can be pressed again."""
    explorer.view.run.click()
    assert explorer.wait(WAIT)
    expected = sweep(explorer.model, PROMPT, explorer.config, progress=False)
    assert explorer.result is not None
    assert_same_readings(explorer.result.table, expected.table)
    best = expected.best().sort_values("score", ascending=False).iloc[0]
    assert explorer.selection == Cell.of(best)
    assert "data-state='done' data-run='1'" in shows(explorer)
    assert not explorer.view.run.disabled
    assert explorer.view.cancel.disabled
    assert [trace.meta for trace in heatmaps(explorer)] == ["resid_mid", "mlp_out", "resid_post"]
    assert sum(len(row) for trace in heatmaps(explorer) for row in trace.z) == len(expected)
    # A second run reuses cells.
    count = len(expected)
    explorer.view.alphas.value = "1, 3, 6"
    assert f"{count} of them from earlier runs" in explorer.view.estimate.value
    finished(explorer)
    assert f"{count} from earlier runs" in shows(explorer)
    assert len(explorer.result) == count * 3 // 2


def test_cancel_keeps_what_is_finished(model: LanguageModel, tmp_path: Path) -> None:
    """Cancel during the first batch: that batch is shown, the rest is marked as not computed."""
    began, resume = threading.Event(), threading.Event()

    def slow(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        began.set()
        assert resume.wait(WAIT)
        return [0.5 for _ in candidates]

    made = Explorer(model, PROMPT, SweepConfig(max_new_tokens=2, batch_size=3, scorer=slow))
    assert made.wait(WAIT)
    made.view.run.click()
    assert began.wait(WAIT)
    # A change during the run is for the next one.
    made.view.alphas.value = "7"
    made.prompt = "Top Gun"
    made.view.cancel.click()
    resume.set()
    assert made.wait(WAIT)
    assert made.state == "cancelled"
    assert len(made.result) == 3  # type: ignore[arg-type]
    assert set(made.result.table["prompt"]) == {PROMPT}  # type: ignore[union-attr]
    assert "Cancelled: 3 of" in shows(made)
    assert marked(made, "not computed") == model.n_layers * 3 * 6 - 3
    assert hooks_on(model) == 0
    made.select(kind="mlp_out", layer=model.n_layers - 1, alpha=15)  # none of the finished cells
    made.view.show.value = "parts"
    assert "not computed" in made.view.stage.children[0].value
    for suffix in (".html", ".png", ".csv"):
        assert made.export(tmp_path / f"part{suffix}").stat().st_size


def unwritten(explorer: Explorer) -> Any:
    """Return the row of the worst cell without a text."""
    table = explorer.result.table  # type: ignore[union-attr]
    return table[~table["written"]].sort_values("recovered").iloc[0]


def select(explorer: Explorer, row: Any) -> Cell:
    """Select the cell of a row."""
    return explorer.select(kind=row["kind"], layer=row["source_layer"], alpha=row["alpha"])


def test_by_default_the_map_comes_first_and_a_selected_cell_is_written(
    llama: LanguageModel,
) -> None:
    """A text for each site; another cell gets its own when it is selected, colours stay."""
    settings: dict[str, Any] = {"alphas": (1, 3), "max_new_tokens": 4, "scorer": by_length}
    made = finished(Explorer(llama, PROMPT, layers=(3, 5), **settings))
    assert made.config.generate == made.view.generate.value == "best"
    assert made.view.colour.value == "recovered"
    before, row = numbers(made), unwritten(made)
    cell = select(made, row)
    assert made.wait(WAIT)
    table = made.result.table  # type: ignore[union-attr]
    assert table["written"].sum() == len(table) // 2 + 1
    (now,) = [r for r in table.itertuples() if Cell.of(r) == cell]
    place = {"layers": cell.source_layer, "kinds": cell.kind}
    alone = sweep(llama, PROMPT, **(settings | place), progress=False).table
    (expected,) = [r for r in alone.itertuples() if Cell.of(r) == cell]
    assert (now.text, now.score, now.recovered) == (expected.text, expected.score, row["recovered"])
    assert f"({now.n_tokens} tokens)" in made.view.detail.value
    assert "data-probe='done'" in made.view.probe.value
    assert (numbers(made), made.view.colour.value) == (before, "recovered")
    assert "Done: 12 of 12 cells, 6 texts" in shows(made)
    finished(made)
    assert len(made.result) == 12  # type: ignore[arg-type]
    assert made.result.table["written"].sum() == 7  # type: ignore[union-attr]


def test_a_cell_is_written_during_a_run_and_after_cancel(llama: LanguageModel) -> None:
    """Selected while the first texts are scored, it is written before the run goes on."""
    began, resume = threading.Event(), threading.Event()

    def slow(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        began.set()
        assert resume.wait(WAIT)
        return [0.5 for _ in candidates]

    made = Explorer(
        llama, PROMPT, layers=(3, 5), alphas=(1, 3), max_new_tokens=2, batch_size=1, scorer=slow
    )
    assert made.wait(WAIT)
    made.run()
    assert began.wait(WAIT)
    assert "Map ready · generating texts: 0 of 6" in shows(made)
    first = select(made, unwritten(made))
    assert "Generating its text" in made.view.probe.value
    made.cancel()
    resume.set()
    assert made.wait(WAIT)
    assert made.state == "cancelled"
    second = select(made, unwritten(made))
    assert made.wait(WAIT)
    assert "Cancelled: 12 of 12 cells" in shows(made)
    table = made.result.table  # type: ignore[union-attr]
    texts = {Cell.of(row) for row in table[table["written"]].itertuples()}
    assert {first, second} < texts
    assert len(texts) == 3
    assert "role='alert'" not in made.view.probe.value
    assert hooks_on(llama) == 0


def test_a_text_that_fails_is_shown_in_its_place(llama: LanguageModel) -> None:
    """The run stays as it ended; the cell can be selected again."""
    fails: list[bool] = []

    def scorer(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        if fails:
            raise RuntimeError("no <scores>")
        return [0.5 for _ in candidates]

    made = finished(
        Explorer(llama, PROMPT, layers=3, alphas=(1, 3), max_new_tokens=2, scorer=scorer)
    )
    assert made.wait(WAIT)
    fails.append(True)
    row = unwritten(made)
    select(made, row)
    assert made.wait(WAIT)
    assert "no &lt;scores&gt;" in made.view.probe.value
    assert made.state == "done"
    fails.clear()
    select(made, row)
    assert made.wait(WAIT)
    assert "data-probe='done'" in made.view.probe.value


def test_cancel_from_python_waits_its_turn(explorer: Explorer) -> None:
    """It takes the lock that callbacks take: a run that ends meanwhile is not shown as stopping."""
    with explorer.view.lock:
        cancelling = threading.Thread(target=explorer.cancel)
        cancelling.start()
        cancelling.join(0.2)
        assert cancelling.is_alive()
    cancelling.join(WAIT)
    assert not cancelling.is_alive()


def test_a_scorer_that_fails_is_shown(model: LanguageModel) -> None:
    """The run fails with the message, escaped; with another scorer the next one works."""

    def broken(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        raise RuntimeError("<no> scores today")

    def infinite(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        return [math.inf for _ in candidates]

    made = Explorer(
        model, PROMPT, SweepConfig(layers=(0, 1), alphas=1, max_new_tokens=2),
        scorers={"b": broken, "i": infinite, "l": by_length},
    )  # fmt: skip
    for scorer, message in ((broken, "RuntimeError: </b>&lt;no&gt; scores"), (infinite, "scorer:")):
        made.view.scorer.value = scorer
        made.run().wait(WAIT)
        assert made.state == "failed"
        assert message in shows(made)
        assert "traceback" in shows(made)
    made.view.scorer.value = by_length
    finished(made)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("score", [1e9, 1e308, -1e308, math.inf])
def test_a_result_with_huge_scores_opens(shared: Explorer, score: float, tmp_path: Path) -> None:
    """It is shown in every view; an infinite one, from a file, has no colour of its own."""
    assert shared.result is not None
    result = SweepResult(shared.result.table.copy(), shared.result.provenance)
    result.table.loc[0, "score"] = score
    shown = Explorer(result=result)
    low, high = value_range(result.table, "score")
    assert low < high < math.inf
    assert score == math.inf or low <= score <= high
    for view in ("best", "parts", "all"):
        shown.view.show.value = view
        assert "role='alert'" not in shows(shown)
    if score == math.inf:
        assert shown.export(tmp_path / "a.png").stat().st_size


def test_a_bad_setting_is_shown_and_raised(explorer: Explorer) -> None:
    """A click shows the message; the method raises it; nothing has run; a good one heals it."""
    explorer.view.alphas.value = "1, <b>two"
    assert "alphas: expected numbers" in explorer.view.estimate.value
    explorer.view.run.click()
    assert "role='alert'" in shows(explorer)
    assert "1, &lt;b&gt;two" in shows(explorer)
    assert explorer.state == "idle"
    assert not explorer.view.run.disabled
    with pytest.raises(ValueError, match="^alphas:"):
        explorer.run()
    explorer.view.alphas.value = "1"
    explorer.view.prompt.value = "  "
    explorer.view.run.click()
    assert "role='alert'" in shows(explorer)
    assert "prompt: expected" in shows(explorer)
    explorer.view.prompt.value = "Top Gun"
    assert "role='status'" in shows(explorer)
    finished(explorer)


def test_memory_that_runs_out_is_shown(
    explorer: Explorer, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to make smaller; afterwards everything works again."""
    assert explorer.wait(WAIT)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("superscopes_tl.PatchedGenerator.step", full)
        explorer.run().wait(WAIT)
    assert explorer.state == "failed"
    assert isinstance(explorer.error, MemoryError)
    assert "MemoryError" in shows(explorer)
    assert hooks_on(model) == 0
    finished(explorer)


def test_a_saved_result_opens_without_a_model(ran: Explorer, tmp_path: Path) -> None:
    """Map, panel, code and export work; a run is refused."""
    saved = SweepResult.load(ran.export(tmp_path / "run.zip"))
    shown = Explorer(result=saved)
    assert (shown.state, shown.model) == ("saved", None)
    assert "Opened without a model" in shown.view.probe.value
    assert shown.view.run.disabled
    assert shown.code == code_for(saved, shown.selection)  # type: ignore[arg-type]
    assert shown.export(tmp_path / "again.csv").stat().st_size
    for action in (shown.run, shown.find):
        with pytest.raises(ValueError, match="^explorer:"):
            action()
    with pytest.raises(ValueError, match="^result:"):
        Explorer(result=SweepResult.from_readings([], {}))


@pytest.mark.parametrize(
    ("suffix", "opened"),
    [(".csv", pd.read_csv), (".parquet", pd.read_parquet), (".zip", SweepResult.load)],
)
def test_an_exported_table_opens_again(
    ran: Explorer, tmp_path: Path, suffix: str, opened: Any
) -> None:
    """Each format has every cell; pictures and pages are tested in the folder of figures."""
    assert len(opened(ran.export(tmp_path / f"out{suffix}"))) == len(ran.result)  # type: ignore[arg-type]


def test_the_save_button_says_where_and_what_went_wrong(
    ran: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to download and the whole path, or a message; folders are for `export` alone."""
    monkeypatch.chdir(tmp_path)
    ran.view.format.value = ".csv"
    ran.view.file.value = "mine.csv"
    ran.view.save.click()
    assert f"Saved {(tmp_path / 'mine.csv').resolve()}" in ran.view.saved.value
    assert base64.b64encode(b"prompt,").decode()[:8] in ran.view.saved.value
    (tmp_path / "below").mkdir()
    for name in ("below/mine", "../mine", str(tmp_path / "other"), "below/"):
        ran.view.status.value = ""
        ran.view.file.value = name
        ran.view.save.click()
        assert "file name: " in shows(ran)
    assert {path.name for path in tmp_path.rglob("*")} == {"mine.csv", "below"}
    assert not (tmp_path.parent / "mine.csv").exists()
    assert ran.export(tmp_path / "below" / "mine.csv").is_file()


def test_nothing_to_export_before_a_run(explorer: Explorer, tmp_path: Path) -> None:
    """An empty result is refused."""
    with pytest.raises(ValueError, match="^result:"):
        explorer.export(tmp_path / "a.png")


def test_clicks_from_two_threads_do_not_mix(explorer: Explorer) -> None:
    """Kernels run callbacks on several threads: cursors move during a run without an error."""
    explorer.run()
    deadline = time.monotonic() + WAIT
    while explorer.result is None and time.monotonic() < deadline:
        time.sleep(0.01)

    def poke(kind: str) -> None:
        for layer in (0, 1, 2, 0):
            explorer.select(kind=kind, layer=layer, alpha=1)

    threads = [threading.Thread(target=poke, args=(kind,)) for kind in ("mlp_out", "resid_post")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert explorer.wait(WAIT)
    assert explorer.state == "done"
    assert "role='alert'" not in shows(explorer) + explorer.view.probe.value


def test_the_first_display_is_quick(model: LanguageModel) -> None:
    """Under 2 s, with a loaded model."""
    start = time.perf_counter()
    Explorer(model)._ipython_display_()
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("installed", [True, False])
def test_without_matplotlib_the_picture_says_what_to_install(
    shared: Explorer, installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Explorer works without it; a saved notebook then has one line in the picture's place."""

    class Shown:
        bundle: dict[str, str]

        def update(self, bundle: dict[str, str], *, raw: bool) -> None:
            self.bundle = bundle

    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made, output = Explorer(result=shared.result), Shown()
    monkeypatch.setattr(made, "_picture", output)
    made._show_picture()
    assert ("image/png" in output.bundle) is installed
    assert ("pip install" in output.bundle["text/plain"]) is not installed
    if not installed:
        with pytest.raises(ImportError, match="^picture: expected matplotlib"):
            made.export(tmp_path / "a.png")
        assert not list(tmp_path.iterdir())


def test_find_adopts_what_was_found(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is shown; a setting shows in the controls, and what it does not name stays."""
    config = SweepConfig(
        target_prompt=TargetPrompt("Syria: a country, x"), target_layer=2,
        source_template="Tell me about {}",
    )  # fmt: skip
    found = Readability("m", True, "readable <b>", config, pd.DataFrame(), pd.DataFrame(), {})
    made = Explorer(chatty, PROMPT, alphas=(1, 2), kinds="mlp_out", layers=(1, 2))
    assert made.wait(WAIT)
    calls: list[Any] = []

    def search(model: LanguageModel, *, progress: bool) -> Readability:
        calls.append((model, made.state, made.view.run.disabled))
        with pytest.raises(ValueError, match="^run:"):
            made.run()
        if len(calls) == 1:
            raise RuntimeError("no <memory>")
        return found

    monkeypatch.setattr("superscopes_tl.explorer.explorer.kept_readability", search)
    made.find().wait(WAIT)
    assert "no &lt;memory&gt;" in shows(made)
    assert (made.check, made.view.find.disabled) == (None, False)
    made.view.find.click()
    assert made.wait(WAIT)
    assert calls == [(chatty, "finding", True)] * 2
    shown = made.config
    assert (shown.target_layer, shown.source_template) == (2, "Tell me about {}")
    assert shown.target_prompt == config.target_prompt
    assert (shown.alphas, shown.kinds, shown.layers) == ((1, 2), ("mlp_out",), (1, 2))
    assert "readable &lt;b&gt;" in made.view.found.value
    assert (made.check, made.state, made.view.run.disabled) == (found, "idle", False)


def test_where_there_are_no_widgets_a_line_says_what_to_do(ran: Explorer) -> None:
    """The page that marimo shows has it, with a picture of the map; all is escaped."""
    kind, page = ran._mime_()
    assert kind == "text/html"
    assert NO_WIDGETS in html.unescape(page)
    assert "src='data:image/png;base64,iVBOR" in page
    assert "<LanguageModel" not in page
