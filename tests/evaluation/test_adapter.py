"""The adapter f(v) = s·v/‖v‖ + b: gradients, files, and what b alone is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from superscopes_tl import (
    DESCRIPTION_PROMPT,
    PAPER_PROMPTS,
    LanguageModel,
    Patch,
    PatchedGenerator,
    TargetPrompt,
    plan_sweep,
    sweep,
)
from superscopes_tl.errors import RunFileError
from superscopes_tl.evaluation import adapter_shares, fit_adapter
from superscopes_tl.experiment import make_patches
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import Adapter
from superscopes_tl.vectors.adapter import FORMAT
from tests.conftest import BACKENDS
from tests.support.hooks import hooks_on
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]
TARGET = TargetPrompt("Syria: Country, x and")
NAMES = [*PAPER_PROMPTS[:5], "Alexander the Great"]
TEXTS = [[7, 40, 5], [9, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "neox"])
def test_gradients_are_those_of_a_whole_pass_in_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """At the embedding by autograd without a cache, at a block by finite differences."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    generator = PatchedGenerator(model, TARGET)
    ids, (at,) = list(generator.target.tokens.ids), generator.target.positions
    v = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    given = v.clone().requires_grad_()
    likely = generator.differentiable([Patch(row, "embed") for row in given], TEXTS)
    assert likely[1, 2] == 0
    (found,) = torch.autograd.grad(likely.sum(), given)
    for row, text in enumerate(TEXTS):
        own = v[row].clone().requires_grad_()
        states = hf.get_input_embeddings()(torch.tensor([[*ids, *text]])).detach()
        states = torch.cat([states[:, :at], own[None, None], states[:, at + 1 :]], dim=1)
        logits = hf(inputs_embeds=states, use_cache=False).logits[0].log_softmax(-1)
        total = sum(logits[len(ids) - 1 + i, token] for i, token in enumerate(text))
        assert float(likely[row].sum().detach()) == pytest.approx(float(total.detach()), abs=1e-3)  # type: ignore[union-attr]
        (expected,) = torch.autograd.grad(total, own)  # type: ignore[arg-type]
        assert torch.allclose(found[row], expected, atol=1e-3, rtol=1e-2)

    def at_block(vectors: Tensor) -> Tensor:
        return generator.differentiable([Patch(row, 2) for row in vectors], TEXTS).sum()

    given = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(at_block(given), given)
    along = slope / slope.norm()
    step = 0.02
    above, below = (float(at_block(v + d * along).detach()) for d in (step, -step))
    rise = (above - below) / (2 * step)
    assert rise == pytest.approx(float(slope.norm()), rel=0.05, abs=1e-3)


@pytest.fixture(scope="module")
def fitted(llama: LanguageModel) -> Adapter:
    """An adapter of the tiny Llama, after a few steps."""
    return fit_adapter(
        llama, NAMES, layer=5, steps=12, batch_size=3, max_new_tokens=4, progress=False
    )  # fmt: skip


def test_fitting_makes_own_words_likelier_and_leaves_the_model_alone(
    llama: LanguageModel, fitted: Adapter
) -> None:
    """Twelve steps beat one; weights have no gradient and no hook stays, also after Ctrl-C."""
    before = hooks_on(llama)
    options: dict[str, Any] = {
        "layer": 5, "batch_size": 6, "max_new_tokens": 4, "progress": False,
        "learning_rate": 0.1,
    }  # fmt: skip
    first, last = (fit_adapter(llama, NAMES, steps=n, **options).training["loss"] for n in (1, 12))
    assert last < first
    assert all(parameter.grad is None for parameter in llama.tl.parameters())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "log_softmax", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit_adapter(llama, NAMES, steps=2, **options)
    assert hooks_on(llama) == before
    assert fitted.layer == 5
    assert fitted.training["names"] <= len(NAMES)


def _interrupted(*args: object, **options: object) -> Iterator[None]:
    raise KeyboardInterrupt


def test_alpha_zero_is_the_bias_alone(llama: LanguageModel, fitted: Adapter) -> None:
    """α·s·v/‖v‖ + b as written; with α = 0 every name has the same patch, b."""
    v = torch.randn(3, 32)
    expected = 2 * fitted.scale * v / v.norm(dim=1, keepdim=True) + fitted.bias
    assert torch.allclose(fitted(2)(v), expected, atol=1e-5)
    with pytest.raises(ValueError, match="v: "):
        fitted(1)(torch.zeros(2, 31))
    plan = plan_sweep(llama, NAMES[0], **{**fitted.sweep, "alphas": 0, "scorer": no_scores})
    for patch in make_patches(plan):
        assert patch.target_layer == "embed"
        assert torch.allclose(patch.vector, fitted.bias)
    table = sweep(
        llama, NAMES[0], progress=False, **{**fitted.sweep, "scorer": no_scores}
    ).table  # fmt: skip
    assert table["mapping"].tolist() == [repr(fitted)]


def test_shares_are_what_each_vector_recovers(llama: LanguageModel, fitted: Adapter) -> None:
    """The row of b alone, by hand from log-probabilities after the patch b."""
    table = adapter_shares(llama, fitted, NAMES[1:], progress=False).set_index("method")
    assert table.index.tolist() == [
        "adapter", "b alone", "adapter, other names' vectors", "untrained"
    ]  # fmt: skip
    plan = plan_sweep(llama, NAMES[1], **{**fitted.sweep, "scorer": no_scores})
    shares = []
    for name in NAMES[1:]:
        there = plan.at_prompt(name)
        (words,) = there.own_words([there.sites[0].position]).values()
        patch = Patch(fitted.bias, "embed")
        (likely,) = plan.generator.log_probabilities([patch], [words.token_ids])
        shares.append(words.recovered(sum(likely)))
    known = [share for share in shares if share == share]
    assert table.loc["b alone", "names"] == len(known)
    assert table.loc["b alone", "recovered"] == pytest.approx(sum(known) / len(known), abs=1e-3)
    assert table.loc["adapter", "gain"] == 0


def test_a_file_gives_the_same_adapter(
    llama: LanguageModel, tiny: Tiny, fitted: Adapter, tmp_path: Path
) -> None:
    """Ours and the authors' two forms; another model's, and files that are none, are refused."""
    path = fitted.save(tmp_path / "adapter.safetensors")
    again = Adapter.load(path, llama)
    assert torch.equal(again.bias, fitted.bias)
    assert again.scale == pytest.approx(fitted.scale)
    assert again.sweep["target_prompt"] == DESCRIPTION_PROMPT
    assert (again.layer, again.training) == (5, fitted.training)
    with pytest.raises(ValueError, match="fit_adapter"):
        Adapter.load(path, tiny("llama", "bridge"))
    with pytest.raises(FileNotFoundError):
        Adapter.load(tmp_path / "none.safetensors", llama)
    with pytest.raises(ValueError, match="where"):
        Adapter.load(path, llama, layers=3)

    state = {"log_scale": torch.tensor([2.0]), "bias": torch.ones(32)}
    save_file(state, published := tmp_path / "theirs.safetensors", metadata={"type": "affine"})
    theirs = Adapter.load(published, llama, layer=3)
    assert (theirs.layer, theirs.target_layer) == (3, "embed")
    unit = torch.eye(32)[:1]
    assert torch.allclose(theirs(1)(9 * unit), torch.tensor(2.0).exp() * unit + 1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"log_scale": torch.zeros(1)},
        {"log_scale": torch.zeros(2), "bias": torch.zeros(32)},
        {"log_scale": torch.zeros(1), "bias": torch.zeros(32), "U": torch.zeros(32, 2)},
        {"log_scale": torch.zeros(1), "bias": torch.full((32,), torch.nan)},
        None,
    ],
    ids=["no bias", "two scales", "low rank", "NaN", "bytes"],
)
def test_a_file_of_another_form_is_refused(
    llama: LanguageModel, tensors: Any, tmp_path: Path
) -> None:
    """In one line that says what was expected."""
    path = tmp_path / "other.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors at all")
    else:
        save_file(tensors, path)
    with pytest.raises(RunFileError, match="log_scale"):
        Adapter.load(path, llama)


@pytest.mark.parametrize(
    ("about", "scale"),
    [
        ('{"settings": {"target_model": "a/b"}}', 0.0), ('{"settings": {"chat": "yes"}}', 0.0),
        ('{"training": {"loss": NaN}}', 0.0), ("[]", 0.0), ("{}", 1e4), ("{}", -1e4),
    ],
)  # fmt: skip
def test_a_file_chooses_no_model_and_no_scale_without_an_end(
    llama: LanguageModel, about: str, scale: float, tmp_path: Path
) -> None:
    """Settings that `fit_adapter` does not keep, a header that is no object, e^±10000."""
    tensors = {"log_scale": torch.tensor([scale]), "bias": torch.ones(32)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "adapter": about})
    with pytest.raises(RunFileError, match="log_scale"):
        Adapter.load(path, llama)


@pytest.mark.parametrize("name", ["reference", "vectors", "write", "alphas"])
def test_settings_that_an_adapter_would_not_keep_are_refused(
    llama: LanguageModel, name: str
) -> None:
    """They would be fitted with, or ignored, and missing from `Adapter.sweep`."""
    with pytest.raises(ValueError, match="settings: expected out of chat"):
        fit_adapter(llama, NAMES, layer=5, progress=False, **{name: None})
