"""Sources of v: single heads, sums over layers, sums of sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, Site, SweepResult, capture, plan_sweep, sweep
from superscopes_tl.experiment import make_patches
from superscopes_tl.model import tokenize
from superscopes_tl.vectors import Accumulated, Head, SumOf, Window
from tests.conftest import BACKENDS, tiny_model
from tests.support.plain_hf import blocks_of
from tests.support.tiny_models import tiny_hf

PROMPT = "Red Hot Chili Peppers"
N_HEADS = 4

Tiny = Callable[[str, str], LanguageModel]


def _plan(model: LanguageModel, **settings: Any) -> Any:
    return plan_sweep(model, PROMPT, scorer=lambda references, candidates: [0.0], **settings)


def _read(model: LanguageModel, vectors: Any, **settings: Any) -> dict[Site, torch.Tensor]:
    """Return what a source gives at every site of a plan."""
    plan = _plan(model, **settings)
    places = [(site, 0) for site in plan.sites]
    return dict(zip(plan.sites, vectors(plan, places), strict=True))


def _output_projection(hf: Any, layer: int) -> Any:
    attention = blocks_of(hf)[layer]
    attention = (
        getattr(attention, "self_attn", None)
        or getattr(attention, "attn", None)
        or (attention.attention)
    )
    names = ("o_proj", "c_proj", "dense")
    return next(getattr(attention, name) for name in names if hasattr(attention, name))


def _plain_head(hf: Any, ids: tuple[int, ...], layer: int, number: int) -> torch.Tensor:
    """Return one head's output in plain Hugging Face: o_proj of its own input, the rest zero."""
    projection, seen = _output_projection(hf, layer), []
    handle = projection.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        hf(torch.tensor([list(ids)]))
        handle.remove()
        width = seen[0].shape[-1] // N_HEADS
        masked = torch.zeros_like(seen[0])
        own = slice(number * width, (number + 1) * width)
        masked[..., own] = seen[0][..., own]
        return (projection(masked) - projection(torch.zeros_like(masked)))[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "qwen2", "qwen3"])
def test_a_head_is_o_proj_of_its_own_input(architecture: str, backend: str, tiny: Tiny) -> None:
    """Each head, grouped queries included, is what plain Hugging Face projects of it alone."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    for number in range(N_HEADS):
        given_ = _read(model, Head(number), kinds="attn_out", layers=(5, 2), positions=slice(None))
        for site, vector in given_.items():
            plain = _plain_head(hf, tokenize(model, PROMPT).ids, site.layer, number)
            torch.testing.assert_close(vector, plain[site.position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_heads_and_the_bias_add_up_to_attn_out(architecture: str, backend: str, tiny: Tiny) -> None:
    """The output bias belongs to no head: together they are attn_out, one by one or at once."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    asked: dict[str, Any] = {"kinds": "attn_out", "layers": (5, 2)}
    own = capture(model, PROMPT, **asked)
    single = [_read(model, Head(number), **asked) for number in range(N_HEADS)]
    together = _read(model, Head(*range(N_HEADS)), **asked)
    for site, vector in together.items():
        bias = getattr(_output_projection(hf, site.layer), "bias", None)
        whole = vector if bias is None else vector + bias.detach()
        torch.testing.assert_close(whole, own.at(site), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(part[site] for part in single), vector, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "neox"])
def test_all_layers_and_the_embedding_are_the_residual_stream(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Embedding + accumulated attn_out + accumulated mlp_out = resid_post, at every token."""
    model = tiny(architecture, backend)
    asked: dict[str, Any] = {"layers": (5, 2), "positions": slice(None)}
    found = _read(model, Accumulated(), kinds=("attn_out", "mlp_out"), **asked)
    embedding = capture(model, PROMPT, kinds="resid_pre", layers=0)["resid_pre", 0]
    stream = capture(model, PROMPT, kinds="resid_post", layers=(5, 2))
    for site, attention in found.items():
        if site.kind == "attn_out":
            mlp = found[Site("mlp_out", site.layer, site.position)]
            torch.testing.assert_close(
                embedding[site.position] + attention + mlp,
                stream["resid_post", site.layer][site.position],
                rtol=1e-4,
                atol=1e-4,
            )


@given(length=st.integers(1, 8), layer=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_window_is_the_difference_of_two_accumulations(length: int, layer: int) -> None:
    """Layers l-k+1..l are all layers to l less all layers to l-k; 1 is the site itself."""
    model = tiny_model("llama", "bridge")
    asked: dict[str, Any] = {"kinds": "mlp_out", "layers": tuple(range(6))}
    (so_far, near) = (_read(model, source, **asked) for source in (Accumulated(), Window(length)))
    own = capture(model, PROMPT, kinds="mlp_out")
    position = len(tokenize(model, PROMPT)) - 1
    site = Site("mlp_out", layer, position)
    expected = so_far[site]
    if layer >= length:
        expected = expected - so_far[Site("mlp_out", layer - length, position)]
    torch.testing.assert_close(near[site], expected, rtol=1e-4, atol=1e-5)
    if length == 1:
        torch.testing.assert_close(near[site], own.at(site), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_sites_is_the_same_for_every_cell(backend: str, tiny: Tiny) -> None:
    """resid_mid + mlp_out = resid_post, by hand; positions may count from the end."""
    model = tiny("llama", backend)
    source = SumOf([Site("resid_mid", 2, -1), Site("mlp_out", 2, -1)])
    found = _read(model, source, kinds="mlp_out", layers=(5, 0))
    stream = capture(model, PROMPT, kinds="resid_post", layers=2)["resid_post", 2][-1]
    assert len(found) == 2
    for vector in found.values():
        torch.testing.assert_close(vector, stream, rtol=1e-4, atol=1e-5)


def test_a_source_runs_the_prompt_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass, whatever the number of sites."""
    model = tiny("llama", "bridge")
    runs = []
    own = type(model.tl).run_with_cache

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.tl), "run_with_cache", counted)
    for source, kinds in (
        (Head(3), "attn_out"),
        (Window(2), ("attn_out", "mlp_out")),
        (Accumulated(), "mlp_out"),
        (SumOf([Site("mlp_out", 1, -1), Site("resid_pre", 4, 1)]), "mlp_out"),
    ):
        runs.clear()
        _read(model, source, kinds=kinds, positions=slice(None))
        assert len(runs) == 1


def test_sources_in_a_sweep_name_themselves(llama: LanguageModel, word_overlap: Any) -> None:
    """The table's mapping tells heads apart, and what is patched is α times the source's vector."""
    asked: dict[str, Any] = {
        "kinds": "attn_out", "layers": (5, 2), "alphas": (1, 3), "scorer": word_overlap,
    }  # fmt: skip
    parts = [
        sweep(llama, PROMPT, vectors=Head(h), max_new_tokens=2, progress=False, **asked)
        for h in (0, 3)
    ]
    both = SweepResult(pd.concat([part.table for part in parts]), parts[0].provenance)
    assert list(both.table["mapping"].unique()) == ["Scale(), of Head(0)", "Scale(), of Head(3)"]
    assert len(both.best()) == 4
    for source in (Head(0, 3), Window(2), Accumulated(), SumOf([Site("mlp_out", 5, -1)])):
        plan = plan_sweep(llama, PROMPT, vectors=source, target_layer=(0, 4), **asked)
        own = source(plan, [(site, 0) for site in plan.sites])
        by_site = dict(zip(plan.sites, own, strict=True))
        for cell, patch in zip(plan.cells, make_patches(plan), strict=True):
            torch.testing.assert_close(patch.vector, cell.alpha * by_site[cell.site])


def test_names_say_the_parameters() -> None:
    """A result can tell one source from another."""
    sites = [Site("mlp_out", 3, -1), Site("attn_out", 2, 5)]
    sources = [Head(3), Head(4, 1), Window(2), Accumulated(), SumOf(sites)]
    assert list(map(repr, sources)) == [
        "Head(3)", "Head(1, 4)", "Window(length=2)", "Accumulated()",
        f"SumOf(sites={tuple(sites)})",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Head(), "heads"),
        (lambda: Head(-1), "heads"),
        (lambda: Head(1.5), "heads"),  # type: ignore[arg-type]
        (lambda: Window(0), "length"),
        (lambda: SumOf([]), "sites"),
        (lambda: SumOf(["mlp_out"]), "sites"),  # type: ignore[list-item]
    ],
)
def test_bad_parameters_are_refused(make: Callable[[], Any], argument: str) -> None:
    """When the source is made, before any model runs."""
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        make()


@pytest.mark.parametrize(
    ("architecture", "source", "kinds", "argument"),
    [
        ("llama", Head(4), "attn_out", "heads"),
        ("llama", Head(0), "mlp_out", "kinds"),
        ("gemma2", Head(0), "attn_out", "heads"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    architecture: str, source: Any, kinds: str, argument: str, tiny: Tiny
) -> None:
    """No such head, no heads in this kind, or a norm after them."""
    with pytest.raises(ValueError, match=f"^{argument}: "):
        _read(tiny(architecture, "bridge"), source, kinds=kinds)
