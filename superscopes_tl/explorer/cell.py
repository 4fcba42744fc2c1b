"""Everything about one cell of a sweep.

1. `reading_at` and `ladder` look up its row and its site's other α.
2. `probe` asks the model about it: what it writes when nothing is patched, or a random vector of
   equal norm, how likely each token of the cell's text is with the patch and without, and which
   next tokens the logit lens names at the same site.
3. `code_for` writes the Python that reads this cell again.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from superscopes_tl.engine import Patch, crop_description, default_target_prompt
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import (
    COLUMNS,
    Cell,
    Reading,
    SweepPlan,
    SweepResult,
    make_patches,
    score_readings,
)
from superscopes_tl.model import KINDS, LanguageModel, Site, load_model
from superscopes_tl.neighbours import LENSES, Lens, TokenEffect, lens_table, token_effects
from superscopes_tl.scores import PAPER_SCORER
from superscopes_tl.vectors import PAPER_MAPPING, random_direction
from superscopes_tl.weights import BUNDLED_MODEL, PACKAGED


@dataclass(frozen=True)
class Control:
    """What the model writes in a cell's place without the cell's vector."""

    name: str
    text: str
    description: str
    score: float
    recovered: float = math.nan


@dataclass(frozen=True)
class LensReading:
    """What a lens reads at a cell's site, whatever its α.

    Attributes:
        lens: its name.
        tokens: the likeliest next tokens with their probabilities, the likeliest first.
    """

    lens: str
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Probe:
    """What only the model can say about a cell."""

    tokens: tuple[TokenEffect, ...]
    controls: tuple[Control, ...]
    lenses: tuple[LensReading, ...]


def reading_at(result: SweepResult, selection: Cell) -> Reading | None:
    """Return the cell's reading; `None` if it was not computed."""
    rows = _site(result, selection)
    rows = rows[rows["alpha"] == selection.alpha]
    if rows.empty:
        return None
    row = rows.to_dict("records")[0]
    controls = {str(name): row[name] for name in row if name not in COLUMNS}
    return Reading(**{name: row[name] for name in COLUMNS}, controls=controls)


def ladder(result: SweepResult, selection: Cell) -> pd.DataFrame:
    """Return the readings of the selected site at every α, smallest first."""
    columns = ["alpha", "norm_ratio", "score", "recovered", "description", "written"]
    return _site(result, selection).sort_values("alpha")[columns].reset_index(drop=True)


def _site(result: SweepResult, selection: Cell) -> pd.DataFrame:
    table = result.table
    wanted = (
        (table["kind"] == selection.kind)
        & (table["source_layer"] == selection.source_layer)
        & (table["position"] == selection.position)
        & (table["target_layer"] == selection.target_layer)
    )
    return table[wanted]


def probe(plan: SweepPlan, reading: Reading, lenses: Mapping[str, Lens] = LENSES) -> Probe:
    """Compare a cell with its controls, weigh the tokens of its text, read its site by lenses.

    Args:
        plan: the plan that the cell belongs to.
        reading: the cell.
        lenses: by name; each also reads a random vector of equal norm.

    Raises:
        ValueError: the cell is none of the plan's, or a lens is another model's.
    """
    cell = Cell.of(reading)
    if cell not in plan.all_cells:
        raise bad_value("reading", "a cell of the plan", cell, "pass the plan of its sweep")
    patch = make_patches(replace(plan, finished=frozenset(plan.all_cells) - {cell}))[0]
    unpatched = Patch(torch.zeros_like(patch.vector), None)
    random = random_direction(0)(1.0)(patch.vector[None])[0]
    controls = {
        "unpatched": unpatched,
        "random vector of equal norm": replace(patch, vector=random),
    }
    generator = plan.generator
    written, *others = generator.generate([patch, *controls.values()])
    texts = [generation.text for generation in others]
    descriptions = [crop_description(text) for text in texts]
    scores = score_readings(plan, [cell] * len(texts), texts, descriptions)
    shares = _shares(plan, cell.position, controls["random vector of equal norm"])
    return Probe(
        tokens=token_effects(generator, [patch], [written.token_ids])[0],
        controls=tuple(map(Control, controls, texts, descriptions, scores, shares)),
        lenses=_through_lenses(plan, cell.site, lenses),
    )


def _shares(plan: SweepPlan, position: int, random: Patch) -> tuple[float, float]:
    """Return what no patch and a random one recover of the model's own words."""
    words = plan.own_words([position])[position]
    if words.undefined:
        return math.nan, math.nan
    (likely,) = plan.generator.log_probabilities([replace(random, seed=None)], [words.token_ids])
    return 0.0, words.recovered(sum(likely))  # nothing, by definition


def _through_lenses(
    plan: SweepPlan, site: Site, lenses: Mapping[str, Lens]
) -> tuple[LensReading, ...]:
    """Return what lenses read at a site; nothing where v is not the site's own activation."""
    if plan.config.vectors is not None:
        return ()
    named = lens_table(plan.model, plan.source, [site], lenses=lenses)
    return tuple(
        LensReading(str(name), tuple(zip(rows["top_token"], rows["probability"], strict=True)))
        for name, rows in named.groupby("lens", sort=False)
    )


def code_for(result: SweepResult, selection: Cell, plan: SweepPlan | None = None) -> str:
    """Return Python that reads this cell again, and writes it out.

    What a provenance cannot hold has to be put in by hand, and a comment says so: a mapping family
    or a scorer of your own, a model that was made in memory. In half precision another batch size
    may change a text; a comment says that too.

    Args:
        result: gives the settings, by its provenance.
        selection: the cell.
        plan: knows where its models came from: their full paths are in no result.
    """
    if selection.kind not in KINDS:
        return "# These vectors came from no prompt: read_vectors(model, vectors, ...) reads them."
    provenance = result.provenance
    config, model = provenance.get("config", {}), provenance.get("model", {})
    read, asked = (None, None) if plan is None else (plan.model, plan.generator.model)
    own, imported = _amplifier(config)
    settings = {
        "layers": selection.source_layer,
        "kinds": selection.kind,
        "alphas": selection.alpha,
        "positions": selection.position,
        "target_layer": selection.target_layer,
        "max_new_tokens": config.get("max_new_tokens"),
        **own,
        **_prompts(result, selection),
    }
    names, notes = ["load_model", "sweep", *imported], _model_notes(model, read)
    if "target_prompt" in settings:
        names.append("TargetPrompt")
    notes += [
        f"# {v}: the sweep's own, {_line(config[k])}" for k, v in own.items() if v in _UNKNOWN
    ]
    if other := provenance.get("target_model"):
        notes += _model_notes(other, asked)
        settings["target_model"] = _Verbatim(_load(other, asked))
    if config.get("score_on", "description") != "description":
        settings["score_on"] = config["score_on"]
    scored = config.get("generate") != "none"
    if scored and config.get("scorer", PAPER_SCORER) != PAPER_SCORER:
        notes.append(f"# scorer={config['scorer']!r}: pass your own to get its scores")
    lines = [
        f"from superscopes_tl import {', '.join(sorted(names, key=str.lower))}",
        "",
        *notes,
        f"model = {_load(model, read)}",
        "result = sweep(",
        f"    model, {provenance.get('prompt')!r},",
        *(f"    {key}={value!r}," for key, value in settings.items()),
        "    progress=False,",
        ")",
        "table = result.table",
    ]
    if str(config.get("mapping", PAPER_MAPPING)) != PAPER_MAPPING:
        lines.append(
            f"table = table[(table.kind == {selection.kind!r}) & (table.source_layer == "
            f"{selection.source_layer}) & (table.position == {selection.position})]"
        )
    return "\n".join([*lines, f"print(table[{_PRINTED}].iloc[0].to_dict())"])


_PRINTED = ["text", "score", "recovered"]


def _line(said: object) -> str:
    """Return what a provenance says, which may come from anyone, as one line of a comment."""
    return " ".join(str(said).split())


def _prompts(result: SweepResult, selection: Cell) -> dict[str, Any]:
    """Return the settings of both prompts that are not the default ones."""
    provenance = result.provenance
    config = provenance.get("config", {})
    settings: dict[str, Any] = {}
    if prompt := _target_prompt(provenance.get("target_prompt", {}), chat=bool(config.get("chat"))):
        settings["target_prompt"] = _Verbatim(prompt)
    if config.get("chat"):
        settings["chat"] = True
    if config.get("source_template", "{}") != "{}":
        settings["source_template"] = config["source_template"]
    # A substring that chose the position is what it is about; the code has its index.
    reading = reading_at(result, selection)
    about = config.get("about") or (reading.about if reading is not None else "")
    if about and (config.get("about") or about != provenance.get("prompt")):
        settings["about"] = about
    if config.get("reference"):
        settings["reference"] = config["reference"]
    return settings


def _target_prompt(target: dict[str, Any], *, chat: bool) -> str:
    """Return the code of a target prompt that is not the default one; nothing for that."""
    asked = tuple(target.get(name, "") for name in ("text", "placeholder", "answer"))
    if asked == astuple(default_target_prompt(None, chat=chat)):
        return ""
    return f"TargetPrompt({', '.join(map(repr, asked if asked[2] else asked[:2]))})"


_UNKNOWN = ("my_mapping", "my_vectors", "my_base", "my_write")
_KNOWN = {
    *("random_direction", "in_units_of", "resid_mid", "placeholder_state"),
    *("head", "window", "accumulated", "add", "interpolate", "at_layers", "both"),
}
"""What a provenance names as the Python that makes it."""


def _amplifier(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that say how α acts, where that is not the paper's way, and imports."""
    settings: dict[str, Any] = {
        name: config[name]
        for name, usual in (("unit", "vector"), ("guide", "vector"), ("draw", 0))
        if config.get(name, usual) != usual
    }
    imported: list[str] = []
    mapping = str(config.get("mapping", PAPER_MAPPING))
    if mapping != PAPER_MAPPING:
        # A mapping may treat the sites of a sweep together: repeat them all, take the one row.
        settings.update(
            {key: config[key] for key in ("layers", "kinds", "positions") if key in config}
        )
    for name, usual in (("mapping", PAPER_MAPPING), ("vectors", ""), ("base", ""), ("write", "")):
        code = str(config.get(name) or usual)
        if code != usual:
            functions = set(re.findall(r"[A-Za-z_]\w*\b(?!=)", code))
            # Python reads ｅｖａｌ as eval, and a line break as the end of what was checked.
            known = functions <= _KNOWN and code.isascii() and code.isprintable()
            imported += sorted(functions) if known else []
            settings[name] = _Verbatim(code if known else f"my_{name}")
    return settings, imported


def _model_notes(model: dict[str, Any], live: LanguageModel | None) -> list[str]:
    """Return comments on how to get a model again, as far as its code does not say it."""
    notes = []
    if live is not None and live.origin is None:
        notes.append("# load_model: this model was made in memory; pass the object itself")
    elif live is None and model.get("name") not in (BUNDLED_MODEL, *PACKAGED):
        notes.append("# load_model: give the path if the model came from a folder, and a revision")
    if model.get("dtype", "float32") != "float32":
        notes.append("# in half precision another batch size may change the text")
    return notes


class _Verbatim(str):
    """A piece of code: its repr is itself."""

    def __repr__(self) -> str:
        return str(self)


_SECRET = ("token",)
"""Loading options that no code shows; whoever has a token is logged in."""


def _load(model: dict[str, Any], live: LanguageModel | None) -> str:
    """Return the code that loads a model: with all that its first loading was given, if known."""
    origin: Any = None if live is None else live.origin
    if not isinstance(origin, partial):
        origin = partial(load_model, model.get("name"))
    values = {k: _plain(v) for k, v in origin.keywords.items() if k not in _SECRET}
    values |= {"backend": model.get("backend", "auto"), "prepend_bos": model.get("prepend_bos")}
    if model.get("dtype", "float32") != "float32":
        values["dtype"] = model["dtype"]
    given = {k: v for k, v in values.items() if v is not None or k == "prepend_bos"}
    settings = ", ".join(f"{k}={v!r}" for k, v in given.items())
    return f"load_model({origin.args[0]!r}, {settings})"


def _plain(value: object) -> object:
    """Return a loading option as a literal; torch's types and devices by their names."""
    try:
        ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        return str(value).removeprefix("torch.")
    return value
