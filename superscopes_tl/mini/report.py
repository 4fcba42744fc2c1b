"""Measure the bundled model: `python -m superscopes_tl.mini.report [--check] [--write]`.

1. Take the counts (`measure.py`) for the paper's 48 prompts, and for random samples of the held-out
   names and of all names (`--sample 0` reads every name, which takes over an hour).
2. Hold them against the bars, which were set before the model was trained.
3. Print both; `--check` ends with exit code 1 and names each bar that falls short; `--write`
   puts the figures beside the weights, where `superscopes models` reads them.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from superscopes_tl.mini import MODEL_DIR
from superscopes_tl.mini.facts import Fact, load_facts
from superscopes_tl.mini.measure import (
    ALPHAS,
    EVERY_ALPHA,
    TOO_LARGE,
    Curves,
    Marks,
    Readings,
    contextualization_layers,
    figure_3,
    folder_size,
    groups,
    last_word_first,
    nearest_own,
    read_earlier,
    readings,
    recall,
    sweep_seconds,
)
from superscopes_tl.mini.reader import Reader

FIGURES = "measured.json"
"""The file of a model folder that holds its figures."""

FIGURE_3_LAYERS = range(1, 8)
"""The layers that the paper's Figure 3 draws."""


@dataclass(frozen=True)
class Bar:
    """Something that the model must reach.

    Attributes:
        number: Bars of one number belong together.
        wanted: What is asked.
        got: What was measured.
        met: Whether it is reached.
    """

    number: int
    wanted: str
    got: str
    met: bool


def percent(marks: Sequence[bool]) -> float:
    """Return a share in per cent.

    >>> percent([True, False])
    50.0
    """
    return round(100 * float(np.mean(marks)), 1) if len(marks) else 0.0


def by_layer(marks: Marks) -> list[float]:
    """Return the per cent of names at each layer."""
    return [percent(list(row)) for row in marks]


def summarise(
    facts: Sequence[Fact],
    group: Sequence[Fact],
    recalled: Sequence[bool],
    read: dict[str, Readings],
) -> dict[str, Any]:
    """Return the figures of one group of names, in per cent unless said otherwise."""
    plain = read["resid_post"].exact(1)
    starts = contextualization_layers(plain)
    found = [start for start in starts if start is not None]
    last = last_word_first(facts, group, read["resid_post"].texts[1])
    return {
        "names read": len(group),
        "recall": percent(recalled),
        "l_c: names per layer": dict(sorted(Counter(found).items())),
        "l_c: median": median(found) if found else None,
        "last word read before l_c": percent(last),
        "names whose last word has a meaning": len(last),
        "some alpha > 1 reads resid_post before l_c": percent(read_earlier(read["resid_post"])),
        **{
            kind: {
                **{f"alpha {alpha}": by_layer(table.exact(alpha)) for alpha in table.texts},
                f"best of {', '.join(map(str, ALPHAS))}": by_layer(table.any_alpha()),
                "at some layer and alpha": percent(
                    [bool(column.any()) for column in table.any_alpha().T]
                ),
            }
            for kind, table in read.items()
        },
    }


def measure(folder: Path, sample: int) -> dict[str, Any]:
    """Take all figures of a model.

    Args:
        folder: The model folder.
        sample: At most so many names per group are read; 0 for no limit. Recall takes all.

    Returns:
        Figures that fit into JSON.
    """
    facts = load_facts()
    reader = Reader(folder)
    figures: dict[str, Any] = {"layers": reader.n_layers, "groups": {}}
    recalled = recall(reader, facts)
    whole = groups(facts, 0)
    for title, group in groups(facts, sample).items():
        states = reader.states([fact.name for fact in group])
        read = readings(reader, states, group, EVERY_ALPHA)
        right = [recalled[fact.name] for fact in whole[title]]
        figures["groups"][title] = summarise(facts, group, right, read)
        if title == "paper":
            prompts = [fact.name for fact in group]
            curves = figure_3(reader, states, read["mlp_out"], prompts)
            figures["figure 3, mlp_out"] = {name: asdict(c) for name, c in curves.items()}
    states = reader.states([fact.name for fact in facts])
    figures["nearest to its own name's block output, all names"] = {
        kind: by_layer(nearest_own(states, kind)) for kind in ("resid_post", "mlp_out")
    }
    figures["megabytes"] = round(folder_size(folder) / 1e6, 2)
    figures["seconds per sweep"] = round(sweep_seconds(folder, "Red Hot Chili Peppers"), 2)
    figures["weights"] = _digest(folder)
    return figures


def above(curves: Curves, baseline: str, layers: Sequence[int]) -> Bar:
    """Hold the any-alpha curve against a baseline: nowhere below, above at most layers."""
    pairs = [(curves.any_alpha[at], getattr(curves, baseline)[at]) for at in layers]
    met = all(a >= b for a, b in pairs) and sum(a > b for a, b in pairs) > len(pairs) / 2
    got = f"{_join(a for a, _ in pairs)} against {_join(b for _, b in pairs)}"
    where = f"layers {min(layers)} to {max(layers)}"
    return Bar(4, f"any alpha above {baseline.replace('_', ' ')}, {where}", got, met)


def bars(figures: dict[str, Any]) -> list[Bar]:
    """Hold the figures against the bars."""
    paper, hidden, every = (figures["groups"][title] for title in ("paper", "held-out", "all"))
    found = [
        _at_least(1, "recall, per cent, paper", paper["recall"], 98),
        _at_least(1, "recall, per cent, all", every["recall"], 98),
        _at_least(
            2, "resid_post at its best layer, paper", max(paper["resid_post"]["alpha 1"]), 85
        ),
        _at_least(2, "resid_post, held-out", max(hidden["resid_post"]["alpha 1"]), 75),
    ]
    for title, group in (("paper", paper), ("all", every)):
        spread = group["l_c: names per layer"]
        found += [
            _at_least(3, f"different layers l_c, {title}", len(spread), 5),
            _at_least(3, f"median l_c, {title}", group["l_c: median"] or 0, 3),
            _at_least(3, f"last word before l_c, {title}", group["last word read before l_c"], 60),
        ]
    mlp = paper["mlp_out"]
    weak = zip(mlp["alpha 1"], mlp[_best()], strict=True)
    layers = [at for at, (one, best) in enumerate(weak) if one <= 15 and best >= 50]
    wanted = "layers where mlp_out reads <= 15 % at alpha 1, >= 50 % at the best"
    got = f"{len(layers)} (best: {_join(mlp[_best()])})"
    found.append(Bar(4, f"{wanted}: >= 4", got, len(layers) >= 4))
    for title, curve in figures["figure 3, mlp_out"].items():
        for baseline in ("alpha_1", "equal_budget"):
            for span in (FIGURE_3_LAYERS, range(figures["layers"])):
                bar = above(Curves(**curve), baseline, span)
                found.append(Bar(4, f"{title}: {bar.wanted}", bar.got, bar.met))
    gained = "some alpha > 1 reads resid_post before l_c"
    found += [
        _at_least(5, f"{gained}, {t}", group[gained], 30)
        for t, group in (("paper", paper), ("all", every))
    ]
    found += [_faded(paper, kind) for kind in ("mlp_out", "resid_post")]
    size, seconds = figures["megabytes"], figures["seconds per sweep"]
    return [
        *found,
        Bar(7, "megabytes <= 12", f"{size}", size <= 12),
        Bar(7, "sweep <= 2 s on two threads", f"{seconds} s", seconds <= 2),
    ]


def _at_least(number: int, what: str, got: float, bound: float) -> Bar:
    return Bar(number, f"{what} >= {bound}", f"{got:g}", got >= bound)


def _faded(group: dict[str, Any], kind: str) -> Bar:
    """Compare the exact readings of all layers at the best alpha and at far too large a one."""
    total = {alpha: sum(group[kind][f"alpha {alpha}"]) for alpha in (1, *ALPHAS)}
    best, last = max(total.values()), sum(group[kind][f"alpha {TOO_LARGE}"])
    layers = _join(group[kind][f"alpha {TOO_LARGE}"])
    share = 100 * last / best if best else 0.0
    wanted = f"{kind} at alpha {TOO_LARGE}, all layers, <= 50 % of the readings at the best alpha"
    return Bar(6, wanted, f"{share:.0f} % (by layer: {layers})", bool(best) and share <= 50)


def _best() -> str:
    return f"best of {', '.join(map(str, ALPHAS))}"


def _join(numbers: Any) -> str:
    return " ".join(f"{number:.0f}" for number in numbers)


def load_figures(folder: Path) -> dict[str, Any]:
    """Return the figures that `--write` put beside the weights.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are of other weights.
    """
    figures: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    if figures["weights"] != _digest(folder):
        raise ValueError(
            f"{folder / FIGURES}: expected figures of the weights beside it, got those of other "
            "weights. Fix: python -m superscopes_tl.mini.report --write"
        )
    return figures


def headline(figures: dict[str, Any]) -> dict[str, str]:
    """Say in a few lines what was measured."""
    paper, hidden, every = (figures["groups"][title] for title in ("paper", "held-out", "all"))
    mlp = paper["mlp_out"]
    return {
        "recall": f"{every['recall']:g} % of all descriptions from plain text",
        "resid_post, alpha 1": f"{max(paper['resid_post']['alpha 1']):g} % of the paper's prompts "
        f"at the best layer, {max(hidden['resid_post']['alpha 1']):g} % of held-out names",
        "l_c": f"median layer {paper['l_c: median']:g}",
        "mlp_out": f"at most {max(mlp['alpha 1']):g} % at alpha 1, "
        f"{max(mlp[_best()]):g} % at the {_best()}",
    }


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def print_figures(figures: dict[str, Any], indent: str = "") -> None:
    """Print the figures as an outline."""
    for name, value in figures.items():
        if isinstance(value, dict) and not name.startswith("l_c"):
            print(f"{indent}{name}")
            print_figures(value, indent + "  ")
        else:
            text = _join(value) if isinstance(value, list) else str(value)
            print(f"{indent}{name:44s} {text}")


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description="Measure the bundled model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the model folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sample", type=int, default=100, help="names read per group; 0: all")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--write", action="store_true", help=f"write {FIGURES} into the folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.model, args.sample)
    if args.write:
        text = json.dumps(figures, indent=1) + "\n"
        (args.model / FIGURES).write_text(text, encoding="utf-8")
    print("Exact readings in per cent, one number per layer, target layer 0.\n")
    print_figures(figures)
    print()
    missed = [bar for bar in bars(figures) if not bar.met]
    for bar in bars(figures):
        print(f"{'ok    ' if bar.met else 'MISSED'} {bar.number}  {bar.wanted}: {bar.got}")
    if missed and args.check:
        numbers = ", ".join(map(str, sorted({bar.number for bar in missed})))
        raise SystemExit(f"{len(missed)} requirements missed, of bars {numbers}")


if __name__ == "__main__":
    main()
