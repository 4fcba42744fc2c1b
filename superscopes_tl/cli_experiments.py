"""The commands about many prompts: what they count, beside what chance would give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from superscopes_tl.scoring import PAPER_THRESHOLD
from superscopes_tl.shell import OUTPUT, check_folder, explained


def replay(
    baseline: Annotated[Path, typer.Argument(help="Recorded Patchscopes: a CSV file with α = 1.")],
    amplified: Annotated[
        Path, typer.Argument(help="Recorded Superscopes: a CSV file with other α.")
    ],
    threshold: Annotated[
        float, typer.Option(help="The similarity above which a text is a hit.")
    ] = PAPER_THRESHOLD,
    scorer: Annotated[
        str, typer.Option(help="A SentenceTransformer. all-MiniLM-L6-v2 unless given.")
    ] = "",
    score_on: Annotated[
        str, typer.Option(help="The whole 'text', as the paper did, or its 'description'.")
    ] = "text",
    html: Annotated[
        Path | None, typer.Option(help="Write Figure 3 to this page (opens offline).")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write every cell that was counted to this file.")
    ] = None,
) -> None:
    """Count recorded generations as the paper's Figure 3 does, and corrected for chance."""
    from superscopes_tl import figure_3, write_html
    from superscopes_tl import replay as run_replay

    with explained():
        for path, option in ((html, "--html"), (csv, "--csv")):
            check_folder(path, option)
        comparison = run_replay(
            baseline, amplified, threshold=threshold, scorer=scorer or None, score_on=score_on
        )
        print_comparison(comparison)
        if csv:
            comparison.cells.to_csv(csv, index=False)
            _say(f"Cells: {csv}")
        if html:
            title = f"Recorded generations: {baseline.stem}, {amplified.stem}"
            page = write_html(figure_3(comparison, title=title), html, title=title)
            _say(f"Figure 3: {page}")


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
