"""Affine maps: least squares in closed form, what is fitted on, files, and their use in a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from superscopes_tl import LanguageModel, capture, plan_sweep
from superscopes_tl.errors import RunFileError
from superscopes_tl.experiment import make_patches
from superscopes_tl.model import TokenizedText, tokenize
from superscopes_tl.vectors import AffineMap, Mapped, fit_affine, load_maps, save_maps
from superscopes_tl.vectors.affine import SMALL_RIDGE, least_squares, matched, r_squared
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]

PROMPT = "Red Hot Chili Peppers"
TEXTS = (
    "Syria: Country in the Middle East",
    "Red Hot Chili Peppers",
    "American rock band from the Middle East",
    "x is a Country, Peppers are hot",
    "the band of Syria is American",
    "Chili in the Country: Red Peppers",
    "Syria and the rock band",
)
PAIRS = [(5, 2), (2, 4), (5, 5)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), d_in=st.integers(1, 8), d_out=st.integers(1, 8))
def test_an_exactly_affine_relation_is_recovered(seed: int, d_in: int, d_out: int) -> None:
    """The fit of y = A·x + b returns A and b, and R² = 1 on unseen vectors."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(d_out, d_in, generator=generator), torch.randn(d_out, generator=generator)
    x = 3 + torch.randn(3 * d_in + 5, d_in, generator=generator)
    weight, bias = least_squares(x, x @ a.T + b)
    torch.testing.assert_close(weight, a, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, b, rtol=1e-2, atol=1e-2)
    fresh = torch.randn(9, d_in, generator=generator)
    assert r_squared(fresh @ weight.T + bias, fresh @ a.T + b) == pytest.approx(1, abs=1e-4)


def test_the_ridge_is_the_closed_form() -> None:
    """With fewer vectors than dimensions, A = YᵀX (XᵀX + λI)⁻¹ of the centred vectors."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 1, (9, 14)), rng.normal(-1, 3, (9, 5))
    weight, bias = least_squares(torch.tensor(x), torch.tensor(y), ridge=0.03)
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc.T @ xc
    expected = yc.T @ xc @ np.linalg.inv(gram + 0.03 * np.trace(gram) / 14 * np.eye(14))
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias, y.mean(0) - expected @ x.mean(0), rtol=1e-4, atol=1e-5)


def test_a_direction_that_never_occurs_is_not_inverted() -> None:
    """Of all exact fits, the one that maps an unseen direction to zero."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 0]  # (1, 0, -1) does not occur
    weight, _ = least_squares(x, x @ torch.tensor([[2.0, 1.0, 4.0]]).T)
    torch.testing.assert_close(weight, torch.tensor([[3.0, 1.0, 3.0]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_maps_equal_those_of_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Every distinct beginning of a text once, every fifth text held out, numpy's least squares."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    rows: dict[tuple[int, ...], tuple[int, dict[Any, torch.Tensor]]] = {}
    for number in (0, 1, 2, 3, 5, 6, 4):
        ids = [0, *model.tokenizer.encode(TEXTS[number], add_special_tokens=False)]
        seen = {
            place: plain_hf.source_vectors(hf, ids, *place)
            for place in [(k, n) for k in ("mlp_out", "resid_post") for n in (5, 4, 2)]
        }
        for p in range(1, len(ids)):
            at = {place: vectors[p] for place, vectors in seen.items()}
            rows.setdefault(tuple(ids[: p + 1]), (number, at))
    fitted = [at for number, at in rows.values() if number != 4]
    held_out = [at for number, at in rows.values() if number == 4]
    maps = fit_affine(model, TEXTS, PAIRS, kinds=["mlp_out", "resid_post"])
    assert [(m.kind, m.source_layer, m.target_layer) for m in maps] == [
        (kind, *pair) for kind in ("mlp_out", "resid_post") for pair in PAIRS
    ]
    for one in maps:
        source, target = (one.kind, one.source_layer), ("resid_post", one.target_layer)
        x, y = (torch.stack([at[p] for at in fitted]).numpy() for p in (source, target))
        ones = np.c_[x, np.ones(len(x))].astype(float)
        solution = np.linalg.lstsq(ones, y.astype(float))[0]
        x2, y2 = (torch.stack([at[p] for at in held_out]) for p in (source, target))
        expected = torch.tensor(np.c_[x2.numpy(), np.ones(len(x2))] @ solution)
        scale = float(expected.abs().max())
        assert float((one(x2) - expected).abs().max()) < 1e-2 * scale
        error = float((y2 - expected).square().sum() / (y2 - y2.mean(0)).square().sum())
        assert one.r2 == pytest.approx(1 - error, rel=1e-2, abs=1e-2)
        assert (one.n_vectors, one.ridge) == (len(fitted), 0.0)
        assert one.source_fingerprint == one.target_fingerprint == model.fingerprint


def test_all_pairs_are_fitted_from_one_forward_pass_per_text(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers and kinds there are."""
    model, runs = tiny("llama", "bridge"), []
    run = LanguageModel.activations

    def counted(self: LanguageModel, *args: Any) -> Any:
        runs.append(args)
        return run(self, *args)

    monkeypatch.setattr(LanguageModel, "activations", counted)
    fit_affine(model, TEXTS, PAIRS, kinds=["mlp_out", "resid_post"])
    assert len(runs) == len(TEXTS)


def test_too_few_vectors_take_a_small_ridge(tiny: Tiny) -> None:
    """The ridge is recorded; one that is passed is used as it is."""
    model = tiny("llama", "bridge")
    (few,) = fit_affine(model, TEXTS[:2], [(5, 2)])
    assert few.n_vectors <= model.d_model
    assert few.ridge == SMALL_RIDGE
    (own,) = fit_affine(model, TEXTS, [(5, 2)], ridge=0.5)
    assert own.ridge == 0.5


def _cut(text: str, *pieces: str) -> TokenizedText:
    """Return a text tokenized into the given pieces, after a BOS."""
    spans, end = [(0, 0)], 0
    for piece in pieces:
        spans.append((end, end + len(piece)))
        end += len(piece)
    ids, own = tuple(range(len(spans))), range(1, len(spans))
    return TokenizedText(text, ids, tuple(spans), ("", *pieces), prefix=1, own=own)


def test_tokens_meet_where_they_end() -> None:
    """Pep|pers and P|eppers meet at the end of the word, and at the words before it."""
    text = "Red Hot Peppers"
    one = _cut(text, "Red", " Hot", " Pep", "pers")
    other = _cut(text, "R", "ed", " Hot P", "eppers")
    assert matched(one, other) == [(1, 2), (4, 4)]
    assert matched(other, one) == [(2, 1), (4, 4)]
    assert matched(one, one) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_character_of_several_tokens_meets_at_its_last(tiny: Tiny) -> None:
    """An emoji takes four bytes here; its last one has read all of it."""
    tokens = tokenize(tiny("llama", "bridge"), "a🌶")
    assert len(tokens) == 6
    assert matched(tokens, _cut("a🌶", "a🌶")) == [(5, 1)]


def test_a_sweep_patches_what_the_maps_give(tiny: Tiny, word_overlap: Any) -> None:
    """f(v) = α·(A·v + b), with the A and b of the site's and the target's layer."""
    model = tiny("llama", "bridge")
    pairs = [(5, 4), (5, 1), (2, 4), (2, 1)]
    maps = fit_affine(model, TEXTS, pairs, kinds=["mlp_out", "resid_post"])
    plan = plan_sweep(
        model, PROMPT, layers=[5, 2], kinds=["resid_post", "mlp_out"], alphas=[1, 3],
        target_layer=[4, 1], positions=["Hot", -1], vectors=Mapped(maps), scorer=word_overlap,
    )  # fmt: skip
    seen = capture(model, PROMPT, kinds=["resid_post", "mlp_out"])
    found = {(one.kind, one.source_layer, one.target_layer): one for one in maps}
    for cell, patch in zip(plan.cells, make_patches(plan), strict=True):
        one = found[cell.kind, cell.source_layer, cell.target_layer]
        expected = cell.alpha * (one.weight @ seen.at(cell.site) + one.bias)
        torch.testing.assert_close(patch.vector, expected, rtol=1e-4, atol=1e-3)
    assert plan.mapping_name.startswith("Scale(), of Mapped(<8 maps ")
    again = Mapped(fit_affine(model, TEXTS, pairs, kinds=["mlp_out", "resid_post"]))
    other = Mapped(fit_affine(model, TEXTS[:-1], pairs, kinds=["mlp_out", "resid_post"]))
    assert again == Mapped(maps) != other
    assert repr(again) == repr(Mapped(maps)) != repr(other)


def test_a_layer_without_a_map_is_refused(tiny: Tiny, word_overlap: Any) -> None:
    """So are two maps for the same layers."""
    model = tiny("llama", "bridge")
    maps = fit_affine(model, TEXTS, [(5, 2)])
    plan = plan_sweep(
        model, PROMPT, layers=4, kinds="resid_post", target_layer=2, vectors=Mapped(maps),
        scorer=word_overlap,
    )  # fmt: skip
    with pytest.raises(ValueError, match="^maps: "):
        make_patches(plan)
    with pytest.raises(ValueError, match="^maps: "):
        Mapped([*maps, *maps])


def test_maps_of_other_weights_are_refused(tiny: Tiny, word_overlap: Any) -> None:
    """A map fitted on another model is no map of this one, whichever side differs."""
    model = tiny("llama", "bridge")
    (one,) = fit_affine(model, TEXTS, [(5, 2)])
    for change, argument in (
        ({"source_fingerprint": "abc"}, "model"),
        ({"target_fingerprint": "abc"}, "target_model"),
    ):
        foreign = Mapped([replace(one, **change)])
        plan = plan_sweep(
            model, PROMPT, layers=5, kinds="resid_post", target_layer=2, vectors=foreign,
            scorer=word_overlap,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"^{argument}: "):
            make_patches(plan)
    with pytest.raises(ValueError, match="^v: "):
        one(torch.zeros(2, 31))


@pytest.fixture
def maps(tiny: Tiny) -> tuple[AffineMap, ...]:
    return fit_affine(tiny("llama", "bridge"), TEXTS, PAIRS)


def test_a_file_gives_back_the_maps(maps: tuple[AffineMap, ...], tmp_path: Path) -> None:
    """Numbers bit for bit, and every word of their provenance; nothing else is left behind."""
    path = save_maps(maps, tmp_path / "maps.safetensors")
    for one, again in zip(maps, load_maps(path), strict=True):
        assert torch.equal(one.weight, again.weight)
        assert torch.equal(one.bias, again.bias)
        assert one.provenance() == again.provenance()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="^maps: "):
        save_maps([], path)
    with pytest.raises(FileNotFoundError):
        load_maps(tmp_path / "none")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, h: (t, {}),
        lambda t, h: (t, h | {"version": "2"}),
        lambda t, h: ({"0.weight": t["0.weight"]}, h),
        lambda t, h: (t | {"0.bias": torch.zeros(3)}, h),
        lambda t, h: (t | {"0.bias": t["0.bias"] * torch.nan}, h),
        lambda t, h: (t | {"0.bias": t["0.bias"].double()}, h),
        lambda t, h: (t, h | {"maps": "[{}]"}),
        lambda t, h: (t, h | {"maps": "3"}),
        lambda t, h: (t, h | {"maps": h["maps"].replace('"kind": "resid_post"', '"kind": 3')}),
    ],
    ids=range(9),
)
def test_a_bad_file_is_refused(
    change: Callable[..., Any], maps: tuple[AffineMap, ...], tmp_path: Path
) -> None:
    """Foreign, newer, incomplete or inconsistent: one kind of error."""
    path = save_maps(maps, tmp_path / "maps.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors, header = change(load_file(path), file.metadata())
    save_file(tensors, path, metadata=header)
    with pytest.raises(RunFileError, match="^path: "):
        load_maps(path)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"texts": "Red"}, "texts"),
        ({"texts": ["Red", "Red"]}, "texts"),
        ({"texts": ["Red Hot", "Red"]}, "texts"),  # nothing held out
        ({"pairs": []}, "pairs"),
        ({"pairs": [5]}, "pairs"),
        ({"pairs": [(9, 0)]}, "source layer"),
        ({"pairs": [(0, 9)]}, "target layer"),
        ({"kinds": "mlp"}, "kinds"),
        ({"ridge": -1}, "ridge"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], argument: str, tiny: Tiny) -> None:
    """By name, before anything is fitted."""
    given: dict[str, Any] = {"texts": TEXTS, "pairs": [(5, 2)], **arguments}
    with pytest.raises(ValueError, match=f"^{argument}: "):
        fit_affine(tiny("llama", "bridge"), **given)
