"""The table of a sweep: the best cells, the contextualization layer, and the file."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from superscopes_tl import SweepResult
from superscopes_tl.errors import RunFileError
from superscopes_tl.experiment import COLUMNS, Reading
from superscopes_tl.vectors import PAPER_MAPPING
from tests.support.readings import NAN, PROVENANCE, reading, result_of

LADDER = result_of(
    # layer 5 comes first, as in a sweep over layers=[5, 2]
    reading(5, 1, 0.20),
    reading(5, 3, 0.70),
    reading(5, 9, 0.40),
    reading(2, 1, 0.10),
    reading(2, 3, NAN),
    reading(2, 9, 0.30),
    reading(5, 1, 0.60, kind="mlp_out"),
    reading(5, 3, 0.60, kind="mlp_out"),
    reading(5, 9, 0.60, kind="mlp_out"),
    reading(2, 1, NAN, kind="mlp_out", description=""),
    reading(2, 3, NAN, kind="mlp_out", description=""),
    reading(2, 9, NAN, kind="mlp_out", description=""),
)


def columns(frame: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    """Return the rows of some columns, in the frame's order."""
    return list(frame[list(names)].itertuples(index=False, name=None))


def test_the_table_has_a_row_per_reading_in_the_given_order() -> None:
    """Columns are the fields of a reading and rows are in the order of the cells."""
    assert tuple(LADDER.table.columns) == COLUMNS
    assert len(LADDER) == 12
    assert columns(LADDER.table, "kind", "source_layer", "alpha")[2:5] == [
        ("resid_post", 5, 9.0),
        ("resid_post", 2, 1.0),
        ("resid_post", 2, 3.0),
    ]
    assert repr(LADDER) == "SweepResult(12 cells of 'Red Hot Chili Peppers', a-model)"


def test_best_takes_the_highest_score_of_every_site() -> None:
    """One row per site in the table's order: the highest score, not the first or last α."""
    assert columns(LADDER.best(), "kind", "source_layer", "alpha") == [
        ("resid_post", 5, 3.0),
        ("resid_post", 2, 9.0),
        ("mlp_out", 5, 1.0),  # three equal scores: the smallest α
        ("mlp_out", 2, 1.0),  # no score at all: the smallest α
    ]
    assert list(LADDER.best().index) == [0, 1, 2, 3]
    assert tuple(LADDER.best().columns) == COLUMNS


@pytest.mark.parametrize(
    "change",
    [{"position": 3}, {"target_layer": 2}, {"mapping": "RandomDirection(seed=0)"}],
    ids=lambda change: next(iter(change)),
)
def test_best_keeps_sites_apart(change: dict[str, Any]) -> None:
    """Another token, target layer or mapping is another site with a best of its own."""
    other = [replace(reading(5, a, s), **change) for a, s in ((1, 0.9), (3, 0.1))]
    result = result_of(reading(5, 1, 0.2), reading(5, 3, 0.7), *other)
    assert columns(result.best(), "alpha", "score") == [(3.0, 0.7), (1.0, 0.9)]


@given(
    cells=st.dictionaries(
        st.tuples(st.sampled_from([5, 2]), st.sampled_from([-3.0, 0.0, 1.0, 3.0, 9.0])),
        st.one_of(st.just(NAN), st.sampled_from([-0.5, 0.0, 0.5, 1.0])),
        min_size=1,
    )
)
@settings(max_examples=100, deadline=None)
def test_no_cell_of_a_site_beats_its_best(cells: dict[tuple[int, float], float]) -> None:
    """The best score is the maximum, a missing one loses, and equal ones go to the smallest |α|."""
    result = result_of(*(reading(layer, a, score) for (layer, a), score in cells.items()))
    best = result.best()
    assert sorted(best["source_layer"]) == sorted({layer for layer, _ in cells})
    for layer, alpha, score in columns(best, "source_layer", "alpha", "score"):
        site = {a: s for (other, a), s in cells.items() if other == layer}
        there = {a: s for a, s in site.items() if not math.isnan(s)}
        if there:
            assert score == max(there.values())
            assert abs(alpha) == min(abs(a) for a, s in there.items() if s == score)
        else:
            assert math.isnan(score)
            assert abs(alpha) == min(map(abs, site))


def test_by_layer_shows_the_best_reading_per_layer_and_kind() -> None:
    """Layers are rows, with the best reading of each kind (Figure 6) or that at α = 1 (5)."""
    wide = LADDER.by_layer()
    assert list(wide.index) == [2, 5]
    shown = ("description", "alpha", "score", "recovered", "target_layer", "written")
    assert list(wide.columns) == [(k, c) for k in ("resid_post", "mlp_out") for c in shown]
    assert columns(wide["resid_post"], "description", "alpha", "score") == [
        ("resid_post 2 x 9", 9, 0.30),
        ("resid_post 5 x 3", 3, 0.70),
    ]
    assert columns(wide["mlp_out"], "description", "alpha") == [("", 1), ("mlp_out 5 x 1", 1)]
    assert pd.isna(wide["mlp_out", "score"].loc[2])
    plain = LADDER.by_layer(alpha=1)
    assert list(plain["resid_post", "description"]) == ["resid_post 2 x 1", "resid_post 5 x 1"]
    assert set(plain["resid_post", "alpha"]) == set(plain["mlp_out", "alpha"]) == {1}


def test_by_layer_takes_the_best_of_several_target_layers() -> None:
    """A grid of target layers collapses to the best of each source layer."""
    result = result_of(
        reading(5, 1, 0.2, target_layer=5),
        reading(5, 1, 0.6, target_layer=2, description="from two"),
        reading(2, 1, NAN, target_layer=5),
        reading(2, 1, 0.1, target_layer=2, description="low"),
    )
    assert list(result.by_layer()["resid_post", "description"]) == ["low", "from two"]


def test_by_layer_shows_the_last_token_or_the_chosen_one() -> None:
    """With several tokens, the last is shown unless a position is given."""
    result = result_of(
        reading(5, 1, 0.9, position=4, description="of Chili"),
        reading(5, 1, 0.9, position=4, kind="mlp_out"),
        reading(5, 1, 0.1, position=6, description="of Peppers"),
    )
    assert list(result.by_layer()["resid_post", "description"]) == ["of Peppers"]
    assert "of Peppers" in result._repr_html_(), "a sweep stopped before the last token's mlp_out"
    assert list(result.by_layer(position=4)["resid_post", "description"]) == ["of Chili"]


def test_by_layer_leaves_holes_where_a_layer_was_not_read() -> None:
    """A kind that was read at fewer layers has a hole there, and no other layer's reading."""
    wide = result_of(reading(5), reading(2), reading(5, kind="mlp_out")).by_layer()
    assert list(wide["mlp_out", "description"].isna()) == [True, False]
    assert list(wide["resid_post", "description"].isna()) == [False, False]


@pytest.mark.parametrize("arguments", [{"alpha": 2}, {"position": 5}, {"position": -1}])
def test_by_layer_refuses_what_the_sweep_does_not_have(arguments: dict[str, Any]) -> None:
    """An α or token that was not swept over is named."""
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: "):
        LADDER.by_layer(**arguments)


def test_an_empty_result_says_so() -> None:
    """A sweep that was stopped before its first batch has a table without rows."""
    empty = result_of()
    assert len(empty) == 0
    assert tuple(empty.table.columns) == COLUMNS
    assert empty.best().empty
    for call in (empty.by_layer, empty.contextualization_layer):
        with pytest.raises(ValueError, match="^table: "):
            call()
    assert html.unescape(empty._repr_html_()) == f"<p>{empty!r}</p>"


def climb(*scores: float, **others: Any) -> list[Reading]:
    """Return `resid_post` at α = 1 of layers 5, 4, 3, ... with these scores."""
    return [reading(5 - i, 1, score, **others) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "threshold", "layer"),
    [
        pytest.param((0.9, 0.3, 0.29, 0.1), 0.3, 4, id="threshold-included"),
        pytest.param((0.9, 0.3, 0.29, 0.1), 0.25, 3, id="lower-threshold"),
        pytest.param((0.9, 0.3, 0.29, 0.1), 0.95, None, id="never"),
        pytest.param((0.9, 0.1, 0.8, NAN), 0.3, 3, id="first-although-a-gap-follows"),
        pytest.param((NAN, NAN), -1.0, None, id="no-text-reads-nothing"),
        pytest.param((0.0, -0.5), -0.1, 5, id="negative-threshold"),
    ],
)
def test_the_contextualization_layer_is_the_first_that_reads(
    scores: tuple[float, ...], threshold: float, layer: int | None
) -> None:
    """The lowest layer whose score reaches the threshold counts, in whatever order they come."""
    found = result_of(*climb(*scores)).contextualization_layer(threshold=threshold).layer
    assert found == layer
    assert found is None or type(found) is int


def test_only_unamplified_block_outputs_count() -> None:
    """Other kinds and amplifiers do not count; the default threshold is the paper's 0.3."""
    found = result_of(
        reading(5, 1, 0.3),
        reading(2, 9, 0.9),
        reading(2, 1, 0.299),
        reading(0, 1, 0.9, kind="mlp_out"),
    )
    assert found.contextualization_layer().layer == 5


def test_a_judge_replaces_the_threshold() -> None:
    """With `reads` the description decides and the score does not."""
    result = result_of(
        reading(5, 1, NAN, description="American rock band"),
        reading(2, 1, 0.9, description="country in Europe"),
    )
    assert result.contextualization_layer(reads=lambda _, text: "rock band" in text).layer == 5
    assert result.contextualization_layer(reads=lambda _, text: "Europe" in text).layer == 2
    assert result.contextualization_layer(reads=lambda _, text: "singer" in text).layer is None


def test_the_contextualization_layer_is_that_of_one_token() -> None:
    """Each token has its own layer; the last is meant unless a position is given."""
    result = result_of(*climb(0.9, 0.9, 0.1, position=4), *climb(0.9, 0.1, 0.1, position=6))
    assert result.contextualization_layer().layer == 5
    assert result.contextualization_layer(position=4).layer == 4
    with pytest.raises(ValueError, match="^position: "):
        result.contextualization_layer(position=3)


def test_several_target_layers_need_a_choice() -> None:
    """Each target layer has its own answer; one per source layer needs no choice."""
    result = result_of(*climb(0.9, 0.9, target_layer=0), *climb(0.9, 0.1, target_layer=3))
    with pytest.raises(ValueError, match="^target_layer: "):
        result.contextualization_layer()
    assert result.contextualization_layer(target_layer=0).layer == 4
    assert result.contextualization_layer(target_layer=3).layer == 5
    same = result_of(*(reading(k, 1, s, target_layer=k) for k, s in ((5, 0.9), (2, 0.1), (3, 0.4))))
    assert same.contextualization_layer().layer == 3


@pytest.mark.parametrize("cell", [reading(5, 3), reading(5, 1, kind="mlp_out")], ids=["α", "kind"])
def test_a_sweep_without_patchscopes_has_no_contextualization_layer(cell: Reading) -> None:
    """Without `resid_post` at α = 1 the question is refused instead of answered by None."""
    with pytest.raises(ValueError, match="^contextualization_layer: "):
        result_of(cell).contextualization_layer()


# One file


def assert_same(a: SweepResult, b: SweepResult) -> None:
    """Assert that two results hold the same table, types included, and provenance."""
    assert a.provenance == b.provenance
    pd.testing.assert_frame_equal(a.table, b.table)


def test_a_file_holds_the_whole_result(tmp_path: Path) -> None:
    """Saving and loading keeps table and provenance; the second save replaces the first."""
    path = tmp_path / "run.superscopes"
    (ordinary := tmp_path / "ordinary").write_text("")
    for result in (result_of(), result_of(reading(5)), LADDER):
        assert result.save(path) == path
        loaded = SweepResult.load(str(path))
        assert len(loaded) == len(result)
        assert loaded.provenance == PROVENANCE
    assert_same(loaded, LADDER)
    assert columns(loaded.best(), "alpha") == columns(LADDER.best(), "alpha")
    assert path.stat().st_mode == ordinary.stat().st_mode, "readable as any new file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ordinary", "run.superscopes"]


TEXTS = st.text(max_size=30)


@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    score=st.one_of(st.just(NAN), st.floats(-1, 1)),
    provenance=st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.lists(TEXTS))),
)
@example(
    texts=[("🌶 'quoted' \"twice\"", "<script>alert(1)</script>"), ("\x00\r\n\u2028", "שלום")],
    score=NAN,
    provenance={"prompt": "🌶 <script>", "α": "ℓ"},
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_text_survives_the_file(
    tmp_path: Path, texts: list[tuple[str, str]], score: float, provenance: dict[str, Any]
) -> None:
    """Any generated text is loaded character by character."""
    cells = [
        replace(reading(5 - i, 1, score), text=text, description=description)
        for i, (text, description) in enumerate(texts)
    ]
    result = SweepResult.from_readings(cells, provenance)
    assert_same(SweepResult.load(result.save(tmp_path / "run")), result)


def test_the_file_is_a_zip_of_data_alone(tmp_path: Path) -> None:
    """Two entries, JSON and Parquet: nothing in it is code, and others can read it."""
    path = LADDER.save(tmp_path / "run.zip")
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["provenance.json", "table.parquet"]
        header = json.loads(archive.read("provenance.json"))
        table = archive.read("table.parquet")
    assert header == {"format": "superscopes_tl.sweep", "version": 1, "provenance": PROVENANCE}
    assert table[:4] == table[-4:] == b"PAR1"
    assert b"pickle" not in path.read_bytes()


def test_loading_needs_no_model(tmp_path: Path) -> None:
    """A file opens without importing a model library."""
    path = LADDER.save(tmp_path / "run.zip")
    code = (
        "import sys\n"
        "from superscopes_tl import SweepResult\n"
        f"result = SweepResult.load({str(path)!r})\n"
        "result.best(), result.by_layer(), result._repr_html_()\n"
        "print(len(result), sorted({'transformer_lens', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "12 []"


def rewritten(path: Path, **entries: bytes | None) -> Path:
    """Save a good file and replace or leave out (`None`) entries of it."""
    LADDER.save(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    names = {"provenance": "provenance.json", "table": "table.parquet"}
    contents |= {names[key]: value for key, value in entries.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in contents.items():
            if value is not None:
                archive.writestr(name, value)
    return path


def header(**changes: Any) -> bytes:
    """Return a good header with some changes."""
    good = {"format": "superscopes_tl.sweep", "version": 1, "provenance": PROVENANCE}
    return json.dumps({**good, **changes}).encode()


@pytest.mark.parametrize(
    "entries",
    [
        {"provenance": None}, {"table": None}, {"provenance": b"{"}, {"provenance": b"\xff\xfe"},
        {"provenance": b"[1]"}, {"provenance": b"{}"}, {"provenance": header(format="x")},
        {"provenance": header(version=2)}, {"provenance": header(provenance=[])}, {"table": b""},
        {"table": b"PAR1 broken PAR1"},
        {"table": LADDER.table.drop(columns=["score", "kind"]).to_parquet()},
    ],
)  # fmt: skip
def test_a_zip_that_is_no_run_file_is_refused(
    tmp_path: Path, entries: dict[str, bytes | None]
) -> None:
    """A foreign, newer or incomplete file is named; a good one with a new header is not."""
    assert_same(SweepResult.load(rewritten(tmp_path / "run", provenance=header())), LADDER)
    path = rewritten(tmp_path / "run.zip", **entries)
    with pytest.raises(RunFileError, match=rf"^path: .*{re.escape(str(path))}"):
        SweepResult.load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1], ids=str)
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    """A file of which a part is missing, or all of it, is not half a result."""
    path = LADDER.save(tmp_path / "run.zip")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(RunFileError, match=r"^path: .*run\.zip"):
        SweepResult.load(path)


@pytest.mark.parametrize("entry", ["provenance.json", "table.parquet"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, entry: str) -> None:
    """Each entry has a checksum: a damaged file is refused instead of read."""
    path = LADDER.save(tmp_path / "run.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(entry)
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(entry) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(RunFileError, match=r"^path: .*run\.zip"):
        SweepResult.load(path)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    """A folder and a text file are no run files, and a wrong path is distinguished from both."""
    (other := tmp_path / "notes.txt").write_text("not a zip")
    for path in (tmp_path, other):
        with pytest.raises(RunFileError, match="^path: "):
            SweepResult.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zip"):
        SweepResult.load(tmp_path / "nowhere.zip")


@pytest.mark.parametrize("failure", ["json", "disk", "parquet", "replace"])
def test_a_failed_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """Whatever goes wrong, the old file stays and no half file is left beside it."""
    path = LADDER.save(tmp_path / "run.zip")
    before = path.read_bytes()
    result = result_of(reading(5))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    if failure == "json":
        result = SweepResult(result.table, {"model": object()})
    elif failure == "disk":
        monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    elif failure == "parquet":
        monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises((TypeError, OSError), match="JSON serializable|No space left"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.zip"]


# In a notebook


def test_the_notebook_table_escapes_all_foreign_text() -> None:
    """Generated text, prompt, model, token and kind never become markup."""
    evil = "<img src=x onerror=alert(1)>"
    cell = reading(5, 3, 0.7, description=evil, prompt=evil, token=evil, kind=evil)
    provenance = {"prompt": evil, "model": {"name": evil}}
    shown = SweepResult.from_readings([cell], provenance)._repr_html_()
    assert "<img" not in shown
    assert shown.count(html.escape(evil)) == 5
    assert shown.count(f"<bdi>{html.escape(evil)}</bdi>") == 2, "the direction stays in its cell"
    assert "α = 3, 0.70" in shown


def test_the_notebook_table_has_a_row_per_layer_and_says_what_is_missing() -> None:
    """Layers are rows; no description and no computation are distinguished."""
    result = result_of(
        reading(5, 9, 0.75, description="band"),
        reading(2, 1, NAN, description=""),
        reading(5, 1, 0.5, kind="mlp_out", description="שלום"),
    )
    shown = result._repr_html_()
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", shown)
    assert heads == ["layer", "resid_post", "mlp_out", "2", "5"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    assert cells == [
        "<bdi></bdi> <small>α = 1, no description</small>",
        "not computed",
        "<bdi>band</bdi> <small>α = 9, 0.75</small>",
        "<bdi>שלום</bdi> <small>α = 1, 0.50</small>",
    ]
    assert "best reading of token <bdi>·token6</bdi> per layer" in shown


# Several prompts


def test_one_prompt_of_several_is_as_its_own_sweep() -> None:
    """The paper's mapping and greedy texts, where there are others; the provenance is adapted."""
    other = replace(reading(5), prompt="Titanic")
    many = result_of(other, reading(5), replace(other, draw=1), replace(other, mapping="cube"))
    assert many.prompts == ("Titanic", "Red Hot Chili Peppers")
    one = many.of("Titanic")
    assert columns(one.table, "mapping", "draw") == [(PAPER_MAPPING, 0)]
    assert one.provenance["prompt"] == "Titanic"
    assert len(many.of("Titanic", mapping="cube")) == len(many.of("Titanic", draw=1)) == 1
    pd.testing.assert_frame_equal(LADDER.of().table, LADDER.table)
    for asked in ({}, {"prompt": "Queen"}):
        with pytest.raises(ValueError, match="^prompt: "):
            many.of(**asked)
    with pytest.raises(ValueError, match="^draw: "):
        many.of("Titanic", draw=2)
    assert "2 prompts" in repr(many)
    assert "2 prompts" in many._repr_html_()


def test_the_contextualization_layer_by_what_is_recovered() -> None:
    """The first layer with half of the most, above what other prompts' vectors recover."""
    shares = {0: (0.3, 0.3), 2: (0.5, 0.1), 5: (0.9, 0.2), 7: (0.8, -4.0)}
    rows = [
        replace(
            reading(layer, 1, 0.9 if layer == 0 else 0.1),
            recovered=own,
            controls={"other_prompt_recovered": others, "specific": own - others},
        )
        for layer, (own, others) in shares.items()
    ]
    found = result_of(*rows).contextualization_layer()
    assert (found.layer, found.by) == (2, "recovered")
    assert (found.recovered, found.others) == (0.5, 0.1)
    assert "layer 2" in str(found)
    assert result_of(*rows).contextualization_layer(by="score").layer == 0
    with pytest.raises(ValueError, match=r"^threshold: "):
        result_of(*rows).contextualization_layer(by="recovered", threshold=0.3)


def test_a_map_that_recovers_nothing_has_no_contextualization_layer() -> None:
    """Neither a share nor a text: the answer is none, not an error."""
    silent = [replace(reading(layer, 1, NAN), written=False, text="") for layer in (5, 2)]
    assert result_of(*silent).contextualization_layer().layer is None
    faint = [replace(reading(layer, 1, 0.1), recovered=0.05) for layer in (5, 2)]
    assert result_of(*faint).contextualization_layer().layer is None


def test_the_best_cell_by_what_it_recovers() -> None:
    """Score and share may disagree; a map without all texts is judged by the share."""
    one = replace(reading(5, 1, 0.9), recovered=0.1)
    two = replace(reading(5, 3, 0.2), recovered=0.8)
    assert list(result_of(one, two).best()["alpha"]) == [1]
    assert list(result_of(one, two).best(by="recovered")["alpha"]) == [3]
    assert list(result_of(one, replace(two, written=False)).best()["alpha"]) == [3]
    wide = result_of(one, two).by_layer(by="recovered")
    assert list(wide["resid_post", "recovered"]) == [0.8]
    unknown: Any = "luck"
    with pytest.raises(ValueError, match=r"^by: "):
        result_of(one).best(by=unknown)
