"""The Jacobian lens against explicit Jacobians, and against TransformerLens's own class."""

from __future__ import annotations

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

from superscopes_tl import LanguageModel, Site, capture
from superscopes_tl.errors import RunFileError
from superscopes_tl.model import tokenize
from superscopes_tl.neighbours import (
    LENSES,
    JacobianLens,
    fit_jacobian_lens,
    lens_table,
    logit_lens,
)
from superscopes_tl.neighbours.jacobian_lens import FORMAT
from tests.conftest import BACKENDS, tiny_model
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]

TEXTS = ["Red Hot Chili Peppers: American rock band", "Syria: Country in the Middle East, x"]
QUICK: dict[str, Any] = {"skip_first": 3, "max_tokens": 9, "progress": False}


def explicit(hf: Any, ids: list[int], layer: int, skip_first: int) -> Tensor:
    """Return J of one text from the full Jacobian of plain Hugging Face's later blocks."""
    with torch.no_grad():
        hidden = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1]
    found: list[Tensor] = []
    (blocks,) = (m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 6)

    def rest(h: Tensor) -> Tensor:
        def instead(module: Any, args: Any, output: Any) -> Any:
            return h[None] if isinstance(output, Tensor) else (h[None], *output[1:])

        def keep(module: Any, args: Any, output: Any) -> None:
            found[:] = [(output if isinstance(output, Tensor) else output[0])[0]]

        hooks = [(layer, instead), (-1, keep)]
        handles = [blocks[number].register_forward_hook(hook) for number, hook in hooks]
        try:
            hf(torch.tensor([ids]))
        finally:
            for handle in handles:
                handle.remove()
        return found[0]

    whole = torch.autograd.functional.jacobian(rest, hidden[0], vectorize=True)
    valid = slice(skip_first, len(ids) - 1)
    # [t' d t d]: summed over later tokens, averaged over the tokens that they come from.
    mean: Tensor = whole[valid, :, valid].sum(dim=0).mean(dim=1)
    return mean


def close(got: Tensor, expected: Tensor) -> None:
    """Assert equality up to the rounding of float32."""
    atol = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox", "gpt2"])
def test_it_is_the_mean_of_explicit_jacobians(architecture: str, backend: str, tiny: Tiny) -> None:
    """Full Jacobians of plain Hugging Face, summed over later tokens, averaged over the rest."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    before = [p.detach().clone() for p in model.tl.parameters()]
    lens = fit_jacobian_lens(model, TEXTS, layers=[5, 4, 2], batch_size=5, **QUICK)
    assert list(lens.matrices) == [2, 4]
    for layer, got in lens.matrices.items():
        ids = [list(tokenize(model, text).ids)[:9] for text in TEXTS]
        close(got, torch.stack([explicit(hf, one, layer, 3) for one in ids]).mean(dim=0))
    for parameter, old in zip(model.tl.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_transformer_lenss_own(architecture: str, tiny: Tiny) -> None:
    """Its class fits the same matrices on the same texts, and reads the same logits by them."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    model = tiny(architecture, "bridge")
    theirs = analysis.JacobianLens.fit(
        model.tl, TEXTS, corpus="two texts", dim_batch=7, max_seq_len=9, skip_first_positions=3,
        show_progress=False,
    )  # fmt: skip
    ours = fit_jacobian_lens(model, TEXTS, **QUICK)
    assert list(ours.matrices) == theirs.source_layers == [0, 1, 2, 3, 4]
    for layer, matrix in ours.matrices.items():
        close(matrix, theirs.jacobians[layer])
    read = theirs.readout(model.tl, TEXTS[0], layers=[2], return_full_logits=True)
    vectors = capture(model, TEXTS[0], kinds="resid_post", layers=2)["resid_post", 2]
    sites = [Site("resid_post", 2, position) for position in range(len(vectors))]
    got = logit_lens(model, ours(model, vectors, sites))
    torch.testing.assert_close(got, read.lens_logits[2].log_softmax(dim=-1), rtol=0, atol=1e-3)


def test_rows_divided_between_texts_are_the_means_over_their_own_texts(tiny: Tiny) -> None:
    """With 13 of 32 rows a text, each row is exact, from the texts whose turn it was."""
    model = tiny("llama", "bridge")
    texts = [*TEXTS, "Country in the Middle East, Syria", "American rock band: Red Hot"]
    alone = [fit_jacobian_lens(model, [text], layers=3, **QUICK).matrices[3] for text in texts]
    shared = fit_jacobian_lens(model, texts, layers=3, rows=13, batch_size=4, **QUICK)
    for row in range(32):
        turns = [n for n in range(4) if row in [d % 32 for d in range(13 * n, 13 * n + 13)]]
        assert len(turns) in (1, 2)
        expected = torch.stack([alone[n][row] for n in turns]).mean(dim=0)
        close(shared.matrices[3][row], expected)
    assert shared.training["rows"] == 13


def test_the_last_blocks_own_is_the_identity_and_idle_blocks_give_it(tiny: Tiny) -> None:
    """Where later blocks add nothing, J = I, and the Jacobian lens is the logit lens."""
    from tests.neighbours.test_lenses import idle_from

    model = idle_from(3)
    lens = fit_jacobian_lens(model, TEXTS, layers=(4, 2), **QUICK)
    for layer in (4, 2):
        torch.testing.assert_close(lens.matrices[layer], torch.eye(32), rtol=0, atol=1e-5)
    sites = [Site("resid_post", layer, -1) for layer in (5, 2)]
    lenses = {**LENSES, "Jacobian lens": lens}
    table = lens_table(model, TEXTS[0], sites, lenses=lenses, control=False, top_k=2)
    one, other = (table[table["lens"] == name].reset_index(drop=True) for name in lenses)
    assert one["top_token_id"].equals(other["top_token_id"])
    assert one["probability"].tolist() == pytest.approx(other["probability"].tolist(), abs=1e-4)


def random_lens(model: LanguageModel, layers: tuple[int, ...] = (0, 1, 2, 3, 4)) -> JacobianLens:
    """Return a lens with random matrices."""
    draw = torch.Generator().manual_seed(0)
    matrices = {la: torch.randn(model.d_model, model.d_model, generator=draw) for la in layers}
    return JacobianLens(model.name, model.fingerprint, matrices, {"texts": 3})


@given(layer=st.sampled_from([4, 2, -3]), factor=st.floats(-3, 3), position=st.integers(0, 4))
@settings(max_examples=10, deadline=None)
def test_it_is_linear_and_terms_of_a_block_sum_to_its_output(
    layer: int, factor: float, position: int
) -> None:
    """J(resid_mid) + J(mlp_out) = J(resid_post), which is resid_pre of the next block."""
    model = tiny_model("llama", "bridge")
    found = capture(model, TEXTS[0], kinds=("resid_pre", "resid_mid", "mlp_out", "resid_post"))
    lens, number = random_lens(model), layer % 6

    def moved(kind: Any, at: int, factor: float = 1.0) -> Tensor:
        vector = factor * found[kind, at % 6][position][None]
        return lens(model, vector, [Site(kind, at, position)])[0]

    whole = moved("resid_post", layer)
    expected = lens.matrices[number] @ found["resid_post", number][position]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-3)
    parts = moved("resid_mid", layer) + moved("mlp_out", layer)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moved("resid_pre", number + 1), whole, rtol=1e-4, atol=1e-3)
    scaled = moved("mlp_out", layer, factor)
    torch.testing.assert_close(scaled, factor * moved("mlp_out", layer), rtol=1e-4, atol=1e-3)


def test_a_layer_that_was_not_fitted_is_refused_but_for_the_ends(tiny: Tiny) -> None:
    """The last block has the identity, the embedding is read as it is; others have no stand-in."""
    model = tiny("llama", "bridge")
    lens = random_lens(model, (2,))
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    ends = [Site("mlp_out", -1, 0), Site("resid_pre", 0, 0)]
    assert torch.equal(lens(model, vectors, ends), vectors)
    with pytest.raises(ValueError, match=r"Jacobian lens: .*\[2\], got 3"):
        lens(model, vectors[:1], [Site("mlp_out", 3, 0)])


def test_a_lens_survives_its_file_and_no_other_weights_take_it(tiny: Tiny, tmp_path: Path) -> None:
    """What is loaded is what was saved; a file or an object of another model is refused."""
    model, other = tiny("llama", "bridge"), tiny("qwen2", "bridge")
    lens = random_lens(model, (4, 2))
    path = lens.save(tmp_path / "lens.safetensors")
    loaded = JacobianLens.load(path, model)
    assert list(loaded.matrices) == [2, 4]
    assert all(torch.equal(loaded.matrices[layer], lens.matrices[layer]) for layer in (4, 2))
    assert loaded.training == lens.training
    with pytest.raises(ValueError, match="path: "):
        JacobianLens.load(path, other)
    with pytest.raises(ValueError, match="Jacobian lens: "):
        lens(other, torch.zeros(1, 32), [Site("mlp_out", 2, 0)])


@pytest.mark.parametrize(
    "tensors",
    [
        {"5": torch.zeros(32, 32)},
        {"2": torch.zeros(32, 31)},
        {"2": torch.full((32, 32), torch.inf)},
        {"02": torch.zeros(32, 32)},
    ],
    ids=["the last layer", "shape", "infinite", "name"],
)
def test_a_damaged_file_is_refused(tensors: dict[str, Tensor], tiny: Tiny, tmp_path: Path) -> None:
    """Layers and shapes that the model does not have, and numbers that are none."""
    model = tiny("llama", "bridge")
    metadata = {"format": FORMAT, "model": "x", "fingerprint": model.fingerprint, "training": "{}"}
    save_file(tensors, tmp_path / "lens", metadata=metadata)
    with pytest.raises(RunFileError, match="path: "):
        JacobianLens.load(tmp_path / "lens", model)


def test_texts_without_a_valid_position_are_left_out(tiny: Tiny) -> None:
    """A text that is too short counts for nothing; the fit says how many there were."""
    model = tiny("llama", "bridge")
    both = fit_jacobian_lens(model, [TEXTS[0], "Syria"], layers=4, **QUICK)
    one = fit_jacobian_lens(model, TEXTS[:1], layers=4, **QUICK)
    assert torch.equal(both.matrices[4], one.matrices[4])
    assert (both.training["texts"], both.training["left_out"]) == (1, 1)


def test_the_time_is_stated_first(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The progress bar says how long the fit takes."""
    fit_jacobian_lens(tiny("llama", "bridge"), TEXTS, layers=4, **{**QUICK, "progress": True})
    assert "Jacobian lens, about 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": "one text"}, TypeError, "texts: "),
        ({"texts": []}, ValueError, "texts: "),
        ({"texts": ["Syria"]}, ValueError, "texts: .*at most"),
        ({"layers": 5}, ValueError, "layers: .*identity"),
        ({"layers": 6}, ValueError, "layers: "),
        ({"rows": 15}, ValueError, "rows: expected 16 or more"),
        ({"batch_size": 0}, ValueError, "batch_size: "),
        ({"skip_first": -1}, ValueError, "skip_first: "),
        ({"max_tokens": 1}, ValueError, "max_tokens: "),
    ],
)
def test_bad_input_is_refused_with_its_name(
    change: dict[str, Any], error: type[Exception], message: str, tiny: Tiny
) -> None:
    """Every bad argument is refused by name."""
    with pytest.raises(error, match=message):
        fit_jacobian_lens(tiny("llama", "bridge"), **{"texts": TEXTS, **QUICK, **change})


def test_a_published_file_is_read(tiny: Tiny, tmp_path: Path) -> None:
    """TransformerLens's own file of its own lens: half precision, data alone."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    model = tiny("llama", "bridge")
    lens = random_lens(model, (4, 2))
    path = tmp_path / "lens.pt"
    analysis.JacobianLens(dict(lens.matrices), n_prompts=3, d_model=32).save(str(path))
    loaded = JacobianLens.load(path, model)
    assert list(loaded.matrices) == [2, 4]
    for layer in (4, 2):
        assert loaded.matrices[layer].dtype == torch.float32
        assert torch.equal(loaded.matrices[layer], lens.matrices[layer].half().float())
    assert loaded.training == {"file": "lens.pt"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"J": {5: torch.zeros(32, 32)}}, r"layers \[5\]"),
        ({"J": {2: torch.zeros(31, 31)}}, r"\(31, 31\), where the model has \(32, 32\)"),
        ({"J": {2: torch.full((32, 32), torch.nan)}}, "not finite"),
        ({"K": {2: torch.zeros(32, 32)}}, "K.2"),
        (b"no tensors", "path: "),
    ],
    ids=["layer", "shape", "infinite", "name", "noise"],
)
def test_a_published_file_that_does_not_fit_is_refused(
    content: Any, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Of a model of other layers or another width, damaged, or of something else."""
    path = tmp_path / "lens.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RunFileError, match=message):
        JacobianLens.load(path, tiny("llama", "bridge"))


def test_a_published_file_is_for_raw_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Folded layer norms change the basis of the stream."""
    folded = replace(tiny("llama", "bridge"), processing="folded layer norms")
    with pytest.raises(ValueError, match="model: expected a model of raw weights"):
        JacobianLens.load(tmp_path / "lens.pt", folded)
