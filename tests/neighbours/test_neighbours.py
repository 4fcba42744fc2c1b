"""One site, all methods, one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from superscopes_tl import LanguageModel, TargetPrompt, sweep
from superscopes_tl.cli.main import app
from superscopes_tl.neighbours import LENSES, NEIGHBOURS, JacobianLens, causal_effects, side_by_side
from superscopes_tl.neighbours.methods import OWN_TOKENS
from superscopes_tl.vectors import Add, fit_affine
from tests.support.scorers import letters

PROMPT = "Red Hot Chili Peppers"
Tiny = Callable[[str, str], LanguageModel]


@pytest.fixture(scope="module")
def table(llama: LanguageModel) -> pd.DataFrame:
    """All methods at one site."""
    return side_by_side(llama, PROMPT, layer=5, scorer=letters, max_new_tokens=5, progress=False)


@pytest.mark.parametrize("method", ["Patchscopes", "SelfIE, five placeholders", "SelfIE, added"])
def test_a_method_is_the_sweep_with_its_settings(
    method: str, llama: LanguageModel, table: pd.DataFrame
) -> None:
    """A row is the best reading of a sweep of its own, and its control the best of as many."""
    alone = sweep(
        llama, PROMPT, layers=5, kinds="mlp_out", controls="random_direction", scorer=letters,
        max_new_tokens=5, progress=False, **NEIGHBOURS[method],
    )  # fmt: skip
    best = alone.best().iloc[0]
    row = table[table["method"] == method].iloc[0]
    assert (row["description"], row["alpha"]) == (best["description"], best["alpha"])
    assert row["score"] == pytest.approx(best["score"], abs=1e-3)
    assert row["control"] == pytest.approx(alone.table["random_direction"].max(), abs=1e-3)
    assert row["tries"] == len(alone)


def test_every_method_has_a_row_in_order(llama: LanguageModel, table: pd.DataFrame) -> None:
    """First the methods, then lenses with likely tokens instead of a score, then the ablation."""
    assert table["method"].tolist() == [
        *NEIGHBOURS, "logit lens", "logit lens, random direction", "ablated in its own run"
    ]  # fmt: skip
    lens = table[table["method"] == "logit lens"].iloc[0]
    assert lens[["alpha", "target_layer", "score", "control", "tries"]].isna().all()
    effects = causal_effects(
        llama, PROMPT, kinds="mlp_out", layers=5, continuation=OWN_TOKENS
    ).iloc[0]  # fmt: skip
    assert f"{effects['effect']:+.2g} nats per token" in table["description"].iloc[-1]
    assert f"{effects['control_effect']:+.2g} with a random change" in table["description"].iloc[-1]


def test_a_lens_that_refuses_the_layer_does_so_first(llama: LanguageModel) -> None:
    """No method is read before, which takes longer."""
    scorer = create_autospec(letters)
    lens = JacobianLens(llama.name, llama.fingerprint, {2: torch.eye(llama.d_model)}, {})
    with pytest.raises(ValueError, match="Jacobian lens: "):
        side_by_side(llama, PROMPT, layer=4, lenses={"Jacobian lens": lens}, scorer=scorer)
    scorer.assert_not_called()


def test_the_ablated_run_has_the_same_template(tiny: Tiny, word_overlap: Any) -> None:
    """The ablated vector is the one that methods and lenses read, in the same template."""
    model = tiny("llama", "bridge")
    eye = {layer: torch.eye(model.d_model) for layer in range(model.n_layers - 1)}
    lenses = {**LENSES, "Jacobian lens": JacobianLens(model.name, model.fingerprint, eye, {})}
    found = side_by_side(
        model, PROMPT, layer=2, source_template="Syria: {}", methods={"Patchscopes": {"alphas": 1}},
        scorer=word_overlap, progress=False, lenses=lenses,
    )  # fmt: skip
    read = found.set_index("method")["description"]
    assert read["Jacobian lens"] == read["logit lens"]
    effects = causal_effects(
        model, f"Syria: {PROMPT}", kinds="mlp_out", layers=2, continuation=OWN_TOKENS
    ).iloc[0]  # fmt: skip
    assert f"{effects['effect']:+.2g} nats per token" in found["description"].iloc[-1]


def test_a_target_prompt_is_read_once_for_all_its_methods(
    tiny: Tiny, word_overlap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six methods with two target prompts compute two prefixes, not six."""
    model = tiny("llama", "bridge")
    read: list[int] = []
    original = model.decoder.prefill

    def prefill(tokens: Any) -> Any:
        read.append(tokens.shape[1])
        return original(tokens)

    monkeypatch.setattr(model.decoder, "prefill", prefill)
    other = TargetPrompt("Syria: Country, _ _", placeholder="_")
    methods: dict[str, dict[str, Any]] = {
        "one": {"alphas": 1},
        "two": {},
        "three": {"target_prompt": other},
        "four": {"write": Add()},
        "five": {"target_prompt": other, "alphas": 3},
        "six": {"unit": "residual"},
    }
    found = side_by_side(
        model, PROMPT, layer=2, kind="resid_post", methods=methods, scorer=word_overlap,
        target_prompt=TargetPrompt("Syria: Country in the Middle East, x"),
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    assert found["method"].tolist()[:6] == list(methods)
    assert len([length for length in read if length > len("Syria")]) == 2
    assert found["tries"].tolist()[:6] == [1, 6, 6, 6, 1, 6]


def test_an_affine_map_is_one_more_method(llama: LanguageModel) -> None:
    """Maps fitted from the site's layer are read as a method of their own."""
    maps = fit_affine(llama, ["Red Hot Chili Peppers", "Back to the Future"], [(5, 2)])
    found = side_by_side(
        llama, PROMPT, layer=5, kind="resid_post", maps=maps,
        methods={"Patchscopes": {"alphas": 1}}, scorer=letters, max_new_tokens=3, progress=False,
    )  # fmt: skip
    assert found["method"].tolist()[:2] == ["Patchscopes", "affine map"]
    assert found["target_layer"].tolist()[:2] == [5, 2]


def test_settings_of_the_site_are_refused(llama: LanguageModel) -> None:
    """Methods cannot change the site or the control."""
    with pytest.raises(ValueError, match="settings: "):
        side_by_side(llama, PROMPT, layer=5, layers=[5, 2])
    with pytest.raises(ValueError, match="mine: "):
        side_by_side(llama, PROMPT, layer=5, methods={"mine": {"controls": ()}})
    with pytest.raises(ValueError, match="methods: "):
        side_by_side(llama, PROMPT, layer=5, methods={})
    several: Any = (5, 2)
    with pytest.raises(TypeError, match="layer: "):
        side_by_side(llama, PROMPT, layer=several)


def test_the_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, llama_folder: Path, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`superscopes side-by-side` shows every method; a bad kind is refused by name."""
    page, folder = tmp_path / "site.html", str(llama_folder)
    with monkeypatch.context() as patched:
        made = create_autospec(side_by_side, return_value=table)
        patched.setattr("superscopes_tl.cli.neighbours.read_side_by_side", made)
        asked = ["side-by-side", "Pearl Jam", "--layer", "5", "--token", "Pearl", "--model", folder]
        run = CliRunner().invoke(app, [*asked, "--html", str(page)])
    assert run.exit_code == 0, run.output
    assert made.call_args.args[1:] == ("Pearl Jam",)
    assert made.call_args.kwargs == {"layer": 5, "kind": "mlp_out", "position": "Pearl"}
    for method in ("Patchscopes", "Superscopes", "SelfIE", "logit lens", "ablated"):
        assert method in run.output
    assert "plotly" in page.read_text(encoding="utf-8")
    bad = CliRunner().invoke(app, [*asked, "--kind", "mlp"])
    assert bad.exit_code != 0
    assert "Error: kinds: expected" in " ".join(bad.output.split())
