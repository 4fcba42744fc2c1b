"""Invariants of capture, patching and sweeping, and the state after errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch

from superscopes_tl import (
    LanguageModel,
    Patch,
    PatchedGenerator,
    TargetPrompt,
    capture,
    iter_sweep,
    load_model,
    plan_sweep,
    sweep,
)
from superscopes_tl.experiment import SweepError, SweepInterrupted
from superscopes_tl.model import hook_name
from superscopes_tl.vectors import RandomDirection
from tests.conftest import BACKENDS
from tests.support.hooks import hooks_on
from tests.support.same import assert_same_readings
from tests.support.scorers import half
from tests.support.spies import spied
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country in the Middle East, x")

Tiny = Callable[[str, str], LanguageModel]


def quick(**settings: Any) -> dict[str, Any]:
    """Return sweep settings that are fast, with these changed."""
    return {
        "layers": (5, 2),
        "alphas": (1, 3),
        "target_prompt": TARGET,
        "max_new_tokens": 3,
        "scorer": half,
        "progress": False,
        **settings,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_block_middle_is_its_input_plus_its_attention(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """resid_mid = resid_pre + attn_out: the two kinds beside the paper's."""
    kinds = ("resid_pre", "attn_out", "resid_mid")
    activations = capture(tiny(architecture, backend), SOURCE, kinds=kinds, layers=(5, 2))
    for layer in (5, 2):
        total = activations["resid_pre", layer] + activations["attn_out", layer]
        torch.testing.assert_close(activations["resid_mid", layer], total, rtol=1e-5, atol=1e-5)


def test_activations_are_found_by_layer_number(tiny: Tiny) -> None:
    """Layer 2 of a capture of layers 5 and 2 is layer 2, not the third one."""
    model = tiny("llama", "bridge")
    some, every = capture(model, SOURCE, layers=(5, 2)), capture(model, SOURCE)
    assert torch.equal(some["mlp_out", 2], every["mlp_out", 2])
    with pytest.raises(ValueError, match="^activations:"):
        some["mlp_out", 0]


def test_the_random_control_keeps_the_norm_and_drops_the_direction() -> None:
    """Random vectors are as long as α·v, each of its own direction, equal for equal seeds."""
    v = torch.randn(7, 32)
    control = RandomDirection(seed=4)(3.0)(v)
    torch.testing.assert_close(control.norm(dim=-1), 3 * v.norm(dim=-1))
    assert torch.equal(control, RandomDirection(seed=4)(3.0)(v))
    directions = control / control.norm(dim=-1, keepdim=True)
    assert torch.pdist(directions).min() > 0.5, "every row has a direction of its own"
    torch.testing.assert_close(RandomDirection(seed=4)(6.0)(v), 2 * control)
    torch.testing.assert_close(RandomDirection(seed=4)(3.0)(v[:2]), control[:2])
    assert not torch.allclose(control, RandomDirection(seed=5)(3.0)(v))


def test_a_row_records_the_norm_of_what_was_patched(tiny: Tiny) -> None:
    """vector_norm is ||α·v||; norm_ratio is that over the residual norm that it replaced."""
    model = tiny("llama", "bridge")
    table = sweep(model, SOURCE, **quick(target_layer="same", alphas=(-3, 0, 15))).table
    vectors, own = capture(model, SOURCE), capture(model, TARGET.text, kinds="resid_post")
    for row in table.to_dict("records"):
        norm = abs(row["alpha"]) * float(vectors[row["kind"], row["source_layer"]][-1].norm())
        assert row["vector_norm"] == pytest.approx(norm, rel=1e-5)
        yardstick = float(own["resid_post", row["target_layer"]][-1].norm())
        assert row["norm_ratio"] == pytest.approx(norm / yardstick, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt()])
def test_an_interrupted_sweep_hands_over_what_it_has_and_leaves_no_hook(
    backend: str, error: BaseException, tiny: Tiny
) -> None:
    """After an error in the second batch the first is in .partial, and the hooks are gone."""
    model, spy = spied(tiny("llama", backend))
    before = hooks_on(model)

    def breaks_in_the_second_batch() -> None:
        if spy.batches.count(4) >= 2:  # the first step of a batch runs with the hooks on
            raise error

    spy.on_step = breaks_in_the_second_batch
    expected = SweepInterrupted if isinstance(error, KeyboardInterrupt) else SweepError
    with pytest.raises(expected, match=r"after 4 of 12 cells; .* \.partial") as raised:
        sweep(model, SOURCE, batch_size=4, **quick())
    partial = raised.value.partial
    assert len(partial) == 4
    assert partial.provenance["complete"] is False
    assert hooks_on(model) == before
    whole = sweep(tiny("llama", backend), SOURCE, batch_size=4, **quick()).table
    assert partial.table["text"].tolist() == whole["text"].tolist()[:4]


def test_an_iterator_that_is_closed_stops_and_leaves_no_hook(tiny: Tiny) -> None:
    """Readings arrive batch by batch; closing the iterator ends the sweep."""
    model = tiny("gpt2", "bridge")
    before = hooks_on(model)
    readings = iter_sweep(model, SOURCE, batch_size=2, **quick())
    first = next(readings)
    readings.close()
    assert (first.kind, first.source_layer, first.alpha) == ("resid_mid", 5, 1.0)
    assert hooks_on(model) == before


def _real_allocation_failure() -> Exception:
    """Return what torch raises on this machine's CPU for more memory than any machine has."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), _real_allocation_failure()],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_repeats_it(error: Exception, tiny: Tiny) -> None:
    """More than three rows fail: the sweep ends with the same table nevertheless."""
    model, spy = spied(tiny("llama", "bridge"))

    def small_only(rows: int) -> None:
        if rows > 3:
            raise error

    whole = sweep(model, SOURCE, **quick()).table
    spy.on_batch, spy.batches = small_only, []
    table = sweep(model, SOURCE, batch_size=12, **quick()).table
    assert spy.batches[:3] == [12, 6, 3]
    assert max(spy.batches[3:]) == 3
    assert_same_readings(table, whole, ["text"])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("fitting", [1, 2, 5])
def test_a_growing_batch_that_does_not_fit_shrinks_to_what_does(
    fitting: int, batch_size: int, tiny: Tiny
) -> None:
    """Down to one row, each row once and in order, and never above the batch size asked for."""
    generator = PatchedGenerator(tiny("llama", "bridge"), batch_size=batch_size)

    def work(rows: Sequence[int]) -> list[int]:
        if len(rows) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    found = list(generator.in_batches(work, range(11), 3 * batch_size))
    assert list(chain(*found)) == list(range(11))
    assert generator.batch_size <= batch_size


def test_out_of_memory_for_one_row_is_an_error_that_says_so(tiny: Tiny) -> None:
    """Where not even one row fits there is nothing left to halve."""
    model, spy = spied(tiny("llama", "bridge"))

    def never(rows: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    spy.on_batch = never
    generator = PatchedGenerator(model, TARGET, batch_size=2)
    with pytest.raises(MemoryError, match="^batch_size:"):
        generator.generate([Patch(torch.full((32,), k), 2) for k in (1.0, 2.0)])


def test_the_target_prefix_is_read_once(tiny: Tiny) -> None:
    """However many batches there are, the tokens before the placeholder are run once."""
    model, spy = spied(tiny("llama", "bridge"))
    sweep(model, SOURCE, batch_size=2, **quick())
    assert spy.prefills == [len(PatchedGenerator(model, TARGET).target.tokens) - 1]


def test_a_vector_that_overflows_half_precision_is_refused() -> None:
    """float16 ends at 65504: α·v beyond it would be patched as infinity."""
    model = load_model(tiny_hf("gpt2").half(), tiny_tokenizer(), backend="bridge")
    generator = PatchedGenerator(model, TARGET, max_new_tokens=2)
    with pytest.raises(ValueError, match="^vector:"):
        generator.generate([Patch(torch.full((32,), 7e4), 2)])


def test_an_overflow_inside_the_model_ends_that_row_alone(tiny: Tiny) -> None:
    """Logits that are no numbers give an empty text and a NaN margin, not a made-up text."""
    model, spy = spied(tiny("llama", "bridge"))
    generator = PatchedGenerator(model, TARGET, max_new_tokens=4, live_share=0)

    def overflows_later(logits: torch.Tensor) -> torch.Tensor:
        if len(spy.steps) == 7:  # the third step of the second run
            logits[1] = float("nan")
        return logits

    spy.change = overflows_later
    patches = [Patch(torch.ones(32), 5), Patch(torch.ones(32), 2)]
    whole, broken = generator.generate(patches), generator.generate(patches)
    assert broken[0] == whole[0]
    assert (broken[1].token_ids, broken[1].text) == ((), "")
    assert broken[1].margin != broken[1].margin


@pytest.mark.parametrize(
    "mapping",
    [lambda alpha: 3.0, lambda alpha: lambda v: v.sum(0), lambda alpha: lambda v: v / 0],
    ids=["no function", "another shape", "not finite"],
)
def test_a_mapping_is_checked_before_anything_is_generated(mapping: Any, tiny: Tiny) -> None:
    """What a mapping returns is named with its α, before the first batch."""
    model, spy = spied(tiny("llama", "bridge"))
    with pytest.raises((ValueError, TypeError), match=r"^mapping\(1\):"):
        sweep(model, SOURCE, **quick(mapping=mapping))
    assert not spy.batches


@pytest.mark.parametrize(("own", "expected"), [(None, 10), (33, 33), (2048, 10), (0, 10)])
def test_a_model_may_state_a_short_length_of_its_own(
    own: int | None, expected: int, tiny: Tiny
) -> None:
    """10 as in the paper, or the model's own length where that is fit for a description."""
    model = dataclasses.replace(tiny("llama", "bridge"), max_new_tokens=own)
    assert PatchedGenerator(model, TARGET).max_new_tokens == expected


def test_a_generator_patches_vectors_of_its_own_width_only(tiny: Tiny) -> None:
    """A vector of another model is refused."""
    generator = PatchedGenerator(tiny("llama", "bridge"), TARGET)
    with pytest.raises(ValueError, match="^vector:"):
        generator.generate([Patch(torch.zeros(31), 2)])


def test_the_hooks_are_on_for_one_step_alone(tiny: Tiny) -> None:
    """The hooks are on for the prompt's step, and off while new tokens are generated."""
    model, spy = spied(tiny("llama", "bridge"))
    generator = PatchedGenerator(model, TARGET, max_new_tokens=4)
    idle, on = hooks_on(model), []
    spy.on_step = lambda: on.append(hooks_on(model) - idle)
    generator.generate([Patch(torch.ones(32), 5), Patch(torch.ones(32), 2)])
    assert on[0] > 0
    assert on[1:] == [0, 0, 0]


def test_hook_names_are_those_of_transformer_lens(tiny: Tiny) -> None:
    """The names in use exist on the model."""
    model = tiny("llama", "bridge")
    assert hook_name("resid_post", 5) == "blocks.5.hook_resid_post"
    assert all(hook_name(kind, 5) in model.tl.hook_dict for kind in model.kinds)


def test_a_plan_knows_its_cells_and_its_cost_before_it_runs(tiny: Tiny) -> None:
    """2 layers x 3 kinds x 2 alphas x 2 target layers are 24 cells, as many texts."""
    settings = quick(target_layer=(4, 1), batch_size=5)
    settings.pop("progress")
    plan = plan_sweep(tiny("llama", "bridge"), SOURCE, **settings)
    assert (len(plan.cells), plan.n_texts) == (24, 24)
    assert plan.with_settings(generate="best").n_texts == 12
    assert 0 < plan.estimate_seconds() < 60


def test_a_sweep_records_where_it_comes_from(tiny: Tiny) -> None:
    """Model, versions, prompts, tokens and settings are in the provenance."""
    result = sweep(tiny("llama", "bridge"), SOURCE, **quick(target_layer="same"))
    provenance = result.provenance
    assert provenance["complete"] is True
    assert provenance["prompt"] == SOURCE
    assert provenance["tokens"]["ids"][0] == 0
    assert provenance["target_prompt"]["positions"] == [len(provenance["target_prompt"]["ids"]) - 1]
    assert provenance["model"]["weight_processing"] == "none"
    assert provenance["model"]["dtype"] == "float32"
    assert provenance["config"]["target_layer"] == "same"
    assert provenance["config"]["mapping"] == "Scale()"
    assert provenance["config"]["max_new_tokens"] == 3


@pytest.mark.parametrize(
    "prompt", ["🌶️ Red Hot 🌶️", "שלום עולם", "one\ntwo\n\nthree", "no no no no", "naïve Ænima 東京"]
)
def test_any_language_can_be_read(prompt: str, tiny: Tiny) -> None:
    """Emoji, right-to-left text, newlines and repeated tokens are prompts like any other."""
    settings = quick(positions=slice(None), kinds="mlp_out", layers=2, alphas=1)
    result = sweep(tiny("gpt2", "bridge"), prompt, **settings)
    model_tokens = result.provenance["tokens"]
    assert result.table["position"].nunique() == len(model_tokens["ids"]) - 1
    assert result.provenance["prompt"] == prompt
    assert result._repr_html_()
