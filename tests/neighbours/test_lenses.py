"""Reading with the unembedding, against plain Hugging Face and closed forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from superscopes_tl import LanguageModel, Site, capture, load_model, plan_sweep, sweep
from superscopes_tl.errors import RunFileError
from superscopes_tl.model import tokenize
from superscopes_tl.neighbours import (
    LENSES,
    LOGIT_LENS,
    TunedLens,
    lens_kl,
    lens_table,
    logit_lens,
    sites_of,
    train_tuned_lens,
)
from superscopes_tl.neighbours.tuned_lens import FORMAT, _losses, _sampled
from tests.conftest import BACKENDS, tiny_model
from tests.support.plain_hf import source_vectors
from tests.support.tiny_models import ARCHITECTURES, tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]

SOURCE = "Red Hot Chili Peppers"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembedding_the_last_block_gives_the_models_logits(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Final norm, W_U and soft cap are the model's own: the logits are plain Hugging Face's."""
    model = tiny(architecture, backend)
    activations = capture(model, SOURCE, kinds="resid_post", layers=(5, 2))
    with torch.no_grad():
        expected = tiny_hf(architecture)(torch.tensor([activations.tokens.ids])).logits[0]
        last = activations["resid_post", 5]
        got = model.decoder.unembed(last)
        alone = model.decoder.unembed(last[3])
        earlier = model.decoder.unembed(activations["resid_post", 2])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected[3], rtol=1e-4, atol=1e-4)
    assert (earlier - expected).abs().max() > 0.1


def plain_logits(hf: Any, hidden: Tensor) -> Tensor:
    """Return the logits of hidden states, by the Hugging Face model's own modules."""
    if hasattr(hf, "transformer"):
        return hf.lm_head(hf.transformer.ln_f(hidden))
    if hasattr(hf, "gpt_neox"):
        return hf.lm_head(hf.gpt_neox.final_layer_norm(hidden))
    logits = hf.lm_head(hf.model.norm(hidden))
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma2"])
def test_the_table_is_plain_hugging_faces_logit_lens(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Each row is norm and lm_head on a hidden state: the same tokens, the same probabilities."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    ids = tokenize(model, SOURCE).ids
    sites = [Site(k, la, p) for p in (4, 2) for k in ("mlp_out", "resid_post") for la in (5, 2)]
    table = lens_table(model, SOURCE, sites, top_k=3, control=False)
    assert len(table) == 3 * len(sites)
    assert sites_of(table) == tuple(sites)
    for index, site in enumerate(sites):
        rows = table[3 * index : 3 * index + 3]
        with torch.no_grad():
            vector = source_vectors(hf, list(ids), site.kind, site.layer)[site.position]
            expected = plain_logits(hf, vector).softmax(dim=-1).topk(3)
        assert rows["rank"].tolist() == [1, 2, 3]
        assert rows["top_token_id"].tolist() == expected.indices.tolist()
        assert rows["top_token"].tolist() == [tiny_tokenizer().decode(i) for i in expected.indices]
        assert rows["probability"].tolist() == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert set(rows["token"]) == {tokenize(model, SOURCE).labels[site.position]}


def test_a_sweeps_sites_are_read_from_its_plan_and_from_its_table(tiny: Tiny) -> None:
    """A plan, its result and the lens agree on the sites, so that the tables can be merged."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {
        "layers": (5, 2),
        "alphas": (1, 3),
        "positions": (-1, 2),
        "max_new_tokens": 2,
        "target_prompt": "Syria: Country, x",
        "scorer": lambda references, candidates: [0.5] * len(candidates),
    }
    plan = plan_sweep(model, SOURCE, **settings)
    result = sweep(model, SOURCE, progress=False, **settings)
    assert set(sites_of(result.table)) == set(plan.sites)
    top = lens_table(model, SOURCE, plan.sites, top_k=1, control=False)
    site = ["prompt", "position", "token", "kind", "source_layer"]
    both = result.table.merge(top, on=site, validate="many_to_one")
    assert len(both) == len(result.table)


@pytest.mark.parametrize("backend", BACKENDS)
@given(factor=st.floats(0.5, 1e3), layer=st.sampled_from([5, 2]))
@settings(max_examples=10, deadline=None)
def test_a_positive_scale_changes_nothing(backend: str, factor: float, layer: int) -> None:
    """The final norm takes α away, up to its epsilon."""
    model = tiny_model("llama", backend)
    v = capture(model, SOURCE, kinds="resid_post", layers=layer)["resid_post", layer]
    torch.testing.assert_close(
        logit_lens(model, factor * v), logit_lens(model, v), atol=1e-3, rtol=0
    )


def test_the_logit_lens_takes_any_shape_and_any_number_of_vectors(tiny: Tiny) -> None:
    """Batches of vectors give what each vector gives alone; probabilities sum to one."""
    model = tiny("gpt2", BACKENDS[0])
    vectors = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(1))
    likely = logit_lens(model, vectors)
    assert likely.shape == (2, 150, len(tiny_tokenizer()))
    assert likely.dtype == torch.float32
    assert not likely.requires_grad
    torch.testing.assert_close(likely.exp().sum(dim=-1), torch.ones(2, 150))
    torch.testing.assert_close(
        likely[1, 149], logit_lens(model, vectors[1, 149]), atol=1e-5, rtol=0
    )


def test_the_control_is_a_random_vector_of_equal_norm(tiny: Tiny) -> None:
    """Each lens has a twin that reads the site's norm in a random direction, always the same."""
    model = tiny("llama", "bridge")
    sites = [Site("mlp_out", layer, -1) for layer in (5, 2)]
    seen: list[Tensor] = []

    def watched(model: LanguageModel, vectors: Tensor, sites: Any) -> Tensor:
        seen.append(vectors)
        return vectors

    table = lens_table(model, SOURCE, sites, lenses={"watched": watched}, top_k=1)
    assert table[["lens", "control"]].to_numpy().tolist() == [
        ["watched", control] for control in (False, False, True, True)
    ]
    v, random = seen
    torch.testing.assert_close(random.norm(dim=-1), v.norm(dim=-1))
    assert torch.cosine_similarity(v, random).abs().max() < 0.9
    assert table.equals(lens_table(model, SOURCE, sites, lenses={"watched": watched}, top_k=1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: logit_lens(m, [1.0]), TypeError, "vectors: "),  # type: ignore[arg-type]
        (lambda m: logit_lens(m, torch.zeros(2, 31)), ValueError, "vectors: "),
        (lambda m: lens_table(m, SOURCE, []), ValueError, "kinds: "),
        (lambda m: lens_table(m, SOURCE, [Site("mlp_out", 9, 1)]), ValueError, "sites: "),
        (lambda m: lens_table(m, SOURCE, [Site("mlp_out", 2, 99)]), ValueError, "position: "),
        (lambda m: lens_table(m, SOURCE, [Site("mlp_out", 2, 1)], top_k=0), ValueError, "top_k: "),
        (lambda m: lens_kl(m, [SOURCE], lenses=m), TypeError, "lenses: "),
        (lambda m: lens_kl(m, "one text"), TypeError, "texts: "),
        (lambda m: lens_kl(m, []), ValueError, "texts: "),
        (lambda m: lens_kl(m, ["x", " "]), ValueError, "texts: "),
        (lambda m: train_tuned_lens(m, ["x"], steps=0), ValueError, "steps: "),
        (lambda m: train_tuned_lens(m, ["x"], layers=5), ValueError, "layers: .*before the last"),
        (lambda m: train_tuned_lens(m, ["x"], layers=6), ValueError, "layers: "),
        (lambda m: train_tuned_lens(m, ["x"], vocabulary=9), ValueError, "vocabulary: "),
    ],
)
def test_bad_input_is_refused_with_its_name(
    call: Callable[[LanguageModel], object], error: type[Exception], message: str, tiny: Tiny
) -> None:
    """Every bad argument is refused by name."""
    with pytest.raises(error, match=message):
        call(tiny("llama", "bridge"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_divergence_is_plain_hugging_faces(architecture: str, backend: str, tiny: Tiny) -> None:
    """KL(final ‖ lens), the mean over every token but the BOS of texts of several lengths."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    texts = [SOURCE, "Syria: Country in the Middle East", "Country"]
    found = lens_kl(model, texts, kinds=("mlp_out", "resid_post"), layers=(5, 2), control=False)
    for row in found.to_dict("records"):
        values = []
        for text in texts:
            ids = list(tokenize(model, text).ids)
            with torch.no_grad():
                final = hf(torch.tensor([ids])).logits[0, 1:].log_softmax(dim=-1)
                vectors = source_vectors(hf, ids, row["kind"], row["source_layer"])[1:]
                lens = plain_logits(hf, vectors).log_softmax(dim=-1)
            values += (
                torch.nn.functional.kl_div(lens, final, reduction="none", log_target=True)
                .sum(dim=-1)
                .tolist()
            )
        assert row["tokens"] == len(values)
        assert row["kl"] == pytest.approx(sum(values) / len(values), abs=1e-3)
    last = found[(found["kind"] == "resid_post") & (found["source_layer"] == 5)]
    assert last["kl"].item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_untrained_tuned_lens_is_the_logit_lens(backend: str, tiny: Tiny) -> None:
    """The identity translator changes no vector of any kind."""
    model = tiny("llama", backend)
    sites = [Site(kind, layer, -1) for kind in ("mlp_out", "resid_mid") for layer in (5, 2)]
    lenses = {**LENSES, "tuned lens": TunedLens.untrained(model)}
    table = lens_table(model, SOURCE, sites, lenses=lenses, control=False)
    plain, tuned = (table[table["lens"] == name].drop(columns="lens") for name in lenses)
    assert tuned.reset_index(drop=True).equals(plain.reset_index(drop=True))


def random_lens(model: LanguageModel) -> TunedLens:
    """Return a lens with random translators."""
    draw = torch.Generator().manual_seed(0)
    shape = (model.n_layers, model.d_model)
    matrices = torch.randn(*shape, model.d_model, generator=draw)
    biases = torch.randn(shape, generator=draw)
    return replace(TunedLens.untrained(model), matrices=matrices, biases=biases)


@given(layer=st.sampled_from([5, 2, -1]), position=st.integers(0, 4))
@settings(max_examples=10, deadline=None)
def test_translated_terms_of_a_block_sum_to_its_translated_output(
    layer: int, position: int
) -> None:
    """T is h + A·h + b of a block's output, and T(resid_mid) + (I + A)·mlp_out gives the same."""
    model = tiny_model("llama", "bridge")
    number = layer % 6
    kinds = ("resid_pre", "resid_mid", "mlp_out", "resid_post")
    found = capture(model, SOURCE, kinds=kinds)
    lens = random_lens(model)

    def translated(kind: Any, at: int) -> Tensor:
        site = Site(kind, at, position)
        return lens(model, found[kind, at % 6][position][None], [site])[0]

    h = found["resid_post", number][position]
    expected = h + lens.matrices[number] @ h + lens.biases[number]
    torch.testing.assert_close(translated("resid_post", layer), expected, rtol=1e-4, atol=1e-3)
    parts = translated("resid_mid", layer) + translated("mlp_out", layer)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-3)
    before, same = translated("resid_pre", number), translated("resid_post", number - 1)
    torch.testing.assert_close(before, same, rtol=1e-4, atol=1e-3)


def test_the_embedding_has_no_translator(tiny: Tiny) -> None:
    """resid_pre of block 0 is no block's output: it is read as it is, its neighbours translated."""
    model = tiny("llama", "bridge")
    lens = random_lens(model)
    sites = [Site("resid_pre", 2, -1), Site("resid_pre", 0, -1), Site("resid_post", 0, 1)]
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    moved = lens(model, vectors, sites)
    assert torch.equal(moved[1], vectors[1])
    for row, layer in ((0, 1), (2, 0)):
        expected = vectors[row] + lens.matrices[layer] @ vectors[row] + lens.biases[layer]
        torch.testing.assert_close(moved[row], expected, rtol=1e-4, atol=1e-4)


def idle_from(layer: int, add: Tensor | None = None) -> LanguageModel:
    """Return a Llama whose blocks from `layer` on do nothing, but for a constant added at one."""
    hf = tiny_hf("llama", seed=7)
    with torch.no_grad():
        for block in hf.model.layers[layer:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    if add is not None:
        hf.model.layers[layer].mlp.down_proj.bias = torch.nn.Parameter(add)
    return load_model(hf, tiny_tokenizer(), backend="bridge")


TEXTS = [SOURCE, "Syria: Country in the Middle East", "American rock band, Syria", "Chili: Hot x"]


def test_before_idle_blocks_every_lens_is_exact_and_training_leaves_it() -> None:
    """Where later blocks add nothing, KL is 0 from the start, so that nothing is learned there."""
    model = idle_from(3)
    lens = train_tuned_lens(model, TEXTS, steps=20, progress=False)
    found = lens_kl(model, TEXTS, layers=(5, 2, 3, 0), control=False)
    exact = found.set_index("source_layer")["kl"]
    assert exact[[2, 3, 5]].abs().max() < 1e-5
    assert exact[0] > 0.01
    assert lens.matrices[0].abs().max() > 1e-3
    assert lens.matrices[5].abs().max() == lens.biases[5].abs().max() == 0


def test_training_finds_the_constant_that_later_blocks_add() -> None:
    """A model whose later blocks add one vector to every token has an exact translator, b."""
    constant = 2 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    model = idle_from(3, add=constant)
    exact = TunedLens.untrained(model)
    exact.biases[2] = constant
    lens = train_tuned_lens(model, TEXTS, layers=2, steps=300, learning_rate=1e-2, progress=False)
    lenses = {**LENSES, "exact": exact, "tuned lens": lens}
    kl = lens_kl(model, TEXTS, lenses=lenses, layers=(2,), control=False).set_index("lens")["kl"]
    assert kl[LOGIT_LENS] > 0.05
    assert kl["exact"] == pytest.approx(0, abs=1e-3)
    assert kl["tuned lens"] < 0.02 * kl[LOGIT_LENS]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_lowers_the_divergence_and_leaves_the_model_alone(
    backend: str, tiny: Tiny
) -> None:
    """Every block but the last gets nearer to the end; no weight moves or gets a gradient."""
    model = tiny("gemma2", backend)
    before = [p.detach().clone() for p in model.tl.parameters()]
    lens = train_tuned_lens(model, TEXTS, steps=60, batch_size=16, progress=False)
    kl = lens_kl(model, TEXTS, lenses={**LENSES, "tuned lens": lens}, control=False)
    wide = kl.pivot(index="source_layer", columns="lens", values="kl")
    assert (wide["tuned lens"][:5] < 0.8 * wide[LOGIT_LENS][:5]).all()
    assert wide["tuned lens"][5] == wide[LOGIT_LENS][5]
    for parameter, old in zip(model.tl.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


def test_training_is_the_same_for_the_same_seed(tiny: Tiny) -> None:
    """The seed decides, and its result does not depend on the global random state."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {"steps": 5, "batch_size": 8, "progress": False}
    one, same, other = (train_tuned_lens(model, TEXTS, seed=s, **settings) for s in (1, 1, 2))
    assert torch.equal(one.matrices, same.matrices)
    assert not torch.equal(one.matrices, other.matrices)


def test_only_the_chosen_layers_are_trained_and_time_is_stated(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other blocks keep the logit lens; the chosen ones learn what they learn beside the others."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {"steps": 5, "batch_size": 8}
    some = train_tuned_lens(model, TEXTS, layers=[4, 2, 5], **settings)
    assert "tuned lens, about 0 s" in capsys.readouterr().err
    whole = train_tuned_lens(model, TEXTS, progress=False, **settings)
    assert some.training["layers"] == [2, 4]
    for layer in range(6):
        expected = whole.matrices[layer] * (layer in (2, 4))
        torch.testing.assert_close(some.matrices[layer], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logits_of_some_tokens_are_those_of_all(backend: str, tiny: Tiny) -> None:
    """Any tokens, in any order, with the soft cap."""
    decoder = tiny("gemma2", backend).decoder
    states = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([7, 300, 2])
    with torch.no_grad():
        got, whole = decoder.unembed(states, tokens), decoder.unembed(states)
    torch.testing.assert_close(got, whole[..., tokens], rtol=1e-4, atol=1e-4)


def test_a_sampled_vocabulary_estimates_the_whole_one(tiny: Tiny) -> None:
    """The mean of the sampled loss over draws is near the exact loss, with and without top tokens.

    Its normaliser is unbiased and its logarithm nearly so; a sample of all tokens is exact.
    """
    model = tiny("llama", "bridge")
    draw = torch.Generator().manual_seed(4)
    last, moved = torch.randn(9, 32, generator=draw), torch.randn(9, 2, 32, generator=draw)
    with torch.no_grad():
        exact = _losses(model, last, moved, None, draw)
        every = _losses(model, last, moved, len(tiny_tokenizer()), draw)
        drawn = torch.stack([_losses(model, last, moved, 128, draw) for _ in range(100)])
    torch.testing.assert_close(every, exact)
    assert drawn.std(dim=0).min() > 0
    torch.testing.assert_close(drawn.mean(dim=0), exact, rtol=0.1, atol=0.02)


def test_a_sample_holds_the_top_tokens_and_others_that_stand_for_the_rest() -> None:
    """No token is there twice, and the weights add up to the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    for count in (3, 60, 400):
        top = torch.randperm(1000, generator=draw)[:count]
        tokens, shift = _sampled(top, 1000, 64, draw)
        assert len(tokens.unique()) == len(tokens) == max(64, count + 16)
        assert set(tokens[:count].tolist()) == set(top.tolist())
        assert shift[:count].abs().max() == 0
        assert float(shift.exp().sum()) == pytest.approx(1000, rel=1e-4)
    tokens, shift = _sampled(torch.arange(100), 100, 64, draw)  # a small vocabulary, all of it
    assert tokens.tolist() == list(range(100))
    assert shift.abs().max() == 0


def test_training_on_a_sampled_vocabulary_lowers_the_exact_divergence(tiny: Tiny) -> None:
    """With 96 of 330 tokens a step, the divergence over all of them falls nearly as far."""
    model = tiny("gemma2", BACKENDS[0])
    settings: dict[str, Any] = {"steps": 60, "batch_size": 16, "progress": False, "layers": [2]}
    lenses = {
        **LENSES,
        "exact": train_tuned_lens(model, TEXTS, vocabulary=None, **settings),
        "sampled": train_tuned_lens(model, TEXTS, vocabulary=96, **settings),
    }
    kl = lens_kl(model, TEXTS, lenses=lenses, layers=2, control=False).set_index("lens")["kl"]
    assert kl["sampled"] < 0.5 * (kl[LOGIT_LENS] + kl["exact"])


def test_a_tuned_lens_survives_its_file(tiny: Tiny, tmp_path: Path) -> None:
    """What is loaded is what was saved, with how it was trained."""
    model = tiny("llama", "bridge")
    lens = train_tuned_lens(model, TEXTS, steps=3, progress=False)
    path = lens.save(tmp_path / "lens.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["lens.safetensors"]
    loaded = TunedLens.load(path, model)
    assert torch.equal(loaded.matrices, lens.matrices)
    assert torch.equal(loaded.biases, lens.biases)
    assert loaded.training == lens.training
    assert loaded.training["steps"] == 3


def test_a_tuned_lens_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Translators mean nothing for other weights: neither a file nor an object is taken."""
    lens = TunedLens.untrained(tiny("llama", "bridge"))
    path = lens.save(tmp_path / "lens.safetensors")
    other = tiny("qwen2", "bridge")
    with pytest.raises(ValueError, match="path: "):
        TunedLens.load(path, other)
    with pytest.raises(ValueError, match="tuned lens: "):
        lens_kl(other, TEXTS, lenses={"tuned lens": lens})


def test_a_file_that_is_no_tuned_lens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Neither noise nor foreign tensors are a lens."""
    model = tiny("llama", "bridge")
    noise, foreign = tmp_path / "noise", tmp_path / "foreign"
    noise.write_bytes(b"no tensors")
    save_file({"matrices": torch.zeros(2)}, foreign)
    for path in (noise, foreign, tmp_path):
        with pytest.raises(RunFileError, match="path: "):
            TunedLens.load(path, model)
    with pytest.raises(FileNotFoundError):
        TunedLens.load(tmp_path / "missing", model)


@pytest.mark.parametrize(
    ("parts", "header"),
    [
        ({"matrices": torch.full((6, 32, 32), torch.nan)}, {}),
        ({"biases": torch.zeros(6, 32).half()}, {}),
        ({"matrices": torch.zeros(5, 32, 32)}, {}),
        ({"more": torch.zeros(1)}, {}),
        ({}, {"training": None}),
        ({}, {"fingerprint": None}),
        ({}, {"training": "{"}),
        ({}, {"training": "[" * 100_000}),
        ({}, {"training": "[1]"}),
        ({}, {"format": "superscopes_tl tuned lens 2"}),
    ],
)
def test_a_damaged_tuned_lens_is_refused(
    parts: dict[str, Tensor], header: dict[str, str | None], tiny: Tiny, tmp_path: Path
) -> None:
    """Numbers that are not finite float32 of the model's shapes, and incomplete headers."""
    model = tiny("llama", "bridge")
    good = TunedLens.untrained(model)
    kept = {"model": good.model, "fingerprint": good.fingerprint, "format": FORMAT}
    metadata = {k: v for k, v in (kept | {"training": "{}"} | header).items() if v is not None}
    path = tmp_path / "lens.safetensors"
    save_file({"matrices": good.matrices, "biases": good.biases} | parts, path, metadata=metadata)
    with pytest.raises(RunFileError, match="^path: "):
        TunedLens.load(path, model)


def package_folder(folder: Path, *, layers: int = 6, width: int = 32, **config: Any) -> Path:
    """Write a folder of the tuned-lens package with random translators."""
    draw = torch.Generator().manual_seed(8)
    stated = {"base_model_name_or_path": "tiny", "d_model": width, "num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**stated, "bias": True, **config}))
    parameters = {}
    for i in range(layers):
        parameters[f"{i}.weight"] = torch.randn(width, width, generator=draw)
        parameters[f"{i}.bias"] = torch.randn(width, generator=draw)
    torch.save(parameters, folder / "params.pt")
    return folder


def test_a_folder_of_the_tuned_lens_package_is_read_one_block_earlier(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Its translator i reads `hidden_states[i]` of Hugging Face: h + W·h + b."""
    model, hf = tiny("llama", "bridge"), tiny_hf("llama")
    folder = package_folder(tmp_path / "lens")
    lens = TunedLens.load(folder, model)
    assert lens.training == {"folder": "lens"}
    parameters = torch.load(folder / "params.pt", weights_only=True)
    tokens = tokenize(model, SOURCE)
    with torch.no_grad():
        hidden = hf(torch.tensor([tokens.ids]), output_hidden_states=True).hidden_states
    found = capture(model, tokens, kinds="resid_post")
    for layer in (4, 2, 0):
        vectors = found["resid_post", layer]
        torch.testing.assert_close(vectors, hidden[layer + 1][0], rtol=1e-3, atol=1e-3)
        weight, bias = (parameters[f"{layer + 1}.{name}"] for name in ("weight", "bias"))
        expected = vectors + vectors @ weight.T + bias
        got = lens(model, vectors, [Site("resid_post", layer, 0)] * len(vectors))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    ends = [Site("resid_post", 5, -1), Site("resid_pre", 0, -1)]
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(lens(model, vectors, ends), vectors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 5}, "path: expected a lens of .*, 6 layers x 32, got lens, one of tiny, 5"),
        ({"width": 16}, "6 layers x 16"),
        ({"d_model": None}, "6 layers x None"),
    ],
)
def test_a_folder_for_a_model_of_another_shape_is_refused(
    settings: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    """One line says of which model it is."""
    with pytest.raises(ValueError, match=message):
        TunedLens.load(package_folder(tmp_path / "lens", **settings), tiny("llama", "bridge"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("params.pt", b"no tensors"),
        ("params.pt", {"1.weight": torch.zeros(32, 32)}),
        ("params.pt", {f"{i}.bias": torch.full((32,), torch.nan) for i in range(6)}),
        ("params.pt", {"1.weight": torch.zeros(1).expand(32, 33)}),
    ],
    ids=["json", "noise", "missing", "names", "shape"],
)
def test_a_damaged_folder_is_refused(name: str, content: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Broken settings, other tensors, other shapes."""
    folder = package_folder(tmp_path / "lens")
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    with pytest.raises(RunFileError, match="path: "):
        TunedLens.load(folder, tiny("llama", "bridge"))
