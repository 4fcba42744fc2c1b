"""The bundled model: its facts, its training, and the statistics of its report."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from superscopes_tl import PAPER_PROMPTS, Patch, PatchedGenerator, capture, load_model
from superscopes_tl.engine import crop_description
from superscopes_tl.mini import MODEL_DIR, train
from superscopes_tl.mini.corpus import Corpus, EncodedFact, train_tokenizer
from superscopes_tl.mini.facts import FEW_SHOT, Fact, held_out, load_facts
from superscopes_tl.mini.measure import (
    Curves,
    Readings,
    contextualization_layers,
    count_prompts,
    last_word_first,
    read_earlier,
)
from superscopes_tl.mini.net import Llama, NetConfig, causal_mask
from superscopes_tl.mini.optim import Muon, OptimConfig
from superscopes_tl.mini.reader import Reader
from superscopes_tl.mini.report import above, bars, headline, load_figures
from superscopes_tl.mini.train import TrainConfig, earliest_layer
from tests.conftest import BACKENDS

FACTS = load_facts()
SMALL = TrainConfig(steps=6, batch=4, length=48, first_layer=1, earlier=0, later=0, text_noise=1.0)


def test_longer_names_are_read_later_if_asked() -> None:
    """At most four tokens: some blocks earlier; eight or more: later; words: from block 0."""
    config = TrainConfig(first_layer=6, earlier=2, later=1)

    def first(kind: str, tokens: int, config: TrainConfig = config) -> int:
        fact = EncodedFact(kind, "name", tuple(range(tokens)), (1,), self_described=True)
        return earliest_layer(fact, config)

    assert [first("band", n) for n in (2, 4, 5, 7, 8, 12)] == [4, 4, 6, 6, 7, 7]
    assert first("word", 3) == 0
    assert first("band", 2, TrainConfig(first_layer=6, earlier=0)) == 6


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The whole table with a small vocabulary, in short rows."""
    return Corpus(FACTS, held_out(FACTS), train_tokenizer(FACTS, 400), SMALL.length)


def small_net() -> Llama:
    """A network that can be trained for a few steps in a second."""
    torch.manual_seed(0)
    return Llama(NetConfig(400, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=48))


def test_the_table_is_as_large_and_varied_as_promised() -> None:
    """Over 2,500 names of over 30 kinds, with the paper's prompts and few-shot descriptions."""
    names = {fact.name: fact for fact in FACTS}
    assert len(names) >= 2500
    assert len({fact.kind for fact in FACTS}) >= 30
    assert set(PAPER_PROMPTS) <= names.keys()
    assert all(names[name].description == text for name, text in FEW_SHOT)
    assert all(fact.source for fact in FACTS)
    ends: Counter[str] = Counter(name.split()[-1].lower() for name in names if " " in name)
    assert sum(count > 1 for count in ends.values()) >= 150
    words = {fact.name.lower() for fact in FACTS if fact.kind == "word"}
    assert words >= {"peppers", "great", "future", "live", "wales"}
    assert max(Counter(fact.description for fact in FACTS).values()) == 1


def test_a_tenth_of_each_kind_is_held_out() -> None:
    """Held-out names are a tenth of each kind, as far as there are any but the paper's."""
    hidden = held_out(FACTS)
    assert not hidden & {*PAPER_PROMPTS, *(name for name, _ in FEW_SHOT)}
    kept = {*PAPER_PROMPTS, *(name for name, _ in FEW_SHOT)}
    by_kind: dict[str, list[str]] = defaultdict(list)
    for fact in FACTS:
        by_kind[fact.kind].append(fact.name)
    for kind, names in by_kind.items():
        wanted = min(round(0.1 * len(names)), len(set(names) - kept))
        assert len(hidden & set(names)) == wanted, kind


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), placeholders=st.booleans())
def test_rows_know_where_their_names_lie(corpus: Corpus, seed: int, placeholders: bool) -> None:
    """Every span begins with its name or the placeholder; held-out names are never patched."""
    row = corpus.list_row(random.Random(seed), placeholders)
    assert len(row.ids) == SMALL.length
    for span in row.spans:
        if span.fact:
            assert row.ids[span.start : span.last + 1] == [corpus.placeholder]
            assert span.fact.self_described
            assert span.fact.name not in held_out(FACTS)
        if span.last + 1 < SMALL.length:
            assert row.ids[span.last + 1] == corpus.colon


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_training_twin_is_the_hugging_face_model(heads: int) -> None:
    """Exported weights give the logits of the network that was trained, but for rounding."""
    torch.manual_seed(5)
    config = NetConfig(300, d_model=32, n_layers=5, n_heads=4, n_kv_heads=heads, d_mlp=56)
    net = Llama(config)
    for weight in (net.out, net.down, net.query, net.key_value):
        torch.nn.init.normal_(weight, std=0.1)
    hf = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()
    lacking = hf.load_state_dict(net.hf_state_dict(torch.float32), strict=False)
    assert lacking.missing_keys == ["lm_head.weight"]  # tied to the embeddings
    assert not lacking.unexpected_keys
    ids = torch.randint(0, 300, (3, 19))
    with torch.no_grad():
        ours = net.logits(net(ids, causal_mask(19).unsqueeze(0))[-1])
        theirs = hf(ids).logits
    # The twin multiplies in bfloat16, which keeps eight bits.
    assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_self_description_reads_block_outputs_as_they_are(corpus: Corpus) -> None:
    """Without noise, the vectors are block outputs of the name's last token, unscaled."""
    net = small_net()
    for weight in (net.out, net.down):
        torch.nn.init.normal_(weight, std=0.1)
    config = replace(SMALL, batch=16, self_description=1.0, noise=0.0)
    batch = train.draw_batch(corpus, config, random.Random(3))
    patches = train.draw_patches(net, corpus, batch, config, random.Random(4))
    assert patches is not None
    for vector, (_, _, fact) in zip(patches.vectors, batch.places, strict=True):
        leads = [[], *corpus.mentions]
        ids = [torch.tensor([[corpus.bos, *lead, *fact.name_ids]]) for lead in leads]
        with torch.no_grad():
            seen = [
                net(text, causal_mask(text.shape[1]).unsqueeze(0), every_layer=True)[:, 0, -1]
                for text in ids
            ]
        first = 0 if fact.kind == "word" else config.first_layer
        found = torch.cat([states[first:] for states in seen])
        # Other lengths of padding round differently in bfloat16.
        assert (found - vector).norm(dim=-1).min() < 0.02 * vector.norm()


def test_a_resumed_run_ends_where_an_unbroken_one_ends(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training draws each step from its number, so a killed run loses nothing."""
    config = replace(SMALL, save_seconds=-1.0)
    draw = train.draw_batch

    def fit(path: Path) -> Llama:
        net = small_net()
        optimiser = Muon(dict(net.named_parameters()), OptimConfig())
        train.load_checkpoint(path, net, optimiser, config)
        train.fit(net, corpus, config, optimiser, path)
        return net

    whole = fit(tmp_path / "whole.safetensors")
    calls: list[int] = []

    def killed_at_the_fourth(*args: Any) -> train.Batch:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train, "draw_batch", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts.safetensors")
    parts = fit(tmp_path / "parts.safetensors")
    assert len(calls) == 4 + 3
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_run_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    """Resuming with other settings is an error, not a silent mixture."""
    net = small_net()
    optimiser = Muon(dict(net.named_parameters()), OptimConfig())
    path = tmp_path / "checkpoint.safetensors"
    train.save_checkpoint(path, net, optimiser, SMALL)
    with pytest.raises(ValueError, match="another run"):
        train.load_checkpoint(path, net, optimiser, replace(SMALL, noise=9.0))


def test_training_lowers_the_loss(corpus: Corpus) -> None:
    """Thirty updates on one batch bring its loss down by a quarter."""
    net = small_net()
    optimiser = Muon(dict(net.named_parameters()), OptimConfig())
    batch = train.draw_batch(corpus, SMALL, random.Random(1))
    losses = []
    for _ in range(30):
        loss = train.batch_loss(net, batch, None, None)
        loss.backward()
        optimiser.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_contextualization_and_earlier_readings_by_hand() -> None:
    """l_c is the first layer that reads a name unscaled; only layers before it are earlier."""
    truth = ["a", "b", "c"]
    texts = {1: [["-", "b", "-"], ["a", "-", "-"]]}
    texts |= {alpha: [["a" if alpha == 9 else "-", "b", "-"], ["-", "-", "c"]] for alpha in (3, 6)}
    texts |= {alpha: [["a", "-", "-"], ["-", "-", "-"]] for alpha in (9, 12, 15)}
    read = Readings(texts, truth)
    assert contextualization_layers(read.exact(1)) == [1, 0, None]
    assert read_earlier(read) == [True, False, True]
    assert read.any_alpha().tolist() == [[True, True, False], [False, False, True]]


def test_a_last_word_counts_only_before_the_name_is_read() -> None:
    """The word's meaning or another name of the group, at a layer before l_c."""
    facts = [
        Fact("word", "Great", "very large", "Size"),
        Fact("ruler", "Alexander the Great", "king of Macedon", "Alexander the Great"),
        Fact("ruler", "Peter the Great", "tsar of Russia", "Peter the Great"),
        Fact("band", "Blur", "English band", "Blur (band)"),
    ]
    group = facts[1:]
    plain = [["very large", "tsar of Russia", "very large"], ["king of Macedon", "very large", "-"]]
    assert last_word_first(facts, group, plain) == [True, False]
    plain = [["tsar of Russia", "-", "-"], ["king of Macedon", "-", "-"]]
    assert last_word_first(facts, group, plain) == [True, False]


def test_the_corrected_count_by_hand() -> None:
    """A prompt counts above the 95th percentile of the other prompts' best scores against it."""
    scores = np.zeros((1, 21, 2, 21))
    scores[0, :, 1, 0] = np.linspace(0.0, 0.95, 21)  # 20 other sources against prompt 0
    scores[0, 0, 1, 0] = 0.0
    scores[0, 0, 0, 0] = 0.94
    # numpy's linear quantile of 0.0475, ..., 0.95 (20 numbers) at 95 % is the 19.05th: 0.9049.
    assert count_prompts(scores, corrected=True) == [1]
    assert count_prompts(scores, corrected=False) == [1]
    scores[0, 0, 0, 0] = 0.90
    assert count_prompts(scores, corrected=True) == [0]
    assert count_prompts(scores, corrected=False) == [1]


def test_under_the_null_the_corrected_count_is_five_per_cent() -> None:
    """Scores that know nothing of their prompt pass in about one of twenty cases."""
    scores = np.random.default_rng(7).normal(size=(200, 48, 5, 48))
    share = np.mean(count_prompts(scores, corrected=True)) / 48
    assert 0.045 < share < 0.08  # 47 others: chance is a little above 5 %


@pytest.mark.parametrize(
    ("ours", "theirs", "met"),
    [([2, 3, 4], [1, 1, 4], True), ([2, 3, 4], [1, 4, 0], False), ([2, 3, 4], [2, 3, 1], False)],
)
def test_a_curve_is_above_when_it_is_nowhere_below(
    ours: list[int], theirs: list[int], met: bool
) -> None:
    """Above at most layers, below at none of those that are asked about."""
    ours, theirs = [0, *ours, 0], [9, *theirs, 9]
    assert above(Curves(theirs, ours, theirs), "alpha_1", range(1, 4)).met is met
    assert not above(Curves(theirs, ours, theirs), "alpha_1", range(5)).met


def test_the_shipped_figures_are_of_the_shipped_weights() -> None:
    """What `superscopes models` states was measured on the weights that are packed with it."""
    figures = load_figures(MODEL_DIR)
    assert figures["groups"]["paper"]["names read"] == len(PAPER_PROMPTS)
    assert figures["groups"]["all"]["recall"] >= 98
    assert {bar.number for bar in bars(figures)} == {1, 2, 3, 4, 5, 6, 7}
    missed = {bar.number for bar in bars(figures) if not bar.met}
    assert missed <= {4}, "the card says what falls short; nothing else may"
    assert "recall" in headline(figures)


def test_figures_of_other_weights_are_refused(tmp_path: Path) -> None:
    """A retrained model cannot carry the figures of its predecessor."""
    (tmp_path / "measured.json").write_text('{"weights": "0"}')
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="those of other weights"):
        load_figures(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_what_plain_transformers_reads(backend: str) -> None:
    """Twelve prompts, MLP outputs of two layers at three alphas, word for word."""
    prompts = PAPER_PROMPTS[::4]
    reader = Reader()
    states = reader.states(prompts)
    model = load_model("mini", backend=backend, device="cpu")
    for layer in (7, 4):
        seen = [capture(model, prompt)["mlp_out", layer][-1] for prompt in prompts]
        for alpha in (1, 6, 15):
            plain = reader.read(alpha * states.mlp_out[layer])
            patches = [Patch(alpha * vector, 0) for vector in seen]
            found = PatchedGenerator(model).generate(patches)
            ours = [crop_description(one.text).split(",")[0].strip() for one in found]
            near = [one.margin < 1e-4 for one in found]
            assert [a for a, n in zip(ours, near, strict=True) if not n] == [
                b for b, n in zip(plain, near, strict=True) if not n
            ]
            assert sum(near) <= 2
