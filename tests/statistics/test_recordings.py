"""Recorded generations: what a file may look like, and what is made of it."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from superscopes_tl.cli.main import app
from superscopes_tl.scores import as_scorer
from superscopes_tl.statistics import read_recording, replay
from superscopes_tl.statistics.recordings import COLUMNS, MAX_FILE_BYTES

HEADER = "source prompt,token,layer,amplification value,result\n"
PROMPTS = ("red apple", "blue sky", "green tree")
PLAIN = HEADER + "".join(
    f"{prompt},{prompt[-1]},{layer},1,{text}\n"
    for layer, texts in ((1, ("apple", "stone", "")), (2, ("red", "blue", "cat")))
    for prompt, text in zip(PROMPTS, texts, strict=True)
)
SCALED = HEADER + "".join(
    f'{prompt},{prompt[-1]},{layer},{alpha},"{text}"\n'
    for layer in (1, 2)
    for alpha in (3, 6)
    for prompt, text in zip(
        PROMPTS, ("an apple", "sky", "fish" if alpha == 3 else "tree"), strict=True
    )
)
PAPER = os.environ.get("SUPERSCOPES_PAPER_DATA")
PAPER_FILES = [
    Path(PAPER or "", f"superscopes_eval_{name}.csv")
    for name in ("patchscopes_reference", "patch_to_same_layer")
]


def write(folder: Path, text: str | bytes, name: str = "recording.csv") -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_columns_get_the_names_of_a_sweep(tmp_path: Path) -> None:
    """One row per text; a file without surprises has no notes but its empty text."""
    found = read_recording(write(tmp_path, PLAIN))
    assert list(found.table.columns) == ["prompt", "token", "source_layer", "alpha", "text"]
    assert found.table.iloc[0].tolist() == ["red apple", "e", 1, 1.0, "apple"]
    assert len(found.table) == 6
    assert found.table.loc[2, "text"] == ""
    assert found.notes == ("Empty texts, which have no score: 1 of 6.",)


def test_texts_that_look_like_nothing_are_texts(tmp_path: Path) -> None:
    """`NA`, `None`, a formula, quotes, commas and line breaks are what the model wrote."""
    texts = ["NA", "None", "=1+1", ' a "b", c', "one\r\ntwo", "one\ntwo", "\ufeff", "日本"]
    table = pd.DataFrame(
        [("Pink Floyd", "loyd", 3, 1, text) for text in texts], columns=list(COLUMNS)
    )
    path = tmp_path / "texts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table.to_csv(file, index=False)
    assert read_recording(path).table["text"].tolist() == texts


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (codecs.BOM_UTF8 + PLAIN.encode(), None),
        (PLAIN.encode("utf-16"), "The file is not UTF-8: read as utf-16."),
        (codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"), "read as utf-16."),
        (PLAIN.replace(",cat", ",café").encode("latin-1"), "read as latin-1."),
        (PLAIN.replace("\n", "\r\n").encode(), None),
    ],
)
def test_encodings_are_recognised_and_named(tmp_path: Path, data: bytes, note: str | None) -> None:
    """A spreadsheet saves in many ways; the rows are the same."""
    found = read_recording(write(tmp_path, data))
    assert found.table["prompt"].tolist() == list(PROMPTS) * 2
    assert found.table["text"].iloc[-1] in ("cat", "café")
    noted = [n for n in found.notes if "UTF-8" in n]
    assert len(noted) == (note is not None)
    assert note is None or note in noted[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda text: text.replace(",", "\t"), "tabs.tsv"),
        (lambda text: text.replace(",", ";"), "excel.csv"),
        (lambda text: "sep=;\r\n" + text.replace(",", ";").replace("\n", "\r\n"), "told.csv"),
        (lambda text: "\ufeff" + text.replace(",", ";").replace(";3;", ";3,0;"), "comma.csv"),
        (lambda text: text.replace("source prompt", "source_prompt"), "snake.csv"),
        (lambda text: text.replace("source prompt,token", "Source Prompt , Token"), "title.csv"),
        (lambda text: text.replace(HEADER, "prompt,token,source_layer,alpha,text\n"), "own.csv"),
        (lambda text: "," + text.replace("\n", "\n0,")[:-2], "index.csv"),
    ],
)  # fmt: skip
def test_what_spreadsheets_make_of_a_recording_is_read(
    change: Any, name: str, tmp_path: Path
) -> None:
    """Semicolons, tabs, decimal commas, other spellings of the names, an index: the same rows."""
    text = SCALED.replace('"', "")
    expected = read_recording(write(tmp_path, text)).table
    found = read_recording(write(tmp_path, change(text), name))
    pd.testing.assert_frame_equal(found.table, expected)


def test_a_table_of_other_columns_is_refused_with_their_names(tmp_path: Path) -> None:
    """What is missing, what is there, and what may separate them."""
    path = write(tmp_path, HEADER.replace("result", "output").replace(",", "|") + "a|b|1|1|x\n")
    with pytest.raises(ValueError, match=r"semicolons or tabs, got no .*output") as raised:
        read_recording(path)
    assert "\n" not in str(raised.value)


def test_repeated_conditions_and_other_columns_are_named(tmp_path: Path) -> None:
    """Every sample is kept; a column that is not part of the format is ignored."""
    text = HEADER.replace("token", "seed,token").replace("layer", " layer ") + (
        "red apple,7,e,1,3,one\nred apple,7,e,1,3,two\n"
        "red apple,7,e,2,3,one\nred apple,7,e,2,3,one\n"
        "red apple,7,red,3,3,one\n"
    )
    found = read_recording(write(tmp_path, text))
    assert found.table["text"].tolist() == ["one", "two", "one", "one", "one"]
    assert found.notes == (
        "Ignored columns: 'seed'.",
        "2 conditions were recorded more than once, 1 of them with different texts: "
        "every text counts as a further sample.",
        "1 prompts were read at several tokens: all of them count.",
    )


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x89PNG\r\n\x1a\n\0\0\0", b"SQLite format 3 ", "hello\nworld\n", HEADER,
        HEADER.replace(",", ";"), HEADER.replace(",result", ""), HEADER + "a,b,one,1,x\n",
        HEADER + "a,b,1,1,x\na,b,1.5,1,x\n", HEADER + "a,b,-1,1,x\n", HEADER + "a,b,nan,1,x\n",
        HEADER + "a,b,1,high,x\n", HEADER + "a,b,1,inf,x\n", HEADER + "a,b,1,,x\n",
        HEADER + 'a,b,1,1,"x\ny"\na,b,1\n', HEADER + " ,b,1,1,x\n", HEADER + 'a,b,1,1,"x\n',
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: str | bytes) -> None:
    """Other formats, columns that are missing, rows without a layer, an α or a prompt."""
    with pytest.raises(ValueError, match=r"^path: .*recording\.csv"):
        read_recording(write(tmp_path, data))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, data: bytes) -> None:
    """No other exception, whatever is in the file."""
    path = write(tmp_path_factory.getbasetemp(), HEADER.encode() + data, "any.csv")
    try:
        outcome = f"read {len(read_recording(path).table)} rows"
    except ValueError as error:
        outcome = str(error)
    assert re.match(r"read [1-9]|path: expected", outcome)


def test_a_missing_a_large_and_a_folder(tmp_path: Path) -> None:
    """The size is known before anything is read."""
    with pytest.raises(FileNotFoundError):
        read_recording(tmp_path / "nowhere.csv")
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # holds no data, so it takes no space
    for path in (tmp_path, tmp_path / "large.csv"):
        with pytest.raises(ValueError, match="^path: "):
            read_recording(path)


def test_patchscopes_against_superscopes(tmp_path: Path, word_overlap: Any) -> None:
    """The counts by hand: best of two α against one, and one α alone."""
    found = replay(
        write(tmp_path, PLAIN, "a.csv"), write(tmp_path, SCALED, "b.csv"), scorer=word_overlap
    )
    assert found.lines() == ["Patchscopes 1 2", "Superscopes 3 3", "Superscopes, one alpha 2.5 2.5"]
    assert found.notes[0] == "Baseline: Empty texts, which have no score: 1 of 6."
    assert any(
        "Superscopes chooses among 2 α" in note and "they hold 1 text per condition" in note
        for note in found.notes
    )


def test_one_file_may_be_both(tmp_path: Path, word_overlap: Any) -> None:
    """α = 1 is Patchscopes wherever it stands, every other α Superscopes."""
    one = write(tmp_path, PLAIN + SCALED.removeprefix(HEADER))
    found = replay(read_recording(one), one, scorer=word_overlap)
    assert found.lines() == ["Patchscopes 1 2", "Superscopes 3 3", "Superscopes, one alpha 2.5 2.5"]
    assert "Baseline: α other than 1 is left out (12 texts)." in found.notes
    assert "Amplified: α of 1 is left out (6 texts)." in found.notes


def test_as_many_draws_as_there_are_alphas_are_a_fair_baseline(
    tmp_path: Path, word_overlap: Any
) -> None:
    """The first sample is Patchscopes; two samples match two α, a third is not used."""
    more = [
        f"{p},{p[-1]},{layer},1,{text}\n"
        for p in PROMPTS
        for text in (p.split()[0], p)
        for layer in (1, 2)
    ]
    baseline = write(tmp_path, PLAIN + "".join(more), "a.csv")
    found = replay(baseline, write(tmp_path, SCALED, "b.csv"), scorer=word_overlap)
    assert found.methods == [
        "Patchscopes", "Patchscopes, equal budget", "Superscopes", "Superscopes, one alpha",
    ]  # fmt: skip
    assert found.lines()[:2] == ["Patchscopes 1 2", "Patchscopes, equal budget 3 3"]
    assert set(found.cells["text"]) & set(PROMPTS) == set(), "the third sample is not used"
    assert not any("cannot be had" in note for note in found.notes)


@pytest.mark.parametrize(("one", "argument"), [(SCALED, "baseline"), (PLAIN, "amplified")])
def test_a_missing_alpha_is_named(tmp_path: Path, one: str, argument: str) -> None:
    """Most likely the two files were given in the wrong order."""
    path = write(tmp_path, one)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        replay(path, path)


def run(*arguments: object) -> Any:
    """Run the command as a user would, on a narrow screen."""
    return CliRunner().invoke(app, ["replay", *map(str, arguments)], env={"COLUMNS": "60"})


def test_the_command_prints_lines_as_they_are_and_writes_both_files(tmp_path: Path) -> None:
    """Plain lines for both counts, tables and notes, the page and the cells."""
    page, cells = tmp_path / "page.html", tmp_path / "cells.csv"
    done = run(
        write(tmp_path, PLAIN, "a<b>.csv"), write(tmp_path, SCALED, "b.csv"),
        "--html", page, "--csv", cells, "--threshold", "0.4", "--score-on", "description",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Prompts with a similarity above 0.4, at layers 1, 2:"
    names = ["Patchscopes", "Superscopes", "Superscopes,"]
    assert [line.split()[0] for line in lines[1:4]] == names
    table = pd.read_csv(cells, keep_default_na=False)
    hits = table[(table["method"] == "Patchscopes") & table["hit"]]
    counts = [int((hits["source_layer"] == layer).sum()) for layer in (1, 2)]
    assert lines[1] == f"Patchscopes {counts[0]} {counts[1]}"
    assert lines[5] == "Prompts above the 95th percentile of the others, at layers 1, 2:"
    assert "Difference to Patchscopes" in done.stdout
    assert any(line.startswith("Note: Superscopes chooses among 2 α") for line in lines)
    html = page.read_text(encoding="utf-8")
    assert html.count("Plotly.newPlot(") == 1
    assert "a<b>.csv" not in html
    bad = run(tmp_path / "a<b>.csv", tmp_path / "b.csv", "--score-on", "words")
    assert (bad.exit_code, "score_on: " in bad.stderr) == (2, True)
    missing = run(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (missing.exit_code, "FileNotFoundError" in missing.stderr) == (1, True)


@pytest.fixture(scope="module")
def paper() -> Any:
    """The counts of the authors' two files, where they are."""
    for path in PAPER_FILES:
        if not PAPER or not path.is_file():
            pytest.skip(
                "SUPERSCOPES_PAPER_DATA names no folder with the authors' files "
                "(github.com/GalNivs/Superscopes, folder data)"
            )
    return replay(*PAPER_FILES)


def test_the_authors_recordings_give_the_papers_figure_3(paper: Any) -> None:
    """48 prompts, layers 1 to 7, similarity of the whole text above 0.3."""
    patchscopes, superscopes, _ = paper.lines()
    assert patchscopes == "Patchscopes 13 3 1 1 5 4 2"
    assert superscopes == "Superscopes 29 36 32 27 25 23 24"
    assert set(paper.counts["prompts"]) == {48}
    notes = "\n".join(paper.notes)
    for part in (
        "12 conditions were recorded more than once, 11 of them with different texts",
        "Empty texts, which have no score: 1 of 336",
        "Superscopes chooses among 5 α",
        "No q-value is up to 0.05",
    ):
        assert part in notes


def test_the_authors_recordings_hold_up_after_correction(paper: Any) -> None:
    """More than chance with the correction, by an implementation of its own."""
    from sentence_transformers.util import cos_sim

    embed: Any = as_scorer(None).embed  # shares what the fixture embedded
    lines = []
    for path in PAPER_FILES:
        rows = pd.read_csv(path, keep_default_na=False)
        rows = rows[rows["result"].str.strip() != ""].reset_index(drop=True)
        prompts = list(dict.fromkeys(rows["source prompt"]))
        similarity = pd.DataFrame(
            cos_sim(embed(rows["result"].tolist()), embed(prompts)).numpy(), columns=prompts
        )
        best = similarity.groupby([rows["layer"], rows["source prompt"]]).max()
        counts = []
        for layer in range(1, 8):
            at = best.loc[layer]
            above = [p in at.index and at.loc[p, p] > at[p].drop(p).quantile(0.95) for p in prompts]
            counts.append(str(sum(above)))
        lines.append(" ".join(counts))
    assert paper.lines(corrected=True)[:2] == [f"Patchscopes {lines[0]}", f"Superscopes {lines[1]}"]


def test_the_notebook_shows_what_the_authors_recordings_give(paper: Any) -> None:
    """Its lines are the command's."""
    notebook = Path(__file__).parents[2] / "notebooks" / "02_paper_figures.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "".join(line for c in cells if c["cell_type"] == "markdown" for line in c["source"])
    for corrected in (False, True):
        assert "\n".join(["", *paper.lines(corrected), ""]) in text
    chance = paper.counts["expected_by_chance"]
    assert f"({chance.min():.1f} to {chance.max():.0f} prompts with a" in " ".join(text.split())
    assert paper.counts["discoveries"].sum() == 0
