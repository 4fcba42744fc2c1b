"""Run the evaluations that notebooks and README show, and keep them as small run files.

    python notebooks/measure.py                    all of them: about three hours on two cores
    python notebooks/measure.py smollm2_chat ...   some of them

1. Each evaluation grows in an SQLite file in `output/`: stop at any time, and call again to resume.
2. When it is complete, its table is rounded and saved in `notebooks/results`.

Shares are computed with `precision="high"`; see `SweepConfig` for the error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superscopes_tl import DESCRIPTION_PROMPT, PAPER_PROMPTS, SweepResult, evaluate, load_model
from superscopes_tl.evaluation import ALL_NAMES, LONG_PROMPT, SECOND_LIST
from superscopes_tl.experiment import SweepConfig

KINDS = ("mlp_out", "resid_post", "resid_mid")
GRID = (0.25, 0.5, 1, 2, 4, 8, 16)
FOUND_LAYER = 8
"""Where the headline was found, on 22 names that are not among those of the confirming test."""

BASE = SweepConfig(
    target_layer="same",
    target_prompt=DESCRIPTION_PROMPT,
    score_on="text",
    controls=("random_direction", "other_prompt"),
    precision="high",
    generate="none",
)
FEW = (1, 3, 9)
SECTION_41: dict[str, Any] = {"kinds": "mlp_out", "layers": range(1, 8), "generate": "all"}
CHAT: dict[str, Any] = {
    "chat": True, "target_prompt": None, "source_template": "Tell me about {}",
    "max_new_tokens": 12, "kinds": "mlp_out",
}  # fmt: skip
HEADLINE: dict[str, Any] = {**CHAT, "layers": FOUND_LAYER, "others": 6}
LONG: dict[str, Any] = {"target_prompt": LONG_PROMPT, "kinds": "mlp_out", "others": 2}

Evaluation = tuple[str, Sequence[str], list[dict[str, Any]]]
EVALUATIONS: dict[str, Evaluation] = {
    "smollm2_paper": (
        "smollm2",
        PAPER_PROMPTS,
        [
            {"kinds": KINDS[:2]},
            SECTION_41,  # with texts, for the paper's own count
            {"kinds": "mlp_out", "unit": "residual", "alphas": GRID},
            {"kinds": "resid_mid"},
        ],
    ),
    "gemma-3-270m_paper": (
        "gemma-3-270m",
        PAPER_PROMPTS,
        [
            {"kinds": "mlp_out", "alphas": FEW},
            {"kinds": "resid_post", "alphas": FEW[:2], "layers": range(12)},
            {**SECTION_41, "alphas": FEW},
            {"kinds": KINDS},
            {"kinds": "mlp_out", "unit": "residual", "alphas": GRID},
        ],
    ),
    # Layer, α and target layer 0 are those at which the headline was found, on other names.
    "smollm2_chat": ("smollm2", ALL_NAMES, [{**HEADLINE, "target_layer": 0}, HEADLINE]),
    "smollm2_chat_layers": (
        "smollm2",
        SECOND_LIST,
        [{**CHAT, "controls": "other_prompt", "others": 2, "alphas": (1, 6)}],
    ),
    "smollm2_names": ("smollm2", SECOND_LIST, [{"kinds": KINDS[:2], "alphas": FEW}]),
    "gemma-3-270m_names": ("gemma-3-270m", SECOND_LIST, [{"kinds": KINDS[:2], "alphas": FEW}]),
    "gemma-3-270m_long": ("gemma-3-270m", ALL_NAMES, [{**LONG, "alphas": (1, 6)}]),
}


def main() -> None:
    """Run the evaluations that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *EVALUATIONS], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("output"), help="of the SQLite files")
    parser.add_argument("--runs", type=int, help="only so many of each evaluation's parts")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names or EVALUATIONS:
        model, prompts, runs = EVALUATIONS[name]
        path = given.folder / f"{name}.sqlite"
        loaded = load_model(model, backend="bridge")
        for run in runs[: given.runs]:
            found = evaluate(loaded, prompts, path, BASE, draws=0, **run)
        save(found, Path(__file__).parent / "results" / f"{name}.zip")


def save(found: SweepResult, path: Path) -> None:
    """Save a table with its numbers rounded: four digits are far below its intervals."""
    path.parent.mkdir(exist_ok=True)
    table = found.table.copy()
    numbers = table.select_dtypes("float").columns.difference(["alpha"])
    table[numbers] = table[numbers].round(4)
    SweepResult(table, found.provenance).save(path)


if __name__ == "__main__":
    main()
