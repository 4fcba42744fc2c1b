"""The `superscopes` command.

Each command is a thin layer over a function of the package: it parses, calls, prints. Bad input
ends with exit code 2 and a message that says what was expected; a sweep that is interrupted
saves its finished cells if a file was asked for and ends with 130.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Amplify a model's internal activations and let the model say what they mean.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ERRORS = Console(stderr=True)


@app.command()
def sweep(
    prompt: Annotated[str, typer.Argument(help="The source prompt whose activations are read.")],
    model: Annotated[
        str, typer.Option(help="'mini' (bundled), a local directory or a hub name.")
    ] = "mini",
    layers: Annotated[
        str, typer.Option(help="Source layers, such as 0-5,8. Every layer unless given.")
    ] = "",
    kinds: Annotated[
        str, typer.Option(help="resid_pre, attn_out, resid_mid, mlp_out, resid_post.")
    ] = "resid_mid,mlp_out,resid_post",
    alphas: Annotated[str, typer.Option(help="Amplifiers; 1 is Patchscopes.")] = "1,3,6,9,12,15",
    token: Annotated[
        str, typer.Option(help="The token to read: an index, a substring, or 'all'.")
    ] = "-1",
    target_layer: Annotated[
        str, typer.Option(help="Where to patch: a layer, 'same', or several, such as 0,3,6.")
    ] = "0",
    target_prompt: Annotated[
        str, typer.Option(help="A text with the placeholder. The paper's unless given.")
    ] = "",
    placeholder: Annotated[str, typer.Option(help="The placeholder's word.")] = "x",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest text. The model's own default, else 10.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Cells per batch. Chosen by memory unless given.")
    ] = None,
    scorer: Annotated[
        str, typer.Option(help="A SentenceTransformer. all-MiniLM-L6-v2 unless given.")
    ] = "",
    backend: Annotated[str, typer.Option(help="auto, hooked or bridge (faster).")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[
        str, typer.Option(help="cuda, mps or cpu; the best there is unless given.")
    ] = "",
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
    from superscopes_tl import (
        DESCRIPTION_PROMPT,
        SweepInterrupted,
        TargetPrompt,
        heatmap,
        load_model,
        write_html,
    )
    from superscopes_tl import sweep as run_sweep

    try:
        target = TargetPrompt(target_prompt, placeholder) if target_prompt else DESCRIPTION_PROMPT
        loaded = load_model(model, backend=_backend(backend), dtype=dtype, device=device or None)
        result = run_sweep(
            loaded,
            prompt,
            layers=parse_layers(layers, "--layers") if layers else None,
            kinds=[kind.strip() for kind in kinds.split(",")],
            alphas=parse_numbers(alphas, "--alphas"),
            positions=_parse_token(token),
            target_layer=(
                "same" if target_layer == "same" else parse_layers(target_layer, "--target-layer")
            ),
            target_prompt=target,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            scorer=scorer or None,
        )
    except (ValueError, TypeError) as error:
        _ERRORS.print(f"[red]Error:[/red] {_plain(str(error))}")
        raise typer.Exit(2) from error
    except SweepInterrupted as stopped:
        where = f" Saved to {stopped.partial.save(out)}." if out else ""
        _ERRORS.print(f"{_plain(str(stopped))}.{where}")
        raise typer.Exit(130) from stopped
    _print_result(result, show_all=show_all)
    console = Console()
    if out:
        console.print(f"Run file: {result.save(out)}")
    if html:
        several = result.table.groupby("source_layer")["target_layer"].nunique().max() > 1
        figure = heatmap(result, x="target_layer" if several else "alpha")
        console.print(f"Heatmap: {write_html(figure, html)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the run files.")] = Path(
        "output"
    ),
    backend: Annotated[str, typer.Option(help="auto, hooked or bridge (faster).")] = "bridge",
) -> None:
    """Run the paper's prompts on the bundled model, with controls, and draw the heatmaps."""
    from superscopes_tl import load_model
    from superscopes_tl.demo import run_demo

    try:
        run_demo(load_model(backend=_backend(backend)), output)
    except ValueError as error:
        _ERRORS.print(f"[red]Error:[/red] {_plain(str(error))}")
        raise typer.Exit(2) from error


@app.command()
def models(
    model: Annotated[
        str, typer.Argument(help="Show this model: 'mini', a directory or a hub name.")
    ] = "mini",
) -> None:
    """Say which models can be loaded, and show what one of them is."""
    from superscopes_tl import load_model

    try:
        loaded = load_model(model)
    except ValueError as error:
        _ERRORS.print(f"[red]Error:[/red] {_plain(str(error))}")
        raise typer.Exit(2) from error
    console = Console()
    console.print(f"[bold]{loaded!r}[/bold]")
    console.print(f"kinds       {', '.join(loaded.kinds)}")
    console.print(f"context     {loaded.n_ctx} tokens")
    for name, value in loaded.provenance().items():
        if name not in ("name", "n_layers"):
            console.print(f"{name:<18}{value}")
    console.print(
        "\nAny Hugging Face causal language model that TransformerLens knows can be loaded: "
        "--model takes a hub name (openai-community/gpt2, EleutherAI/pythia-410m, "
        "meta-llama/Llama-2-13b-chat-hf) or a local directory."
    )


def parse_numbers(text: str, option: str) -> list[float]:
    """Return the numbers of a comma-separated list.

    Raises:
        ValueError: something in it is no number.
    """
    from superscopes_tl.errors import bad_value

    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise bad_value(
            option,
            expected="numbers with commas between them",
            got=text,
            fix=f"write for example {option} 1,3,6",
        ) from error


def parse_layers(text: str, option: str) -> list[int]:
    """Return the layers of a list such as `0-5,8`.

    Raises:
        ValueError: something in it is neither a number nor a range.
    """
    from superscopes_tl.errors import bad_value

    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            layers += range(int(first), int(last) + 1) if dash and first else [int(part)]
        except ValueError as error:
            raise bad_value(
                option,
                expected="layers such as 0-5,8",
                got=text,
                fix=f"write for example {option} 0-5,8",
            ) from error
    return layers


def _parse_token(text: str) -> Any:
    if text == "all":
        return slice(None)
    try:
        return int(text)
    except ValueError:
        return text


def _backend(text: str) -> Any:
    return text  # load_model checks it and says what is expected


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _print_result(result: Any, *, show_all: bool) -> None:
    from rich.table import Table

    from superscopes_tl.demo import reading_table

    console = Console()
    if not show_all:
        for position in dict.fromkeys(result.table["position"]):
            chosen = result.table[result.table["position"] == position]
            console.print(reading_table(type(result)(chosen, result.provenance)))
        return
    table = Table(title=_plain(str(result.provenance["prompt"])))
    columns = ["token", "kind", "source_layer", "target_layer", "alpha", "score", "text"]
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in result.table[columns].to_dict("records"):
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*map(_plain, cells))
    console.print(table)
