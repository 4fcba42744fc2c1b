"""One model is read, another is asked: identity or affine map, against plain Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from superscopes_tl import LanguageModel, TargetPrompt, capture, load_model, plan_sweep, sweep
from superscopes_tl.engine import NEAR_TIE, crop_description
from superscopes_tl.mini import MODEL_DIR
from superscopes_tl.mini.facts import load_facts
from superscopes_tl.mini.twin import random_rotation, rotated_llama
from superscopes_tl.neighbours import PATCHED, next_tokens
from superscopes_tl.vectors import AffineMap, Mapped, fit_affine
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

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
    """Return a Llama of another width, depth and tokenizer: 4 layers of 24 dimensions."""
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=24, intermediate_size=40,
        num_hidden_layers=4, num_attention_heads=3, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" in name else 3.0)
    return hf


@cache
def narrow(backend: str) -> LanguageModel:
    """Return that model, for the package."""
    return load_model(narrow_hf(), byte_tokenizer(), backend=backend)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [0, *tokenizer.encode(text, add_special_tokens=False)]


def _check_texts(
    table: Any, hf: Any, tokenizer: Any, vector_of: Callable[[dict[str, Any]], torch.Tensor]
) -> None:
    """Check that each row's text is what the asked model writes, one forward pass at a time."""
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
    """Llama is read and GPT-2 asked: GPT-2's texts for Llama's vectors."""
    model, asked = tiny("llama", backend), tiny("gpt2", backend)
    table = sweep(
        model, SOURCE, layers=[5, 2], alphas=[1, 9], target_layer=[4, 1], target_model=asked,
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
    assert set(table["mapping"]) == {f"Scale(), into {asked.name}"}


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
    """32 dimensions and BPE are read, 24 and single bytes asked: texts of numpy's own map."""
    model, asked = tiny("llama", backend), narrow(backend)
    pairs = [(5, 3), (5, 1), (2, 3), (2, 1)]
    maps = fit_affine(model, TEXTS, pairs, target_model=asked)
    table = sweep(
        model, SOURCE, layers=[5, 2], kinds="resid_post", alphas=[1, 9], target_layer=[3, 1],
        target_model=asked, vectors=Mapped(maps), target_prompt=TARGET, max_new_tokens=N_NEW,
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
    assert table["mapping"][0].endswith(f"into {asked.name}")


def test_other_widths_need_a_map(tiny: Tiny, word_overlap: Any) -> None:
    """The message says how to make one, and a map of another pair of models is refused."""
    model, asked = tiny("llama", "bridge"), narrow("bridge")
    with pytest.raises(ValueError, match="^target_model:"):
        sweep(
            model, SOURCE, target_layer=0, target_model=asked, scorer=word_overlap, progress=False
        )
    maps = fit_affine(tiny("gpt2", "bridge"), TEXTS, [(5, 2)], target_model=asked)
    with pytest.raises(ValueError, match="^model:"):
        sweep(
            model, SOURCE, layers=5, kinds="resid_post", target_layer=2, target_model=asked,
            vectors=Mapped(maps), scorer=word_overlap, progress=False,
        )  # fmt: skip


@cache
def rotated_mini() -> tuple[LanguageModel, torch.Tensor]:
    """Return the bundled model with a rotated residual stream, and the rotation."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    rotation = random_rotation(hf.config.hidden_size)
    twin = rotated_llama(hf, rotation)
    twin.config.name_or_path = "rotated"
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return load_model(twin, tokenizer, backend="bridge"), rotation.float()


@cache
def rotation_maps(mini: LanguageModel) -> tuple[AffineMap, ...]:
    """Return maps from the bundled model to its rotated twin, fitted on every 70th fact."""
    texts = [f"{fact.name}: {fact.description}" for fact in load_facts()][::70]
    return fit_affine(mini, texts, [(5, 5), (7, 7)], target_model=rotated_mini()[0])


def test_a_rotated_model_computes_the_same(mini: LanguageModel) -> None:
    """Same probabilities, other vectors: R·h at every layer."""
    twin, rotation = rotated_mini()
    plain, turned = (capture(m, SOURCE, kinds="resid_post") for m in (mini, twin))
    for layer in (8, 5, 2):
        torch.testing.assert_close(
            turned["resid_post", layer], plain["resid_post", layer] @ rotation.T,
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip
    logits = [
        model.decoder.unembed(seen["resid_post", 9])
        for model, seen in ((mini, plain), (twin, turned))
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_an_affine_map_recovers_what_a_rotation_hides(
    mini: LanguageModel, word_overlap: Any
) -> None:
    """Fitted on texts, A is the rotation: readings come back that identity patching lost."""
    twin, rotation = rotated_mini()
    maps = rotation_maps(mini)
    for one in maps:
        assert one.n_vectors > 2 * mini.d_model
        torch.testing.assert_close(one.weight, rotation, rtol=1e-3, atol=1e-4)
        assert one.r2 == pytest.approx(1, abs=1e-5)
    settings: dict[str, Any] = {
        "layers": [7, 5], "kinds": "resid_post", "alphas": 1, "target_layer": "same",
        "scorer": word_overlap, "progress": False,
    }  # fmt: skip
    own = sweep(mini, SOURCE, **settings).table
    assert "rock band" in crop_description(own["text"][0])
    through = sweep(mini, SOURCE, target_model=twin, vectors=Mapped(maps), **settings).table
    assert_same_readings(through, own, ["text"])
    identity = sweep(mini, SOURCE, target_model=twin, **settings).table
    assert "rock band" not in " ".join(identity["text"])


def test_next_tokens_across_models(mini: LanguageModel) -> None:
    """Through the rotation's own map a twin predicts what the model predicts by itself."""
    twin, _ = rotated_mini()
    maps = rotation_maps(mini)

    def surprisal(**extra: Any) -> np.ndarray:
        table = next_tokens(mini, [SOURCE, "Titanic"], layers=[5], controls=(), **extra).table
        found: np.ndarray = table.loc[table["method"] == PATCHED, "surprisal"].to_numpy()
        return found

    own = surprisal()
    through = surprisal(target_model=twin, vectors=Mapped(maps))
    np.testing.assert_allclose(through, own, atol=1e-2)
    assert surprisal(target_model=twin).mean() > own.mean() + 1


def test_a_plan_names_both_models(tiny: Tiny, word_overlap: Any) -> None:
    """The result says which model was read and which was asked."""
    model, asked = tiny("llama", "bridge"), tiny("gpt2", "bridge")
    plan = plan_sweep(model, SOURCE, target_model=asked, scorer=word_overlap)
    provenance = plan.provenance()
    assert provenance["model"]["fingerprint"] == model.fingerprint
    assert provenance["target_model"]["fingerprint"] == asked.fingerprint
