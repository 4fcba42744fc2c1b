"""Experiments over many prompts: the same readings as sweeps, resumable, in one file."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from superscopes_tl import (
    CONTROLS,
    PAPER_PROMPTS,
    LanguageModel,
    PatchedGenerator,
    SweepResult,
    evaluate,
    sweep,
)
from superscopes_tl.evaluation import methods
from superscopes_tl.vectors import MeanActivation, RandomDirection, ResidMid
from tests.support.same import assert_same_readings

PROMPTS = ("Red Hot Chili Peppers", "Pearl Jam", "Will Smith")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of every generation in a test."""
    counts: list[int] = []
    plain = PatchedGenerator.generate

    def counting(self: PatchedGenerator, patches: Any, **options: Any) -> Any:
        counts.append(len(patches))
        return plain(self, patches, **options)

    monkeypatch.setattr(PatchedGenerator, "generate", counting)
    return counts


@pytest.fixture
def settings(word_overlap: Any) -> dict[str, Any]:
    """A small experiment."""
    return {
        "layers": (5, 2), "alphas": (1, 3, 9), "max_new_tokens": 4, "scorer": word_overlap,
        "progress": False, "draws": 0, "target_prompt": "A band of rock is x",
    }  # fmt: skip


def test_readings_equal_those_of_single_sweeps(
    llama: LanguageModel, settings: dict[str, Any]
) -> None:
    """Batches across prompts change nothing but the speed, for controls too."""
    settings.pop("draws")  # a sweep has none
    asked = ("unpatched", "random_direction", "unpatched_log_probability")
    table = evaluate(llama, PROMPTS, batch_size=7, draws=0, controls=asked, **settings).table
    for prompt in PROMPTS:
        own = table[table["prompt"] == prompt].reset_index(drop=True)
        alone = sweep(
            llama, prompt, kinds="mlp_out", target_layer="same", score_on="text",
            controls=asked, **settings,
        ).table  # fmt: skip
        exact = ["text", "description", "alpha", "source_layer", "target_layer", "score"]
        exact += ["unpatched_text", "random_direction_text", "random_direction", asked[-1]]
        assert_same_readings(own, alone, exact, check_dtype=False)


def test_each_prompt_may_have_its_own_token_text_and_reference(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Positions, `about` and `reference` by prompt give what one sweep per prompt gives."""
    settings.pop("draws")
    own: dict[str, dict[str, Any]] = {
        "Pearl Jam played in Syria": {"positions": "Jam", "about": "Jam", "reference": "rock"},
        "Will Smith": {"positions": 1, "reference": "actor"},
        "Tupac Shakur": {},
    }
    names = ("positions", "about", "reference")
    given = {n: {prompt: one[n] for prompt, one in own.items() if n in one} for n in names}
    asked = {**settings, **given, "score_against": "own words", "controls": "other_prompt",
             "kinds": "mlp_out", "score_on": "text"}  # fmt: skip
    path = tmp_path / "run.sqlite"
    table = evaluate(llama, tuple(own), path, batch_size=7, draws=0, **asked).table
    asked = {name: value for name, value in asked.items() if name not in names}
    for prompt, one in own.items():
        found = table[table["prompt"] == prompt].reset_index(drop=True)
        expected = sweep(llama, prompt, batch_size=64, **asked, **one).table
        assert_same_readings(found, expected, check_dtype=False)
    assert set(table.query("prompt.str.startswith('Pearl')")["about"]) == {"Jam"}
    with pytest.raises(ValueError, match="about"):
        evaluate(
            llama, tuple(own), path, draws=0, **{**asked, **given, "about": {"Will Smith": "x"}}
        )


def test_controls_of_several_prompts_share_a_batch(
    llama: LanguageModel, settings: dict[str, Any], generated: list[int]
) -> None:
    """Three prompts with six cells each: one run for the cells, one for their controls.

    Between them is the unpatched text, once.
    """
    evaluate(llama, PROMPTS, controls=("random_direction", "shuffled_dimensions"), **settings)
    assert generated == [18, 1, 36]


def test_a_finished_cell_is_never_computed_twice(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path, generated: list[int]
) -> None:
    """A second call computes what is new: nothing, or one more layer, α, prompt or mapping.

    Greedy texts are compared with the unpatched one, which is generated once.
    """
    path = tmp_path / "run.sqlite"
    for expected, prompts, extra in (
        (12 + 1, PROMPTS[:2], {}),
        (0, PROMPTS[:2], {}),
        (8 + 1, PROMPTS[:2], {"alphas": (1, 6, 12)}),
        (6 + 1, PROMPTS, {}),
        (9 + 1, PROMPTS, {"layers": (5, 3)}),
        (18 + 1, PROMPTS, {"base": ResidMid()}),
        (12, PROMPTS, {"draws": 2}),
    ):
        generated.clear()
        evaluate(llama, prompts, path, **{**settings, **extra})
        assert sum(generated) == expected
    table = SweepResult.load(path).table
    assert len(table) == 65
    assert not table.duplicated(["prompt", "source_layer", "alpha", "mapping", "draw"]).any()


def test_a_broken_run_keeps_its_finished_batches(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped in the third batch, two are in the file; the next call does the rest."""
    path, calls, plain = tmp_path / "run.sqlite", iter(range(99)), settings["scorer"]

    def stopping(references: Any, candidates: Any) -> Any:
        if next(calls) == 3:  # the second batch holds two prompts, each scored by itself
            raise KeyboardInterrupt
        return plain(references, candidates)

    stopping.__name__ = stopping.__qualname__ = plain.__name__  # the file knows it by its name
    asked = {**settings, "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama, PROMPTS, path, **{**asked, "scorer": stopping})
    assert len(SweepResult.load(path)) == 10
    whole = evaluate(llama, PROMPTS, path, **asked).table
    fresh = evaluate(llama, PROMPTS, **settings).table
    key = ["prompt", "source_layer", "alpha"]
    kept = whole.sort_values(key)["text"].tolist()
    assert kept == fresh.sort_values(key)["text"].tolist()


def test_methods_name_the_parts_that_are_compared(
    llama: LanguageModel, settings: dict[str, Any]
) -> None:
    """α = 1 is Patchscopes, other α Superscopes; samples, mappings and controls have their own."""
    found = evaluate(llama, PROMPTS[:2], controls=CONTROLS, **{**settings, "draws": None})
    parts = methods(found)
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {
        "Patchscopes": 4,
        "Superscopes": 8,
        "Patchscopes, equal budget": 8,
        **{name.replace("_", " "): 8 for name in CONTROLS[:-1]},
    }
    assert list(parts["unpatched"]["text"]) == list(parts["Superscopes"]["unpatched_text"])
    with pytest.raises(ValueError, match="^kind: "):
        methods(found, kind="resid_mid")


def test_another_experiment_is_refused(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What must not differ within a file is named, with both values; the file is left alone."""
    path = tmp_path / "run.sqlite"
    evaluate(llama, PROMPTS[:1], path, **settings)
    before = path.read_bytes()
    for extra, name in (
        ({"max_new_tokens": 9}, "max_new_tokens"), ({"target_prompt": "x means"}, "text"),
        ({"controls": "unpatched"}, "controls"),
        ({"target_model": replace(llama, name="other")}, "fingerprint"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^path: .*{name}"):
            evaluate(llama, PROMPTS[:1], path, **{**settings, **extra})
    assert path.read_bytes() == before


def test_bad_prompts_are_refused_before_any_work(
    llama: LanguageModel, settings: dict[str, Any]
) -> None:
    """One text is a sweep's, none is nothing, and an empty one has no token."""
    bad: Any
    for bad in ("Pearl Jam", (), ("Pearl Jam", "")):
        with pytest.raises((ValueError, TypeError), match="^prompts?: "):
            evaluate(llama, bad, **settings)


def test_the_paper_s_prompts_are_the_default() -> None:
    """48 of them, as in Figure 3."""
    assert (evaluate.__defaults__ or ())[0] is PAPER_PROMPTS
    assert len(set(PAPER_PROMPTS)) == 48


def test_bases_and_seeds_of_one_name_family_are_told_apart(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Means of other texts are other bases; functions without a name cannot go into a file."""
    path = tmp_path / "run.sqlite"
    for texts in (("Pink Floyd", "Titanic"), ("Star Wars", "Will Smith")):
        found = evaluate(llama, PROMPTS[:1], path, base=MeanActivation(texts), **settings)
    assert found.table["mapping"].nunique() == 2
    assert len(found) == 12
    for extra in (
        {"mapping": lambda alpha: lambda v: alpha * v},
        {"scorer": lambda references, candidates: [0.5 for _ in candidates]},
    ):
        with pytest.raises(ValueError, match="^mapping, base or scorer: "):
            evaluate(llama, PROMPTS[:1], path, **{**settings, **extra})
    with pytest.raises(ValueError, match="^draw: "):
        evaluate(llama, PROMPTS[:1], **settings, draw=2)
    with pytest.raises(TypeError, match="^layer: "):
        evaluate(llama, PROMPTS[:1], **settings, layer=2)


def test_random_directions_differ_between_prompts_and_not_between_batches(
    llama: LanguageModel, settings: dict[str, Any]
) -> None:
    """As a mapping, too: a null over prompts needs another vector for each of them."""
    asked = {**settings, "mapping": RandomDirection(1), "alphas": 9}
    wide = evaluate(llama, PROMPTS, **asked).table
    narrow = evaluate(llama, PROMPTS, **{**asked, "layers": 2}).table
    at_2 = wide[wide["source_layer"] == 2]
    assert_same_readings(at_2, narrow, ["text"])
    assert at_2["text"].nunique() == 3


def test_methods_have_equal_budgets_or_say_so(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """α = 1 is no try of another mapping; the samples match the α of the whole file."""
    path, budget = tmp_path / "run.sqlite", {**settings, "draws": None}
    evaluate(llama, PROMPTS, path, **budget)
    found = evaluate(llama, PROMPTS, path, **{**budget, "alphas": (1, 3, 6, 12)})
    evaluate(llama, PROMPTS, path, base=ResidMid(), **budget)
    cells = {name: len(part) / 6 for name, part in methods(found).items()}
    assert cells == {"Patchscopes": 1, "Superscopes": 4, "Patchscopes, equal budget": 4}
    cells = {name: len(part) / 6 for name, part in methods(SweepResult.load(path)).items()}
    assert cells["Superscopes, Scale(), from ResidMid()"] == 2
    fewer = evaluate(llama, PROMPTS, **{**settings, "alphas": (1, 3, 6, 9, 12), "draws": 1})
    assert len(methods(fewer)["Patchscopes, 2 readings"]) == 12


def test_two_target_layers_in_a_file_are_not_counted_together(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """They would be two tries of one method: one of them has to be chosen."""
    path = tmp_path / "run.sqlite"
    evaluate(llama, PROMPTS, path, **settings)
    both = evaluate(llama, PROMPTS, path, target_layer=0, positions=(-2, -1), **settings)
    with pytest.raises(ValueError, match="^target_layer: "):
        methods(both)
    for target in ("same", 0):
        part = methods(both, target_layer=target)["Patchscopes"]  # type: ignore[arg-type]
        assert len(part) == 6
        wanted = part["source_layer"] if target == "same" else 0
        assert (part["target_layer"] == wanted).all()


def test_what_a_killed_writer_left_is_undone_on_loading(
    llama: LanguageModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A journal beside the file belongs to a batch that was never finished."""
    path, copy = tmp_path / "run.sqlite", tmp_path / "copy.sqlite"
    evaluate(llama, PROMPTS[:1], path, **settings)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA cache_size = 1")
    database.execute("BEGIN")
    database.execute("UPDATE readings SET text = 'half' || hex(zeroblob(9000))")
    journal = tmp_path / "run.sqlite-journal"
    assert journal.exists()
    copy.write_bytes(path.read_bytes())  # as a kill at this moment would leave the two files
    (tmp_path / "copy.sqlite-journal").write_bytes(journal.read_bytes())
    database.close()
    loaded = SweepResult.load(copy).table
    pd.testing.assert_frame_equal(loaded, SweepResult.load(path).table)
    assert not loaded["text"].str.startswith("half").any()
