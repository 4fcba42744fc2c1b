"""Prompts from files: lines, tables of every kind, the field's data sets, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, evaluate
from superscopes_tl.evaluation import SourcePrompt, load_prompts
from superscopes_tl.scores import Contains, own_words
from tests.support.refusals import refused

COLUMNS = [
    "sample_id", "prompt_target", "position_target", "target_baseline", "object", "subject",
    "generations_baseline", "generations_baseline_str", "is_correct_baseline", "prompt_source",
    "position_source", "source_cropped_toks",
]  # fmt: skip


def patchscopes(path: Path, *rows: tuple[str, list[str], str, str], **changes: Any) -> Path:
    """Write rows (prompt, tokens, object, subject) as the authors' tables have them."""
    table = pd.DataFrame(
        [
            (
                i, "The capital of x", -1, f"The capital of {subject}", fact, subject,
                "[' is', '\\n']", " is  a  deep . \n \n The  skin", False, prompt, len(tokens) - 1,
                str(tokens),
            )
            for i, (prompt, tokens, fact, subject) in enumerate(rows)
        ],
        columns=COLUMNS,
    ).assign(**changes)  # fmt: skip
    table.to_csv(path, sep="\t")
    return path


JAPAN = (" war with Japan, and Japan prompted a", [" war", " with", " Japan"], "Tokyo", "Japan")
SYRIA = (" in a Syrian town", [" in", " a", " Sy", "ria"], "Damascus", "Syria")


def test_a_table_of_patchscopes_is_an_evaluation(tmp_path: Path) -> None:
    """Each prompt ends at its subject's last token; object and target prompt come along."""
    path = patchscopes(
        tmp_path / "capital.tsv", JAPAN, (" 5,6 bananas", [" 5", ",", "6"], "", "6"), SYRIA
    )
    found = load_prompts(path)
    target = "The capital of x"
    assert found.rows == (
        SourcePrompt(JAPAN[0], " war with Japan", "Japan", "Tokyo", target),
        SourcePrompt(SYRIA[0], " in a Syria", "Syria", "Damascus", target),
    )
    assert found.prompts == (" war with Japan", " in a Syria")
    assert found.settings == {
        "about": {" war with Japan": "Japan", " in a Syria": "Syria"},
        "reference": {" war with Japan": "Tokyo", " in a Syria": "Damascus"},
        "score_against": "own words", "score_on": "text", "scorer": Contains(),
        "target_prompt": target, "max_new_tokens": 20,
    }  # fmt: skip
    assert found.notes == ("1 of 3 rows are left out: no prompt up to the subject, or no fact.",)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_source": ""}, {"prompt_source": "cut\n"}, {"position_source": 5},
        {"source_cropped_toks": "['"}, {"source_cropped_toks": "[" * 9999},
        {"source_cropped_toks": "[1]"}, {"source_cropped_toks": "__import__('os')"},
        {"object": ""}, {"prompt_target": " "},
    ],
)  # fmt: skip
def test_rows_whose_token_cannot_be_found_are_left_out(changes: Any, tmp_path: Path) -> None:
    """Prompts that were cut, tokens that disagree with the prompt or their number, no list."""
    path = patchscopes(tmp_path / "capital.tsv", JAPAN, SYRIA, **changes)
    assert "none in the 2 rows" in refused(lambda: load_prompts(path), ValueError, "path")
    assert load_prompts(path, column="subject").prompts == ("Japan", "Syria")


FACTS = [
    {"known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica", "prediction": " x",
     "template": "{} is in the continent of", "relation_id": "P30",
     "prompt": "Vinson Massif is in the continent of"},
    {"known_id": 7, "subject": "Malta", "attribute": "English", "prediction": ' a "mix",\nof',
     "template": "In {}, the language is", "relation_id": "P37",
     "prompt": "In Malta, the language is a mix of"},
    {"known_id": 8, "subject": "Nil", "attribute": "Z", "prediction": "", "template": "",
     "prompt": "no"},
]  # fmt: skip


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "columns.json"])
def test_known_facts_are_read_at_the_subject(ending: str, tmp_path: Path) -> None:
    """ROME's list, SelfIE's CSV of it, lines of JSON, and what pandas writes: the same rows."""
    path = tmp_path / f"known.{ending}"
    if ending == "csv":
        pd.DataFrame(FACTS).to_csv(path, index=False)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in FACTS))
    elif ending == "json":
        path.write_text(json.dumps(FACTS))
    else:
        pd.DataFrame(FACTS).to_json(path)
    found = load_prompts(path)
    assert found.prompts == ("Vinson Massif", "In Malta")
    assert found.rows[1].prompt == "In Malta, the language is a mix of"
    assert "target_prompt" not in found.settings
    assert [note.split()[0] for note in found.notes] == ["1", "The"]
    parts = found.by_target_prompt()
    assert list(parts) == ["x is in the continent of", "In x, the language is a mix of"]
    assert parts["In x, the language is a mix of"].settings["reference"] == {"In Malta": "English"}


def test_one_subject_may_have_several_facts(tmp_path: Path) -> None:
    """Each counts with its own target prompt; of the same one, and of the whole file, the first."""
    subject = {"subject": "Vietnam"}
    rows = [
        {**subject, "prompt": "Vietnam is in", "attribute": "Asia"},
        {**subject, "prompt": "Vietnam is in", "attribute": "Asien"},
        {**subject, "prompt": "Vietnam speaks", "attribute": "Vietnamese"},
    ]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    found = load_prompts(tmp_path / "facts.json")
    assert found.prompts == ("Vietnam",)
    assert found.settings["reference"] == {"Vietnam": "Asia"}
    assert found.notes[0].startswith("1 rows repeat")
    parts = found.by_target_prompt().values()
    assert [part.settings["reference"]["Vietnam"] for part in parts] == ["Asia", "Vietnamese"]


ROWS = [{"name": "Pink Floyd", "what": "rock band"}, {"what": "country", "name": "Japan"}]
TABLE = "name,what\nPink Floyd,rock band\nJapan,country\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", TABLE), ("t.csv", "\ufeff" + TABLE.replace(",", ";").replace("\n", "\r\n")),
        ("t.tsv", TABLE.replace(",", "\t")), ("t.csv", TABLE.replace(",", "\t")),
        ("t.jsonl", "\n\n".join(map(json.dumps, ROWS))), ("t.json", json.dumps({"data": ROWS})),
        ("t.json", pd.DataFrame(ROWS).to_json()),
        ("t.json", json.dumps(pd.DataFrame(ROWS).to_dict("list"))),
    ],
)  # fmt: skip
def test_columns_of_any_table_are_prompts_and_facts(name: str, text: str, tmp_path: Path) -> None:
    """Every kind of table, separator and line end; without the column its names are shown."""
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = load_prompts(path, column="name", reference_column="what")
    assert found.prompts == ("Pink Floyd", "Japan")
    assert found.settings["reference"] == {"Pink Floyd": "rock band", "Japan": "country"}
    assert load_prompts(path, column="what").settings == {}
    for column in (None, "names"):
        message = refused(partial(load_prompts, path, column=column), ValueError, "column")
        assert "'name', 'what'" in message
    refused(
        lambda: load_prompts(path, column="name", reference_column="x"),
        ValueError,
        "reference_column",
    )


@hypothesis_settings(max_examples=12)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), min_size=1
    )
)
def test_prompts_survive_a_table(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    """Whatever a cell holds: separators, quotes, line breaks, brackets."""
    folder = tmp_path_factory.mktemp("tables")
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(
        [["id", "prompt"], *(["1", p] for p in prompts)]
    )
    (folder / "p.csv").write_bytes(text.getvalue().encode())
    (folder / "p.json").write_text(json.dumps([{"id": 1, "prompt": prompt} for prompt in prompts]))
    expected = tuple(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    for name in ("p.csv", "p.json"):
        if expected:
            assert load_prompts(folder / name).prompts == expected
        else:
            refused(partial(load_prompts, folder / name), ValueError, "path")


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    """One per line, without empty lines, marks and white space around; commas are no table."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffParis, France\r\n\r\n 5,662 acres \r\n[The] Who\r\n".encode())
    assert load_prompts(path).prompts == ("Paris, France", "5,662 acres", "[The] Who")
    path.write_text("Pink Floyd")
    assert load_prompts(path).settings == {}


@pytest.mark.parametrize(
    "text",
    [
        TABLE, TABLE.replace(",", ";"), TABLE.replace(",", "\t"), '[{"prompt": "a"}]',
        '{"prompt": "a"}\n{"prompt": "b"}', '[\n{"prompt": "a"}\n]', "\tid\tprompt\n0\t0\tOn x\n",
    ],
)  # fmt: skip
def test_a_table_in_a_text_file_is_refused(text: str, tmp_path: Path) -> None:
    """It is never taken line by line: the fix is its right ending."""
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    message = refused(lambda: load_prompts(path), ValueError, "path")
    assert "rename it to prompts." in message


def test_a_row_without_its_fact_is_left_out(tmp_path: Path) -> None:
    """It would be judged by the model's own words, among rows that are judged by facts."""
    (tmp_path / "t.csv").write_text("prompt,fact\nJapan,Tokyo\nSyria, \n")
    found = load_prompts(tmp_path / "t.csv", reference_column="fact")
    assert found.prompts == ("Japan",)
    assert found.notes[0].startswith("1 of 2 rows")
    assert load_prompts(tmp_path / "t.csv").prompts == ("Japan", "Syria")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "," * 10_001 + "\n"), ("a.csv", "\n  \n" + "," * 10_001 + "\n1\n"),
        ("a.csv", ("a" * 300 + ",") * 5_000), ("a.csv", '"a\n"' + ',"b\n"' * 10_001),
        ("a.txt", "a\n" * 1_000_001), ("a.txt", "a\v" * 1_000_001),
        ("a.jsonl", "{}\n" * 1_000_001), ("a.csv", "a\n" * 1_000_002),
        ("a.json", '["' + 'a","' * 1_000_000 + 'a"]'),
    ],
    ids=["columns", "after blanks", "long names", "over lines", "lines", "form feeds", "objects",
         "rows", "list"],
)  # fmt: skip
def test_more_rows_or_columns_than_any_list_has_are_refused(
    name: str, text: str, tmp_path: Path
) -> None:
    """Each would take gigabytes, or minutes, before anything can be said of it."""
    (tmp_path / name).write_text(text)
    assert "more than 1" in refused(lambda: load_prompts(tmp_path / name), ValueError, "path")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b""), ("a.txt", b"\0\1"), ("a.csv", b""), ("a.csv", b"prompt\n"), ("a.json", b""),
        ("a.json", b"5"), ("a.json", b"[]"), ("a.json", b"[1, 2]"), ("a.json", b"{}"),
        ("a.json", b'{"prompt": "a"}'), ("a.jsonl", b"a\nb"), ("a.json", b"[" * 100_000),
        ("a.csv", b'prompt\n"a'), ("a.json", b'{"a": [1, 2], "b": [1]}'),
        ("a.json", b'[{"prompt": null}]'), ("a.json", b'{"a": {"0": 1}, "b": {}}'),
    ],
)  # fmt: skip
def test_what_is_no_file_of_prompts_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    """Nothing, binary data, JSON of other things, a table without prompts."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^(path|column): expected .*, got .*Fix: "):
        load_prompts(path)


@given(st.data())
def test_spoilt_files_raise_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut short or with other bytes: prompts, or a `ValueError` in the house's form."""
    folder = tmp_path_factory.mktemp("spoilt")
    patchscopes(folder / "a.tsv", JAPAN, SYRIA)
    (folder / "a.json").write_text(json.dumps(FACTS))
    path = folder / data.draw(st.sampled_from(["a.tsv", "a.json"]))
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(1, len(content)))]
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(ValueError):
        assert all(load_prompts(path).prompts)
        return
    with pytest.raises(ValueError, match=r"^(path|column): expected .*, got .*Fix: "):
        load_prompts(path)


def test_an_evaluation_scores_each_prompt_against_its_object(
    llama: LanguageModel, tmp_path: Path
) -> None:
    """`recovered` is that of the object after the target prompt with the subject."""
    found = load_prompts(patchscopes(tmp_path / "capital.tsv", JAPAN, SYRIA))
    settings = {**found.settings, "max_new_tokens": 4}
    table = evaluate(
        llama, found.prompts, layers=[5, 2], alphas=(1, 3), draws=0, progress=False, **settings
    ).table
    assert len(table) == 8
    for row in table.to_dict("records"):
        subject, fact = (found.settings[name][row["prompt"]] for name in ("about", "reference"))
        words = own_words(
            llama, row["prompt"], target_prompt="The capital of x", about=subject, reference=fact
        )
        assert (row["about"], row["own_words"]) == (subject, fact)
        assert row["plain_nats"] == pytest.approx(words.plain_nats, abs=1e-3)
        assert row["score"] == float(fact.lower() in row["text"].lower())
