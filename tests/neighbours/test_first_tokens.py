"""What lenses read of the model's own words, against one vector and one token at a time."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from superscopes_tl import LanguageModel, Site, capture
from superscopes_tl.neighbours import LENSES, TunedLens, content_token, lens_recovery, logit_lens
from superscopes_tl.neighbours.first_tokens import _table
from superscopes_tl.scores import own_words

PROMPTS = ["Red Hot Chili Peppers", "Syria", "American rock band", "Country", "Middle East"]
WORDS: dict[str, Any] = {"target_prompt": "Syria: Country, x", "max_new_tokens": 6}


class Pieces:
    """A model with a tokenizer whose tokens are given texts."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.tokenizer = texts, self

    def decode(self, ids: list[int], **options: Any) -> str:
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.texts[token]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((":", " British", " rock"), 1),
        ((":", " a", " the", " river"), 3),
        (("A", " river"), 1),
        ((" An", "aconda"), 0),
        ((" a", "-", "b"), 2),
        (("\n", '"', " 1984"), 2),
        ((":", " a", "."), None),
        ((), None),
    ],
)
def test_the_content_token_is_the_first_of_a_word_that_is_no_article(
    texts: tuple[str, ...], expected: int | None
) -> None:
    """Marks and articles are skipped, but not an article that only begins a longer word."""
    assert content_token(Pieces(*texts), range(len(texts))) == expected  # type: ignore[arg-type]


@cache
def with_tokens(model: LanguageModel) -> tuple[list[str], list[int]]:
    """Return the prompts whose own words have a content token, and that token."""
    words = {prompt: own_words(model, prompt, **WORDS) for prompt in PROMPTS}
    found = {prompt: content_token(model, own.token_ids) for prompt, own in words.items()}
    there = {prompt: token for prompt, token in found.items() if token is not None}
    assert len(set(there.values())) >= 2
    return list(there), list(there.values())


def test_it_is_one_vector_and_one_token_at_a_time(llama: LanguageModel) -> None:
    """Each number is that of a single reading of a single prompt's vector."""
    lenses = {**LENSES, "tuned lens": TunedLens.untrained(llama)}
    found = lens_recovery(llama, PROMPTS, layers=[5, 2], lenses=lenses, **WORDS)
    kept, tokens = with_tokens(llama)
    assert set(found.left_out) == set(PROMPTS) - set(kept)
    assert len(found.table) == 2 * 2 * 2 * len(kept)
    for (kind, layer), (n, prompt) in itertools.product(
        itertools.product(("mlp_out", "resid_post"), (5, 2)), enumerate(kept)
    ):
        nats, ranks = [], []
        for text in kept:
            vector = capture(llama, text, kinds=kind, layers=layer).at(Site(kind, layer, -1))
            likely = logit_lens(llama, vector)
            order = likely.argsort(descending=True).tolist()
            nats.append(float(likely[tokens[n]]))
            ranks.append(order.index(tokens[n]) + 1)
        others = [number for number in range(len(kept)) if tokens[number] != tokens[n]]
        table = found.table[found.table["prompt"] == prompt]
        rows = table[(table["kind"] == kind) & (table["source_layer"] == layer)]
        assert rows["lens"].tolist() == list(lenses)
        for row in rows.to_dict("records"):
            assert row["own"] == pytest.approx(nats[n], abs=1e-3)
            assert row["others"] == pytest.approx(np.mean([nats[o] for o in others]), abs=1e-3)
            assert abs(row["own_rank"] - ranks[n]) <= 1
            assert abs(row["others_rank"] - np.median([ranks[o] for o in others])) <= 1


def test_prompts_with_the_same_token_are_no_control_of_each_other() -> None:
    """By hand: of three prompts two have one token, so each has the third alone as its other."""
    nats = torch.tensor([[-1.0, -1.0, -5.0], [-2.0, -2.0, -6.0], [-3.0, -3.0, -7.0]])
    numbers = {False: (nats, -nats), True: (nats - 1, -nats)}
    names = [("a", " x"), ("b", " x"), ("c", " y")]
    table = _table("lens", [Site("mlp_out", 2, 0)], names, torch.tensor([4, 4, 9]), numbers)
    assert table["own"].tolist() == [-1, -2, -7]
    assert table["others"].tolist() == [-3, -3, (-5 - 6) / 2]
    assert table["random"].tolist() == [-2, -3, -8]
    assert table["others_rank"].tolist() == [3, 3, 5.5]


def test_the_summary_is_the_mean_over_prompts_with_an_interval(llama: LanguageModel) -> None:
    """Specific = own - others lies within its interval; a row per lens, kind and layer."""
    found = lens_recovery(llama, PROMPTS, kinds="mlp_out", layers=[5, 2], **WORDS)
    summary = found.summary()
    assert summary["source_layer"].tolist() == [5, 2]
    assert summary["prompts"].tolist() == [len(with_tokens(llama)[0])] * 2
    for row in summary.to_dict("records"):
        rows = found.table[found.table["source_layer"] == row["source_layer"]]
        gain = (rows["own"] - rows["others"]).mean()
        assert row["specific"] == pytest.approx(gain)
        assert row["specific_low"] <= gain <= row["specific_high"]
        assert row["own_rank"] == rows["own_rank"].median()


def test_a_lens_that_knows_the_prompt_is_specific_to_it(llama: LanguageModel) -> None:
    """A lens that answers with each prompt's own token has rank 1; a random vector's has none."""
    plain = lens_recovery(llama, PROMPTS, kinds="resid_post", layers=2, **WORDS)
    _, tokens = with_tokens(llama)
    rows = llama.tl.unembed.W_U.detach().T[torch.tensor(tokens)] * 100
    seen = []

    def knows(model: LanguageModel, vectors: torch.Tensor, sites: Any) -> torch.Tensor:
        seen.append(vectors)
        return rows if len(seen) == 1 else torch.zeros_like(vectors)

    found = lens_recovery(
        llama, PROMPTS, kinds="resid_post", layers=2, lenses={"knows": knows}, **WORDS
    )
    assert (found.table["own"] > plain.table["own"]).all()
    assert (found.summary()["specific"] > plain.summary()["specific"]).all()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: "),
        ({"prompts": ["Syria"]}, "prompts: .*two prompts"),
        ({"layers": 9}, "layers: "),
        ({"position": 99}, "position"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, llama: LanguageModel) -> None:
    """No prompts to compare, or places that they do not have."""
    with pytest.raises(ValueError, match=message):
        lens_recovery(llama, **{"prompts": PROMPTS, **WORDS, **change})
