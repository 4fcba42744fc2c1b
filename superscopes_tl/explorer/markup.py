"""The Explorer's HTML: pure functions from data to a piece of markup.

1. A macro of `templates/explorer.html` lays a piece out (`render`); where what to show has to be
   chosen first, a function here does so.
2. Jinja escapes every value: generated text and prompts are untrusted.
3. Colours that carry a value are cividis, under black or white text, whichever contrasts more;
   everything else takes its colour from the style sheet.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from superscopes_tl.engine import NEAR_TIE
from superscopes_tl.experiment import Cell, Reading, SweepResult, flags
from superscopes_tl.explorer.cell import beside
from superscopes_tl.figures import MARKS, USUAL_SCORES, Shades, on_scale
from superscopes_tl.model import PAPER_KINDS, layer_name

SHARES = {
    "other_prompt_recovered": "recovered by other prompts",
    "random_direction_recovered": "recovered by random direction",
    "specific": "specific",
}
"""The shares that controls recover, by column."""
STEPS = ((0, "×1"), (1, "×10"), (2, "×100"), (4, "×10⁴ or more"))
"""The legend of the token effects: powers of ten."""
LONGEST_PROMPT = 80


def render(macro: str, *values: object) -> str:
    """Return what a macro of the template makes of some values."""
    return str(getattr(_TEMPLATES.get_template("explorer.html").module, macro)(*values))


def alert(error: BaseException, *, run: int = 0) -> str:
    """Return an error message that screen readers announce, with an expandable traceback."""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return render("alert", name, str(error), "".join(traceback.format_exception(error)), run)


def note(text: str, role: str = "") -> str:
    """Return a quiet remark."""
    return render("note", text, role)


def caption(result: SweepResult, token: str, target: int | str, marks: Sequence[str]) -> str:
    """Return what the heatmaps show, and the legend of their marks."""
    prompt = str(result.provenance.get("prompt", ""))
    if len(prompt) > LONGEST_PROMPT:
        prompt = f"{prompt[: LONGEST_PROMPT - 1]}…"
    into = (
        "target layer = source layer"
        if target == "same"
        else f"target layer {layer_name(int(target))}"
    )
    model = result.provenance.get("model", {}).get("name", "unknown model")
    legend = ", ".join(f"{MARKS[name][1]} {name}" for name in marks)
    return render("caption", prompt, token, into, model, legend)


def detail(reading: Reading | None, cell: Cell | None, shades: Shades) -> str:
    """Return the selected cell: its place, its reading and numbers, the full generation."""
    if cell is None:
        return note("Click a cell, or use the cursors below, to read it here.")
    if reading is None:
        return render("detail", cell, None, (), (), ())
    unusual = {
        "repeats the name": reading.echo,
        "repeats a name from the target prompt": reading.few_shot_copy,
        "near tie: another batch size may generate another text": reading.margin < NEAR_TIE,
    }
    recovered = Shades("recovered")
    scores = shades if shades.column == "score" else Shades("score", *USUAL_SCORES)
    chips = [("recovered", reading.recovered, recovered)]
    if reading.written:
        chips.insert(int(shades.column == "recovered"), ("score", reading.score, scores))
    shares = [
        (label, float(reading.controls[name]), recovered)
        for name, label in SHARES.items()
        if name in reading.controls
    ]
    there = [*flags(reading.norm_outlier, reading.unchanged)]
    there += (flag for flag, true in unusual.items() if true)
    return render("detail", cell, reading, there, chips, shares)


def best(result: SweepResult, shades: Shades, alpha: float | None) -> str:
    """Return the reading of each layer and kind at one α or the best (Figures 5 and 6)."""
    by: Any = shades.column
    wide = result.by_layer(alpha=alpha, by=by)
    kinds = list(wide.columns.get_level_values(0).unique())
    rows = [
        (layer, [row[kind].to_dict() for kind in kinds])
        for layer, (_, row) in zip(map(int, wide.index), wide.iterrows(), strict=True)
    ]
    title = "Best α of every site" if alpha is None else f"α = {alpha:g}"
    return render("best", title, kinds, rows, shades)


def parts(result: SweepResult, cell: Cell, shades: Shades) -> str:
    """Return resid_mid + mlp_out = resid_post of one layer, each with its readings (Figure 1)."""
    here = beside(result, cell).sort_values(shades.column, ascending=False)
    kinds = [
        (kind, sign, _part(here[here["kind"] == kind]))
        for kind, sign in zip(PAPER_KINDS, ("", "+", "="), strict=True)
    ]
    return render("parts", cell.source_layer, kinds, shades)


def _part(rows: pd.DataFrame) -> list[tuple[str, Mapping[Any, Any]]]:
    """Return the unamplified and the best of a kind's cells, which come best first."""
    records = rows.to_dict("records")
    plain = [row for row in records if row["alpha"] == 1][:1]
    if plain and plain[0] is records[0]:
        return [("unamplified and best", plain[0])]
    return [("unamplified", row) for row in plain] + [("best", row) for row in records[:1]]


def _shade(value: float, low: float, high: float) -> str:
    """Return the style of a value's colour, with the text colour that contrasts more."""
    background, ink = on_scale(value, low, high)
    return f"background:{background};color:{ink}"


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.tests["nan"] = math.isnan
_TEMPLATES.filters["visible"] = repr
_TEMPLATES.filters["layer_name"] = layer_name
_TEMPLATES.globals |= {
    "shade": _shade, "steps": STEPS, "probability": lambda log: f"{math.exp(log):.2g}"
}  # fmt: skip
