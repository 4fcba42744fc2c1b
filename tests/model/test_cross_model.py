"""Source and target model differ: identity or affine map, against plain Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from superscopes_tl import LanguageModel, TargetPrompt, capture, load_model, plan_sweep, sweep
from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.neighbours import PATCHED, next_tokens
from superscopes_tl.vectors import Mapped, fit_affine
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.rotated import random_rotation, rotated_llama
from tests.support.same import assert_same_readings
from tests.support.tiny_models import random_hf, tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]

SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country in the Middle East, x")
TEXTS = (
    "Syria: Country in the Middle East",
    "American rock band from the Middle East",
    "x is a Country, Peppers are hot",
    "the band of Syria is American",
    "Chili in the Country: Red Peppers",
    "Syria and the rock band",
)
N_NEW = 4


@cache
def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes: no token of more than one character, other ids."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


@cache
def narrow_hf() -> Any:
    """Return a Llama of another width and depth: 4 layers of 24 dimensions."""
    return random_hf("llama", 4, n_layers=4, width=24, heads=3)


@cache
def narrow(backend: str) -> LanguageModel:
    """Return that model, for the package."""
    return load_model(narrow_hf(), byte_tokenizer(), backend=backend)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [0, *tokenizer.encode(text, add_special_tokens=False)]


def _check_texts(
    table: Any, hf: Any, tokenizer: Any, vector_of: Callable[[dict[str, Any]], torch.Tensor]
) -> None:
    """Check each row's text against the target model, one forward pass at a time."""
    ids = _ids(tokenizer, TARGET.text)
    at = (len(ids) - 1,)
    for row in table.to_dict("records"):
        vector = row["alpha"] * vector_of(row)
        new, _ = plain_hf.generate(hf, ids, at, vector, row["target_layer"], n_new=N_NEW, eos=1)
        if row["margin"] > NEAR_TIE:
            assert row["text"] == tokenizer.decode(new, skip_special_tokens=True), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_widths_patch_the_vector_as_it_is(
    backend: str, tiny: Tiny, word_overlap: Any
) -> None:
    """GPT-2 as target model generates its own texts for vectors of Llama."""
    model, target = tiny("llama", backend), tiny("gpt2", backend)
    table = sweep(
        model, SOURCE, layers=[5, 2], alphas=[1, 9], target_layer=[4, 1], target_model=target,
        target_prompt=TARGET, max_new_tokens=N_NEW, scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    source, hf = _ids(tiny_tokenizer(), SOURCE), tiny_hf("llama")
    _check_texts(
        table,
        tiny_hf("gpt2"),
        tiny_tokenizer(),
        lambda row: plain_hf.source_vectors(hf, source, row["kind"], row["source_layer"])[-1],
    )
    assert table["text"].nunique() > 1
    assert set(table["mapping"]) == {f"Scale(), into {target.name}"}


def _fit_by_hand(layer: int, target_layer: int) -> tuple[np.ndarray, int]:
    """Return A and b as one matrix, from vectors that meet where their tokens end."""
    wide, thin = tiny_tokenizer(), byte_tokenizer()
    x, y, begun = [], [], set()
    for text in (*TEXTS[:4], TEXTS[5]):
        one = wide(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in one["offset_mapping"]]
        ids = [0, *one["input_ids"]]
        source = plain_hf.source_vectors(tiny_hf("llama"), ids, "resid_post", layer)
        target = plain_hf.source_vectors(narrow_hf(), _ids(thin, text), "resid_post", target_layer)
        for p, end in enumerate(ends, start=1):
            if text[:end] not in begun:  # a byte per character: the token that ends at `end`
                begun.add(text[:end])
                x.append([*source[p].tolist(), 1.0])
                y.append(target[end].tolist())
    return np.linalg.lstsq(np.array(x), np.array(y))[0], len(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_widths_and_tokenizers_patch_through_an_affine_map(
    backend: str, tiny: Tiny, word_overlap: Any
) -> None:
    """From 32 dimensions and BPE to 24 and single bytes, through a map that numpy fits too."""
    model, target = tiny("llama", backend), narrow(backend)
    pairs = [(5, 3), (5, 1), (2, 3), (2, 1)]
    maps = fit_affine(model, TEXTS, pairs, target_model=target)
    table = sweep(
        model, SOURCE, layers=[5, 2], kinds="resid_post", alphas=[1, 9], target_layer=[3, 1],
        target_model=target, vectors=Mapped(maps), target_prompt=TARGET, max_new_tokens=N_NEW,
        scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    source = _ids(tiny_tokenizer(), SOURCE)

    def by_hand(row: dict[str, Any]) -> torch.Tensor:
        v = plain_hf.source_vectors(tiny_hf("llama"), source, row["kind"], row["source_layer"])[-1]
        solution, _ = _fit_by_hand(row["source_layer"], row["target_layer"])
        return torch.tensor([*v.tolist(), 1.0], dtype=torch.float64) @ torch.tensor(solution)

    for one in maps:
        solution, n = _fit_by_hand(one.source_layer, one.target_layer)
        assert one.n_vectors == n
        np.testing.assert_allclose(one.weight, solution[:-1].T, rtol=2e-2, atol=2e-3)
    _check_texts(table, narrow_hf(), byte_tokenizer(), by_hand)
    assert table["text"].nunique() > 1
    assert table["mapping"][0].endswith(f"into {target.name}")


def test_other_widths_need_a_map(tiny: Tiny, word_overlap: Any) -> None:
    """Without a map, or with one of another source model, the sweep is refused."""
    model, target = tiny("llama", "bridge"), narrow("bridge")
    with pytest.raises(ValueError, match="^target_model:"):
        sweep(
            model, SOURCE, target_layer=0, target_model=target, scorer=word_overlap, progress=False
        )
    maps = fit_affine(tiny("gpt2", "bridge"), TEXTS, [(5, 2)], target_model=target)
    with pytest.raises(ValueError, match="^model:"):
        sweep(
            model, SOURCE, layers=5, kinds="resid_post", target_layer=2, target_model=target,
            vectors=Mapped(maps), scorer=word_overlap, progress=False,
        )  # fmt: skip


@cache
def rotated() -> tuple[LanguageModel, torch.Tensor]:
    """Return the tiny Llama with a rotated residual stream, and the rotation."""
    hf = tiny_hf("llama")
    rotation = random_rotation(hf.config.hidden_size)
    twin = load_model(rotated_llama(hf, rotation), tiny_tokenizer(), backend="bridge")
    return twin, rotation.float()


def test_a_rotated_model_computes_the_same_logits(tiny: Tiny) -> None:
    """Its vectors are R·h at every layer; its logits are those of the original."""
    model, (twin, rotation) = tiny("llama", "bridge"), rotated()
    plain, turned = (capture(m, SOURCE, kinds="resid_post") for m in (model, twin))
    for layer in (5, 2):
        expected = plain["resid_post", layer] @ rotation.T
        torch.testing.assert_close(turned["resid_post", layer], expected, rtol=1e-3, atol=1e-3)
    logits = [
        m.decoder.unembed(seen["resid_post", 5]) for m, seen in ((model, plain), (twin, turned))
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_an_affine_map_recovers_what_a_rotation_hides(tiny: Tiny, word_overlap: Any) -> None:
    """The fitted A is the rotation; through it, readings and next tokens are the model's own."""
    model, (twin, rotation) = tiny("llama", "bridge"), rotated()
    texts = [" ".join(words) for words in permutations(TEXTS[0].split(), 3)][::4]
    maps = fit_affine(model, texts, [(3, 3), (2, 2)], target_model=twin)
    for one in maps:
        assert one.n_vectors > 2 * model.d_model
        torch.testing.assert_close(one.weight, rotation, rtol=1e-2, atol=1e-2)
        assert one.r2 == pytest.approx(1, abs=1e-4)
    through: dict[str, Any] = {"target_model": twin, "vectors": Mapped(maps)}
    settings: dict[str, Any] = {
        "layers": [3, 2], "kinds": "resid_post", "alphas": 1, "target_layer": "same",
        "target_prompt": TARGET, "max_new_tokens": N_NEW, "scorer": word_overlap,
        "progress": False,
    }  # fmt: skip
    own = sweep(model, SOURCE, **settings).table
    assert_same_readings(sweep(model, SOURCE, **through, **settings).table, own, ["text"])
    identity = sweep(model, SOURCE, target_model=twin, **settings).table
    assert not identity["text"].equals(own["text"])

    def surprisal(**extra: Any) -> Any:
        table = next_tokens(model, [SOURCE, "Syria"], layers=[2], controls=(), **extra).table
        return table.loc[table["method"] == PATCHED, "surprisal"].to_numpy()

    np.testing.assert_allclose(surprisal(**through), surprisal(), rtol=1e-2, atol=1e-2)
    assert abs(surprisal(target_model=twin) - surprisal()).max() > 0.1


def test_a_plan_names_both_models(tiny: Tiny, word_overlap: Any) -> None:
    """The provenance has the fingerprints of source and target model."""
    model, target = tiny("llama", "bridge"), tiny("gpt2", "bridge")
    plan = plan_sweep(model, SOURCE, target_model=target, scorer=word_overlap)
    provenance = plan.provenance()
    assert provenance["model"]["fingerprint"] == model.fingerprint
    assert provenance["target_model"]["fingerprint"] == target.fingerprint
