"""Measure what notebooks, README and the documentation show, and keep it as small files.

    python notebooks/measure.py                    all of it: about three hours on two cores
    python notebooks/measure.py smollm2_chat ...   some of it

1. Each evaluation grows in an SQLite file in `output/`: stop at any time, and call again to resume.
   When it is complete, its table is rounded and saved in `notebooks/results`.
2. Each check is what `superscopes check` finds of a model, with the model's hash, as JSON.
3. Each sweep of the gallery is a run file, from which the documentation draws its pages.
4. What tells a good α without a text (`alpha_signals`) is a table, to be joined to an evaluation's.
5. What lenses read of the model's own words, without an α, is a table with a row per lens, kind and
   layer (`lens_recovery`). The lenses are fitted on paragraphs of Python's own manual.
6. An adapter is fitted on names of 15 kinds, and what it recovers of the names of five other kinds
   is a table, beside its b alone and the untrained vector (`adapter_shares`).

Every file says in `measured` which command made it, and how long it took where it ran in one go.
Shares of evaluations are computed with `precision="high"`; see `SweepConfig` for the error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from superscopes_tl import (
    DESCRIPTION_PROMPT,
    PAPER_PROMPTS,
    SweepResult,
    evaluate,
    load_model,
    plan_sweep,
    readability,
    sweep,
)
from superscopes_tl.evaluation import (
    ALL_NAMES,
    LONG_PROMPT,
    NAMES_BY_KIND,
    SECOND_LIST,
    adapter_shares,
    fit_adapter,
)
from superscopes_tl.experiment import SweepConfig
from superscopes_tl.neighbours import LENSES, fit_jacobian_lens, lens_recovery, train_tuned_lens
from superscopes_tl.statistics import alpha_signals

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


SIGNALS = {"smollm2_chat_signals": "smollm2_chat"}
"""By file, the evaluation whose first part's cells are measured."""
LENS_TABLES = {"smollm2_lenses": "smollm2", "gemma-3-270m_lenses": "gemma-3-270m"}
ADAPTERS = {"smollm2_adapter": ("smollm2", 12)}
"""By file, the model and the layer whose block output is read."""
CHECKS = {"smollm2_check": "smollm2", "gemma-3-270m_check": "gemma-3-270m"}

Sweep = tuple[str, str, dict[str, Any]]
OTHERS: dict[str, Any] = {"controls": "other_prompt", "others": 3}
GALLERY: dict[str, Sweep] = {
    "gallery_pink_floyd": (
        "smollm2",
        "Pink Floyd",
        {"kinds": "resid_post", "alphas": (1, 2, 3), "generate": "best", **OTHERS},
    ),
    "gallery_einstein": (
        "smollm2",
        "Albert Einstein",
        {
            "kinds": ("mlp_out", "resid_post"), "alphas": (1, 2, 3, 6, 9, 15), "target_layer": 0,
            "chat": True, "source_template": "Tell me about {}", "max_new_tokens": 12,
            "generate": "best", **OTHERS,
        },
    ),
    "gallery_targets": (
        "smollm2",
        "Marie Curie",
        {
            "kinds": "resid_post", "alphas": 1, "layers": range(0, 30, 3),
            "target_layer": range(0, 30, 3), **OTHERS,
        },
    ),
    "gallery_gemma": (
        "gemma-3-270m",
        "Marie Curie",
        {"kinds": ("mlp_out", "resid_post"), "alphas": (1, 3, 9), "generate": "best", **OTHERS},
    ),
}  # fmt: skip


def main() -> None:
    """Measure what the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*EVALUATIONS, *SIGNALS, *LENS_TABLES, *ADAPTERS, *CHECKS, *GALLERY]
    parser.add_argument("names", nargs="*", choices=[[], *every], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("output"), help="of the SQLite files")
    parser.add_argument("--runs", type=int, help="only so many of each evaluation's parts")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names or every:
        if name in CHECKS:
            check(name)
        elif name in SIGNALS:
            signals(name)
        elif name in LENS_TABLES:
            lenses(name)
        elif name in ADAPTERS:
            adapter(name)
        elif name in GALLERY:
            model, prompt, settings = GALLERY[name]
            started = time.monotonic()
            found = sweep(load_model(model, backend="bridge"), prompt, **settings)
            save(found, name, seconds=time.monotonic() - started)
        else:
            evaluated(name, given.folder / f"{name}.sqlite", given.runs)


def evaluated(name: str, path: Path, parts: int | None) -> None:
    """Run or resume an evaluation, and save it when it is complete."""
    model, prompts, runs = EVALUATIONS[name]
    started, resumed = time.monotonic(), path.exists()
    loaded = load_model(model, backend="bridge")
    for run in runs[:parts]:
        found = evaluate(loaded, prompts, path, BASE, draws=0, **run)
    save(found, name, seconds=None if resumed else time.monotonic() - started)


def signals(name: str) -> None:
    """Measure the signals of every cell of the first part of an evaluation."""
    model, prompts, runs = EVALUATIONS[SIGNALS[name]]
    plan = plan_sweep(load_model(model, backend="bridge"), prompts[0], BASE, **runs[0])
    found = alpha_signals(plan.at_prompt(prompt) for prompt in prompts)
    found.round(4).to_csv(_path(f"{name}.csv"), index=False)


def lenses(name: str) -> None:
    """Fit both lenses, and count what all three read of own words that begin differently."""
    model = load_model(LENS_TABLES[name], backend="bridge")
    paragraphs = [part for text in topics.values() for part in text.split("\n\n")]
    texts = [part for part in paragraphs if 200 < len(part) < 400][:36]
    jacobian = fit_jacobian_lens(
        model, texts, rows=model.d_model // 12 + 1, max_tokens=40, skip_first=8
    )
    tuned = train_tuned_lens(model, texts, steps=200)
    read = {**LENSES, "tuned lens": tuned, "Jacobian lens": jacobian}
    asked = {key: CHAT[key] for key in ("chat", "source_template", "max_new_tokens")}
    settings = asked if LENS_TABLES[name] == "smollm2" else {}
    found = lens_recovery(model, ALL_NAMES[::4], lenses=read, **settings).summary()
    found.round(4).to_csv(_path(f"{name}.csv"), index=False)


def adapter(name: str) -> None:
    """Fit an adapter, and measure it on names of kinds that it has not seen."""
    asked, layer = ADAPTERS[name]
    model = load_model(asked, backend="bridge")
    groups = list(NAMES_BY_KIND.values())
    unseen = [name for several in groups[3::4] for name in several]
    seen = [name for several in groups for name in several[:4] if name not in unseen]
    fitted = fit_adapter(
        model, seen, layer=layer, batch_size=20, learning_rate=0.05,
        source_template=CHAT["source_template"], precision="high",
    )  # fmt: skip
    fitted.save(_path(f"{name}.safetensors"))
    adapter_shares(model, fitted, unseen).round(4).to_csv(_path(f"{name}.csv"), index=False)


def check(name: str) -> None:
    """Find out how a model can be read, and keep that with what the model is."""
    started = time.monotonic()
    model = load_model(CHECKS[name], backend="bridge")
    found = readability(model).to_json()
    made = {
        **measured(name, time.monotonic() - started),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "model": model.provenance(),
    }
    _path(f"{name}.json").write_text(json.dumps({**made, "check": found}, indent=1), "utf-8")


def measured(name: str, seconds: float | None) -> dict[str, Any]:
    """Return how a file was made."""
    took = None if seconds is None else round(seconds)
    return {"measured": {"command": f"make results RESULTS={name}", "seconds": took}}


def save(found: SweepResult, name: str, *, seconds: float | None) -> None:
    """Save a table with its numbers rounded: four digits are far below its intervals."""
    table = found.table.copy()
    numbers = table.select_dtypes("float").columns.difference(["alpha"])
    table[numbers] = table[numbers].round(4)
    made = {**found.provenance, **measured(name, seconds)}
    SweepResult(table, made).save(_path(f"{name}.zip"))


def _path(name: str) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / name


if __name__ == "__main__":
    main()
