"""One cell: its controls, its token effects, what lenses read, and the code that reads it again."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from superscopes_tl import (
    Explorer,
    LanguageModel,
    SweepConfig,
    SweepResult,
    TargetPrompt,
    load_model,
    plan_sweep,
    sweep,
)
from superscopes_tl.experiment import Cell, make_control, make_patches
from superscopes_tl.explorer.cell import code_for, ladder, probe, reading_at
from superscopes_tl.neighbours import LENSES, JacobianLens, TunedLens, lens_label, lens_table
from superscopes_tl.vectors import RandomDirection, Scale
from tests.explorer.conftest import PROMPT, WAIT, finished
from tests.model.test_chat import TEMPLATES, with_template
from tests.support.scorers import by_length
from tests.support.tiny_models import tiny_hf, tiny_tokenizer


def read_again(code: str) -> Any:
    """Run some code; return the row that it prints."""
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, space)
    return space["table"].iloc[0]


def first_code(result: SweepResult, row: int = 0, plan: Any = None) -> str:
    return code_for(result, Cell.of(result.table.iloc[row]), plan)


def test_the_ladder_has_every_alpha_of_a_site(model: LanguageModel, config: SweepConfig) -> None:
    """One row per α, in ascending order."""
    result = sweep(model, PROMPT, replace(config, alphas=(3, 1)), progress=False)
    assert ladder(result, Cell.of(result.table.iloc[0]))["alpha"].tolist() == [1.0, 3.0]


def test_the_probe_compares_a_cell_with_its_controls(
    model: LanguageModel, config: SweepConfig
) -> None:
    """Texts are those of the sweep's own controls; token effects agree with a plain forward."""
    plan = plan_sweep(model, PROMPT, config)
    generator = plan.generator
    result = sweep(model, PROMPT, config, progress=False)
    reading = reading_at(result, Cell.of(result.table.iloc[5]))
    assert reading is not None
    found = probe(plan, reading)
    assert "".join(token.token for token in found.tokens) == reading.text
    cell = Cell.of(reading)
    patches = make_patches(plan.only([cell]))
    (random,) = make_control("random_direction", plan, [cell], patches)
    unpatched, at_random = found.controls
    assert unpatched.text == generator.unpatched().text
    assert at_random.text == generator.generate([random])[0].text
    ids = generator.generate(patches)[0].token_ids
    assert len(ids) == reading.n_tokens > 0
    tokens = torch.tensor([[*generator.target.tokens.ids, *ids]])
    with torch.no_grad():
        logits = model.tl(tokens)[0].log_softmax(dim=-1)
    start = len(generator.target.tokens) - 1
    for step, (token, effect) in enumerate(zip(ids, found.tokens, strict=True)):
        assert effect.unpatched == pytest.approx(float(logits[start + step, token]), abs=1e-3)


def test_the_probe_names_what_each_lens_reads_at_the_site(
    model: LanguageModel, config: SweepConfig
) -> None:
    """Tokens and probabilities are the lens table's, at every α, each lens beside its control."""
    eye = {layer: torch.eye(model.d_model) for layer in range(model.n_layers - 1)}
    jacobian = JacobianLens(model.name, model.fingerprint, eye, {})
    lenses = {**LENSES, "tuned lens": TunedLens.untrained(model), "Jacobian lens": jacobian}
    plan = plan_sweep(model, PROMPT, config)
    result = sweep(model, PROMPT, config, progress=False)
    first, second = (reading_at(result, Cell.of(result.table.iloc[row])) for row in (0, 1))
    assert (first.alpha, second.alpha) == (1, 3)  # type: ignore[union-attr]
    found = probe(plan, first, lenses).lenses  # type: ignore[arg-type]
    assert found == probe(plan, second, lenses).lenses  # type: ignore[arg-type]
    table = lens_table(model, plan.source, [plan.cells[0].site], lenses=lenses)
    assert len(found) == 2 * table["lens"].nunique() == 2 * len(lenses)
    for lens in found:
        named = map(lens_label, table["lens"], table["control"])
        rows = table[[name == lens.lens for name in named]]
        assert lens.tokens == tuple(zip(rows["top_token"], rows["probability"], strict=True))
    lenses["Jacobian lens"] = replace(jacobian, matrices={})  # as if fitted for other layers
    *others, unfitted = probe(plan, first, lenses).lenses  # type: ignore[arg-type]
    assert others == found[:4]
    assert unfitted.tokens == ()
    assert unfitted.problem.startswith("Jacobian lens: ")


@pytest.mark.parametrize("mapping", [Scale(), RandomDirection(3)], ids=str)
@pytest.mark.parametrize("target_layer", [4, "same", "embed"])
def test_the_code_reads_the_same_cell(
    llama: LanguageModel, mapping: Any, target_layer: Any, word_overlap: Any
) -> None:
    """Layers out of order, any mapping of the package, a late target: the text is the same."""
    result = sweep(
        llama, "Alexander the Great", layers=(5, 2), kinds=("mlp_out", "resid_post"), alphas=(1, 6),
        target_layer=target_layer, mapping=mapping, generate="all", max_new_tokens=5,
        unit="residual" if target_layer == 4 else "vector", scorer=word_overlap, progress=False,
    )  # fmt: skip
    row = result.table.iloc[6]
    code = first_code(result, 6, result.plan)
    again = read_again(code)
    assert again["text"] == row["text"], code
    assert again["recovered"] == pytest.approx(row["recovered"], abs=1e-3, nan_ok=True)
    assert Cell.of(again) == Cell.of(row)


def test_the_code_names_what_differs_from_the_defaults(model: LanguageModel) -> None:
    """Another target prompt, mapping, scorer and protocol are all in it, with their imports."""
    result = sweep(
        model, PROMPT, alphas=(2,), kinds="mlp_out", max_new_tokens=2, score_on="text",
        target_prompt=TargetPrompt("_ is", "_"), mapping=RandomDirection(1), scorer=by_length,
        progress=False,
    )  # fmt: skip
    code = first_code(result, 1)
    compile(code, "code", "exec")
    for part in (
        "TargetPrompt('_ is', '_')", "mapping=RandomDirection(seed=1)", "score_on='text'",
        "scorer='by_length'", "from superscopes_tl import load_model, sweep, TargetPrompt",
        "from superscopes_tl.vectors import RandomDirection",
    ):  # fmt: skip
        assert part in code


def test_a_mapping_of_ones_own_is_left_to_fill_in(model: LanguageModel) -> None:
    """A lambda has no source to print: the code has a name in its place and says so."""
    result = sweep(
        model, PROMPT, layers=1, alphas=2, mapping=lambda alpha: lambda v: alpha * v,
        scorer=by_length, max_new_tokens=2, progress=False,
    )  # fmt: skip
    code = first_code(result)
    compile(code, "code", "exec")
    assert "mapping=my_mapping" in code
    assert "# my_mapping: your own, <lambda>" in code


@pytest.mark.parametrize(
    "label",
    [
        "x\nboom()", "ｂｏｏｍ()", "Head\rboom()", "boom()", "Head(boom())", "Head(boom)", "boom",
        "Head.boom()", "Head([boom() for _ in 'x'])", "Head(lambda: boom())", "Head()()",
        "Head(f'{boom()}')",
    ],
)  # fmt: skip
def test_no_code_comes_out_of_a_file(model: LanguageModel, label: str) -> None:
    """A label of a run file is code only if it calls this package's own values with literals."""
    result = sweep(
        model, PROMPT, layers=1, alphas=2, scorer=by_length, max_new_tokens=2, progress=False
    )
    result.provenance["config"] |= {"mapping": label, "base": label}
    code = first_code(result)
    compile(code, "code", "exec")
    assert "boom" not in "\n".join(line for line in code.splitlines() if line[:1] != "#")


def test_the_code_says_what_a_provenance_cannot_hold(model: LanguageModel) -> None:
    """Models that are not packaged ones may need their path; half precision is not exact."""
    result = sweep(
        model, PROMPT, layers=1, alphas=2, scorer=by_length, max_new_tokens=2, progress=False
    )
    result.provenance["model"] |= {"name": "smollm2"}
    assert "# load_model" not in first_code(result)
    result.provenance["model"] |= {"name": "my-llama", "dtype": "bfloat16"}
    code = first_code(result)
    assert "# load_model: pass the path" in code
    assert "in half precision another batch size" in code
    assert "dtype='bfloat16'" in code


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_a_local_model_runs_as_it_stands(
    chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with every setting of both prompts, it reads the same cell."""
    folder = tmp_path / "models" / "mine"
    tiny_hf("llama").save_pretrained(folder)
    with_template(tiny_tokenizer(), TEMPLATES["chatml"]).save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "models")
    made = Explorer(
        load_model("mine", backend="bridge", local_files_only=True), "Red Hot Chili Peppers",
        layers=(1, 3), kinds="resid_post", alphas=(1, 2), positions="Hot", chat=chat,
        source_template="Tell me about {}", reference="American rock band",
        generate="best" if chat else "none", max_new_tokens=3, scorer=by_length,
    )  # fmt: skip
    table = finished(made).result.table  # type: ignore[union-attr]
    chosen = Cell.of(table[~table["written"]].iloc[1])
    made.select(kind=chosen.kind, layer=chosen.source_layer, alpha=chosen.alpha)
    assert made.wait(WAIT)
    result = made.result
    assert result is not None
    row = next(r for _, r in result.table.iterrows() if Cell.of(r) == chosen)
    monkeypatch.chdir(tmp_path)
    assert repr(str(folder)) in made.code
    again = read_again(made.code)
    assert again["about"] == row["about"] == "Hot"
    assert again["recovered"] == pytest.approx(row["recovered"], abs=1e-3, nan_ok=True)
    assert again["plain_nats"] == pytest.approx(row["plain_nats"], abs=1e-2)
    assert again["written"]
    assert again["text"] == row["text"]
    saved = code_for(result, chosen)
    assert str(folder) not in saved
    assert "# load_model: pass the path" in saved


def test_the_code_keeps_how_the_model_was_loaded(llama: LanguageModel) -> None:
    """A file of a folder and the dtype are in it, an access token is not."""
    origin: Any = llama.origin
    options = {**origin.keywords, "gguf_file": "a.gguf", "token": "secret"}
    model = replace(llama, origin=type(origin)(origin.func, "some/name", **options))
    settings: dict[str, Any] = {"layers": 3, "alphas": 1, "generate": "none"}
    plan = plan_sweep(model, PROMPT, **settings)
    result = sweep(model, PROMPT, progress=False, **settings)
    code = first_code(result, plan=plan)
    assert "load_model('some/name', backend='bridge'" in code
    assert "gguf_file='a.gguf'" in code
    assert "secret" not in code
    memory = replace(plan, model=replace(llama, origin=None))
    assert "built in memory" in first_code(result, plan=memory)
