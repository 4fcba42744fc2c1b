"""Invariants of capture, patching and sweeping, and what remains after things go wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import (
    LanguageModel,
    Patch,
    PatchedGenerator,
    TargetPrompt,
    capture,
    iter_sweep,
    plan_sweep,
    sweep,
)
from superscopes_tl.experiment import SweepError, SweepInterrupted
from superscopes_tl.model import hook_name
from superscopes_tl.vectors import RandomDirection, Scale
from tests.conftest import BACKENDS, tiny_model
from tests.support.same import assert_same_readings
from tests.support.tiny_models import ARCHITECTURES

SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country in the Middle East, x")

Tiny = Callable[[str, str], LanguageModel]


def hooks_on(model: LanguageModel) -> int:
    """Count the functions that are attached to the model's hook points."""
    return sum(
        len(point.fwd_hooks) + len(point._forward_hooks) for point in model.tl.hook_dict.values()
    )


def quick(**settings: Any) -> dict[str, Any]:
    """Return sweep settings that are fast, with these changed."""
    return {
        "layers": (5, 2),
        "alphas": (1, 3),
        "target_prompt": TARGET,
        "max_new_tokens": 3,
        "scorer": lambda references, candidates: [0.5] * len(candidates),
        "progress": False,
        **settings,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "mistral"])
def test_block_output_is_its_middle_plus_its_mlp(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """resid_post = resid_mid + mlp_out, also where a norm follows the MLP."""
    activations = capture(tiny(architecture, backend), SOURCE, layers=(5, 2))
    for layer in (5, 2):
        total = activations["resid_mid", layer] + activations["mlp_out", layer]
        torch.testing.assert_close(activations["resid_post", layer], total, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(ValueError, match="activations: expected one of .*Fix: name it"):
        some["mlp_out", 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_last_layer_every_positive_alpha_writes_the_same(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Nothing is added behind the last block, and the final norm cancels a scale.

    Only the first token is decided by the scaled state alone; what follows has attended to the
    placeholder in earlier blocks, where it was not patched.
    """
    settings = quick(alphas=(0.5, 1, 3, 15, 100), target_layer=5, kinds=("mlp_out", "resid_post"))
    table = sweep(tiny(architecture, backend), SOURCE, **settings).table
    assert (table.groupby(["kind", "source_layer"])["text"].nunique() == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_a_vector_into_its_own_place_changes_nothing(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """The placeholder's own block output at α = 1 gives the unpatched text, at every layer."""
    model = tiny(architecture, backend)
    generator = PatchedGenerator(model, TARGET, max_new_tokens=6)
    own = capture(model, TARGET.text, kinds="resid_post")
    position = generator.target.positions[0]
    patches = [Patch(own["resid_post", layer][position], layer) for layer in (5, 2, 0)]
    unpatched = generator.unpatched()
    for generation in generator.generate(patches):
        assert generation.token_ids == unpatched.token_ids


@settings(max_examples=25, deadline=None)
@given(
    factor=st.floats(0.01, 100, allow_nan=False),
    alpha=st.floats(-20, 20, allow_nan=False),
    layer=st.integers(0, 5),
    seed=st.integers(0, 5),
)
def test_amplifying_is_the_same_as_reading_a_longer_vector(
    factor: float, alpha: float, layer: int, seed: int
) -> None:
    """α·(c·v) and (α·c)·v are one patch: only the product counts."""
    model = tiny_model("qwen2", "bridge")
    generator = PatchedGenerator(model, TARGET, max_new_tokens=3)
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    one, other = generator.generate(
        [Patch(Scale()(alpha)(factor * v), layer), Patch(Scale()(alpha * factor)(v), layer)]
    )
    if min(one.margin, other.margin) > 1e-3:
        assert one.token_ids == other.token_ids


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


def test_rows_come_in_the_order_of_the_settings(tiny: Tiny) -> None:
    """Position, kind, source layer, target layer, α: each as it was given."""
    settings = quick(
        positions=(-1, 2), kinds=("mlp_out", "resid_mid"), target_layer=(4, 1), alphas=(3, 1)
    )
    table = sweep(tiny("llama", "bridge"), SOURCE, **settings).table
    columns = ["position", "kind", "source_layer", "target_layer", "alpha"]
    last = table["position"].iloc[0]
    expected = [
        (position, kind, layer, target, alpha)
        for position in (last, 2)
        for kind in ("mlp_out", "resid_mid")
        for layer in (5, 2)
        for target in (4, 1)
        for alpha in (3.0, 1.0)
    ]
    assert list(table[columns].itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_hook_stays_after_a_sweep(backend: str, tiny: Tiny) -> None:
    """A finished sweep leaves the model as it was."""
    model = tiny("llama", backend)
    before = hooks_on(model)
    sweep(model, SOURCE, **quick())
    assert hooks_on(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt()])
def test_an_interrupted_sweep_hands_over_what_it_has_and_leaves_no_hook(
    backend: str, error: BaseException, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first batch something breaks: its cells are in .partial, the hooks are gone."""
    model = tiny("llama", backend)
    before, step, batch = hooks_on(model), PatchedGenerator.step, PatchedGenerator._generate_batch
    batches: list[int] = []

    def counted(self: PatchedGenerator, patches: Any) -> Any:
        batches.append(len(patches))
        return batch(self, patches)

    def breaks_in_the_second_batch(self: PatchedGenerator, tokens: Any, cache: Any) -> Any:
        if len(batches) == 2:  # the first step of a batch runs with the hooks on
            raise error
        return step(self, tokens, cache)

    monkeypatch.setattr(PatchedGenerator, "_generate_batch", counted)
    monkeypatch.setattr(PatchedGenerator, "step", breaks_in_the_second_batch)
    expected = SweepInterrupted if isinstance(error, KeyboardInterrupt) else SweepError
    with pytest.raises(expected, match=r"after 4 of 12 cells; .* \.partial") as raised:
        sweep(model, SOURCE, batch_size=4, **quick())
    partial = raised.value.partial
    assert len(partial) == 4
    assert partial.provenance["complete"] is False
    assert hooks_on(model) == before
    monkeypatch.undo()
    whole = sweep(model, SOURCE, batch_size=4, **quick()).table
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


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), _real_allocation_failure()],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(
    error: Exception, progress: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than three rows fail: the sweep ends with the same table nevertheless."""
    model = tiny("llama", "bridge")
    whole = sweep(model, SOURCE, **quick()).table
    start = PatchedGenerator._start
    sizes: list[int] = []

    def small_only(self: PatchedGenerator, rows: int, new: int) -> Any:
        sizes.append(rows)
        if rows > 3:
            raise error
        return start(self, rows, new)

    monkeypatch.setattr(PatchedGenerator, "_start", small_only)
    table = sweep(model, SOURCE, batch_size=12, **quick(progress=progress)).table
    # With a progress bar the estimate finds out, else the first batch.
    assert sizes[:3] == [12, 6, 3]
    assert max(sizes[3:]) == 3
    assert_same_readings(table, whole, ["text"])


def test_out_of_memory_for_one_row_is_an_error_that_says_so(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even one row fits there is nothing left to halve."""
    generator = PatchedGenerator(tiny("llama", "bridge"), TARGET, batch_size=2)

    def never(rows: int, new: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "_start", never)
    with pytest.raises(MemoryError, match="batch_size: not even one row .* Fix: a shorter"):
        generator.generate([Patch(torch.zeros(32), 2)] * 4)


def test_the_batch_size_is_capped_by_free_memory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of llama takes 2·(placeholder + new)·6 layers·2 heads·8 numbers·4 bytes of cache.

    The tokens before the placeholder are stored once, whatever the batch size.
    """
    model = tiny("llama", "bridge")
    length = 1 + 10
    row = 2 * length * 6 * 2 * 8 * 4

    class Memory:
        available = 4 * 5 * row + 3  # a quarter of it may be used: five rows

    monkeypatch.setattr("superscopes_tl.engine.memory.psutil.virtual_memory", Memory)
    assert PatchedGenerator(model, TARGET).batch_size == 5


def test_the_target_prefix_is_read_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are, the tokens before the placeholder are run once."""
    model = tiny("llama", "bridge")
    lengths: list[int] = []
    prefill = type(model.decoder).prefill

    def spy(self: Any, tokens: torch.Tensor) -> Any:
        lengths.append(tokens.shape[1])
        return prefill(self, tokens)

    monkeypatch.setattr(type(model.decoder), "prefill", spy)
    sweep(model, SOURCE, batch_size=2, **quick())
    assert lengths == [len(PatchedGenerator(model, TARGET).target.tokens) - 1]


def test_a_vector_that_overflows_half_precision_is_refused(tiny: Tiny) -> None:
    """float16 ends at 65504: α·v beyond it would be patched as infinity."""
    model = tiny("gpt2", "bridge")
    half = PatchedGenerator(_in_half_precision(model), TARGET, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"vector: expected numbers that torch.float16 .* 7e\+04"):
        half.generate([Patch(torch.full((32,), 7e4), 2)])


def test_an_overflow_inside_the_model_ends_that_row_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are no numbers give an empty text and a NaN margin, not a made-up text."""
    monkeypatch.setattr("superscopes_tl.engine.decoding.LIVE_SHARE", 0)  # rows keep their numbers
    generator = PatchedGenerator(tiny("llama", "bridge"), TARGET, max_new_tokens=4)
    step, calls = generator.step, []

    def overflows_later(tokens: Any, cache: Any) -> torch.Tensor:
        logits = step(tokens, cache)
        calls.append(1)
        if len(calls) == 7:  # the third step of the second run
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(generator, "step", overflows_later)
    patches = [Patch(torch.ones(32), 5), Patch(torch.ones(32), 2)]
    whole, broken = generator.generate(patches), generator.generate(patches)
    assert broken[0] == whole[0]
    assert (broken[1].token_ids, broken[1].text) == ((), "")
    assert broken[1].margin != broken[1].margin


def _in_half_precision(model: LanguageModel) -> LanguageModel:
    from superscopes_tl import load_model
    from tests.support.tiny_models import tiny_hf, tiny_tokenizer

    return load_model(tiny_hf("gpt2").half(), tiny_tokenizer(), backend="bridge")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (lambda alpha: 3.0, r"mapping\(1\): expected a mapping function, .* got float 3.0"),
        (lambda alpha: lambda v: v.sum(0), r"mapping\(1\): expected vectors of shape \(6, 32\)"),
        (lambda alpha: lambda v: v / 0, r"mapping\(1\): expected numbers that torch.float32 can"),
    ],
    ids=["no function", "another shape", "not finite"],
)
def test_a_mapping_is_checked_before_anything_is_generated(
    mapping: Any, message: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mapping returns is named with its α, before the first batch."""
    monkeypatch.setattr(PatchedGenerator, "batches", lambda self, patches: pytest.fail("ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(tiny("llama", "bridge"), SOURCE, **quick(mapping=mapping))


@pytest.mark.parametrize(("own", "expected"), [(None, 10), (33, 33), (2048, 10), (0, 10)])
def test_a_model_may_state_a_short_length_of_its_own(
    own: int | None, expected: int, tiny: Tiny
) -> None:
    """10 as in the paper, unless the model asks for something fit for a description."""
    model = dataclasses.replace(tiny("llama", "bridge"), max_new_tokens=own)
    assert PatchedGenerator(model, TARGET).max_new_tokens == expected


def test_a_generator_patches_vectors_of_its_own_width_only(tiny: Tiny) -> None:
    """A vector of another model is refused, with both widths."""
    generator = PatchedGenerator(tiny("llama", "bridge"), TARGET)
    with pytest.raises(ValueError, match=r"vector: expected 32 numbers.*got shape \(31,\)"):
        generator.generate([Patch(torch.zeros(31), 2)])


def test_the_hooks_are_on_for_one_step_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched once, at the prompt's step; never while new tokens are written."""
    model = tiny("llama", "bridge")
    generator = PatchedGenerator(model, TARGET, max_new_tokens=4)
    idle, step, on = hooks_on(model), generator.step, []

    def spy(tokens: Any, cache: Any) -> Any:
        on.append(hooks_on(model) - idle)
        return step(tokens, cache)

    monkeypatch.setattr(generator, "step", spy)
    generator.generate([Patch(torch.ones(32), 5), Patch(torch.ones(32), 2)])
    assert on[0] > 0
    assert on[1:] == [0, 0, 0]


def test_hook_names_are_those_of_transformer_lens(tiny: Tiny) -> None:
    """The names in use exist on the model."""
    model = tiny("llama", "bridge")
    assert hook_name("resid_post", 5) == "blocks.5.hook_resid_post"
    assert all(hook_name(kind, 5) in model.tl.hook_dict for kind in model.kinds)


def test_a_plan_knows_its_cells_and_its_cost_before_it_runs(tiny: Tiny) -> None:
    """2 layers x 3 kinds x 2 alphas x 2 target layers are 24 cells, in 5 batches of 5."""
    settings = quick(target_layer=(4, 1), batch_size=5)
    settings.pop("progress")
    plan = plan_sweep(tiny("llama", "bridge"), SOURCE, **settings)
    assert (len(plan.cells), plan.n_batches) == (24, 5)
    assert 0 < plan.estimate_seconds() < 60


def test_progress_shows_cells_batches_and_expected_time(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar says what is ahead before the first cell is done, and counts to the end."""
    sweep(tiny("llama", "bridge"), SOURCE, **quick(progress=True, batch_size=5))
    shown = capsys.readouterr().err
    assert re.search(r"12 cells in 3 batches, (under 1 s|about \d+ s)", shown)
    assert "12/12" in shown


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
    "prompt",
    [
        "🌶️ Red Hot 🌶️",
        "שלום עולם",
        "مرحبا بالعالم",
        "one\ntwo\n\nthree",
        "no no no no",
        "naïve Ænima 東京",
    ],
)
def test_any_language_can_be_read(prompt: str, tiny: Tiny) -> None:
    """Emoji, right-to-left text, newlines and repeated tokens are prompts like any other."""
    result = sweep(tiny("gpt2", "bridge"), prompt, **quick(positions=slice(None)))
    model_tokens = result.provenance["tokens"]
    assert result.table["position"].nunique() == len(model_tokens["ids"]) - 1
    assert result.provenance["prompt"] == prompt
    assert result._repr_html_()
