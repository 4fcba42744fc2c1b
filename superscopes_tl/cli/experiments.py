"""The commands that read prompts: `sweep` one, `evaluate` many, `replay` recorded generations."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import pandas as pd
import typer
from rich.table import Table
from rich.text import Text

from superscopes_tl.cli.options import (
    ERRORS,
    OUTPUT,
    Cells,
    Controls,
    Loading,
    Model,
    Page,
    RunFile,
    ScoreOn,
    Scorer,
    check_folders,
    parse_names,
    read_prompts,
    say,
    table_of,
)
from superscopes_tl.engine import PAPER_PROMPTS
from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.evaluation import (
    ALL_NAMES,
    HIDDEN_STATES,
    MLP_OUTPUTS,
    SECOND_LIST,
    kept_readability,
    layer_ranges,
    local_workers,
    methods,
)
from superscopes_tl.evaluation import evaluate as run_evaluate
from superscopes_tl.experiment import SweepConfig, SweepError, SweepInterrupted, flags, rows_at
from superscopes_tl.experiment import sweep as run_sweep
from superscopes_tl.figures import (
    earlier_table,
    figure_3,
    heatmap,
    layer_grid,
    share_curves,
    write_html,
)
from superscopes_tl.files import written_whole
from superscopes_tl.model import DEFAULT_MODEL, LanguageModel, layer_name
from superscopes_tl.scores import PAPER_THRESHOLD, Contains
from superscopes_tl.statistics import FEWEST_PROMPTS, compare, layer_shares, reveals_earlier
from superscopes_tl.statistics import replay as run_replay
from superscopes_tl.vectors import PAPER_MAPPING, PRESETS

SECTIONS = {"4.1": MLP_OUTPUTS, "4.2": HIDDEN_STATES}
LISTS = {"paper": PAPER_PROMPTS, "names": SECOND_LIST, "all-names": ALL_NAMES}
CHECKED = ("target_prompt", "chat", "target_layer", "source_template")
"""The settings that `check` chooses."""

Auto: TypeAlias = Annotated[bool, typer.Option("--auto", help="Use what `check` finds best.")]


def sweep(
    prompt: Annotated[str, typer.Argument(help="The source prompt to read.")],
    *,
    model: Model = DEFAULT_MODEL,
    cells: Cells,
    loading: Loading,
    auto: Auto = False,
    about: Annotated[str, typer.Option(help="Scored against; default: the source prompt.")] = "",
    reference: Annotated[str, typer.Option(help="A fact, in place of the model's own words.")] = "",
    controls: Controls = "",
    out: RunFile = None,
    html: Page = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print every cell.")] = False,
) -> None:
    """Read a prompt at every layer and α, and print the model's descriptions."""
    check_folders(out=out, html=html)
    settings = {
        **cells.settings(),
        "about": about or None,
        "reference": reference or None,
        "controls": parse_names(controls),
    }
    SweepConfig.of(None, settings)  # before the model is loaded
    _check_auto(cells, auto=auto)
    loaded = loading.load(model)
    if auto:
        settings |= _checked(loaded)
    try:
        result = run_sweep(loaded, prompt, **settings)
    except (SweepInterrupted, SweepError) as stopped:
        ERRORS.print(str(stopped), markup=False)
        if out:
            ERRORS.print(f"Saved to {stopped.partial.save(out)}.", markup=False)
        raise typer.Exit(130 if isinstance(stopped, SweepInterrupted) else 1) from stopped
    saved = result.save(out) if out else None  # before anything else can go wrong
    _print_result(result, show_all=show_all)
    if saved:
        say(f"Run file: {saved}")
    if html:
        draw = layer_grid if _several(result) else heatmap
        value = "score" if result.table["written"].all() else "recovered"
        positions = dict.fromkeys(result.table["position"])
        figures = [draw(result, value=value, position=p) for p in positions]
        say(f"Heatmap: {write_html(figures, html)}")


def evaluate(
    *,
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[
        str,
        typer.Option(
            help="The 'paper' 48, 60 'names' of 20 kinds, 'all-names' (120), or a file: a prompt "
            "per line, or a table (.csv, .tsv, .json, .jsonl), such as Patchscopes' or ROME's."
        ),
    ] = "paper",
    column: Annotated[str | None, typer.Option(help="Of a table: the column of prompts.")] = None,
    reference_column: Annotated[
        str | None, typer.Option(help="Of a table: a column of facts, in place of own words.")
    ] = None,
    section: Annotated[str, typer.Option(help="4.1 (MLP outputs) or 4.2 (hidden states).")] = "4.1",
    cells: Cells,
    loading: Loading,
    auto: Auto = False,
    draws: Annotated[
        int | None,
        typer.Option(help="Sampled readings at α = 1. Defaults to the budget of all other α."),
    ] = None,
    controls: Controls = "",
    workers: Annotated[int | None, typer.Option(help="Processes, each with the model.")] = None,
    out: Annotated[
        Path, typer.Option(help="The file that collects readings; run again to resume.")
    ] = Path("evaluation.sqlite"),
    html: Page = None,
) -> None:
    """Run the paper's experiments (section 4) over many prompts, and count."""
    check_folders(out=out, html=html)
    config = SECTIONS[check_choice("--section", section, SECTIONS)]
    settings = {**cells.settings(), "controls": parse_names(controls)}
    several = LISTS.get(prompts, ())
    if several and (column or reference_column):
        raise bad_value("--column", "a table as --prompts", prompts, "leave it out")
    if not several:
        listed = read_prompts(Path(prompts), "--prompts", column, reference_column)
        several = listed.prompts
        # What is asked for on the command line wins over what the file says.
        usual = Cells(chat=cells.chat).settings()
        asked = {name for name, value in settings.items() if value != usual.get(name)}
        settings |= {name: v for name, v in listed.settings.items() if name not in asked}
    _check_auto(cells, auto=auto)
    loaded: Any = partial(loading.load, model)
    if auto:
        settings |= _checked(checked := loaded())
        loaded = checked if workers is None else loaded
    into = settings["target_layer"]
    if isinstance(into, list):
        if len(into) != 1:
            expected = "'same' or one layer"
            raise bad_value("--target-layer", expected, cells.target_layer, "run twice")
        into = settings["target_layer"] = into[0]
    found = run_evaluate(
        loaded,
        several,
        out,
        config,
        draws=draws,
        executor=None if workers is None else local_workers(workers),
        **settings,
    )
    figures = _print_evaluation(found, into, settings["scorer"])
    say(f"Readings: {out}")
    if html:
        say(f"Figures: {write_html(figures, html, title=repr(found))}")


def replay(
    baseline: Annotated[Path, typer.Argument(help="Recorded Patchscopes: a CSV file with α = 1.")],
    amplified: Annotated[Path, typer.Argument(help="Recorded Superscopes: CSV with other α.")],
    threshold: Annotated[float, typer.Option(help="Similarity of a hit.")] = PAPER_THRESHOLD,
    scorer: Scorer = "",
    score_on: ScoreOn = "text",
    html: Page = None,
    csv: Annotated[Path | None, typer.Option(help="Write every counted cell to this file.")] = None,
) -> None:
    """Count recorded generations as in the paper's Figure 3, and corrected for chance."""
    check_folders(html=html, csv=csv)
    comparison = run_replay(
        baseline, amplified, threshold=threshold, scorer=scorer or None, score_on=score_on
    )
    _print_comparison(comparison)
    if csv:
        with written_whole(csv) as fresh:
            comparison.cells.to_csv(fresh, index=False)
        say(f"Cells: {csv}")
    if html:
        title = f"Recorded generations: {baseline.stem}, {amplified.stem}"
        say(f"Figure 3: {write_html(figure_3(comparison, title=title), html, title=title)}")


def _check_auto(cells: Cells, *, auto: bool) -> None:
    """Raise if `--auto` stands beside a setting that it chooses."""
    chosen = {name for name in (*CHECKED, "answer") if getattr(cells, name) != getattr(Cells, name)}
    if cells.preset and set(CHECKED) & set(PRESETS.get(cells.preset, ())):
        chosen.add("preset")
    if auto and chosen:
        expected = f"none of {', '.join((*CHECKED, 'answer'))} with it"
        raise bad_value("--auto", expected, ", ".join(sorted(chosen)), "leave one out")


def _checked(model: LanguageModel) -> dict[str, Any]:
    """Print the verdict of `check` on a model, and return the settings that it found."""
    check = kept_readability(model)
    say(check.verdict)
    return {name: getattr(check.config, name) for name in CHECKED}


def _several(result: Any) -> bool:
    """Return whether a source layer was patched into several target layers."""
    return bool(result.table.groupby("source_layer")["target_layer"].nunique().max() > 1)


def _print_result(result: Any, *, show_all: bool) -> None:
    prompt = textwrap.shorten(str(result.provenance["prompt"]), 60, placeholder=" …")
    if show_all:
        columns = ["token", "kind", "source_layer", "target_layer", "alpha", "score", "recovered",
                   "description"]  # fmt: skip
        unusual = map(flags, result.table["norm_outlier"], result.table["unchanged"])
        table = result.table[columns].assign(
            target_layer=result.table["target_layer"].map(layer_name),
            flags=[", ".join(several) for several in unusual],
        )
        rows = table.itertuples(index=False)
        cells = ([f"{v:.3g}" if isinstance(v, float) else v for v in row] for row in rows)
        OUTPUT.print(table_of(prompt, [name.replace("_", " ") for name in table], cells))
        return
    tokens = result.table[["position", "token"]].drop_duplicates()
    for position, token in tokens.itertuples(index=False):
        OUTPUT.print(_best_table(result, f"{prompt} · token {token!r}", int(position)))
        _print_contextualization(result, int(position))


def _best_table(result: Any, title: str, position: int) -> Table:
    """Return the best reading per layer and kind of a token."""
    wide = result.by_layer(position=position)
    several = _several(result)
    kinds = list(wide.columns.get_level_values(0).unique())
    others = "other_prompt_recovered" in wide.columns.get_level_values(1)
    legend = "α, similarity, recovered" + (" / by other prompts' vectors" if others else "")
    legend += ", → target layer" if several else ""
    rows = [
        [layer, *(_best_cell(row[kind], several=several) for kind in kinds)]
        for layer, row in wide.iterrows()
    ]
    return table_of(f"{title} · best reading ({legend})", ["layer", *kinds], rows)


def _best_cell(cell: Any, *, several: bool) -> Text:
    if cell.isna()["alpha"]:
        return Text("not computed", "dim")
    numbers = [f"{cell['alpha']:g}"]
    numbers += [f"{cell[name]:.2f}" for name in ("score", "recovered") if not cell.isna()[name]]
    if not math.isnan(others := cell.get("other_prompt_recovered", math.nan)):
        numbers[-1] += f" / {others:.2f}"
    into = f" → {layer_name(int(cell['target_layer']))}" if several else ""
    return Text.assemble(str(cell["description"]), (f" ({', '.join(numbers)}{into})", "dim"))


def _print_contextualization(result: Any, position: int) -> None:
    """Print where the model resolves the text, for each target layer of the sweep."""
    table = result.table
    here = table.query("position == @position and alpha == 1 and kind == 'resid_post'")
    if here.empty or here["mapping"].nunique() > 1:  # no single unamplified reading per layer
        return
    same = (here["source_layer"] == here["target_layer"]).all()
    targets: list[Any] = [None] if same else sorted(here["target_layer"].unique())
    for into in targets:
        found = result.contextualization_layer(position=position, target_layer=into)
        say(f"{found}" if same else f"{found} [target layer {layer_name(int(into))}]")


def _print_evaluation(evaluation: Any, target: Any, scorer: Any) -> list[Any]:
    """Print the counts of every kind, and the early readings; return the figures."""
    figures = []
    model = evaluation.provenance["model"]["name"]
    score_on = evaluation.provenance["config"]["score_on"]
    for kind in dict.fromkeys(evaluation.table["kind"]):
        cells = evaluation.table[evaluation.table["kind"] == kind]
        cells = cells[(cells["draw"] == 0) & cells["recovered"].notna()]
        if len(cells):
            figures += _print_shares(cells, target, f"{kind} of {model}")
        if not evaluation.table["written"].all():
            continue  # counts over selected cells would be biased
        if evaluation.provenance["config"]["reference"]:  # a fact each: no count by similarity
            rows = rows_at(evaluation.table, kind=kind, target_layer=target).query("draw == 0")
            for mapping, part in rows.groupby("mapping", sort=False):
                title = f"{kind} of {model}" + f", {mapping}" * (mapping != PAPER_MAPPING)
                OUTPUT.print(_fact_table(part, title, evaluation.provenance["config"]["scorer"]))
            continue
        parts = methods(evaluation, kind=kind, target_layer=target)
        few = [name for name, part in parts.items() if part["prompt"].nunique() < FEWEST_PROMPTS]
        parts = {name: part for name, part in parts.items() if name not in few}
        for name in few:
            say(f"{kind}: {name} has fewer than {FEWEST_PROMPTS} prompts and is left out.")
        if "Patchscopes" not in parts or len(parts) < 2:
            say(f"{kind}: nothing to compare; that takes α = 1 and another α, for enough prompts.")
            continue
        say(f"{kind} of {model}")
        comparison = compare(parts, scorer=scorer, score_on=score_on)
        _print_comparison(comparison)
        figures.append(figure_3(comparison, title=f"{kind} of {model}"))
        if kind == "resid_post":
            figures += _print_early(pd.concat([parts["Patchscopes"], parts["Superscopes"]]))
    return figures


def _print_shares(cells: pd.DataFrame, target: Any, what: str) -> list[Any]:
    """Print what each layer recovers, per mapping, and what holds; return the figures."""
    plain = (cells["mapping"] == PAPER_MAPPING) & (cells["alpha"] == 1)
    if "other_prompt_recovered" not in cells or not plain.any():
        OUTPUT.print(share_table(cells, f"{what}: mean share of own words recovered"))
        say("--controls other_prompt and α = 1 in --alphas tell what is specific, and what is won.")
        return []
    figures = []
    for mapping in dict.fromkeys(cells["mapping"]):
        shares = layer_shares(cells, mapping=mapping, target_layer=target)
        title = what if mapping == PAPER_MAPPING else f"{what}, {mapping}"
        OUTPUT.print(_layer_table(shares, title))
        say(f"{title}: {_what_holds(shares)}")
        figures.append(share_curves(shares, title=title))
    return figures


def _layer_table(shares: pd.DataFrame, title: str) -> Table:
    """Return the means and tests of `layer_shares`."""
    measures = {
        "α = 1": "plain", "amplified": "amplified", "others": "other_prompt",
        "random": "random_direction", "above others": "above_others", "gain": "gain",
        "nats": "gain_nats",
    }  # fmt: skip
    rows = [
        [
            row["source_layer"], row["prompts"], f"{row['alpha']:g}",
            *(_share_with_interval(row, name) for name in measures.values()),
            f"{row['p']:.2g}", f"{row['q']:.2g}",
        ]
        for row in shares.to_dict("records")
    ]  # fmt: skip
    headers = ("layer", "prompts", "α", *measures, "p", "q")
    caption = (
        "Mean share of own words recovered [95 % interval over prompts]; α chosen on other prompts;"
        " gain: amplified minus α = 1, each above other prompts' vectors; q: over layers."
    )
    return table_of(title, headers, rows, caption)


def _what_holds(shares: pd.DataFrame) -> str:
    """Return in a sentence where amplification beats α = 1, and where it does not."""
    among, sure = shares["source_layer"], shares[shares["holds"]]
    claim = "than α = 1, above other prompts' vectors"
    if sure.empty:
        smallest = "" if shares["q"].isna().all() else f" (smallest q: {shares['q'].min():.2g})"
        return f"at none of {len(shares)} layers does amplification recover more {claim}{smallest}."
    top = sure.nlargest(1, "gain").to_dict("records")[0]
    left = len(shares) - len(sure)
    rest = f"; at the other {left} it is not shown to" if left else ""
    gain = f"{_share_with_interval(top, 'gain')}, {top['gain_nats']:.1f} nats"
    return (
        f"amplification recovers more {claim}, at {layer_ranges(sure['source_layer'], among=among)}"
        f" (q ≤ 0.05){rest}; most at layer {top['source_layer']}: a gain of {gain}, "
        f"at α = {top['alpha']:g}."
    )


def _share_with_interval(row: dict[Any, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def share_table(table: pd.DataFrame, title: str) -> Table:
    """Return the mean share recovered per layer and α, by the prompt's own and others' vectors."""
    columns = [name for name in ("recovered", "other_prompt_recovered") if name in table]
    wide = table.pivot_table(columns, "source_layer", "alpha")
    alphas = sorted(table["alpha"].unique())
    beside = " / by other prompts' vectors" if len(columns) > 1 else ""
    rows = [
        [layer, *(" / ".join(f"{row[name, alpha]:.2f}" for name in columns) for alpha in alphas)]
        for layer, row in wide.iterrows()
    ]
    return table_of(title + beside, ["layer", *(f"α = {alpha:g}" for alpha in alphas)], rows)


def _fact_table(table: pd.DataFrame, title: str, scorer: str) -> Table:
    """Return the sum of scores per layer and α; that of `Contains` counts texts with their fact."""
    counts = scorer == Contains().name
    what = "texts with their fact, of all" if counts else f"sum of scores by {scorer}, of all texts"
    wide = table.pivot_table("score", "source_layer", "alpha", aggfunc=["sum", "count"])
    alphas = sorted(table["alpha"].unique())
    rows = [
        [layer, *(f"{row['sum', a]:.3g} of {row['count', a]:.0f}" for a in alphas)]
        for layer, row in wide.iterrows()
    ]
    headers = ["layer", *(f"α = {alpha:g}" for alpha in alphas)]
    return table_of(f"{title}: {what}", headers, rows)


def _print_early(table: pd.DataFrame) -> list[Any]:
    """Print what amplified block outputs read before the contextualization layer (Table 3)."""
    both = table.groupby("prompt")["alpha"].transform(lambda alphas: alphas.nunique() > 1)
    found = reveals_earlier(table[both])
    say(
        f"\nBefore the contextualization layer, amplified block outputs read "
        f"{found['prompt'].nunique()} of {table['prompt'].nunique()} prompts "
        f"({len(found)} layers), at a similarity of {PAPER_THRESHOLD:g}."
    )
    for row in found.to_dict("records"):
        say(
            f"{row['prompt']}, layer {row['source_layer']} before "
            f"{row['contextualization_layer']}: {row['at_alpha_1']!r}; "
            f"α = {row['alpha']:g}: {row['reading']!r}"
        )
    return [earlier_table(found)]


def _print_comparison(comparison: Any) -> None:
    """Print the counts as plain lines, then their intervals, chance levels and notes."""
    settings, layers = comparison.settings, comparison.layers
    over = f"at layers {', '.join(map(str, layers))}"
    say(f"Prompts with a similarity above {settings['threshold']:g}, {over}:")
    for line in comparison.lines():
        say(line)
    say(f"\nPrompts above the {settings['percentile']:g}th percentile of the others, {over}:")
    for line in comparison.lines(corrected=True):
        say(line)
    say("")
    for method in comparison.methods:
        OUTPUT.print(_count_table(comparison.counts, method))
    if len(comparison.differences):
        OUTPUT.print(_difference_table(comparison.differences, comparison.methods[0]))
    for note in comparison.notes:
        say(f"Note: {note}")


def _count_table(counts: pd.DataFrame, method: str) -> Table:
    rows = [
        [
            row["source_layer"], _with_interval(row, "hits"), f"{row['expected_by_chance']:.1f}",
            _with_interval(row, "corrected"), f"{row['expected_corrected']:.1f}",
            f"{row['discoveries']:.3g}",
        ]
        for row in counts[counts["method"] == method].to_dict("records")
    ]  # fmt: skip
    headers = ("layer", "hits", "chance", "corrected", "chance", "q ≤ 0.05")
    return table_of(f"{method} [95 % interval over prompts]", headers, rows)


def _difference_table(differences: pd.DataFrame, first: str) -> Table:
    rows = [
        [
            row["method"], row["source_layer"], _with_interval(row, "hits"),
            _with_interval(row, "corrected"),
        ]
        for row in differences.to_dict("records")
    ]  # fmt: skip
    title = f"Difference to {first} [95 % interval, paired by prompt]"
    return table_of(title, ("method", "layer", "hits", "corrected"), rows)


def _with_interval(row: dict[Any, Any], form: str) -> str:
    return f"{row[form]:.3g} [{row[f'{form}_low']:.3g}, {row[f'{form}_high']:.3g}]"
