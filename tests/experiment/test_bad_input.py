"""Bad input ends before any work, with a message that begins with the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from superscopes_tl import (
    KINDS,
    LanguageModel,
    PatchedGenerator,
    SweepConfig,
    TargetPrompt,
    capture,
    iter_sweep,
    plan_sweep,
    sweep,
)
from superscopes_tl.errors import PlaceholderError, UnavailableKindError

PROMPT = "Red Hot Chili Peppers"
LONG = "the " * 300


@pytest.fixture
def neox(tiny: Callable[[str, str], LanguageModel]) -> LanguageModel:
    """A model whose attention and MLP run in parallel: it has no `resid_mid`."""
    return tiny("neox", "bridge")


@pytest.fixture
def module_calls(llama: LanguageModel, neox: LanguageModel) -> Iterator[list[str]]:
    """The class of every torch module that is called; the models are loaded before."""
    calls: list[str] = []
    handle = register_module_forward_pre_hook(
        lambda module, inputs: calls.append(type(module).__name__)
    )
    yield calls
    handle.remove()


def test_the_spy_sees_a_forward_pass(
    llama: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """The spy of the tests below notices a forward pass."""
    plan_sweep(llama, PROMPT, scorer=word_overlap)
    assert module_calls == []
    capture(llama, PROMPT, kinds="resid_post", layers=[5, 2])
    assert len(module_calls) > llama.n_layers


WITHOUT_A_MODEL: list[tuple[str, Any, type[Exception]]] = [
    ("alphas", [], ValueError),
    ("alphas", [1, math.nan], ValueError),
    ("alphas", [math.inf], ValueError),
    ("alphas", -math.inf, ValueError),
    ("alphas", "high", TypeError),
    ("alphas", "12", TypeError),
    ("alphas", None, TypeError),
    ("target_layer", "all", ValueError),
    ("target_prompt", "Syria: Country", PlaceholderError),
    ("target_prompt", TargetPrompt("What is x?", answer="It is"), ValueError),
    ("source_template", "no place for a name", ValueError),
    ("about", " ", ValueError),
    ("reference", "", ValueError),
    ("reference", {PROMPT: 5}, TypeError),
    ("unit", "stream", ValueError),
    ("guide", "text", ValueError),
    ("generate", "some", ValueError),
    ("chat", "yes", TypeError),
    ("draw", -1, ValueError),
    ("others", 0, ValueError),
    ("controls", "nothing", ValueError),
    ("scorer", 5, TypeError),
    ("score_on", "all", ValueError),
    ("mapping", 3, TypeError),
    ("mapping", None, TypeError),
    ("vectors", 3, TypeError),
    ("base", "mean", TypeError),
    ("write", 3, TypeError),
]

WITH_A_MODEL: list[tuple[str, Any, type[Exception]]] = [
    ("layers", [5, 6], ValueError),
    ("layers", [-7], ValueError),
    ("layers", [], ValueError),
    ("layers", [2.5], TypeError),
    ("layers", 2.5, TypeError),
    ("layers", "all", TypeError),
    ("layers", [True], TypeError),
    ("target_layer", 6, ValueError),
    ("target_layer", -7, ValueError),
    ("target_layer", [5, 99], ValueError),
    ("target_layer", [], ValueError),
    ("target_layer", 2.5, TypeError),
    ("positions", 99, ValueError),
    ("positions", -6, ValueError),
    ("positions", [3, 5], ValueError),
    ("positions", "Adele", ValueError),
    ("positions", [], ValueError),
    ("positions", 2.5, TypeError),
    ("kinds", "resid_md", ValueError),
    ("kinds", ["mlp_out", "z"], ValueError),
    ("kinds", [], ValueError),
    ("kinds", 5, TypeError),
    ("target_prompt", LONG + "x", ValueError),
    ("max_new_tokens", 0, ValueError),
    ("max_new_tokens", -1, ValueError),
    ("max_new_tokens", 2.5, TypeError),
    ("max_new_tokens", True, TypeError),
    ("max_new_tokens", 256, ValueError),
    ("batch_size", 0, ValueError),
    ("batch_size", 1.5, TypeError),
]


@pytest.mark.parametrize(("setting", "value", "error"), WITHOUT_A_MODEL)
def test_settings_validate_themselves(setting: str, value: Any, error: type[Exception]) -> None:
    """What needs no model is refused before one is loaded."""
    with pytest.raises(error, match=rf"^{setting}[.\w]*: expected .*, got .*\. Fix: "):
        SweepConfig(**{setting: value})


@pytest.mark.parametrize(("setting", "value", "error"), WITH_A_MODEL)
def test_a_bad_setting_is_explained_before_any_work(
    setting: str, value: Any, error: type[Exception], llama: LanguageModel,
    module_calls: list[str], word_overlap: Any,
) -> None:  # fmt: skip
    """Each bad setting is named, with what was expected, what came and what to do."""
    settings: dict[str, Any] = {"scorer": word_overlap, setting: value}
    with pytest.raises(error, match=rf"(?s)^{setting}: expected .*, got .*\. Fix: "):
        sweep(llama, PROMPT, progress=False, **settings)
    assert module_calls == []


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("", ValueError), (" \n\t", ValueError), (5, TypeError), (None, TypeError), (["a"], TypeError),
     (LONG, ValueError)],
)  # fmt: skip
def test_a_bad_prompt_is_explained_before_any_work(
    prompt: Any, error: type[Exception], llama: LanguageModel, module_calls: list[str],
    word_overlap: Any,
) -> None:  # fmt: skip
    """An empty, blank, overlong or non-text prompt never reaches the model."""
    with pytest.raises(error, match="^prompt:"):
        sweep(llama, prompt, progress=False, scorer=word_overlap)
    assert module_calls == []


@pytest.mark.parametrize(
    ("text", "placeholder", "error", "field"),
    [
        ("", "x", ValueError, "target_prompt.text"),
        ("  ", "x", ValueError, "target_prompt.text"),
        ("the x", "", ValueError, "target_prompt.placeholder"),
        (5, "x", TypeError, "target_prompt.text"),
        ("the x", 5, TypeError, "target_prompt.placeholder"),
        ("Syria: Country, x", "?", PlaceholderError, "target_prompt"),
        ("Syria: Country, x", "entity", PlaceholderError, "target_prompt"),
    ],
)
def test_a_target_prompt_is_checked_when_it_is_made(
    text: Any, placeholder: Any, error: type[Exception], field: str
) -> None:
    """A target prompt without text or placeholder cannot be made."""
    with pytest.raises(error, match=f"^{field}:"):
        TargetPrompt(text, placeholder)


def test_the_context_holds_target_prompt_and_new_tokens_exactly(llama: LanguageModel) -> None:
    """256 tokens of prompt and text fit into a context of 256, and 257 do not."""
    text = "the" + " the" * 243 + " x"  # BOS, 244 times `the`, the placeholder: 246 tokens
    assert len(PatchedGenerator(llama, text, max_new_tokens=10).target.tokens) == 246
    with pytest.raises(ValueError, match="^target_prompt:"):
        PatchedGenerator(llama, text, max_new_tokens=11)


def test_settings_are_checked_at_the_call_of_iter_sweep(
    llama: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """Settings are refused before the first reading is requested."""
    with pytest.raises(ValueError, match="^layers:"):
        iter_sweep(llama, PROMPT, layers=[99], scorer=word_overlap)
    assert module_calls == []


def test_single_settings_change_a_config(llama: LanguageModel, word_overlap: Any) -> None:
    """Other settings keep the value of the config."""
    config = SweepConfig(layers=[5, 2], alphas=3, scorer=word_overlap)
    plan = plan_sweep(llama, PROMPT, config, layers=[2])
    assert {site.layer for site in plan.sites} == {2}
    assert plan.alphas == (3.0,)


def test_an_unknown_setting_is_refused(llama: LanguageModel) -> None:
    """A misspelt setting is not silently ignored; the message names the known ones."""
    with pytest.raises(TypeError, match="^token: .*positions"):
        sweep(llama, PROMPT, token=2)


@pytest.mark.parametrize("kinds", ["resid_mid", ["resid_post", "resid_mid"]])
def test_a_kind_that_the_model_does_not_compute_is_refused(
    kinds: Any, neox: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """A parallel block has no `resid_mid`; the message says why."""
    for call in (
        lambda: sweep(neox, PROMPT, kinds=kinds, scorer=word_overlap, progress=False),
        lambda: capture(neox, PROMPT, kinds=kinds),
    ):
        with pytest.raises(UnavailableKindError, match="^kinds: .*parallel"):
            call()
    assert module_calls == []


def test_the_other_kinds_of_a_parallel_model_work(neox: LanguageModel, word_overlap: Any) -> None:
    """Every kind but `resid_mid` of a parallel block is read and patched."""
    kinds = [kind for kind in KINDS if kind != "resid_mid"]
    assert list(neox.kinds) == kinds
    table = sweep(
        neox, PROMPT, kinds=kinds, layers=[5, 2], alphas=[3], max_new_tokens=2,
        scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    assert list(table["kind"]) == [kind for kind in kinds for _ in (5, 2)]
    assert (table["vector_norm"] > 0).all()


@pytest.mark.parametrize("bad", [{"kinds": "resid_end"}, {"layers": [2, 6]}], ids=str)
def test_capture_checks_its_own_arguments(
    bad: dict[str, Any], llama: LanguageModel, module_calls: list[str]
) -> None:
    """Reading activations alone refuses the same settings as a sweep."""
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}:"):
        capture(llama, PROMPT, **bad)
    assert module_calls == []


@pytest.mark.parametrize("missing", [1, 2])
def test_a_scorer_that_returns_too_few_scores_is_named(
    missing: int, llama: LanguageModel, word_overlap: Any
) -> None:
    """A score too few is an error instead of a table whose rows are shifted."""

    def forgetful(references: Any, candidates: Any) -> list[float]:
        return word_overlap(references, candidates)[missing:]

    with pytest.raises(ValueError, match="^scorer:"):
        sweep(llama, PROMPT, layers=[5, 2], alphas=3, scorer=forgetful, progress=False)


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        ([0], (0.0,)),
        ([-3, 3], (-3.0, 3.0)),
        (6, (6.0,)),
        ([9, 1, 9, 9.0], (9.0, 1.0)),
        (range(1, 4), (1.0, 2.0, 3.0)),
        (torch.tensor([2.0, 1.0]), (2.0, 1.0)),
        ((a for a in (5, 2)), (5.0, 2.0)),
    ],
)
def test_these_alphas_are_legal(alphas: Any, expected: tuple[float, ...]) -> None:
    """Zero, negative, single and repeated amplifiers."""
    assert SweepConfig(alphas=alphas).alphas == expected


def test_zero_and_negative_alphas_run(llama: LanguageModel, word_overlap: Any) -> None:
    """α = 0 patches a zero vector, and -α one of the same norm as α."""
    table = sweep(
        llama, PROMPT, kinds="resid_post", layers=[5, 2], alphas=[0, -3, 3, 0], max_new_tokens=2,
        scorer=word_overlap, progress=False,
    ).table  # fmt: skip
    assert list(table["alpha"]) == [0.0, -3.0, 3.0] * 2
    norms = table["vector_norm"].tolist()
    assert norms[0] == norms[3] == 0
    assert norms[1] == norms[2] != norms[4] == norms[5] > 0
