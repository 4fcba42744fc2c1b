"""SmolLM2-135M and Gemma-3-270M, cell by cell against plain Hugging Face.

The models come from the package index (`superscopes fetch`); `make test` brings them here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from superscopes_tl import CHAT_PROMPT, DESCRIPTION_PROMPT, LanguageModel, load_model, sweep
from superscopes_tl.engine import NEAR_TIE, crop_description
from superscopes_tl.engine.named import LOOK_AHEAD
from superscopes_tl.scores import no_scores
from superscopes_tl.weights import PACKAGED, find_packaged
from tests.conftest import BACKENDS
from tests.support import plain_hf

MODELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(find_packaged(name) is None, reason=f"superscopes fetch {name}"),
    )
    for name in PACKAGED
]
NAME = "Pink Floyd"
ALPHAS = (1.0, 9.0)
KINDS = ("mlp_out", "resid_post")
LAYERS = {"smollm2": (0, 14), "gemma-3-270m": (8,)}
"""Gemma's vocabulary makes a cell of plain Hugging Face take a second."""
N_NEW = 4


@cache
def plain(name: str) -> tuple[Any, Any]:
    """Return the Hugging Face model and tokenizer of a packaged model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(find_packaged(name))
    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return hf.eval(), AutoTokenizer.from_pretrained(folder)


@cache
def loaded(name: str, backend: Any) -> LanguageModel:
    """Return a packaged model through one of the TransformerLens classes."""
    return load_model(name, backend=backend, device="cpu")


@cache
def cells(name: str) -> dict[tuple[str, int, int, float], tuple[list[int], float]]:
    """Return tokens and recovered share of every cell, one at a time in plain Hugging Face."""
    hf, tokenizer = plain(name)
    eos = hf.generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else (eos,)

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    prompt, source = DESCRIPTION_PROMPT.text, ids_of(NAME)
    target, named = ids_of(prompt), ids_of(f"{prompt[:-1]}{NAME}")
    at = (len(target) - 1,)
    written = plain_hf.generate_cached(hf, named, None, n_new=N_NEW + LOOK_AHEAD, eos=ends)
    description = crop_description(tokenizer.decode(written))
    own = next(
        written[:n] for n in range(1, len(written)) if description in tokenizer.decode(written[:n])
    )[:N_NEW]
    there = plain_hf.log_probability(hf, named, own)
    without = plain_hf.log_probability(hf, target, own)
    last = hf.config.num_hidden_layers - 1
    found = {}
    for kind in KINDS:
        for layer in LAYERS[name]:
            vector = plain_hf.source_vectors(hf, source, kind, layer)[-1]
            for into in dict.fromkeys((layer, 0, last)):
                for alpha in ALPHAS:
                    patch = (at, alpha * vector, into)
                    text = plain_hf.generate_cached(hf, target, patch, n_new=N_NEW, eos=ends)
                    nats = plain_hf.log_probability(hf, target, own, patch)
                    share = (nats - without) / (there - without)
                    found[kind, layer, into, alpha] = (text, share)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_cell_equals_plain_hugging_face(name: str, backend: str) -> None:
    """Same, first and last target layer: texts and recovered shares."""
    if (name, backend) == ("gemma-3-270m", "hooked"):
        pytest.skip("HookedTransformer has no converter for this Gemma 3")
    if name == "gemma-3-270m" and "hooked" not in BACKENDS:
        pytest.skip("one real model suffices on the second line of TransformerLens")
    model = loaded(name, backend)
    expected = cells(name)
    last = model.n_layers - 1
    settings: dict[str, Any] = {
        "layers": LAYERS[name],
        "kinds": KINDS,
        "alphas": ALPHAS,
        "max_new_tokens": N_NEW,
        "scorer": no_scores,
        "score_on": "text",
        "progress": False,
    }
    rows = [
        row
        for into in ("same", (0, last))
        for row in sweep(model, NAME, target_layer=into, **settings).table.to_dict("records")
    ]
    seen = set()
    for row in rows:
        place = (row["kind"], row["source_layer"], row["target_layer"], row["alpha"])
        seen.add(place)
        tokens, share = expected[place]
        assert row["recovered"] == pytest.approx(share, abs=1e-3), place
        if row["margin"] > NEAR_TIE:
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            assert row["text"] == text, place
    assert seen == set(expected)


@pytest.mark.skipif(find_packaged("smollm2") is None, reason="superscopes fetch smollm2")
def test_the_chat_form_equals_plain_hugging_face() -> None:
    """The template's tokens, the placeholder in it, texts and shares of a chat sweep."""
    hf, tokenizer = plain("smollm2")
    model = loaded("smollm2", "bridge")
    name = "Albert Einstein"
    table = sweep(
        model, name, layers=(8, 12), kinds="mlp_out", alphas=(1, 6), target_layer=0, chat=True,
        source_template="Tell me about {}", max_new_tokens=6, scorer=no_scores, progress=False,
    ).table  # fmt: skip

    def rendered(user: str, answer: str = "") -> str:
        messages = [{"role": "user", "content": user}]
        if answer:
            messages.append({"role": "assistant", "content": answer})
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answer,
            continue_final_message=bool(answer),
        )  # fmt: skip
        return text

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    source = rendered(f"Tell me about {name}")
    encoded = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
    end = source.index(name) + len(name)
    token = next(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end <= b)
    asked = rendered(CHAT_PROMPT.text, CHAT_PROMPT.answer)
    target, named = ids_of(asked), ids_of(rendered(CHAT_PROMPT.filled(name), CHAT_PROMPT.answer))
    (x,) = [i for i, t in enumerate(target) if tokenizer.decode([t]).strip() == "x"]
    own = plain_hf.generate_cached(hf, named, None, n_new=6, eos=(hf.config.eos_token_id,))
    assert table["own_words"].iloc[0] == crop_description(tokenizer.decode(own))
    there = plain_hf.log_probability(hf, named, own)
    without = plain_hf.log_probability(hf, target, own)
    for row in table.to_dict("records"):
        vectors = plain_hf.source_vectors(hf, encoded["input_ids"], "mlp_out", row["source_layer"])
        patch = ((x,), row["alpha"] * vectors[token], 0)
        share = (plain_hf.log_probability(hf, target, own, patch) - without) / (there - without)
        assert row["recovered"] == pytest.approx(share, abs=1e-3)
        text = plain_hf.generate_cached(hf, target, patch, n_new=6, eos=(hf.config.eos_token_id,))
        if row["margin"] > NEAR_TIE:
            assert row["text"] == crop_or_whole(tokenizer.decode(text), row["text"])


def crop_or_whole(text: str, said: str) -> str:
    """Return a text as far as a sweep writes it: it may end where its description does."""
    return text[: len(said)] if crop_description(text) == crop_description(said) else text
