"""The choice of tokens: guidance, sampling, and the numbers recorded for every choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt, load_model, sweep
from superscopes_tl.engine import crop_description, decoding, description_is_over, generate_named
from superscopes_tl.engine.decoding import (
    BLOCK,
    Batch,
    decode,
    guide,
    token_log_probabilities,
    unembedded_log_probabilities,
)
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings, same_text
from tests.support.spies import spied
from tests.support.tiny_models import sharp_llama, tiny_hf, tiny_tokenizer

TARGET = TargetPrompt("Syria: Country in the Middle East, x")
N_NEW = 6

Tiny = Callable[[str, str], LanguageModel]


def _ids(model: LanguageModel, text: str) -> list[int]:
    return [0, *model.tokenizer.encode(text, add_special_tokens=False)]


def _plain_logits(hf: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return hf(torch.tensor([ids]), use_cache=False).logits[0, -1]


def _guided_by_hand(
    model: LanguageModel, hf: Any, vector: torch.Tensor, layer: int, w: float
) -> list[int]:
    ids, new = _ids(model, TARGET.text), []
    for _ in range(N_NEW):
        c = plain_hf.patched_logits(hf, ids + new, (len(ids) - 1,), vector, layer)[-1]
        u = _plain_logits(hf, ids + new)
        token = int((u + w * (c - u)).argmax())
        if token == 1:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_guided_texts_equal_a_loop_over_plain_hugging_face(architecture: str, tiny: Tiny) -> None:
    """U + w(c - u) at every step, with u of the same text after the unpatched prompt."""
    model, hf = tiny(architecture, "bridge"), tiny_hf(architecture)
    generator = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW)
    vectors = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(4))
    patches = [
        Patch(10 * vector, layer, guidance=w)
        for vector in vectors
        for layer in (5, 2)
        for w in (0.0, 0.5, 1.0, 3.0, 9.0)
    ]
    written = generator.generate(patches)
    for patch, generation in zip(patches, written, strict=True):
        by_hand = _guided_by_hand(model, hf, patch.vector, patch.target_layer, patch.guidance)
        assert list(generation.token_ids) == by_hand
    assert len({generation.text for generation in written}) > 5


def test_guidance_of_0_is_the_unpatched_prompt_and_of_1_the_patched_one(tiny: Tiny) -> None:
    """The two ends of the line between the logits are the two texts themselves."""
    model = tiny("llama", "bridge")
    generator = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW)
    vector = 30 * torch.ones(model.d_model)
    none, plain = generator.generate([Patch(vector, 2, guidance=0.0), Patch(vector, 2)])
    assert none.text == generator.unpatched().text != plain.text


@given(w=st.floats(-3, 9), seed=st.integers(0, 99))
def test_guide_mixes_the_rows_that_have_a_twin_alone(w: float, seed: int) -> None:
    """Row 1 of two is guided: its twin follows the batch; row 0 is unchanged."""
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    if w == 1:  # no guidance, no twin
        logits = logits[:2]
    mixed = guide(logits, torch.tensor([1.0, w]))
    torch.testing.assert_close(mixed[0], logits[0])
    guided = logits[1] if w == 1 else logits[2] + w * (logits[1] - logits[2])
    torch.testing.assert_close(mixed[1], guided)


@given(
    n_vocab=st.sampled_from([2, 300, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK - 1, 1000]),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    masked=st.booleans(),
    offset=st.sampled_from([0.0, -1000.0, 3000.0]),
)
def test_the_two_best_are_those_of_a_sorted_row(
    n_vocab: int, seed: int, *, ties: bool, masked: bool, offset: float
) -> None:
    """With equal logits the first counts; with masked ones entropy and probability are finite."""
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, n_vocab, generator=made) * 8
    if ties:
        logits = (logits / 8).round()
    if masked:
        logits[torch.rand(4, n_vocab, generator=made) < 0.5] = -torch.inf
        logits[:, -1] = 1.0
    logits += offset
    found = decoding._choose(logits, logits)
    best = logits.sort(dim=-1, descending=True).values
    assert torch.equal(found.tokens, logits.argmax(dim=-1))
    assert torch.equal(found.margins, best[:, 0] - best[:, 1])
    logs = logits.double().log_softmax(dim=-1)
    entropies = -(logs.exp() * logs.clamp_min(-1e9)).sum(dim=-1)
    assert torch.allclose(found.entropies.double(), entropies, atol=1e-4)
    assert torch.allclose(found.log_probabilities.double(), logs.amax(dim=-1), atol=1e-4)


def test_logits_that_overflow_have_no_margin() -> None:
    """Neither NaN nor infinity is a choice."""
    logits = torch.randn(3, 4 * BLOCK)
    logits[0, 700], logits[1, 3] = torch.nan, torch.inf
    assert torch.isnan(decoding._choose(logits, logits).margins).tolist() == [True, True, False]


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_part_of_the_vocabulary_at_a_time_gives_the_same(
    architecture: str, backend: str, size: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft caps and biases included; NaN stays NaN."""
    decoder = tiny(architecture, backend).decoder
    residual = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, 1, 5, 299, 7, 7, 100, 2, 3])
    monkeypatch.setattr(decoding, "UNEMBEDDED_ROWS", 4)
    monkeypatch.setattr(decoding, "UNEMBEDDED_ON_CPU", size * 4)
    with torch.no_grad():
        wanted = token_log_probabilities(decoder.unembed(residual), ids)
        found = unembedded_log_probabilities(decoder, residual, ids)
        residual[3] = torch.nan
        broken = unembedded_log_probabilities(decoder, residual, ids)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.isnan(broken).nonzero()[:, 0].tolist() == [3]


def test_entropies_and_log_probabilities_equal_plain_hugging_face(tiny: Tiny) -> None:
    """They are those of the patched model's own distribution at every step, in nats."""
    model, hf = tiny("llama", "bridge"), tiny_hf("llama")
    generator = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW)
    vector = 20 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    patches = [Patch(vector, 2), Patch(-vector, 5)]
    generation = generator.generate(patches, confidence=True)[0]
    ids = _ids(model, TARGET.text)
    new, steps = plain_hf.generate(hf, ids, (len(ids) - 1,), vector, 2, n_new=N_NEW, eos=1)
    for step, token in enumerate(new):
        distribution = torch.distributions.Categorical(logits=steps[step])
        entropy, likely = distribution.entropy(), distribution.log_prob(torch.tensor(token))
        assert generation.entropies[step] == pytest.approx(float(entropy), abs=1e-4)
        assert generation.log_probabilities[step] == pytest.approx(float(likely), abs=1e-4)
    unasked = generator.generate(patches)[0]
    assert unasked == replace(generation, entropies=(), log_probabilities=())


def test_a_sampled_text_depends_on_its_seed_alone(tiny: Tiny) -> None:
    """The same in every batch; another seed samples another text; greedy rows are unchanged."""
    model = tiny("llama", "bridge")
    vector = 5 * torch.ones(model.d_model)
    patches = [Patch(vector, 2, seed=seed) for seed in range(6)] + [Patch(vector, 2)]
    together = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW).generate(patches)
    single = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW, batch_size=1).generate(patches)
    assert all(map(same_text, together, single))
    assert len({g.token_ids for g in together}) > 2
    alone = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW).generate([Patch(vector, 2)])
    assert same_text(together[-1], alone[0])


def test_samples_follow_the_model_s_distribution() -> None:
    """4,000 first tokens of p = (0.5, 0.3, 0.2) come about as often as they should."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)

    def nothing_more(*_: Any) -> torch.Tensor:
        raise AssertionError("one token per text")

    batch = Batch(nothing_more, nothing_more, None, torch.ones(4000))
    texts = decode(batch, logits, max_new_tokens=1, eos=(), seeds=list(range(4000)), text_of=str)
    counts = Counter(text.token_ids[0] for text in texts)
    for token, p in enumerate((0.5, 0.3, 0.2)):
        assert abs(counts[token] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_samples_of_a_sweep_are_reproducible_and_named(tiny: Tiny, word_overlap: Any) -> None:
    """`draw=2` gives the same texts in another run, others than `draw=1`, and says so."""
    settings: dict[str, Any] = {
        "layers": (5, 2), "kinds": "mlp_out", "alphas": 1, "target_prompt": TARGET,
        "max_new_tokens": N_NEW, "scorer": word_overlap, "progress": False,
    }  # fmt: skip
    model = tiny("llama", "bridge")
    first, again, other = (sweep(model, "Red Hot", draw=k, **settings) for k in (2, 2, 1))
    assert list(first.table["text"]) == list(again.table["text"]) != list(other.table["text"])
    assert set(first.table["draw"]) == {2}
    assert first.provenance["config"]["decoding"] == "sampled at temperature 1, 2"


def test_a_generation_knows_how_many_tokens_its_description_takes(llama: LanguageModel) -> None:
    """The tokens counted hold the description, and one token fewer does not."""
    generator = PatchedGenerator(llama)
    found = [generator.unpatched(), *generate_named(generator, ["Pearl Jam", "Titanic"])]
    for generation in found:
        ids, length = generation.token_ids, generation.n_description_tokens
        assert generation.description == crop_description(generation.text) != ""
        assert generation.description in generator.text_of(ids[:length])
        assert generation.description not in generator.text_of(ids[: length - 1])


def test_texts_that_end_with_their_description_change_no_result() -> None:
    """Readings, scores and flags are those of whole texts; the shorter ones are their start."""
    hf = sharp_llama()
    with torch.no_grad():  # a model that often ends its line
        hf.lm_head.weight[tiny_tokenizer().convert_tokens_to_ids("Ċ")] *= 4
    model = load_model(hf, tiny_tokenizer(), backend="bridge")
    settings: dict[str, Any] = {
        "layers": (5, 2), "kinds": ("mlp_out", "resid_post"), "progress": False,
        "scorer": lambda references, candidates: [len(text) for text in candidates],
    }  # fmt: skip
    short = sweep(model, "Red Hot", **settings).table
    whole = sweep(model, "Red Hot", score_on="text", **settings).table
    same = ["position", "kind", "source_layer", "alpha", "description", "few_shot_copy"]
    assert_same_readings(short, whole, same)
    lengths = whole["description"].str.len().replace(0, float("nan"))
    assert short["score"].to_numpy() == pytest.approx(lengths.to_numpy(), nan_ok=True)
    entropies = pytest.approx(short["entropy"].to_numpy(), abs=1e-3, nan_ok=True)
    assert whole["entropy"].to_numpy() == entropies
    pairs = list(zip(short["text"], whole["text"], strict=True))
    assert all(full.startswith(text) for text, full in pairs)
    ended = [text for text, full in pairs if text != full]
    assert len(ended) >= len(pairs) / 2
    for text in ended:
        assert description_is_over(text)
        assert not description_is_over(text[:-1]), "and not a token later"


@given(text=st.text(alphabet=":,\n ab", max_size=30), more=st.text(alphabet=":,\n ab", max_size=30))
def test_a_description_that_is_over_stays_as_it_is(text: str, more: str) -> None:
    """However the text continues, its description is the same, and it stays over."""
    if description_is_over(text):
        assert crop_description(text + more) == crop_description(text)
        assert description_is_over(text + more)


def test_a_kept_row_keeps_its_twin() -> None:
    """Rows 1, 3 and 4 of five are guided: their twins are rows 5, 6 and 7 of the cache."""
    kept: list[list[int]] = []
    batch = Batch(
        lambda tokens, cache: torch.zeros(len(tokens), 3),
        lambda cache, rows: kept.append(rows.tolist()),
        None,
        torch.tensor([1.0, 2.0, 1.0, 3.0, 0.5]),
    )
    batch.keep(torch.tensor([0, 3, 4]))
    batch.keep(torch.tensor([0, 2]))
    assert kept == [[0, 3, 4, 6, 7], [0, 2, 4]]
    assert batch.advance(torch.tensor([5, 6])).shape == (2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_longer_than_max_new_tokens_can_be_scored(backend: str, tiny: Tiny) -> None:
    """Log-probabilities of twelve tokens do not depend on `max_new_tokens`."""
    model = tiny("llama", backend)
    patch, ids = Patch(10 * torch.ones(model.d_model), 2), [list(range(5, 17))]
    short, long = (
        PatchedGenerator(model, TARGET, max_new_tokens=n).log_probabilities([patch], ids)
        for n in (3, 20)
    )
    assert short[0] == pytest.approx(long[0], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_of_one_token_has_an_estimate(backend: str, tiny: Tiny) -> None:
    """Timing a batch needs more room than one new token takes."""
    assert PatchedGenerator(tiny("llama", backend), TARGET, max_new_tokens=1).seconds_per_batch(3)


@pytest.mark.parametrize("patches", ["two layers", "sampled", "kept", "guided"])
def test_rows_that_may_differ_later_are_all_generated(patches: str, tiny: Tiny) -> None:
    """Rows at an earlier layer too, sampled or guided rows are each generated.

    Rows that keep a share of the residual stream at the last layer alone need not be.
    """
    model, spy = spied(tiny("llama", "bridge"))
    target = TargetPrompt("x, x: Adele, x")
    generator = PatchedGenerator(model, target, max_new_tokens=N_NEW, live_share=1)
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    rows = {
        "two layers": [Patch(a * v, (2, 5)) for a in (1.0, 1.01, 1.02)],
        "sampled": [Patch(v, 5, seed=seed) for seed in (1, 2, 3)],
        "kept": [Patch(a * v, 5, keep=1.0) for a in (1.0, 1.01, 1.02)],
        "guided": [Patch(v, 5, guidance=w) for w in (2.0, 2.1, 2.2)],
    }[patches]
    together, sizes = generator.generate(rows), spy.steps
    firsts = {generation.token_ids[0] for generation in together}
    assert sizes[1] == {"guided": 6, "kept": len(firsts)}.get(patches, 3)
    assert len(firsts) < 3 or patches == "sampled"
    assert all(map(same_text, together, [generator.generate([p])[0] for p in rows]))


def test_rows_that_have_ended_leave_the_batch(tiny: Tiny) -> None:
    """The batch shrinks as texts end, and every text equals that of its row alone."""
    model, spy = spied(tiny("llama", "bridge"))
    generator = PatchedGenerator(model, TARGET, max_new_tokens=12, until=lambda t: len(t) > 9)
    vectors = torch.randn(12, model.d_model, generator=torch.Generator().manual_seed(2))
    patches = [Patch(20 * vector, 2) for vector in vectors]
    patches += [Patch(vector, 3, guidance=2.0, seed=5) for vector in vectors[:3]]
    together, sizes = generator.generate(patches), list(spy.steps)
    assert sizes[0] == 15 + 3, "every row, and the unpatched twins of the guided ones"
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    for patch, generation in zip(patches, together, strict=True):
        alone = generator.generate([patch])[0]
        if min(alone.margin, generation.margin) > 1e-3:
            assert generation.token_ids == alone.token_ids


@pytest.mark.parametrize("until", [None, lambda text: len(text) > 4])
def test_at_the_last_layer_one_row_is_generated_per_first_token(
    until: Callable[[str], bool] | None, tiny: Tiny
) -> None:
    """After the first token one row per first token continues; texts are unchanged."""
    model, spy = spied(tiny("gpt2", "bridge"))
    generator = PatchedGenerator(model, TARGET, max_new_tokens=N_NEW, until=until)
    vectors = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0))
    patches = [Patch(alpha * v, 5) for v in vectors for alpha in (0.5, 1, 3, 15)]
    together, sizes = generator.generate(patches), list(spy.steps)
    firsts = {generation.token_ids[:1] for generation in together}
    assert sizes[0] == 12
    assert sizes[1] <= len(firsts) <= 3
    assert all(map(same_text, together, [generator.generate([p])[0] for p in patches]))
