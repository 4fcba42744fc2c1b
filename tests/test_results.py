"""Numbers that the README and the notebooks state, recomputed from the committed result files."""

from __future__ import annotations

import re

import nbformat
import pandas as pd
import pytest

from superscopes_tl.scores import above_others
from superscopes_tl.statistics import (
    by_other_prompts,
    equal_dose,
    layer_shares,
    quality,
    quality_intervals,
    rate,
    self_explaining,
)
from tests.support.notebooks import FOLDER
from tests.support.result_figures import ALPHA, MODELS, RESULTS, confirmed, table


def _shown(notebook: str) -> str:
    """Return what the cells of a committed notebook printed."""
    cells = nbformat.read(FOLDER / f"{notebook}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join(texts)


def test_the_confirming_test_is_what_the_notebook_shows() -> None:
    """The gain of the claim that was fixed beforehand, with its interval."""
    found = confirmed(table("smollm2_chat"))
    (line,) = re.findall(r"gain over α = 1.*", _shown("04_is_it_real"))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
    assert numbers == [round(found[f"gain{end}"], 2) for end in ("", "_low", "_high")]


@pytest.mark.parametrize("name", [name for name in MODELS if (RESULTS / f"{name}.zip").is_file()])
def test_figure_3_is_what_the_notebook_shows(name: str) -> None:
    """How many layers' MLP outputs amplification reads better, of each model."""
    cells = table(name)
    shares = layer_shares(cells[cells["kind"] == "mlp_out"])
    top, holds = shares.loc[shares["gain"].idxmax()], shares["holds"]
    shown = _shown("02_paper_figures")
    layers = shares.loc[holds, "source_layer"].tolist()
    first = f"{name} mlp_out: holds at {holds.sum()} of {len(shares)} layers {layers}"
    gain = f"largest gain {top['gain']:.2f} ({top['gain_low']:.2f} to {top['gain_high']:.2f})"
    assert f"{first}\n    {gain}" in shown


README = (FOLDER.parent / "README.md").read_text("utf-8")


def test_the_readme_states_the_confirming_test() -> None:
    """Shares, gain, nats and p of the claim that was fixed beforehand."""
    found = confirmed(table("smollm2_chat"))
    (row,) = (line for line in README.splitlines() if line.startswith("| One claim fixed"))
    share = f"{found['amplified']:.2f} of the own words ({_ends(found, 'amplified')})"
    gain = f"{found['gain']:.2f} ({_ends(found, 'gain')}), {found['gain_nats']:.1f} nats"
    for stated in (share, gain, f"{found['plain']:.2f} at α = 1", f"{found['other_prompt']:.2f}."):
        assert stated in row


def test_the_readme_states_what_all_layers_show() -> None:
    """The layers of the chat form at which α = 6 holds, and those of the paper's prompt."""
    every = layer_shares(table("smollm2_chat_layers"), alpha=ALPHA)
    held = every[every["holds"]].set_index("source_layer")["q"]
    stated = " and ".join(f"{layer} (q = {q:.3f})" for layer, q in held.items())
    assert f"it holds at {stated}" in README
    for name, count in (("smollm2_paper", 30), ("gemma-3-270m_paper", 18)):
        cells = table(name)
        shares = layer_shares(cells[cells["kind"] == "mlp_out"])
        assert len(shares) == count
        assert not shares["holds"].any()
    assert "at none of SmolLM2's 30 layers, and none of Gemma's 18" in README


def test_the_readme_states_how_scores_agree_with_judged_readings() -> None:
    """AUROC of three scores, with intervals."""
    judged = pd.read_csv(RESULTS / "judgements.csv")
    right = judged["judge_1"] == 1
    for name in ("own_similarity", "recovered", "score"):
        low, high = quality_intervals(right, judged[name], judged["prompt"], resamples=2000).loc[
            "auc"
        ]
        assert f"{quality(right, judged[name]).auc:.2f} ({low:.2f} to {high:.2f})" in README


def test_the_readme_states_what_chooses_alpha() -> None:
    """What each selector's α recovers above others, at the layer of the headline."""
    cells = table("smollm2_chat")
    cells = cells[(cells["source_layer"] == 8) & (cells["target_layer"] == 0)]
    rated = cells.merge(pd.read_csv(RESULTS / "smollm2_chat_signals.csv"))
    selectors = {"own": self_explaining, "dose": equal_dose(1), "others": by_other_prompts}
    found = rate(
        rated,
        selectors,
        lambda rows: above_others(rows["recovered"], rows["other_prompt_recovered"]),
    )["value"]
    (row,) = (line for line in README.splitlines() if line.startswith("| Does the choice of α"))
    stated = [float(number) for number in re.findall(r"0\.\d\d", row)]
    oracle, blind = found["best alpha (oracle)"], found["random alpha"]
    measured = [found["own"], found["dose"], blind, found["others"], oracle]
    assert stated == [round(value, 2) for value in measured]


@pytest.mark.parametrize(("name", "owner"), [("smollm2", "SmolLM2"), ("gemma-3-270m", "Gemma")])
def test_the_readme_states_what_lenses_find_in_mlp_outputs(name: str, owner: str) -> None:
    """At how many layers each lens's reading is specific, and the best one of the Jacobian lens."""
    cells = pd.read_csv(RESULTS / f"{name}_lenses.csv")
    cells = cells[cells["kind"] == "mlp_out"]
    counts = cells[cells["specific_low"] > 0].groupby("lens").size()
    jacobian = cells[cells["lens"] == "Jacobian lens"].set_index("source_layer")
    best = jacobian["specific"].idxmax()
    top = jacobian.loc[best]
    (row,) = (line for line in README.splitlines() if line.startswith("| Must an MLP output"))
    assert f"at {counts['Jacobian lens']} of {owner}'s {len(jacobian)}" in row
    assert f"most at {best}: {top['specific']:.1f} nats, {top['specific_low']:.1f} to " in row
    if name == "smollm2":
        assert f"logit lens {counts['logit lens']}, tuned lens {counts['tuned lens']})" in row
        assert jacobian.loc[8, "specific_low"] < 0


def _ends(found: dict[str, float], name: str) -> str:
    return f"{found[f'{name}_low']:.2f} to {found[f'{name}_high']:.2f}"
