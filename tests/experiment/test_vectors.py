"""Descriptions of given vectors, against plain Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from superscopes_tl import (
    LanguageModel,
    PatchedGenerator,
    SweepResult,
    TargetPrompt,
    capture,
    heatmap,
    read_vectors,
    sweep,
)
from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.experiment import (
    SweepInterrupted,
    make_patches,
    plan_vectors,
    read_vector,
    refine,
)
from superscopes_tl.experiment.vector_plans import NO_LAYER
from superscopes_tl.vectors import PlaceholderState, ResidMid
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.same import assert_same_readings
from tests.support.spies import spied
from tests.support.tiny_models import D_MODEL, tiny_hf

Tiny = Callable[[str, str], LanguageModel]
PROMPT = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country in the Middle East, x")


def _given(n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("unit", ["residual", "vector"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_reading_equals_plain_hugging_face(
    architecture: str, backend: str, unit: Any, tiny: Tiny
) -> None:
    """Vectors x target layers x α give the texts of one forward pass at a time, and no score."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    vectors = _given(4)
    table = read_vectors(
        model, vectors, alphas=(0.5, 3), target_layer=(5, 2), unit=unit,
        target_prompt=TARGET, max_new_tokens=5, progress=False,
    ).table  # fmt: skip
    tokens = PatchedGenerator(model, TARGET).target
    ids, positions = list(tokens.tokens.ids), tokens.positions
    for row in table.to_dict("records"):
        layer, v = row["target_layer"], vectors[row["position"]]
        old = plain_hf.source_vectors(hf, ids, "resid_post", layer)[positions[0]]
        patched = row["alpha"] * (v if unit == "vector" else v / v.norm() * old.norm())
        new, _ = plain_hf.generate(hf, ids, positions, patched, layer, n_new=5, eos=1)
        assert row["margin"] > NEAR_TIE
        assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True), row
        assert row["norm_ratio"] == pytest.approx(float(patched.norm() / old.norm()), rel=1e-4)
        assert math.isnan(row["score"])
        assert row["entropy"] > 0 or not row["description"]
    assert len(table) == 4 * 2 * 2
    assert table["text"].nunique() > 4, "a model that always writes the same proves nothing"
    assert list(table["position"]) == sorted(table["position"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_activation_given_as_a_vector_reads_as_in_a_sweep(
    backend: str, tiny: Tiny, word_overlap: Any
) -> None:
    """Readings are equal whether the vector is captured or given, scores included."""
    model = tiny("llama", backend)
    settings: dict[str, Any] = {
        "alphas": (1, 6), "target_layer": (4, 1), "target_prompt": TARGET,
        "max_new_tokens": 5, "scorer": word_overlap, "progress": False,
    }  # fmt: skip
    swept = sweep(model, PROMPT, layers=[5, 2], kinds="mlp_out", **settings).table
    seen = capture(model, PROMPT, kinds="mlp_out", layers=[5, 2])
    vectors = torch.stack([seen["mlp_out", layer][-1] for layer in (5, 2)])
    read = read_vectors(
        model, vectors, unit="vector", layers=[5, 2], references=PROMPT, **settings
    ).table
    same = ["prompt", "source_layer", "target_layer", "alpha", "text", "description", "score"]
    assert_same_readings(read, swept, same)
    assert set(read["kind"]) == {"vector"}


def test_names_references_and_layers_are_those_of_each_vector(
    tiny: Tiny, word_overlap: Any
) -> None:
    """Rows keep the order of the vectors, whatever the order of their references."""
    table = read_vectors(
        tiny("llama", "bridge"), _given(4), names=["a", "b", "c", "d"], layers=[3, 0, 3, 5],
        references=["East", None, "East", "band"], target_layer="same", alphas=(2, 1),
        scorer=word_overlap, max_new_tokens=3, progress=False,
    ).table  # fmt: skip
    assert list(table["token"]) == list("aabbccdd")
    assert list(table["alpha"]) == [2, 1] * 4
    assert list(table["prompt"][::2]) == ["East", "", "East", "band"]
    assert list(table["source_layer"][::2]) == [3, 0, 3, 5]
    assert table["target_layer"].equals(table["source_layer"])
    scored = table["score"].notna()
    assert scored.equals((table["prompt"] != "") & (table["description"] != ""))
    for row in table[scored].to_dict("records"):
        assert row["score"] == word_overlap([row["prompt"]], [row["description"]])[0]


def test_vectors_with_many_references_share_batches(tiny: Tiny, word_overlap: Any) -> None:
    """Six vectors with six references, 2 target layers and 2 α are 24 cells: two batches of 12."""
    model, spy = spied(tiny("llama", "bridge"))
    result = read_vectors(
        model, _given(6), references=list("uvwxyz"), target_layer=(5, 2),
        alphas=(1, 3), batch_size=12, scorer=word_overlap, max_new_tokens=3, progress=False,
    )  # fmt: skip
    assert spy.batches[0] == max(spy.batches) == 12
    assert spy.batches.count(12) >= 2
    assert result.provenance["planned_cells"] == 24
    assert result.provenance["complete"]


def test_without_a_reference_no_scorer_is_loaded(tiny: Tiny) -> None:
    """The sentence embeddings are not loaded."""
    (plan,) = plan_vectors(tiny("llama", "bridge"), _given(2), target_prompt=TARGET)
    assert plan.provenance()["config"]["scorer"] == "no_scores"
    assert plan.provenance()["tokens"]["labels"] == ["vector 0", "vector 1"]
    assert plan.provenance()["config"]["kinds"] == ["vector"]


def test_a_result_knows_its_vectors_by_their_numbers(tiny: Tiny) -> None:
    """Equal vectors have equal names in the column `mapping`, other ones other names."""
    model = tiny("llama", "bridge")
    names = [plan_vectors(model, v)[0].mapping_name for v in (_given(2), _given(2), _given(2, 3))]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("Scale(), of GivenVectors(<2 vectors ")
    assert names[0].endswith(", in residual norms")


def test_controls_stand_beside_each_vector(tiny: Tiny) -> None:
    """Same place, equal norm, no meaning; and the log-probability without any vector."""
    model = tiny("llama", "bridge")
    controls = ("unpatched", "alpha_zero", "random_direction", "shuffled_dimensions")
    table = read_vectors(
        model, _given(3), alphas=(1, 3), target_layer=(5, 2), target_prompt=TARGET,
        max_new_tokens=4, controls=(*controls, "unpatched_log_probability"), progress=False,
    ).table  # fmt: skip
    generator = PatchedGenerator(model, TARGET, max_new_tokens=4)
    assert set(table["unpatched_text"]) == {generator.unpatched().text}
    assert table["alpha_zero_text"].nunique() == 2  # one per target layer
    assert (table["random_direction_text"] != table["text"]).any()
    assert table[list(controls)].isna().all(axis=None)
    assert table["unpatched_log_probability"].notna().equals(table["description"] != "")


def test_results_of_vectors_are_ordinary_results(
    tiny: Tiny, word_overlap: Any, tmp_path: Path
) -> None:
    """File, best α, heatmap of one vector, refinement."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {
        "alphas": (1, 3, 9), "target_layer": 2, "references": "band", "scorer": word_overlap,
        "max_new_tokens": 3,
    }  # fmt: skip
    result = read_vectors(model, _given(3), progress=False, **settings)
    loaded = SweepResult.load(result.save(tmp_path / "v.zip"))
    assert loaded.table.equals(result.table)
    assert list(result.best()["token"]) == ["vector 0", "vector 1", "vector 2"]
    figure = heatmap(result, position=1)
    assert "vector 1" in figure.layout.title.text
    finer = refine(result, rounds=1, progress=False).table
    assert len(finer) > len(result.table)
    assert set(finer["token"]) == set(result.table["token"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_base_may_be_the_placeholders_own_state(backend: str, tiny: Tiny) -> None:
    """f(v) = b + α·(v − b) without a source prompt: α = 0 is the unpatched prompt."""
    model = tiny("llama", backend)
    table = read_vectors(
        model, _given(2), base=PlaceholderState(), unit="vector", alphas=(0, 1), target_layer=5,
        target_prompt=TARGET, max_new_tokens=4, progress=False,
    ).table  # fmt: skip
    unpatched = PatchedGenerator(model, TARGET, max_new_tokens=4).unpatched().text
    assert set(table[table["alpha"] == 0]["text"]) == {unpatched}
    with pytest.raises(ValueError, match="^prompt:"):
        read_vectors(model, _given(2), base=ResidMid(), target_prompt=TARGET, progress=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resized_vector_is_itself_at_alpha_1_whatever_the_base(backend: str, tiny: Tiny) -> None:
    """f(v) = b + α·(v − b) with v, however weak, as long as the stream, by plain Hugging Face."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    vectors = _given(3) * torch.tensor([[1e-4], [1.0], [1e3]])
    settings: dict[str, Any] = {"alphas": (1, 0), "target_layer": (5, 2), "target_prompt": TARGET}
    (plan,) = plan_vectors(model, vectors, base=PlaceholderState(), **settings)
    tokens = plan.generator.target
    ids, at = list(tokens.tokens.ids), tokens.positions[0]
    for cell, patch in zip(plan.cells, make_patches(plan), strict=True):
        layer, alpha = cell.target_layer, cell.alpha
        b = plain_hf.source_vectors(hf, ids, "resid_post", layer)[at]
        v = vectors[cell.position] / vectors[cell.position].norm() * b.norm()
        torch.testing.assert_close(patch.vector, b + alpha * (v - b), rtol=1e-4, atol=1e-4)
        assert alpha != 1 or patch.norm == pytest.approx(float(b.norm()), rel=1e-4)
    (kept,) = plan_vectors(model, vectors, base=PlaceholderState(), unit="vector", **settings)
    assert ", of GivenVectors(<3 vectors " in plan.mapping_name
    assert kept.mapping_name == plan.mapping_name.replace("resize=True", "resize=False")


def test_vectors_may_come_from_no_layer(tiny: Tiny) -> None:
    """NO_LAYER, alone or beside layers, is not the last layer."""
    model = tiny("llama", "bridge")
    for layers, expected in ((NO_LAYER, [-1, -1]), ([5, NO_LAYER], [5, -1]), (None, [-1, -1])):
        (plan,) = plan_vectors(model, _given(2), layers=layers, target_layer=3)
        assert [site.layer for site in plan.sites] == expected


def test_the_provenance_is_that_of_all_vectors(tiny: Tiny, word_overlap: Any) -> None:
    """Every position, layer and reference is named, and the scorer that scored."""
    result = read_vectors(
        tiny("llama", "bridge"), _given(3), references=[None, "a king", "band"], layers=[2, 5, 2],
        alphas=1, scorer=word_overlap, max_new_tokens=3, progress=False,
    )  # fmt: skip
    config = result.provenance["config"]
    assert sorted(config["positions"]) == [0, 1, 2]
    assert sorted(config["layers"]) == [2, 5]
    assert config["scorer"] == "word_overlap"
    assert config["kinds"] == ["vector"]
    assert result.provenance["prompts"] == ["a king", "band", ""]
    assert list(result.table["prompt"]) == ["", "a king", "band"]


def test_the_bar_counts_the_cells_of_all_plans(
    tiny: Tiny, word_overlap: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several references are several plans, with one progress bar."""
    settings: dict[str, Any] = {"alphas": (1, 2), "scorer": word_overlap, "max_new_tokens": 2}
    read_vectors(
        tiny("llama", "bridge"), _given(3), references=list("abc"), batch_size=4, **settings
    )
    shown = capsys.readouterr().err
    assert " 6/6 " in shown
    assert "cell" in shown
    assert " 0/6 " in shown


def test_one_vector_has_a_name(tiny: Tiny) -> None:
    """`read_vector` is `read_vectors` for one; a matrix is refused."""
    model = tiny("llama", "bridge")
    settings: dict[str, Any] = {
        "alphas": 2, "target_layer": 5, "max_new_tokens": 3, "progress": False
    }  # fmt: skip
    one = read_vector(model, _given(1)[0], name="bands", **settings).table
    many = read_vectors(model, _given(1).numpy(), names=["bands"], **settings).table
    assert_same_readings(one, many)
    assert list(one["token"]) == ["bands"]
    with pytest.raises(ValueError, match="^v:"):
        read_vector(model, _given(2))


def test_a_stopped_run_keeps_what_it_has(tiny: Tiny) -> None:
    """Ctrl+C in the second of two batches, with references of their own: the first is kept."""

    def stop(references: Any, candidates: Any) -> list[float]:
        if "c" in references:
            raise KeyboardInterrupt
        return [0.5] * len(candidates)

    with pytest.raises(SweepInterrupted, match="stopped after 2 of 4 cells") as stopped:
        read_vectors(
            tiny("llama", "bridge"), _given(4), references=list("abcd"), alphas=1, batch_size=2,
            scorer=stop, max_new_tokens=3, progress=False,
        )  # fmt: skip
    assert list(stopped.value.partial.table["prompt"]) == ["a", "b"]
    assert not stopped.value.partial.provenance["complete"]


@pytest.mark.parametrize(
    ("argument", "settings", "error"),
    [
        ("vectors", {"vectors": np.zeros((2, 31))}, ValueError),
        ("vectors", {"vectors": np.ones((32, 5))}, ValueError),
        ("vectors", {"vectors": np.zeros((0, 32))}, ValueError),
        ("vectors", {"vectors": np.full(32, np.nan)}, ValueError),
        ("vectors", {"vectors": "mlp"}, TypeError),
        ("names", {"names": ["a"]}, ValueError),
        ("names", {"names": ["a", "a"]}, ValueError),
        ("names", {"names": ["a", ""]}, ValueError),
        ("references", {"references": ["", "a"]}, ValueError),
        ("references", {"references": [3, "a"]}, TypeError),
        ("layers", {"layers": [1, 2, 3]}, ValueError),
        ("layers", {"layers": 6}, ValueError),
        ("layers", {"layers": [NO_LAYER, -2]}, ValueError),
        ("layers", {"layers": [[2], 1]}, TypeError),
        ("target_layer", {"target_layer": "same"}, ValueError),
        ("target_layer", {"target_layer": "same", "layers": [3, NO_LAYER]}, ValueError),
        ("target_layer", {"target_layer": "same", "layers": NO_LAYER}, ValueError),
        ("controls", {"controls": "other_prompt"}, ValueError),
        ("settings", {"positions": 0}, TypeError),
        ("alpha", {"alpha": 0}, TypeError),
        ("unit", {"unit": "stream"}, ValueError),
    ],
)
def test_bad_input_is_refused(
    argument: str, settings: dict[str, Any], error: type[Exception], tiny: Tiny
) -> None:
    """Before anything is generated, by the name of the argument."""
    with pytest.raises(error, match=f"^{argument}:"):
        plan_vectors(tiny("llama", "bridge"), **{"vectors": _given(2), **settings})
