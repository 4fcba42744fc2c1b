"""The commands about many prompts: what they count, beside what chance would give."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from superscopes_tl.cli import options as options
from superscopes_tl.cli.shell import (
    OUTPUT,
    check_folder,
    explained,
    parse_layers,
    parse_numbers,
    read_lines,
    share_table,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.figures import write_html
from superscopes_tl.files import written_whole
from superscopes_tl.model import DEFAULT_MODEL
from superscopes_tl.scores import PAPER_THRESHOLD
from superscopes_tl.statistics import FEWEST_PROMPTS, reveals_earlier


def replay(
    baseline: Annotated[Path, typer.Argument(help="Recorded Patchscopes: a CSV file with α = 1.")],
    amplified: Annotated[
        Path, typer.Argument(help="Recorded Superscopes: a CSV file with other α.")
    ],
    threshold: Annotated[
        float, typer.Option(help="The similarity above which a text is a hit.")
    ] = PAPER_THRESHOLD,
    scorer: options.ScorerName = "",
    score_on: options.ScoreOn = "text",
    html: Annotated[
        Path | None, typer.Option(help="Write Figure 3 to this page (opens offline).")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write every cell that was counted to this file.")
    ] = None,
) -> None:
    """Count recorded generations as the paper's Figure 3 does, and corrected for chance."""
    from superscopes_tl.figures import figure_3
    from superscopes_tl.statistics import replay as run_replay

    with explained():
        for path, option in ((html, "--html"), (csv, "--csv")):
            check_folder(path, option)
        comparison = run_replay(
            baseline, amplified, threshold=threshold, scorer=scorer or None, score_on=score_on
        )
        print_comparison(comparison)
        if csv:
            with written_whole(csv) as fresh:
                comparison.cells.to_csv(fresh, index=False)
            _say(f"Cells: {csv}")
        if html:
            title = f"Recorded generations: {baseline.stem}, {amplified.stem}"
            page = write_html(figure_3(comparison, title=title), html, title=title)
            _say(f"Figure 3: {page}")


def evaluate(
    model: options.Model = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, a source prompt per line. The paper's 48 unless given."),
    ] = None,
    section: Annotated[
        str, typer.Option(help="4.1 (MLP outputs) or 4.2 (hidden states, fine α): the defaults.")
    ] = "4.1",
    layers: Annotated[
        str, typer.Option(help="Source layers, such as 1-7. Those of the section unless given.")
    ] = "",
    kinds: Annotated[str, typer.Option(help="mlp_out or resid_post, or others.")] = "",
    alphas: Annotated[str, typer.Option(help="Amplifiers; 1 is Patchscopes.")] = "",
    target: Annotated[
        str, typer.Option("--target", "--target-layer", help="Where to patch: 'same' or a layer.")
    ] = "same",
    draws: Annotated[
        int | None,
        typer.Option(help="More readings of α = 1, drawn. To the same budget unless given."),
    ] = None,
    controls: options.Controls = "",
    source_template: options.Template = "{}",
    target_prompt: options.TargetText = None,
    placeholder: options.Placeholder = "x",
    chat: options.Chat = False,
    answer: options.Answer = "",
    max_new_tokens: options.MaxNewTokens = None,
    generate: options.Generate = "all",
    batch_size: options.BatchSize = None,
    scorer: options.ScorerName = "",
    score_on: options.ScoreOn = "text",
    backend: options.Backend = "auto",
    dtype: options.DType = "float32",
    device: options.Device = "",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read, each with the model. This one alone unless given."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The file that readings are added to; run again to go on.")
    ] = Path("evaluation.sqlite"),
    html: Annotated[
        Path | None, typer.Option(help="Write Figure 3 and the table to this page.")
    ] = None,
) -> None:
    """Run the paper's experiments (section 4) over many prompts, and count."""
    from superscopes_tl.engine import PAPER_PROMPTS
    from superscopes_tl.evaluation import HIDDEN_STATES, MLP_OUTPUTS, local_workers
    from superscopes_tl.evaluation import evaluate as run_evaluate

    with explained():
        for path, option in ((out, "--out"), (html, "--html")):
            check_folder(path, option)
        config = {"4.1": MLP_OUTPUTS, "4.2": HIDDEN_STATES}.get(section)
        if config is None:
            raise bad_value("--section", "4.1 or 4.2", section, "leave it out")
        into = _one_target(target)
        changed: dict[str, Any] = {}  # what is not given stays as the section has it
        if layers:
            changed["layers"] = parse_layers(layers, "--layers")
        if kinds:
            changed["kinds"] = options.names(kinds)
        if alphas:
            changed["alphas"] = parse_numbers(alphas, "--alphas")
        found = run_evaluate(
            partial(options.load, model, backend, dtype, device),
            PAPER_PROMPTS if prompts is None else read_lines(prompts, "--prompts"),
            out,
            config,
            draws=draws,
            executor=None if workers is None else local_workers(workers),
            **changed,
            target_layer=into,
            source_template=source_template,
            target_prompt=options.target_prompt(target_prompt, placeholder, answer, chat),
            chat=chat,
            controls=options.names(controls),
            max_new_tokens=max_new_tokens,
            generate=generate,
            batch_size=batch_size,
            scorer=scorer or None,
            score_on=score_on,
        )
        figures = print_evaluation(found, into, scorer or None)
        _say(f"Readings: {out}")
        if html:
            _say(f"Figures: {write_html(figures, html, title=repr(found))}")


def _one_target(text: str) -> Any:
    """Return "same" or one layer: several would be more tries."""
    into = options.parse_target(text)
    if into != "same" and len(into) != 1:
        raise bad_value("--target", "'same' or one layer", text, "run it twice")
    return into if into == "same" else into[0]


def print_evaluation(evaluation: Any, target: Any = None, scorer: Any = None) -> list[Any]:
    """Print the counts of every kind, and what amplification reads early; return the figures.

    Args:
        evaluation: from `evaluate`.
        target: the target layer to count, if the file holds several.
        scorer: the scorer of the counts; all-MiniLM-L6-v2 unless given.
    """
    from superscopes_tl.evaluation import methods
    from superscopes_tl.figures import figure_3
    from superscopes_tl.statistics import compare

    figures = []
    model = evaluation.provenance["model"]["name"]
    for kind in dict.fromkeys(evaluation.table["kind"]):
        cells = evaluation.table[evaluation.table["kind"] == kind]
        cells = cells[(cells["draw"] == 0) & cells["recovered"].notna()]
        if len(cells):
            title = f"{kind} of {model}: mean share of own words recovered"
            OUTPUT.print(share_table(cells, title + _beside(cells)))
        if not evaluation.table["written"].all():
            continue  # what was chosen to be written is no sample to count
        parts = methods(evaluation, kind=kind, target_layer=target)
        few = [name for name, part in parts.items() if part["prompt"].nunique() < FEWEST_PROMPTS]
        parts = {name: part for name, part in parts.items() if name not in few}
        for name in few:
            _say(f"{kind}: {name} has fewer than {FEWEST_PROMPTS} prompts and is left out.")
        if "Patchscopes" not in parts or len(parts) < 2:
            _say(f"{kind}: nothing to compare: that takes α = 1 and another α, of enough prompts.")
            continue
        _say(f"{kind} of {model}")
        score_on = evaluation.provenance["config"]["score_on"]
        comparison = compare(parts, scorer=scorer, score_on=score_on)
        print_comparison(comparison)
        figures.append(figure_3(comparison, title=f"{kind} of {model}"))
        if kind == "resid_post":
            figures += _print_early(pd.concat([parts["Patchscopes"], parts["Superscopes"]]))
    return figures


def _beside(cells: pd.DataFrame) -> str:
    return " / by other prompts' vectors" if "other_prompt_recovered" in cells else ""


def _print_early(table: pd.DataFrame) -> list[Any]:
    """Print what amplified block outputs read before the contextualization layer (Table 3)."""
    from superscopes_tl.figures import earlier_table

    both = table.groupby("prompt")["alpha"].transform(lambda alphas: alphas.nunique() > 1)
    found = reveals_earlier(table[both])
    _say(
        f"\nBefore the contextualization layer, amplified block outputs already read "
        f"{found['prompt'].nunique()} of {table['prompt'].nunique()} prompts "
        f"({len(found)} layers), by a similarity of {PAPER_THRESHOLD:g}."
    )
    for row in found.to_dict("records"):
        _say(
            f"{row['prompt']}, layer {row['source_layer']} before "
            f"{row['contextualization_layer']}: {row['at_alpha_1']!r}; "
            f"α = {row['alpha']:g}: {row['reading']!r}"
        )
    return [earlier_table(found)]


def print_comparison(comparison: Any) -> None:
    """Print the counts as plain lines, then their intervals, chance levels and notes."""
    settings, layers = comparison.settings, comparison.layers
    over = f"at layers {', '.join(map(str, layers))}"
    _say(f"Prompts with a similarity above {settings['threshold']:g}, {over}:")
    for line in comparison.lines():
        _say(line)
    _say(f"\nPrompts above the {settings['percentile']:g}th percentile of the others, {over}:")
    for line in comparison.lines(corrected=True):
        _say(line)
    _say("")
    for method in comparison.methods:
        OUTPUT.print(_count_table(comparison.counts, method))
    if len(comparison.differences):
        OUTPUT.print(_difference_table(comparison.differences, comparison.methods[0]))
    for note in comparison.notes:
        _say(f"Note: {note}")


def _count_table(counts: Any, method: str) -> Table:
    table = Table(title=escape(f"{method} [95 % interval over prompts]"), title_justify="left")
    for header in ("layer", "hits", "chance", "corrected", "chance", "q ≤ 0.05"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in counts[counts["method"] == method].to_dict("records"):
        table.add_row(
            str(row["source_layer"]),
            _with_ends(row, "hits"),
            f"{row['expected_by_chance']:.1f}",
            _with_ends(row, "corrected"),
            f"{row['expected_corrected']:.1f}",
            f"{row['discoveries']:.3g}",
        )
    return table


def _difference_table(differences: Any, first: str) -> Table:
    title = escape(f"Difference to {first} [95 % interval, paired by prompt]")
    table = Table(title=title, title_justify="left")
    for header in ("method", "layer", "hits", "corrected"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in differences.to_dict("records"):
        ends = [_with_ends(row, form) for form in ("hits", "corrected")]
        table.add_row(escape(row["method"]), str(row["source_layer"]), *ends)
    return table


def _with_ends(row: dict[str, Any], form: str) -> str:
    low, high = row[f"{form}_low"], row[f"{form}_high"]
    return escape(f"{row[form]:.3g} [{low:.3g}, {high:.3g}]")


def _say(line: str) -> None:
    """Print a line as it is: not wrapped, coloured or interpreted."""
    OUTPUT.print(line, markup=False, highlight=False, soft_wrap=True)
