"""What the commands share: how they parse, print and end.

Bad input ends with exit code 2 and a message that says what was expected; what the machine
refuses ends with 1.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superscopes_tl.errors import bad_value

# Generated text is printed as it is: a `:x:` in it is no emoji, a `[b]` no markup.
OUTPUT = Console(emoji=False)
ERRORS = Console(stderr=True, emoji=False)


def parse_numbers(text: str, option: str) -> list[float]:
    """Return the numbers of a comma-separated list.

    Raises:
        ValueError: something in it is no number.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise bad_value(
            option, "numbers with commas between them", text, f"write for example {option} 1,3,6"
        ) from error


def parse_layers(text: str, option: str) -> list[int]:
    """Return the layers (or other numbers) of a list such as `0-5,8`.

    Raises:
        ValueError: something in it is neither a number nor a range.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            chosen: Sequence[int] = (
                range(int(first), int(last) + 1) if dash and first else [int(part)]
            )
            if not chosen:
                raise ValueError("a range from high to low")
            layers += chosen
        except ValueError as error:
            raise bad_value(
                option, "numbers such as 0-5,8", text, f"write for example {option} 0-5,8"
            ) from error
    return layers


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """End with exit code 2 and the message on bad input, with 1 on what the machine refuses."""
    try:
        yield
    except (ValueError, TypeError) as error:
        ERRORS.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    except (OSError, MemoryError) as error:
        ERRORS.print(f"Error: {type(error).__name__}: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


def reading_table(result: Any) -> Table:
    """Return the best reading per layer and kind of a `SweepResult` as a table.

    Where a source layer was patched at several target layers, the cell names the one that counts.
    """
    wide = result.by_layer()
    kinds = list(wide.columns.get_level_values(0).unique())
    prompt, token = str(result.provenance["prompt"]), result.table["token"].iloc[-1]
    several = result.table.groupby("source_layer")["target_layer"].nunique().max() > 1
    shown = textwrap.shorten(prompt, 60, placeholder=" …")
    legend = "α, similarity, recovered" + (", → target layer" if several else "")
    table = Table(title=escape(f"{shown} · token {token!r} · best reading ({legend})"))
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, overflow="fold")
    for layer, row in wide.iterrows():
        table.add_row(str(layer), *(_best_cell(row[kind], several=several) for kind in kinds))
    return table


def share_table(table: Any, title: str) -> Table:
    """Return what the cells of many prompts recover, the mean over prompts per layer and α.

    Where other prompts' vectors stand beside them, their mean comes behind a slash.

    Args:
        table: cells of one kind.
        title: of the table.
    """
    columns = ["recovered", *(c for c in ("other_prompt_recovered",) if c in table)]
    means = table.groupby(["source_layer", "alpha"])[columns].mean()
    alphas = sorted(table["alpha"].unique())
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("layer", justify="right")
    for alpha in alphas:
        shown.add_column(f"α = {alpha:g}", justify="right")
    for layer in sorted(table["source_layer"].unique()):
        cells = [
            " / ".join(f"{means.loc[(layer, alpha), c]:.2f}" for c in columns)
            if (layer, alpha) in means.index
            else ""
            for alpha in alphas
        ]
        shown.add_row(str(layer), *cells)
    return shown


def _best_cell(cell: Any, *, several: bool) -> str:
    """Return a reading with the numbers that it has."""
    if cell.isna()["alpha"]:
        return "[dim]not computed[/dim]"
    numbers = [f"{cell['alpha']:g}"]
    numbers += [f"{cell[name]:.2f}" for name in ("score", "recovered") if not cell.isna()[name]]
    into = f" → {cell['target_layer']:.0f}" if several else ""
    return f"{escape(str(cell['description']))} [dim]({', '.join(numbers)}{into})[/dim]"


def read_lines(path: Path, option: str) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    if not path.is_file():
        raise bad_value(
            option, "a text file with one entry per line", str(path),
            "leave it out for the default",
        )  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_value(
            option, "a text in UTF-8", f"{path} ({error.reason})",
            "save it as UTF-8",
        ) from error  # fmt: skip
    lines = [line.strip() for line in text.splitlines()]
    if not any(lines):
        raise bad_value(option, "at least one line", f"nothing in {path}", "add prompts")
    return [line for line in lines if line]


def check_folder(path: Path | None, option: str = "--out or --html") -> None:
    """Find out before a long sweep that its result would have no place."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise bad_value(
            option, "a file in a folder that exists", str(path), f"mkdir -p {path.parent}"
        )
