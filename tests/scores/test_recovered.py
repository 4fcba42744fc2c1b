"""The share of the model's own words that a cell recovers, against plain Hugging Face."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import (
    DESCRIPTION_PROMPT,
    LanguageModel,
    Patch,
    PatchedGenerator,
    TargetPrompt,
    load_model,
    plan_sweep,
    sweep,
)
from superscopes_tl.engine import generate_named, is_echo, name_fits
from superscopes_tl.experiment import Cell, finished_cells, make_patches
from superscopes_tl.scores import OwnWords, own_words, words_of
from tests.conftest import BACKENDS, tiny_model
from tests.model.test_chat import TEMPLATES, with_template
from tests.support import plain_hf
from tests.support.tiny_models import ARCHITECTURES, sharp_llama, tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]
SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country in the Middle East, x")
SEVERAL = TargetPrompt("The x and the x of Peppers", "x")
PROMPT = "Alexander the Great"
FAST: dict[str, Any] = {
    "layers": (5, 2),
    "kinds": ("mlp_out", "resid_post"),
    "alphas": (1, 9),
    "target_layer": 0,
    "progress": False,
}


def _plain(
    hf: Any, generator: PatchedGenerator, text: list[int], patch: Patch | None = None
) -> float:
    """Return log p(text) after the target prompt by plain Hugging Face, patched at one layer."""
    ids, place = list(generator.target.tokens.ids), None
    if patch is not None:
        assert isinstance(patch.target_layer, int)
        layer = patch.target_layer % generator.model.n_layers
        place = (generator.target.positions, patch.vector, layer)
    return plain_hf.log_probability(hf, ids, text, place)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_texts_are_as_likely_as_in_one_whole_pass(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Texts of several lengths after patches at several layers and placeholders."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    torch.manual_seed(1)
    for target in (TARGET, SEVERAL):
        generator = PatchedGenerator(model, target)
        patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in (5, 2, 0)]
        texts = [[7, 40, 5, 6, 90], [9], [31, 30]]
        found = generator.log_probabilities([*patches, Patch(torch.zeros(32), None)], [*texts, [8]])
        for patch, text, likely in zip(patches, texts, found, strict=False):
            assert sum(likely) == pytest.approx(_plain(hf, generator, text, patch), abs=1e-3)
            assert len(likely) == len(text)
        assert sum(found[3]) == pytest.approx(_plain(hf, generator, [8]), abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_several_texts_after_a_patch_share_its_prompt(
    architecture: str, backend: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text after every patch, of any length and batch size, as one whole pass each."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    torch.manual_seed(2)
    patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in (1, 0, (0, 3))]
    patches.append(Patch(torch.zeros(model.d_model), None))
    texts = [[7, 40, 5, 6, 90], [9], [31, 30], [8, 8, 8]]
    pairs = [(patch, text) for patch in patches for text in texts]
    monkeypatch.setattr(PatchedGenerator, "_score_batch", None)  # a way of its own
    for size in (64, 3):
        generator = PatchedGenerator(model, SEVERAL, batch_size=size)
        found = generator.log_probabilities(*map(list, zip(*pairs, strict=True)))
        for (patch, text), likely in zip(pairs, found, strict=True):
            assert len(likely) == len(text)
            if patch.layers != (0, 3):  # plain Hugging Face is patched at one layer here
                one = patch if patch.layers else None
                assert sum(likely) == pytest.approx(_plain(hf, generator, text, one), abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_growing_batch_scores_a_text_like_one_pass_per_patch(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Patches at several layers, at one layer several times, at two layers at once, and at none."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    torch.manual_seed(2)
    assert model.decoder.grows
    text = [7, 40, 5, 6]
    layers: list[Any] = [5, 2, (2, 4), 5, "embed", 0, -1, ("embed", 3), None]
    for target in (TARGET, SEVERAL):
        generator = PatchedGenerator(model, target)
        patches = [Patch(torch.randn(model.d_model) * 4, layer) for layer in layers]
        found = generator.log_probabilities(patches, [text] * len(patches))
        alone = [generator.log_probabilities([patch], [text])[0] for patch in patches]
        for number, patch in enumerate(patches):
            assert found[number] == pytest.approx(alone[number], abs=1e-3)
            if isinstance(patch.target_layer, int):
                expected = _plain(hf, generator, text, patch)
                assert sum(found[number]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_of_one_length_grow_in_one_batch(
    architecture: str, backend: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text's rows grow from its own; a text of another length and a lone one are apart."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    torch.manual_seed(3)
    three = [[7, 40, 5], [9, 8, 7], [30, 31, 40]]
    texts = [*three, *three, three[1], [6], [6], [8, 9]]
    patches = [Patch(torch.randn(32) * 4, layer) for layer in (5, 2, 0, 2, None, 5, 3, 1, 4, 2)]
    generator, sizes = PatchedGenerator(model, TARGET), []
    grow = generator._score_growing
    monkeypatch.setattr(
        generator, "_score_growing", lambda pairs: [sizes.append(len(pairs)), grow(pairs)][1]
    )
    found = generator.log_probabilities(patches, texts)
    assert sizes == [7, 2]
    for patch, text, likely in zip(patches, texts, found, strict=True):
        expected = _plain(hf, generator, text, patch if patch.layers else None)
        assert sum(likely) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("units", [True, False])
def test_high_precision_differs_little_and_leaves_texts_alone(
    smollm2: LanguageModel, monkeypatch: pytest.MonkeyPatch, *, units: bool
) -> None:
    """Shares differ as stated where the device has units for bfloat16, and texts nowhere."""
    monkeypatch.setattr("superscopes_tl.engine.forced.multiplies_bfloat16", lambda device: units)
    settings: dict[str, Any] = {**FAST, "layers": (12, 3), "kinds": "resid_post"}
    fresh = replace(smollm2)  # knows no words of the other units
    exact, fast = (sweep(fresh, SOURCE, precision=p, **settings).table for p in ("highest", "high"))
    off = (exact["recovered"] - fast["recovered"]).abs()
    assert 0 < off.max() < 0.05 if units else off.max() == 0
    assert exact["text"].equals(fast["text"])


@given(
    layer=st.integers(0, 5),
    texts=st.lists(st.lists(st.integers(2, 300), min_size=1, max_size=6), min_size=1, max_size=5),
    batch_size=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=25)
def test_log_probabilities_do_not_depend_on_the_batch(
    layer: int, texts: list[list[int]], batch_size: int, order: Any
) -> None:
    """Alone, in any batch and in any place a row has the same numbers."""
    model = tiny_model("llama", "bridge")
    torch.manual_seed(layer)
    patches = [Patch(torch.randn(model.d_model), (layer + i) % 6) for i in range(len(texts))]
    alone = PatchedGenerator(model, TARGET, batch_size=1).log_probabilities(patches, texts)
    places = list(range(len(texts)))
    order.shuffle(places)
    mixed = PatchedGenerator(model, TARGET, batch_size=batch_size).log_probabilities(
        [patches[p] for p in places], [texts[p] for p in places]
    )
    for place, row in zip(places, mixed, strict=True):
        assert row == pytest.approx(alone[place], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [TARGET, SEVERAL], ids=["one", "several"])
def test_the_placeholder_s_own_state_recovers_nothing(
    backend: str, target: TargetPrompt, tiny: Tiny
) -> None:
    """A patch with the state that it replaces changes nothing."""
    generator = PatchedGenerator(tiny("llama", backend), target)
    patches = [Patch(generator.placeholder_states[layer], layer) for layer in (5, 2, 0)]
    patches.append(Patch(torch.zeros(32), None))
    *found, unpatched = generator.log_probabilities(patches, [[7, 40, 5]] * 4)
    for row in found:
        assert row == pytest.approx(unpatched, abs=1e-4)


def _ids(text: str) -> list[int]:
    return [0, *tiny_tokenizer().encode(text, add_special_tokens=False)]


@pytest.fixture(scope="module")
def hf() -> Any:
    """The model of `llama` in plain Hugging Face."""
    return sharp_llama()


def test_own_words_are_the_greedy_text_after_the_name(llama: LanguageModel, hf: Any) -> None:
    """The name takes the placeholder's place; tokens and nats are those of plain Hugging Face."""
    words = own_words(llama, PROMPT, max_new_tokens=6)
    named = _ids(DESCRIPTION_PROMPT.filled(PROMPT))
    greedy = plain_hf.generate_cached(hf, named, None, n_new=6, eos=(1,))
    assert list(words.token_ids) == greedy
    assert words.text == llama.tokenizer.decode(greedy).strip(": ")
    there = plain_hf.log_probability(hf, named, greedy)
    without = plain_hf.log_probability(hf, _ids(DESCRIPTION_PROMPT.text), greedy)
    assert words.plain_nats == pytest.approx(there, abs=1e-3)
    assert words.unpatched_nats == pytest.approx(without, abs=1e-3)
    assert words.plain_nats > words.unpatched_nats
    assert not words.undefined
    assert words.recovered(words.plain_nats) == pytest.approx(1.0)
    assert words.recovered(words.unpatched_nats) == pytest.approx(0.0)


def test_own_words_do_not_depend_on_other_names(llama: LanguageModel) -> None:
    """Names of several lengths share batches only where they are equally long."""
    names = ["Pink Floyd", PROMPT, "Titanic", "Pink Floyd"]
    together = words_of(PatchedGenerator(llama), names)
    assert [words.about for words in together] == names
    for words in together:
        (alone,) = words_of(PatchedGenerator(replace(llama)), [words.about])  # knows no words
        assert alone.token_ids == words.token_ids
        assert alone.plain_nats == pytest.approx(words.plain_nats, abs=1e-3)


def test_own_words_are_found_once_while_the_model_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second sweep knows them; a changed weight, a hook or another target prompt ask anew."""
    model = load_model(copy.deepcopy(tiny_hf("llama")), tiny_tokenizer(), backend="bridge")
    asked: list[str] = []

    def counted(generator: PatchedGenerator, names: list[str]) -> Any:
        asked.extend(names)
        return generate_named(generator, names)

    monkeypatch.setattr("superscopes_tl.scores.words.generate_named", counted)
    first = own_words(model, PROMPT)
    assert own_words(model, PROMPT) == first
    assert asked == [PROMPT]
    own_words(model, PROMPT, target_prompt=TARGET)
    own_words(model, PROMPT, max_new_tokens=3)
    assert len(asked) == 3
    with model.tl.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda act, hook: act * 0.5)]):
        assert own_words(model, PROMPT) != first
    assert own_words(model, PROMPT) == first
    with torch.no_grad():
        next(iter(model.tl.parameters())).mul_(-1)
    assert own_words(model, PROMPT) != first
    assert asked == [PROMPT] * 6


def test_words_of_nothing_are_not_defined(llama: LanguageModel) -> None:
    """Without a text at a token, or where the name adds nothing to D, there is no share."""
    (nothing,) = words_of(PatchedGenerator(llama), [""])
    assert nothing.undefined
    assert math.isnan(nothing.recovered(-1.0))
    near = OwnWords("name", (5,), "text", -3.0, -3.9)
    assert near.undefined
    assert math.isnan(near.recovered(-3.0))


def test_a_reference_replaces_the_own_words(
    llama: LanguageModel, hf: Any, word_overlap: Any
) -> None:
    """A text of the user's own is scored as a continuation of the prompt, colon included."""
    fact = "English rock band"
    words = own_words(llama, PROMPT, reference=fact)
    assert words.given
    ids = _ids(f"{DESCRIPTION_PROMPT.text}: {fact}")[len(_ids(DESCRIPTION_PROMPT.text)) :]
    assert list(words.token_ids) == ids
    named = plain_hf.log_probability(hf, _ids(DESCRIPTION_PROMPT.filled(PROMPT)), ids)
    assert words.plain_nats == pytest.approx(named, abs=1e-3)
    assert own_words(llama, PROMPT, reference=f": {fact}") == words
    table = sweep(llama, PROMPT, reference=fact, scorer=word_overlap, **FAST).table
    assert set(table["own_words"]) == {fact}
    with pytest.raises(ValueError, match=r"^reference: "):
        own_words(llama, PROMPT, reference=" ")


def test_every_cell_of_a_sweep_has_its_share(llama: LanguageModel, word_overlap: Any) -> None:
    """Recovered = (L - L_0) / (L_plain - L_0), of the patch that the cell is."""
    result = sweep(llama, PROMPT, scorer=word_overlap, **FAST)
    table, plan, words = result.table, result.plan, own_words(llama, PROMPT)
    assert plan is not None
    texts = [words.token_ids] * len(plan.cells)
    likely = plan.generator.log_probabilities(make_patches(plan), texts)
    shares = [(sum(row) - words.unpatched_nats) / words.gap for row in likely]
    assert table["recovered"].tolist() == pytest.approx(shares, abs=1e-3)
    assert set(table["own_words"]) == {words.text}
    assert table["written"].all()
    assert table["recovered"].nunique() == len(table)


@pytest.fixture(scope="module")
def whole(llama: LanguageModel, word_overlap: Any) -> pd.DataFrame:
    """A small sweep with controls."""
    names = ("unpatched", "alpha_zero", "random_direction", "other_prompt")
    return sweep(llama, PROMPT, controls=names, scorer=word_overlap, **FAST).table


def test_controls_have_shares_and_leave_what_is_specific(
    whole: pd.DataFrame, llama: LanguageModel, word_overlap: Any
) -> None:
    """Own minus the mean over several other prompts whose own words differ."""
    table = whole
    assert (table["unpatched_recovered"] == 0).all()
    assert table.groupby("target_layer")["alpha_zero_recovered"].nunique().max() == 1
    specific = table["recovered"] - table["other_prompt_recovered"]
    assert table["specific"].tolist() == pytest.approx(specific.tolist())
    best = table[(table["kind"] == "resid_post") & (table["source_layer"] == 5)]
    assert best["random_direction_recovered"].max() < best["recovered"].max()
    two = sweep(
        llama, PROMPT, controls="other_prompt", others=2, scorer=word_overlap, **FAST
    ).table  # fmt: skip
    assert (two["other_prompt_recovered"] != table["other_prompt_recovered"]).any()


@pytest.mark.parametrize("generate", ["best", "none"])
def test_only_the_best_of_each_site_is_generated(
    generate: Any, whole: pd.DataFrame, llama: LanguageModel, word_overlap: Any
) -> None:
    """Shares are those of the whole sweep; the α of each site that recovers most is generated."""
    settings_ = {**FAST, "generate": generate, "controls": "other_prompt"}
    table = sweep(llama, PROMPT, scorer=word_overlap, **settings_).table
    assert table["recovered"].tolist() == pytest.approx(whole["recovered"].tolist(), abs=1e-3)
    assert table["specific"].tolist() == pytest.approx(whole["specific"].tolist(), abs=1e-3)
    written = table[table["written"]]
    if generate == "none":
        assert written.empty
        return
    sites = ["kind", "source_layer"]
    assert len(written) == len(whole.drop_duplicates(sites))
    best = whole.loc[whole.groupby(sites)["recovered"].idxmax()].sort_index()
    assert written.index.tolist() == best.index.tolist()
    assert written["text"].tolist() == best["text"].tolist()
    assert written["other_prompt_text"].tolist() == best["other_prompt_text"].tolist()
    assert table.loc[~table["written"], "score"].isna().all()


def test_what_is_finished_depends_on_what_is_to_be_generated() -> None:
    """The texts of a map can be generated later; a site with its best text is finished."""
    low, high = Cell(3, "mlp_out", 2, 0, 1.0), Cell(3, "mlp_out", 2, 0, 9.0)
    other = Cell(3, "mlp_out", 5, 0, 1.0)
    written = {low: False, high: True, other: False}
    assert finished_cells(written, "none") == {low, high, other}
    assert finished_cells(written, "best") == {low, high}
    assert finished_cells(written, "all") == {high}


def test_a_template_stands_around_the_name_alone(llama: LanguageModel, word_overlap: Any) -> None:
    """Positions, the score and the own words are those of the name, in any sentence."""
    settings_: dict[str, Any] = {"source_template": "He is {} of Macedon", "scorer": word_overlap}
    plan = plan_sweep(llama, PROMPT, positions=(-1, "Alexander"), **settings_)
    source = plan.source
    assert source.text == PROMPT
    assert "".join(source.text[a:b] for a, b in source.spans) == PROMPT
    last, first = (site.position for site in (plan.sites[0], plan.sites[-1]))
    assert first < last < len(source) - 1
    assert plan.about(last) == PROMPT
    assert plan.about(first) == "Alexander"
    there = plan_sweep(llama, PROMPT, **settings_).at_prompt("Titanic")
    assert there.about(there.sites[0].position) == "Titanic"


def test_a_position_is_scored_against_what_it_can_know(llama: LanguageModel) -> None:
    """The text up to the token, unless a substring chose it or `about` says what it is."""
    seen: list[str] = []

    def scorer(references: Any, candidates: Any) -> list[float]:
        seen.extend(references)
        return [0.5] * len(references)

    quick: dict[str, Any] = {**FAST, "layers": 5, "alphas": 1, "kinds": "resid_post"}
    table = sweep(llama, PROMPT, positions=(1, -1), scorer=scorer, **quick).table
    assert set(seen) <= {*table["about"]}
    assert table["about"].tolist()[1] == PROMPT
    assert PROMPT.startswith(table["about"].tolist()[0])
    assert len(table["about"].tolist()[0]) < len(PROMPT)
    named = sweep(llama, PROMPT, about="a king", scorer=scorer, **quick).table
    assert set(named["about"]) == {"a king"}


def test_an_echo_repeats_the_name() -> None:
    """A repeated name is no reading of it."""
    echoes = ["-great-great-great", "Alexander the Great, a king", "King of Rome", ""]
    assert [is_echo(text, PROMPT) for text in echoes] == [True, True, False, False]


def test_a_name_that_does_not_fit_costs_no_sweep(tiny: Tiny, word_overlap: Any) -> None:
    """A target prompt with a name that exceeds the context is not run."""
    model = tiny("llama", "bridge")
    generator = PatchedGenerator(model, TARGET)
    count = next(n for n in range(1, 400) if not name_fits(generator, "Red " * n))
    (long,) = words_of(generator, ["Red " * count])
    assert long.too_long
    assert math.isnan(long.recovered(-1.0))
    table = sweep(
        model, "Red " * count, layers=5, kinds="resid_post", alphas=1, target_prompt=TARGET,
        max_new_tokens=10, scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    assert table["recovered"].isna().all()
    assert table["written"].all()


@given(
    architecture=st.sampled_from(ARCHITECTURES),
    target=st.sampled_from([TARGET, SEVERAL, TargetPrompt("Red x means: hot", "x")]),
    chat=st.booleans(),
    guidance=st.sampled_from([1.0, 0.5, 2.0]),
    layers=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_teacher_forcing_agrees_with_generation(
    architecture: str, target: TargetPrompt, chat: bool, guidance: float, layers: list[int],
    seed: int,
) -> None:  # fmt: skip
    """One pass over a text gives each of its tokens the log-probability of generation."""
    model = tiny_model(architecture, "bridge")
    if chat:
        model = replace(model, tokenizer=with_template(tiny_tokenizer(), TEMPLATES["chatml"]))
    generator = PatchedGenerator(model, target, max_new_tokens=5, chat=chat)
    torch.manual_seed(seed)
    patches = [Patch(torch.randn(32) * 4, layer, guidance=guidance) for layer in layers]
    written = generator.generate(patches, confidence=True)
    found = generator.log_probabilities(patches, [text.token_ids for text in written])
    for text, likely in zip(written, found, strict=True):
        if not math.isnan(text.margin):
            assert likely == pytest.approx(list(text.log_probabilities), abs=1e-3)
