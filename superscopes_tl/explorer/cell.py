"""Everything about one cell of a sweep.

1. `reading_at` and `ladder` look up its row, and its site at every α.
2. `probe` asks the target model: what it generates at the same place for each control, how the
   patch changes the probability of every generated token, and which next tokens lenses read at the
   same site.
3. `code_for` writes the Python that reads this cell again.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from superscopes_tl.engine import Patch, default_target_prompt
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import (
    COLUMNS,
    Cell,
    Reading,
    SweepPlan,
    SweepResult,
    make_control,
    make_patches,
    score_readings,
)
from superscopes_tl.model import KINDS, LanguageModel, Site, layer_name, load_model
from superscopes_tl.neighbours import (
    LENSES,
    Lens,
    TokenEffect,
    lens_label,
    lens_table,
    token_effects,
)
from superscopes_tl.scores import PAPER_SCORER
from superscopes_tl.vectors import PAPER_MAPPING
from superscopes_tl.vectors import __all__ as values
from superscopes_tl.weights import PACKAGED

PROBE_CONTROLS = {"unpatched": "unpatched", "random_direction": "random direction of equal norm"}
"""The controls that are generated for the selected cell, with their labels."""


@dataclass(frozen=True)
class ControlReading:
    """What the target model generates in a cell's place under a control."""

    name: str
    text: str
    description: str
    score: float
    recovered: float = math.nan
    written: bool = True


@dataclass(frozen=True)
class LensReading:
    """The most likely next tokens of a lens at a cell's site, or why it cannot read the site.

    Attributes:
        lens: its name.
        tokens: the tokens, each with its probability.
        problem: the lens's own error, if any.
    """

    lens: str
    tokens: tuple[tuple[str, float], ...]
    problem: str = ""


@dataclass(frozen=True)
class Probe:
    """What only the model can tell about a cell."""

    tokens: Sequence[TokenEffect]
    controls: Sequence[ControlReading]
    lenses: Sequence[LensReading]


def reading_at(result: SweepResult, cell: Cell) -> Reading | None:
    """Return the cell's reading; `None` if it was not computed."""
    rows = ladder(result, cell)
    for row in rows[rows["alpha"] == cell.alpha].to_dict("records"):
        controls = {str(name): row[name] for name in row if name not in COLUMNS}
        return Reading(**{name: row[name] for name in COLUMNS}, controls=controls)
    return None


def ladder(result: SweepResult, cell: Cell) -> pd.DataFrame:
    """Return the readings of the cell's site at every α, in ascending order."""
    rows = beside(result, cell)
    return rows[rows["kind"] == cell.kind].sort_values("alpha")


def beside(result: SweepResult, cell: Cell) -> pd.DataFrame:
    """Return the readings of all kinds at the cell's layers and token."""
    same = ["source_layer", "position", "target_layer"]
    return result.table[(result.table[same] == [getattr(cell, name) for name in same]).all(axis=1)]


def probe(plan: SweepPlan, reading: Reading, lenses: Mapping[str, Lens] = LENSES) -> Probe:
    """Compare a cell of a plan with its controls, weigh its tokens, read its site by lenses.

    Raises:
        ValueError: the cell is not in the plan.
    """
    cell = Cell.of(reading)
    if cell not in plan.all_cells:
        raise bad_value("reading", "a cell of the plan", cell, "pass the plan of its sweep")
    patch = make_patches(plan.only([cell]))[0]
    controls = {name: make_control(name, plan, [cell], [patch])[0] for name in PROBE_CONTROLS}
    generated, *others = plan.generator.generate([patch, *controls.values()])
    texts = [generation.text for generation in others]
    descriptions = [generation.description for generation in others]
    scores = score_readings(plan, [cell] * len(texts), texts, descriptions)
    shares = [_recovered(plan, cell.position, control) for control in controls.values()]
    return Probe(
        token_effects(plan.generator, [patch], [generated.token_ids])[0],
        [*map(ControlReading, PROBE_CONTROLS.values(), texts, descriptions, scores, shares)],
        _lens_readings(plan, cell.site, lenses),
    )


def _recovered(plan: SweepPlan, position: int, control: Patch) -> float:
    """Return the share of the model's own words that a control recovers."""
    words = plan.own_words([position])[position]
    if words.undefined:
        return math.nan
    if control.target_layer is None:
        return 0.0  # the unpatched prompt, by definition
    (likely,) = plan.generator.log_probabilities([replace(control, seed=None)], [words.token_ids])
    return words.recovered(sum(likely))


def _lens_readings(plan: SweepPlan, site: Site, lenses: Mapping[str, Lens]) -> list[LensReading]:
    """Return what lenses read at a site; nothing where v is not the site's own activation."""
    if plan.config.vectors is not None:
        return []
    found = []
    for name, lens in lenses.items():  # one that was fitted for other layers leaves the others
        try:
            table = lens_table(plan.model, plan.source, [site], lenses={name: lens})
        except ValueError as error:
            found.append(LensReading(name, (), str(error)))
            continue
        found += [
            LensReading(
                lens_label(name, bool(control)),
                tuple(zip(rows["top_token"], rows["probability"], strict=True)),
            )
            for control, rows in table.groupby("control", sort=False)
        ]
    return found


def code_for(result: SweepResult, cell: Cell, plan: SweepPlan | None = None) -> str:
    """Return Python that reads this cell again and generates its text.

    Comments say what a provenance cannot hold and has to be filled in by hand: a mapping or scorer
    of your own, a model that was built in memory; and that in half precision another batch size
    may change a text.

    Args:
        result: its provenance has the settings.
        cell: the cell.
        plan: knows where its models were loaded from: no result has their full paths.
    """
    if cell.kind not in KINDS:
        return "# These vectors come from no prompt: read_vectors(model, vectors, ...) reads them."
    provenance = result.provenance
    config, model = provenance.get("config", {}), provenance.get("model", {})
    source, target = (None, None) if plan is None else (plan.model, plan.generator.model)
    amplifier, names, notes = _amplifier(config)
    settings = {
        "layers": cell.source_layer, "kinds": cell.kind, "alphas": cell.alpha,
        "positions": cell.position, "target_layer": layer_name(cell.target_layer),
        "max_new_tokens": config.get("max_new_tokens"), **amplifier, **_prompts(result, cell),
    }  # fmt: skip
    notes = [*_model_notes(model, source), *notes]
    if other := provenance.get("target_model"):
        notes += _model_notes(other, target)
        settings["target_model"] = _Verbatim(_load(other, target))
    for name, default in (("score_on", "description"), ("score_against", "prompt")):
        if config.get(name, default) != default:
            settings[name] = config[name]
    if config.get("generate") != "none" and config.get("scorer", PAPER_SCORER) != PAPER_SCORER:
        notes.append(f"# scorer={config['scorer']!r}: pass your own to get its scores")
    prompt = {"TargetPrompt"} if "target_prompt" in settings else set()
    lines = [
        *_imports("superscopes_tl", {"load_model", "sweep", *prompt, *(names & {"Site"})}),
        *_imports("superscopes_tl.vectors", names - {"Site"}),
        "",
        *notes,
        f"model = {_load(model, source)}",
        "result = sweep(",
        f"    model, {provenance.get('prompt')!r},",
        *(f"    {key}={value!r}," for key, value in settings.items()),
        "    progress=False,",
        ")",
        "table = result.table",
    ]
    if "mapping" in settings:
        place = {"kind": cell.kind, "source_layer": cell.source_layer, "position": cell.position}
        is_it = " & ".join(f"(table.{column} == {value!r})" for column, value in place.items())
        lines.append(f"table = table[{is_it}]")
    return "\n".join([*lines, 'print(table[["text", "score", "recovered"]].iloc[0].to_dict())'])


def _imports(module: str, names: set[str]) -> list[str]:
    return [f"from {module} import {', '.join(sorted(names, key=str.lower))}"] if names else []


def _prompts(result: SweepResult, cell: Cell) -> dict[str, Any]:
    """Return the settings of both prompts that differ from the defaults."""
    provenance = result.provenance
    config = provenance.get("config", {})
    settings: dict[str, Any] = {}
    target, chat = provenance.get("target_prompt", {}), bool(config.get("chat"))
    given = tuple(target.get(name, "") for name in ("text", "placeholder", "answer"))
    if given != astuple(default_target_prompt(None, chat=chat)):
        arguments = ", ".join(map(repr, given if given[2] else given[:2]))
        settings["target_prompt"] = _Verbatim(f"TargetPrompt({arguments})")
    if chat:
        settings["chat"] = True
    if config.get("source_template", "{}") != "{}":
        settings["source_template"] = config["source_template"]
    # Readings are about the substring that chose the position; the code has its index.
    reading = reading_at(result, cell)
    about = config.get("about") or (reading.about if reading is not None else "")
    if about and (config.get("about") or about != provenance.get("prompt")):
        settings["about"] = about
    if config.get("reference"):
        settings["reference"] = config["reference"]
    return settings


def _amplifier(config: dict[str, Any]) -> tuple[dict[str, Any], set[str], list[str]]:
    """Return how α acts where that is not the paper's way: settings, names they need, comments."""
    usual = {"unit": "vector", "guide": "vector", "draw": 0}
    settings = {
        name: config[name] for name in usual if config.get(name, usual[name]) != usual[name]
    }
    names: set[str] = set()
    notes: list[str] = []
    for setting in ("mapping", "vectors", "base", "write"):
        label = str(config.get(setting) or "")
        if label in ("", PAPER_MAPPING):
            continue
        if setting == "mapping":
            # A mapping may treat the sites of a sweep together: repeat them all, take the one row.
            settings |= {k: config[k] for k in ("layers", "kinds", "positions") if k in config}
        code, needed = _parsed(label)
        names |= needed
        if not code:
            code = f"my_{setting}"
            notes.append(f"# {code}: your own, {' '.join(label.split())}")
        settings[setting] = _Verbatim(code)
    return settings, names, notes


def _parsed(label: str) -> tuple[str, set[str]]:
    """Return the Python that makes a value of this package, with its names; else nothing.

    A label may come from anyone's file: only calls of the package's own classes, with literals and
    such calls as arguments, are code.
    """
    try:
        nodes = list(ast.walk(tree := ast.parse(label, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", set()
    made = {node.func for node in nodes if isinstance(node, ast.Call)}
    names = {node.id for node in made if isinstance(node, ast.Name)}
    plain = all(isinstance(n, _NODES) or (isinstance(n, ast.Name) and n in made) for n in nodes)
    return (ast.unparse(tree), names) if plain and names and names <= _VALUES else ("", set())


_VALUES = {"Site", *(name for name in values if name[0].isupper())}
_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.USub,
    ast.Load,
)  # fmt: skip


def _model_notes(model: dict[str, Any], live: LanguageModel | None) -> list[str]:
    """Return comments on how to load a model again, as far as its code does not say it."""
    notes = []
    if live is not None and live.origin is None:
        notes.append("# load_model: this model was built in memory; pass the object itself")
    elif live is None and model.get("name") not in PACKAGED:
        notes.append("# load_model: pass the path if the model came from a folder, and a revision")
    if model.get("dtype", "float32") != "float32":
        notes.append("# in half precision another batch size may change the text")
    return notes


class _Verbatim(str):
    """A piece of code: its repr is itself."""

    def __repr__(self) -> str:
        return str(self)


def _load(model: dict[str, Any], live: LanguageModel | None) -> str:
    """Return the code that loads a model, with every option of its first loading, if known."""
    origin: Any = None if live is None else live.origin
    if not isinstance(origin, partial):
        origin = partial(load_model, model.get("name"))
    values = {k: _plain(v) for k, v in origin.keywords.items() if k != "token"}
    values |= {"backend": model.get("backend", "auto"), "prepend_bos": model.get("prepend_bos")}
    if model.get("dtype", "float32") != "float32":
        values["dtype"] = model["dtype"]
    given = {k: v for k, v in values.items() if v is not None or k == "prepend_bos"}
    settings = ", ".join(f"{k}={v!r}" for k, v in given.items())
    return f"load_model({origin.args[0]!r}, {settings})"


def _plain(value: object) -> object:
    """Return a loading option as a literal; torch's dtypes and devices by their names."""
    try:
        ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        return str(value).removeprefix("torch.")
    return value
