"""Ways to write, against forward hooks on plain Hugging Face and closed forms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from superscopes_tl import LanguageModel, Patch, PatchedGenerator, TargetPrompt, sweep
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import SELFIE_PROMPT, Add, AtLayers, Both, Interpolate, PlaceholderState
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]
PROMPT = "Red Hot Chili Peppers"
SEVERAL = TargetPrompt("Syria: Country in the Middle East, x x x of x", "x")
ONE = TargetPrompt("Syria: Country in the Middle East, x")
NEAR_TIE = 5e-5
N_NEW = 4
WAYS: dict[str, Any] = {
    "replace": None,
    "add": Add(),
    "interpolate": Interpolate(),
    "at_layers": AtLayers(4, 1),
    "add at_layers": Both(Add(), AtLayers(4, 1)),
    "interpolate at_layers": Both(AtLayers(4, 1), Interpolate()),
}


def hooked_logits(
    hf: Any, ids: list[int], positions: Sequence[int], v: Tensor, way: str, alpha: float, layer: int
) -> Tensor:
    """Return all logits of one forward pass with hooks that do what `way` says, in its words."""

    def write(module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = states.clone()
        for position in positions:
            if way.startswith("add"):
                new[0, position] = states[0, position] + alpha * v
            elif way.startswith("interpolate"):
                new[0, position] = (1 - alpha) * states[0, position] + alpha * v
            else:
                new[0, position] = alpha * v
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with contextlib.ExitStack() as stack, torch.no_grad():
        for number in (4, 1) if "at_layers" in way else (layer,):
            handle = plain_hf.blocks_of(hf)[number].register_forward_hook(write)
            stack.callback(handle.remove)
        return hf(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_way_to_write_equals_hooks_on_plain_hugging_face(
    architecture: str, backend: str, way: str, tiny: Tiny
) -> None:
    """Four placeholders, two target layers, α below and above 1: the texts are the same."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    table = sweep(
        model, PROMPT, layers=(5, 2), kinds="mlp_out", alphas=(0.25, 2), target_layer=(5, 2),
        write=WAYS[way], target_prompt=SEVERAL, max_new_tokens=N_NEW, scorer=no_scores,
        progress=False,
    ).table  # fmt: skip
    target = PatchedGenerator(model, SEVERAL).target
    assert len(target.positions) == 4
    source = [0, *model.tokenizer.encode(PROMPT, add_special_tokens=False)]
    for row in table.to_dict("records"):
        v = plain_hf.source_vectors(hf, source, "mlp_out", row["source_layer"])[-1]
        new: list[int] = []
        for _ in range(N_NEW):
            ids = [*target.tokens.ids, *new]
            logits = hooked_logits(
                hf, ids, target.positions, v, way, row["alpha"], row["target_layer"]
            )
            if int(logits[-1].argmax()) == 1:
                break
            new.append(int(logits[-1].argmax()))
        if row["margin"] > NEAR_TIE:
            assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True), row
    assert len(table) == 2 * 2 * 2
    assert (table["margin"] > NEAR_TIE).sum() >= 7, "near ties must be the exception"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_next_token_probabilities_of_every_way_equal_plain_hugging_face(
    backend: str, way: str, tiny: Tiny
) -> None:
    """The whole distribution, not the greedy token alone; and the ways differ from replace."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    generator = PatchedGenerator(model, SEVERAL)
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(4)) * 4
    alphas, layer = (0.25, 2.0), 2
    write = WAYS[way] or (lambda patch, alpha: patch)
    patches = [write(Patch(alpha * v, layer), alpha) for alpha in alphas]
    ids, positions = list(generator.target.tokens.ids), generator.target.positions
    for alpha, found in zip(alphas, generator.next_token(patches), strict=True):
        expected = hooked_logits(hf, ids, positions, v, way, alpha, layer)[-1].log_softmax(dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        replaced = hooked_logits(hf, ids, positions, v, "replace", alpha, layer)[-1]
        far = (found - replaced.log_softmax(dim=-1)).abs().max()
        assert (far > 5e-3) == (way != "replace")


def _table(model: LanguageModel, write: Any, alphas: Any, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "layers": (5, 2), "kinds": ("mlp_out", "resid_post"), "target_layer": (4, 1),
        "target_prompt": ONE, "max_new_tokens": N_NEW, "scorer": no_scores, "progress": False,
    }  # fmt: skip
    return sweep(model, PROMPT, alphas=alphas, write=write, **(given | settings)).table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_ends_of_every_way_are_known(architecture: str, backend: str, tiny: Tiny) -> None:
    """α = 0 of add and interpolate is the unpatched prompt; α = 1 of interpolate is replace."""
    model = tiny(architecture, backend)
    given: dict[str, Any] = {"target_prompt": SEVERAL, "kinds": "mlp_out", "max_new_tokens": 3}
    unpatched = PatchedGenerator(model, SEVERAL, max_new_tokens=3).unpatched()
    for write in (Add(), Interpolate(), WAYS["add at_layers"], WAYS["interpolate at_layers"]):
        table = _table(model, write, 0, **given)
        assert set(table["text"]) == {unpatched.text}
        assert table["entropy"].nunique() <= 2  # one number, but for rounding
    for writes in ([], [AtLayers(4, 1)]):
        mixed = _table(model, Both(Interpolate(), *writes), 1, **given)
        replaced = _table(model, Both(*writes), 1, **given)
        assert_same_readings(mixed, replaced, ["text"])
        assert mixed["text"].nunique() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_interpolating_is_counting_from_the_placeholders_state(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """At one placeholder and layer, (1 − α)·old + α·v is b + α·(v − b) with b = old."""
    model = tiny(architecture, backend)
    alphas = (0.25, 0.75, 1.5)
    one = _table(model, Interpolate(), alphas)
    other = _table(model, None, alphas, base=PlaceholderState())
    assert_same_readings(one, other, ["text", "log_probability"])
    assert one["text"].nunique() > 2


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: AtLayers(), "layers"),
        (lambda: AtLayers(0, 1.5), "layers"),  # type: ignore[arg-type]
        (lambda: AtLayers([0, 3]), "layers"),  # type: ignore[arg-type]
        (lambda: Both("add", AtLayers(2)), "writes"),  # type: ignore[arg-type]
    ],
)
def test_bad_ways_are_refused(make: Callable[[], Any], argument: str) -> None:
    """No layer, no whole number, no way to write."""
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        make()


def test_what_a_sweep_cannot_write_is_refused(tiny: Tiny) -> None:
    """No such layer; interpolation where α acts on the logits."""
    model = tiny("llama", "bridge")
    with pytest.raises(ValueError, match="^target_layer: "):
        _table(model, AtLayers(0, 6), 1)
    with pytest.raises(ValueError, match="^write: "):
        _table(model, Interpolate(), 2, guide="logits")


@pytest.mark.parametrize("name", ["llama", "smollm2"])
def test_the_prompt_has_five_placeholders(name: str, request: pytest.FixtureRequest) -> None:
    """Each of them is a token of its own, with SmolLM2's real tokenizer too."""
    assert len(SELFIE_PROMPT.locate(request.getfixturevalue(name), 20).positions) == 5
    assert SELFIE_PROMPT.few_shot_names == ("Portugal", "Frida Kahlo", "Toyota")
