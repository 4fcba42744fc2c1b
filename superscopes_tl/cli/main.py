"""The `superscopes` command.

Each command is a thin layer over a function of the package: it parses, calls, prints. Bad input
ends with exit code 2 and a message that says what was expected; a sweep that is interrupted
saves its finished cells if a file was asked for and ends with 130.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from superscopes_tl.cli import experiments as cli_experiments
from superscopes_tl.cli import models as cli_models
from superscopes_tl.cli import neighbours as cli_neighbours
from superscopes_tl.cli import options as options
from superscopes_tl.cli.shell import (
    ERRORS,
    OUTPUT,
    check_folder,
    explained,
    parse_layers,
    parse_numbers,
    reading_table,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import check_config
from superscopes_tl.model import DEFAULT_MODEL

app = typer.Typer(
    help="Amplify a model's internal activations and let the model say what they mean.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(cli_models.check)
app.command()(cli_experiments.evaluate)
app.command()(cli_experiments.replay)
app.command()(cli_neighbours.side_by_side)
app.command()(cli_neighbours.read_vector)
app.command()(cli_models.models)
app.command()(cli_models.fetch)


@app.command()
def sweep(
    prompt: Annotated[str, typer.Argument(help="The source prompt whose activations are read.")],
    model: options.Model = DEFAULT_MODEL,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Prompts and target layer that read this model best (check)."),
    ] = False,
    layers: options.Layers = "",
    kinds: options.Kinds = "resid_mid,mlp_out,resid_post",
    alphas: options.Alphas = "1,3,6,9,12,15",
    token: options.Token = "-1",
    source_template: options.Template = "{}",
    about: Annotated[
        str, typer.Option(help="What readings are scored against. The prompt up to the token.")
    ] = "",
    reference: Annotated[
        str, typer.Option(help="A true fact, in place of the model's own words.")
    ] = "",
    target_layer: options.Target = "same",
    target_prompt: options.TargetText = None,
    placeholder: options.Placeholder = "x",
    chat: options.Chat = False,
    answer: options.Answer = "",
    max_new_tokens: options.MaxNewTokens = None,
    generate: options.Generate = "all",
    batch_size: options.BatchSize = None,
    scorer: options.ScorerName = "",
    score_on: options.ScoreOn = "description",
    controls: options.Controls = "",
    backend: options.Backend = "auto",
    dtype: options.DType = "float32",
    device: options.Device = "",
    out: Annotated[
        Path | None, typer.Option(help="Save the result to this run file (.zip).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the heatmap to this page (opens offline).")
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Print every cell, not the best α of each site.")
    ] = False,
) -> None:
    """Read a prompt at every layer and α, and print what the model says it means."""
    from superscopes_tl.experiment import sweep as run_sweep
    from superscopes_tl.figures import heatmap, write_html

    with explained(), _stopped_sweep_saved_to(out):
        for path in (out, html):
            check_folder(path)
        # Everything that needs no model first: a slip of the pen should not cost a load.
        settings: dict[str, Any] = {
            "layers": parse_layers(layers, "--layers") if layers else None,
            "kinds": options.names(kinds),
            "alphas": parse_numbers(alphas, "--alphas"),
            "positions": options.parse_token(token),
            "source_template": source_template,
            "about": about or None,
            "reference": reference or None,
            "target_layer": options.parse_target(target_layer),
            "target_prompt": options.target_prompt(target_prompt, placeholder, answer, chat),
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "generate": generate,
            "batch_size": batch_size,
            "scorer": scorer or None,
            "score_on": score_on,
            "controls": options.names(controls),
        }
        check_config(None, settings)
        own = (target_prompt, answer, chat, target_layer.lower(), source_template)
        if auto and own != (None, "", False, "same", "{}"):
            raise bad_value(
                "--auto", "no prompt, template or target layer of your own beside it",
                own, "leave one of the two out",
            )  # fmt: skip
        loaded = options.load(model, backend, dtype, device)
        if auto:
            settings |= _auto_settings(loaded)
        result = run_sweep(loaded, prompt, **settings)
        saved = result.save(out) if out else None  # before anything else can go wrong
        _print_result(result, show_all=show_all)
        if saved:
            OUTPUT.print(f"Run file: {saved}", markup=False)
        if html:
            grid = result.table.groupby("source_layer")["target_layer"].nunique().max() > 1
            x: Literal["alpha", "target_layer"] = "target_layer" if grid else "alpha"
            positions = dict.fromkeys(result.table["position"])
            value = "score" if result.table["written"].all() else "recovered"
            figures = [heatmap(result, x=x, value=value, position=p) for p in positions]
            OUTPUT.print(f"Heatmap: {write_html(figures, html)}", markup=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the run files.")] = Path(
        "output"
    ),
    backend: options.Backend = "bridge",
) -> None:
    """Read names of many kinds on SmolLM2-135M-Instruct, with controls, and draw the heatmaps."""
    from superscopes_tl.cli.demonstration import run_demo

    with explained():
        run_demo(options.load(DEFAULT_MODEL, backend), output)


@app.command("app")
def page(
    model: options.Model = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option(help="The source prompt to begin with.")] = "",
    result: Annotated[
        Path | None, typer.Option(help="Show this run file (.zip); no model is loaded.")
    ] = None,
    backend: options.Backend = "bridge",
    dtype: options.DType = "float32",
    device: options.Device = "",
    ip: Annotated[
        str, typer.Option(help="Where to listen. This machine alone unless given.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.")] = 8866,
    token: Annotated[
        str | None,
        typer.Option(envvar="SUPERSCOPES_TOKEN", help="What visitors show. A random one."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
) -> None:
    """Serve the Explorer as a page of its own (needs the extra `app`)."""
    from superscopes_tl.experiment import SweepResult
    from superscopes_tl.explorer import explorer_cell, serve

    with explained():
        if result is not None:
            SweepResult.load(result)  # says what is wrong with the file before a page does
            cell = explorer_cell(result=str(result.resolve()))
        else:
            cell = explorer_cell(
                prompt=prompt, model=model, backend=backend, dtype=dtype, device=device or None
            )
        status = serve(
            cell, ip=ip, port=port, token=token, open_browser=browser,
            announce=lambda url: OUTPUT.print(f"Open {url} (Ctrl+C stops)", markup=False,
                                               soft_wrap=True),
        )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def bench(
    size: Annotated[
        str, typer.Option(help="mini (bundled), gpt2 or 1b, these with random weights.")
    ] = "mini",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU. As torch chooses unless given.")
    ] = None,
    device: options.Device = "",
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the figure to this page (opens offline).")
    ] = None,
) -> None:
    """Measure cells per second beside other ways to compute the same cells (needs a clone)."""
    with explained():
        check_folder(json, "--json")
        check_folder(html, "--html")
        benchmark = benchmark_in(Path(__file__).parent.parent)
        report = benchmark.run_bench(
            size, dtype=dtype, rounds=rounds, threads=threads, device=device or None
        )
        for file in benchmark.show(report, OUTPUT, json=json, html=html):
            OUTPUT.print(f"Written: {file}", markup=False)


def benchmark_in(root: Path) -> Any:
    """Return the benchmark, which lives beside the tests of a clone.

    Args:
        root: the folder that holds the package; it is on the import path for this import alone.

    Raises:
        ValueError: there are no tests beside the package.
    """
    folder = root / "tests" / "benchmarks"
    if not folder.is_dir():
        raise bad_value(
            "bench",
            "a clone of the repository, with tests/benchmarks beside the package",
            "an installed package without its tests",
            "clone the repository, run pip install -e . there, then superscopes bench",
        )
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("tests.benchmarks.bench")
    finally:
        sys.path.remove(str(root))


@contextlib.contextmanager
def _stopped_sweep_saved_to(out: Path | None) -> Iterator[None]:
    """Save the finished cells of a sweep that broke off; end with 130 or 1."""
    from superscopes_tl.experiment import SweepError, SweepInterrupted

    try:
        yield
    except (SweepInterrupted, SweepError) as stopped:
        ERRORS.print(str(stopped), markup=False)
        if out:
            ERRORS.print(f"Saved to {stopped.partial.save(out)}.", markup=False)
        raise typer.Exit(130 if isinstance(stopped, SweepInterrupted) else 1) from stopped


def _auto_settings(model: Any) -> dict[str, Any]:
    """Return the settings that read a model best, and say where they come from."""
    from superscopes_tl.evaluation import kept_readability

    check = kept_readability(model)
    OUTPUT.print(check.verdict, markup=False, highlight=False)
    return {
        "target_prompt": check.config.target_prompt,
        "target_layer": check.config.target_layer,
        "source_template": check.config.source_template,
        "chat": check.config.chat,
    }


def _print_result(result: Any, *, show_all: bool) -> None:
    from rich.table import Table

    if not show_all:
        for position in dict.fromkeys(result.table["position"]):
            chosen = result.table[result.table["position"] == position]
            OUTPUT.print(reading_table(type(result)(chosen, result.provenance)))
            _print_contextualization(result, int(position))
        return
    columns = {
        "token": "token",
        "kind": "kind",
        "source_layer": "layer",
        "target_layer": "into",
        "alpha": "α",
        "score": "score",
        "recovered": "recovered",
        "description": "description",
    }
    table = Table(title=escape(textwrap.shorten(str(result.provenance["prompt"]), 60)))
    for header in columns.values():
        table.add_column(header, overflow="fold")
    for row in result.table[list(columns)].to_dict("records"):
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*map(escape, cells))
    OUTPUT.print(table)


def _print_contextualization(result: Any, position: int) -> None:
    """Print where the model resolves the text, of each target layer that was swept."""
    table = result.table
    here = table[
        (table["position"] == position) & (table["alpha"] == 1) & (table["kind"] == "resid_post")
    ]
    if here.empty or here["mapping"].nunique() > 1:  # nothing unamplified to judge by
        return
    same = (here["source_layer"] == here["target_layer"]).all()
    for into in [None] if same else sorted(here["target_layer"].unique()):
        found = result.contextualization_layer(position=position, target_layer=into)
        where = "" if same else f" [target layer {into}]"
        OUTPUT.print(f"{found}{where}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
