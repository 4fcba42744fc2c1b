"""`python -m tests.benchmarks`, which `superscopes bench` and `make bench` run."""

from __future__ import annotations

from typing import Annotated

import typer

from superscopes_tl.cli.options import OUTPUT, Json, Page, check_folders, command
from tests.benchmarks.bench import run_bench
from tests.benchmarks.report import show


def bench(
    size: Annotated[
        str, typer.Option(help="small (the default), gpt2 or 1b, all with random weights.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="In place of a size: a fetched model, a hub name or a folder.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Defaults to torch's choice.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, mps or cpu. Defaults to cuda, else cpu.")] = "",
    json: Json = None,
    html: Page = None,
) -> None:
    """Measure cells per second against other ways to compute the same cells."""
    check_folders(json=json, html=html)
    report = run_bench(
        size, model=model, dtype=dtype, rounds=rounds, threads=threads, device=device or None
    )
    for file in show(report, OUTPUT, json=json, html=html):
        OUTPUT.print(f"Written: {file}", markup=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(command(bench))

if __name__ == "__main__":
    app(prog_name="superscopes bench")
