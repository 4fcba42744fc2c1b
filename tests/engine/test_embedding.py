"""The input embedding as the place that is patched, against Hugging Face's `inputs_embeds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from superscopes_tl import (
    LanguageModel,
    Patch,
    PatchedGenerator,
    SweepConfig,
    SweepResult,
    TargetPrompt,
    evaluate,
    plan_sweep,
    sweep,
)
from superscopes_tl.cli.options import parse_targets
from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.errors import UnavailableKindError
from superscopes_tl.figures import heatmap, layer_grid
from superscopes_tl.model import EMBED
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import Add, AtLayers, Both, PlaceholderState
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf

Tiny = Callable[[str, str], LanguageModel]
SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Syria: Country, x is a band")
SEVERAL = TargetPrompt("The x and the x of Peppers", "x")
FAST: dict[str, Any] = {"max_new_tokens": 3, "scorer": no_scores, "progress": False}


def embedded(
    hf: Any, ids: Sequence[int], positions: Sequence[int], vector: Tensor, *, keep: float = 0.0
) -> Tensor:
    """Return a prompt's input embeddings, with a vector written at some positions."""
    states = hf.get_input_embeddings()(torch.tensor([list(ids)])).detach().clone()
    for position in positions:
        states[0, position] = keep * states[0, position] + vector
    return states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_texts_equal_generation_from_input_embeddings(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Llama, learned positions and scaled embeddings: token for token, replaced and added."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    source = [0, *model.tokenizer.encode(SOURCE, add_special_tokens=False)]
    for target, write in ((TARGET, None), (SEVERAL, Add())):
        result = sweep(
            model, SOURCE, layers=(5, 2), kinds="resid_post", alphas=(1, 9), write=write,
            target_layer=("embed", 0), target_prompt=target, **FAST,
        )  # fmt: skip
        seen = PatchedGenerator(model, target).target
        rows = result.at(target_layer="embed").table
        assert sorted(set(result.table["target_layer"])) == [EMBED, 0]
        for row in rows[rows["margin"] > NEAR_TIE].to_dict("records"):
            v = plain_hf.source_vectors(hf, source, "resid_post", row["source_layer"])[-1]
            states = embedded(
                hf, seen.tokens.ids, seen.positions, row["alpha"] * v, keep=float(write is not None)
            )
            with torch.no_grad():
                (ids,) = hf.generate(
                    inputs_embeds=states, attention_mask=torch.ones(states.shape[:2]),
                    do_sample=False, max_new_tokens=3, eos_token_id=1, pad_token_id=1,
                )  # fmt: skip
            expected = ids.tolist()[: ids.tolist().index(1)] if 1 in ids else ids.tolist()
            assert row["text"] == model.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_known_texts_are_as_likely_as_after_input_embeddings(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Rows at the embedding and rows that grow later, of three texts, share one batch."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    torch.manual_seed(4)
    texts = [[7, 40, 5], [9, 8, 7], [30, 31, 40]] * 3
    layers: list[Any] = ["embed", 2, 5, 0, "embed", None, "embed", "embed", 2]
    patches = [Patch(torch.randn(32) * 4, layer) for layer in layers]
    for target in (TARGET, SEVERAL):
        generator = PatchedGenerator(model, target)
        found = generator.log_probabilities(patches, texts)
        ids, positions = list(generator.target.tokens.ids), generator.target.positions
        for patch, text, likely in zip(patches, texts, found, strict=True):
            alone = generator.log_probabilities([patch], [text])[0]
            assert likely == pytest.approx(alone, abs=1e-3)
            if patch.target_layer != "embed":
                continue
            states = embedded(hf, [*ids, *text], positions, patch.vector)
            with torch.no_grad():
                logits = hf(inputs_embeds=states, use_cache=False).logits[0]
            rows = logits.log_softmax(-1)[len(ids) - 1 :]
            expected = [float(rows[step, token]) for step, token in enumerate(text)]
            assert likely == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_norms_bases_and_ways_to_write_know_the_embedding(architecture: str, tiny: Tiny) -> None:
    """A residual norm is that of the placeholder's embedding; adding nothing changes nothing."""
    model, hf = tiny(architecture, "bridge"), tiny_hf(architecture)
    plan = plan_sweep(
        model, SOURCE, layers=2, alphas=(0, 2), unit="residual", target_layer="embed",
        target_prompt=TARGET, scorer=no_scores, max_new_tokens=3,
    )  # fmt: skip
    seen = plan.generator.target
    own = embedded(hf, seen.tokens.ids, (), torch.zeros(32))[0, seen.positions[0]]
    assert float(plan.generator.placeholder_norms[EMBED]) == pytest.approx(float(own.norm()))
    table = plan.run(progress=False).table
    assert table["norm_ratio"].tolist() == pytest.approx(table["alpha"].tolist())
    (base,) = PlaceholderState()(plan, [(plan.sites[0], EMBED)])
    assert torch.allclose(base, own)
    nothing = Patch(torch.zeros(32), "embed", keep=1.0)
    same = plan.generator.next_token([nothing, Patch(own, "embed"), Patch(own, None)])
    assert torch.allclose(same[:2], same[2], atol=1e-3)


def test_the_embedding_has_its_name_wherever_a_layer_is_named(
    llama: LanguageModel, tmp_path: Path
) -> None:
    """Plans, saved runs, evaluations, figures and options; −1 stays the last layer."""
    several = {"layers": 2, "kinds": "mlp_out", "alphas": (1, 3), **FAST}
    result = sweep(llama, SOURCE, target_layer=(-1, "embed"), **several)
    assert result.provenance["config"]["target_layer"] == [5, "embed"]
    again = SweepResult.load(result.save(tmp_path / "run.zip"))
    assert again.at(target_layer="embed").table["target_layer"].tolist() == [EMBED] * 2
    grid = layer_grid(again, value="vector_norm")
    assert grid.layout.xaxis.ticktext == ("embed", "5")
    hover = heatmap(again, value="vector_norm", target_layer="embed").data[0].customdata[0][0]
    assert "→ layer embed" in hover
    config = SweepConfig(layers=2, kinds="mlp_out", alphas=(1, 3), target_layer="embed")
    names = [SOURCE, "Syria"]
    evaluated = evaluate(
        llama, names, tmp_path / "found.db", replace(config, scorer=no_scores), progress=False
    )
    assert set(evaluated.table["target_layer"]) == {EMBED}
    assert parse_targets("embed,0-2") == ["embed", 0, 1, 2]
    assert parse_targets("Same") == "same"
    with pytest.raises(TypeError, match="target_layer"):
        sweep(llama, SOURCE, target_layer=("embed", "first"), **several)
    with pytest.raises(ValueError, match="target_layer"):
        SweepConfig(target_layer="embedding")  # type: ignore[arg-type]


def test_a_patch_at_several_layers_begins_at_the_embedding(llama: LanguageModel) -> None:
    """`AtLayers("embed", 3)` writes twice, in generation as in a growing batch."""
    write = Both(Add(), AtLayers("embed", 3))
    assert repr(AtLayers("embed", 3)) == "AtLayers('embed', 3)"
    generator = PatchedGenerator(llama, TARGET)
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    patch = write(Patch(v, 0), 1.0)
    found = generator.log_probabilities([patch, Patch(v, 3), Patch(v, "embed")], [[7, 40]] * 3)
    first = generator.next_token([patch])[0]
    assert found[0][0] == pytest.approx(float(first[7]), abs=1e-3)
    assert len({round(row[0], 4) for row in found}) == 3


def test_a_model_without_that_hook_point_says_so(llama: LanguageModel) -> None:
    """Its blocks can be patched as before."""
    model = replace(llama, embeds=False)
    assert PatchedGenerator(model, TARGET).placeholder_states.shape[0] == 6
    with pytest.raises(UnavailableKindError, match="target_layer"):
        plan_sweep(model, SOURCE, target_layer="embed")
