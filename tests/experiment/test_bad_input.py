"""Bad input ends before any work: with a message that says what to do, and no forward pass."""

from __future__ import annotations

import math
import re
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
    load_model,
    plan_sweep,
    sweep,
)
from superscopes_tl.errors import PlaceholderError, UnavailableKindError

PROMPT = "Red Hot Chili Peppers"
N_LAYERS = 6


@pytest.fixture
def llama(tiny: Callable[[str, str], LanguageModel]) -> LanguageModel:
    """A model with 6 layers, a context of 256 tokens and every kind of activation."""
    return tiny("llama", "bridge")


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


def assert_message(error: BaseException, argument: str, expected: str, got: str, fix: str) -> None:
    """Assert that the message names argument, expected, got and fix, each by a regex."""
    pattern = rf"^{argument}: expected .*{expected}.*, got .*{got}.*\. Fix: .*{fix}.*\."
    assert re.search(pattern, str(error), re.DOTALL), f"{pattern}\n{error}"


def test_the_spy_sees_a_forward_pass(
    llama: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """The spy that the tests below rely on does notice the work of a legal sweep."""
    plan_sweep(llama, PROMPT, scorer=word_overlap)
    assert module_calls == []
    capture(llama, PROMPT, kinds="resid_post", layers=[5, 2])
    assert len(module_calls) > N_LAYERS


LONG = "the " * 300

SETTINGS = [
    # setting, value, error class, expected, got, fix
    pytest.param("layers", [5, 6], ValueError, "6 layers", "6", "0 to 5", id="layer-high"),
    pytest.param("layers", [-7], ValueError, "6 layers", "-7", "0 to 5", id="layer-low"),
    pytest.param("layers", [], ValueError, "at least one layer", r"\(\)", "0 to 5", id="no-layer"),
    pytest.param("layers", [2.5], TypeError, "whole numbers", r"2\.5", "0 to 5", id="layer-2.5s"),
    pytest.param("layers", 2.5, TypeError, "whole numbers", r"2\.5", "0 to 5", id="layer-2.5"),
    pytest.param("layers", "all", TypeError, "whole numbers", "a", "0 to 5", id="layer-string"),
    pytest.param("layers", [True], TypeError, "whole numbers", "True", "0 to 5", id="layer-bool"),
    pytest.param("target_layer", 6, ValueError, "6 layers", "6", "0 to 5", id="target-high"),
    pytest.param("target_layer", -7, ValueError, "6 layers", "-7", "0 to 5", id="target-low"),
    pytest.param(
        "target_layer", [5, 99], ValueError, "6 layers", "99", "0 to 5", id="target-in-list"
    ),
    pytest.param("target_layer", [], ValueError, "at least one layer", "", "0 to", id="no-target"),
    pytest.param("target_layer", 2.5, TypeError, "whole", r"2\.5", "0 to", id="target-2.5"),
    pytest.param("target_layer", "all", ValueError, "'same'", "all", "'same'", id="target-word"),
    pytest.param("positions", 99, ValueError, "index from -5 to 4", "99", "4 '·Peppers'", id="pos"),
    pytest.param("positions", -6, ValueError, "index from -5 to 4", "-6", "0 '<s>'", id="-pos"),
    pytest.param("positions", [3, 5], ValueError, "-5 to 4", "5", "choose from", id="pos-list"),
    pytest.param("positions", "Adele", ValueError, PROMPT, "Adele", "choose from", id="pos-word"),
    pytest.param("positions", [], ValueError, "at least one", r"\[\]", "choose from", id="no-pos"),
    pytest.param(
        "positions", 2.5, TypeError, "an index", r"float 2\.5", "positions=", id="pos-2.5"
    ),
    pytest.param("alphas", [], ValueError, "at least one", r"\[\]", r"alphas=\(1", id="no-alpha"),
    pytest.param("alphas", [1, math.nan], ValueError, "finite", "nan", r"alphas=\(1", id="nan"),
    pytest.param("alphas", [math.inf], ValueError, "finite", "inf", r"alphas=\(1", id="inf"),
    pytest.param("alphas", -math.inf, ValueError, "finite", "-inf", r"alphas=\(1", id="-inf"),
    pytest.param("alphas", "high", TypeError, "numbers", "str", r"alphas=\(1", id="alpha-word"),
    pytest.param("alphas", "12", TypeError, "numbers", "str", r"alphas=\(1", id="alpha-digits"),
    pytest.param("alphas", None, TypeError, "numbers", "None", r"alphas=\(1", id="alpha-none"),
    pytest.param("kinds", "resid_md", ValueError, "resid_mid", "resid_md", "spelling", id="kind"),
    pytest.param("kinds", ["mlp_out", "z"], ValueError, "resid_mid", "z", "spell", id="kind-list"),
    pytest.param("kinds", [], ValueError, "at least one kind", r"\(\)", "resid_mid", id="no-kind"),
    pytest.param("kinds", 5, TypeError, "kind", "5", "resid_mid", id="kind-number"),
    pytest.param(
        "target_prompt", "Syria: Country", PlaceholderError, "'x'", "Syria", "'x'", id="no-x"
    ),
    pytest.param("target_prompt", LONG + "x", ValueError, "256", "30. tok", "short", id="target"),
    pytest.param(
        "max_new_tokens", 0, ValueError, "1 or more", "0", "max_new_tokens=10", id="new-0"
    ),
    pytest.param("max_new_tokens", -1, ValueError, "1 or more", "-1", "another", id="new--1"),
    pytest.param("max_new_tokens", 2.5, TypeError, "whole", r"float 2\.5", "1 or", id="new-2.5"),
    pytest.param("max_new_tokens", True, TypeError, "whole", "bool True", "1 or", id="new-bool"),
    pytest.param("batch_size", 0, ValueError, "1 or more", "0", "batch_size=", id="batch-0"),
    pytest.param("batch_size", -3, ValueError, "1 or more", "-3", "batch_size=", id="batch--3"),
    pytest.param("batch_size", 1.5, TypeError, "whole", r"float 1\.5", "1 or", id="batch-1.5"),
    pytest.param("scorer", 5, TypeError, "callable", "int 5", "leave it out", id="scorer"),
    pytest.param("score_on", "all", ValueError, "'description' or 'text'", "all", "paper", id="on"),
    pytest.param("mapping", 3, TypeError, "callable", "int 3", "amplify", id="mapping"),
]


@pytest.mark.parametrize(("setting", "value", "error", "expected", "got", "fix"), SETTINGS)
def test_a_bad_setting_is_explained_before_any_work(
    setting: str,
    value: Any,
    error: type[Exception],
    expected: str,
    got: str,
    fix: str,
    llama: LanguageModel,
    module_calls: list[str],
    word_overlap: Any,
) -> None:
    """Each bad setting names itself, what was expected, what came and what to do."""
    settings: dict[str, Any] = {"scorer": word_overlap, setting: value}
    with pytest.raises(error) as caught:
        sweep(llama, PROMPT, progress=False, **settings)
    assert_message(caught.value, setting, expected, got, fix)
    assert module_calls == []


@pytest.mark.parametrize(
    ("prompt", "error", "expected", "got", "fix"),
    [
        pytest.param("", ValueError, "visible character", "''", "write the prompt", id="empty"),
        pytest.param(" \n\t", ValueError, "visible", r"' \\n\\t'", "write the prompt", id="blank"),
        pytest.param(5, TypeError, "a string", "int 5", "pass the text", id="number"),
        pytest.param(None, TypeError, "a string", "NoneType None", "pass the text", id="none"),
        pytest.param(["a"], TypeError, "a string", r"list \['a'\]", "pass the text", id="list"),
        pytest.param(LONG, ValueError, "at most 256 tokens", "30. tokens", "shorten", id="long"),
    ],
)
def test_a_bad_prompt_is_explained_before_any_work(
    prompt: Any,
    error: type[Exception],
    expected: str,
    got: str,
    fix: str,
    llama: LanguageModel,
    module_calls: list[str],
    word_overlap: Any,
) -> None:
    """An empty, blank, overlong or non-text prompt never reaches the model."""
    with pytest.raises(error) as caught:
        sweep(llama, prompt, progress=False, scorer=word_overlap)
    assert_message(caught.value, "prompt", expected, got, fix)
    assert module_calls == []


@pytest.mark.parametrize(
    ("text", "placeholder", "error", "field", "expected", "got"),
    [
        pytest.param("", "x", ValueError, "text", "visible", "''", id="empty"),
        pytest.param("  ", "x", ValueError, "text", "visible", "'  '", id="blank"),
        pytest.param("the x", "", ValueError, "placeholder", "visible", "''", id="no-placeholder"),
        pytest.param(5, "x", TypeError, "text", "a string", "int 5", id="number"),
        pytest.param("the x", 5, TypeError, "placeholder", "a string", "int 5", id="number-word"),
    ],
)
def test_a_target_prompt_is_checked_when_it_is_made(
    text: Any, placeholder: Any, error: type[Exception], field: str, expected: str, got: str
) -> None:
    """A target prompt without text or placeholder cannot be made."""
    with pytest.raises(error) as caught:
        TargetPrompt(text, placeholder)
    assert_message(caught.value, rf"target_prompt\.{field}", expected, got, "")


@pytest.mark.parametrize("placeholder", ["?", "entity"])
def test_a_missing_placeholder_is_named(placeholder: str) -> None:
    """The message shows which placeholder the text lacks and how to choose another."""
    with pytest.raises(PlaceholderError) as caught:
        TargetPrompt("Syria: Country, x", placeholder)
    assert_message(
        caught.value,
        "target_prompt",
        rf"the placeholder '{re.escape(placeholder)}'",
        "Syria: Country, x",
        "placeholder=",
    )


def test_the_context_holds_target_prompt_and_new_tokens_exactly(
    llama: LanguageModel, module_calls: list[str]
) -> None:
    """256 tokens of prompt and text fit into a context of 256, and 257 do not."""
    text = "the" + " the" * 243 + " x"  # BOS, 244 times `the`, the placeholder: 246 tokens
    generator = PatchedGenerator(llama, text, max_new_tokens=10)
    assert len(generator.target.tokens) == 246
    with pytest.raises(ValueError, match="target_prompt") as caught:
        PatchedGenerator(llama, text, max_new_tokens=11)
    assert_message(
        caught.value,
        "target_prompt",
        "at most 245 tokens .*context of LlamaForCausalLM is 256, 11 are to be generated",
        "246 tokens",
        "generate fewer tokens",
    )
    assert module_calls == []


def test_more_new_tokens_than_the_context_are_refused(
    llama: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """The message names the context, the wish, and the way out."""
    with pytest.raises(ValueError, match="target_prompt") as caught:
        sweep(llama, PROMPT, max_new_tokens=250, scorer=word_overlap, progress=False)
    assert_message(
        caught.value,
        "target_prompt",
        "at most 6 tokens .*context of LlamaForCausalLM is 256, 250 are to be generated",
        "119 tokens",
        "generate fewer tokens",
    )
    assert module_calls == []


def test_settings_are_checked_at_the_call_of_iter_sweep(
    llama: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """The iterator need not be asked for a reading before it complains."""
    with pytest.raises(ValueError, match=r"^layers: expected layers of a model with 6 layers"):
        iter_sweep(llama, PROMPT, layers=[99], scorer=word_overlap)
    assert module_calls == []


def test_config_and_single_settings_exclude_each_other(
    llama: LanguageModel, module_calls: list[str]
) -> None:
    """Both at once would leave open which one holds."""
    with pytest.raises(ValueError, match="config") as caught:
        sweep(llama, PROMPT, SweepConfig(layers=[5, 2]), progress=False, layers=[2])
    assert_message(caught.value, "config", "either config or", "'layers': ", "dataclasses.replace")
    assert module_calls == []


def test_an_unknown_setting_is_refused(llama: LanguageModel, module_calls: list[str]) -> None:
    """A misspelt setting is not silently ignored."""
    with pytest.raises(TypeError, match="alpha"):
        sweep(llama, PROMPT, progress=False, alpha=3)
    assert module_calls == []


@pytest.mark.parametrize("kinds", ["resid_mid", ["resid_post", "resid_mid"]])
def test_a_kind_that_the_model_does_not_compute_is_named(
    kinds: Any, neox: LanguageModel, module_calls: list[str], word_overlap: Any
) -> None:
    """A parallel block has no `resid_mid`: the message names the model and what it has."""
    for call in (
        lambda: sweep(neox, PROMPT, kinds=kinds, scorer=word_overlap, progress=False),
        lambda: capture(neox, PROMPT, kinds=kinds),
    ):
        with pytest.raises(UnavailableKindError) as caught:
            call()
        assert_message(
            caught.value,
            "kinds",
            r"GPTNeoXForCausalLM.*\('resid_pre', 'attn_out', 'mlp_out', 'resid_post'\)",
            "resid_mid",
            "leave 'resid_mid' out.*parallel",
        )
    assert isinstance(caught.value, ValueError)
    assert module_calls == []


def test_the_other_kinds_of_a_parallel_model_work(neox: LanguageModel, word_overlap: Any) -> None:
    """Every kind but `resid_mid` of a parallel block is read and patched."""
    kinds = [kind for kind in KINDS if kind != "resid_mid"]
    assert list(neox.kinds) == kinds
    result = sweep(
        neox,
        PROMPT,
        kinds=kinds,
        layers=[5, 2],
        alphas=[3],
        max_new_tokens=2,
        scorer=word_overlap,
        progress=False,
    )
    assert list(result.table["kind"]) == [kind for kind in kinds for _ in (5, 2)]
    assert list(result.table["source_layer"]) == [5, 2] * 4
    assert (result.table["vector_norm"] > 0).all()


@pytest.mark.parametrize("argument", ["kinds", "layers"])
def test_capture_checks_its_own_arguments(
    argument: str, llama: LanguageModel, module_calls: list[str]
) -> None:
    """Reading activations alone gives the same messages as a sweep."""
    bad: dict[str, Any] = {"kinds": "resid_end"} if argument == "kinds" else {"layers": [2, 6]}
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got .*\. Fix: "):
        capture(llama, PROMPT, **bad)
    assert module_calls == []


@pytest.mark.parametrize(
    ("options", "expected", "got", "fix"),
    [
        pytest.param({"backend": "fast"}, "'auto', 'hooked' or 'bridge'", "fast", "'bridge'"),
        pytest.param({"backend": None}, "'auto', 'hooked' or 'bridge'", "None", "leave it out"),
        pytest.param({"dtype": "float31"}, "float32, bfloat16 or float16", "float31", "leave it"),
        pytest.param({"dtype": "int8"}, "float32, bfloat16 or float16", "int8", "leave it out"),
        pytest.param({"dtype": torch.int64}, "float32", r"torch\.int64", "leave it out"),
        pytest.param({"dtype": "nn"}, "float32", "nn", "leave it out"),
        pytest.param({"dtype": 32}, "float32", "32", "leave it out"),
        pytest.param({"device": "gpu9"}, "device", "gpu9", "", id="device"),
    ],
)
def test_a_bad_load_option_is_explained_before_any_work(
    options: dict[str, Any], expected: str, got: str, fix: str, module_calls: list[str]
) -> None:
    """An unknown backend, number type or device is named before anything is loaded."""
    with pytest.raises(ValueError, match="expected") as caught:
        load_model("mini", **options)
    assert_message(caught.value, next(iter(options)), expected, got, fix)
    assert module_calls == []


@pytest.mark.parametrize("missing", [1, 2])
def test_a_scorer_that_returns_too_few_scores_is_named(
    missing: int, llama: LanguageModel, word_overlap: Any
) -> None:
    """A score too few is an error instead of a table whose rows are shifted."""

    def forgetful(references: Any, candidates: Any) -> list[float]:
        return word_overlap(references, candidates)[missing:]

    with pytest.raises(ValueError, match="scorer") as caught:
        sweep(
            llama,
            PROMPT,
            kinds="resid_post",
            layers=[5, 2],
            alphas=[3],
            scorer=forgetful,
            progress=False,
        )
    assert_message(caught.value, "scorer", "2 scores", f"{2 - missing} scores", "one number per")


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        pytest.param([0], (0.0,), id="zero"),
        pytest.param([-3, 3], (-3.0, 3.0), id="negative"),
        pytest.param(6, (6.0,), id="single-number"),
        pytest.param(0.5, (0.5,), id="single-fraction"),
        pytest.param([9, 1, 9, 9.0], (9.0, 1.0), id="repeated"),
        pytest.param(range(1, 4), (1.0, 2.0, 3.0), id="range"),
        pytest.param(torch.tensor([2.0, 1.0]), (2.0, 1.0), id="tensor"),
        pytest.param((a for a in (5, 2)), (5.0, 2.0), id="generator"),
    ],
)
def test_these_alphas_are_legal(
    alphas: Any, expected: tuple[float, ...], llama: LanguageModel, word_overlap: Any
) -> None:
    """Zero, negative, single and repeated amplifiers mean what they say."""
    plan = plan_sweep(llama, PROMPT, alphas=alphas, layers=[5, 2], scorer=word_overlap)
    assert plan.alphas == expected
    assert len(plan.cells) == 3 * 2 * len(expected)  # three kinds, two layers


def test_zero_and_negative_alphas_run(llama: LanguageModel, word_overlap: Any) -> None:
    """α = 0 patches a zero vector, and -α one of the same norm as α."""
    result = sweep(
        llama,
        PROMPT,
        kinds="resid_post",
        layers=[5, 2],
        alphas=[0, -3, 3, 0],
        max_new_tokens=2,
        scorer=word_overlap,
        progress=False,
    )
    assert list(result.table["alpha"]) == [0.0, -3.0, 3.0] * 2
    norms = result.table["vector_norm"].tolist()
    assert norms[0] == norms[3] == 0
    assert norms[1] == norms[2] > 0
    assert norms[4] == norms[5] > 0
    assert norms[1] != norms[4]


def test_an_unknown_setting_is_answered_with_the_known_ones(mini: LanguageModel) -> None:
    """Who guesses a name learns the names there are."""
    with pytest.raises(
        TypeError, match=r"settings: expected settings out of \[.*'positions'.*'token'"
    ):
        sweep(mini, "Red", token=2)


def test_a_device_that_this_machine_lacks_is_named_before_anything_is_loaded() -> None:
    """Torch's own complaint is passed on, behind the argument's name."""
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device: expected a device of this machine.*{missing}"):
        load_model("no/such-model", device=missing)
