"""The commands of the neighbouring methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from superscopes_tl.cli import options as options
from superscopes_tl.cli.shell import OUTPUT, check_folder, explained, parse_layers, parse_numbers
from superscopes_tl.model import DEFAULT_MODEL


def read_vector(
    file: Annotated[
        Path, typer.Argument(help="Vectors, [n d_model]: a .safetensors, .npy or .npz file.")
    ],
    name: Annotated[str, typer.Option(help="Which array, if the file holds several.")] = "",
    rows: Annotated[str, typer.Option(help="Which rows, such as 0-5,8. All if empty.")] = "",
    model: options.Model = DEFAULT_MODEL,
    alphas: Annotated[str, typer.Option(help="Amplifiers, in the unit.")] = "1,3",
    unit: Annotated[
        str, typer.Option(help="What α = 1 is: as long as the 'residual' stream, or the 'vector'.")
    ] = "residual",
    target_layer: Annotated[
        str, typer.Option(help="Where to patch: a layer, or several, such as 0,3,6.")
    ] = "0",
    reference: Annotated[
        str, typer.Option(help="What they mean, if known, to score against. No score if empty.")
    ] = "",
    target_prompt: options.TargetText = None,
    placeholder: options.Placeholder = "x",
    max_new_tokens: options.MaxNewTokens = None,
    batch_size: options.BatchSize = None,
    scorer: options.ScorerName = "",
    controls: options.Controls = "random_direction",
    backend: options.Backend = "auto",
    dtype: options.DType = "float32",
    device: options.Device = "",
    out: Annotated[
        Path | None, typer.Option(help="Save the result to this run file (.zip).")
    ] = None,
) -> None:
    """Let the model say what a vector means: a parameter, an SAE row, a steering vector."""
    from superscopes_tl.experiment import read_vectors
    from superscopes_tl.vectors import load_vectors

    with explained():
        check_folder(out, "--out")
        chosen = parse_layers(rows, "--rows") if rows else None
        vectors = load_vectors(file, name or None, rows=chosen)
        numbers = range(len(vectors)) if chosen is None else chosen
        wanted: Any = unit  # plan_vectors checks it and says what is expected
        result = read_vectors(
            options.load(model, backend, dtype, device),
            vectors,
            names=[f"{name or file.stem} {number}" for number in numbers],
            references=reference or None,
            alphas=parse_numbers(alphas, "--alphas"),
            unit=wanted,
            target_layer=parse_layers(target_layer, "--target-layer"),
            target_prompt=options.target_prompt(target_prompt, placeholder),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            scorer=scorer or None,
            controls=options.names(controls),
        )
        OUTPUT.print(_readings(result, file, scored=bool(reference)))
        if out:
            OUTPUT.print(f"Run file: {result.save(out)}", markup=False)


def side_by_side(
    prompt: Annotated[str, typer.Argument(help="The source prompt.")],
    layer: Annotated[int, typer.Option(help="The source layer.")],
    kind: Annotated[str, typer.Option(help="The kind of activation.")] = "mlp_out",
    token: Annotated[str, typer.Option(help="The token: an index or a substring.")] = "-1",
    model: options.Model = DEFAULT_MODEL,
    backend: options.Backend = "auto",
    dtype: options.DType = "float32",
    device: options.Device = "",
    html: Annotated[
        Path | None, typer.Option(help="Write the table to this page (opens offline).")
    ] = None,
) -> None:
    """Read one site by all methods, each beside as many readings of a random direction."""
    from superscopes_tl.figures import cells_of, side_by_side_figure, write_html
    from superscopes_tl.neighbours import side_by_side as read

    with explained():
        check_folder(html, "--html")
        found = read(
            options.load(model, backend, dtype, device),
            prompt,
            layer=layer,
            kind=kind,
            position=options.parse_token(token),
        )
        title = f"{kind} of layer {layer}, {prompt!r}, {model}"
        table = Table(title=escape(title))
        columns = cells_of(found)
        for name in columns:
            text = name in ("method", "reading")
            table.add_column(name, overflow="fold", no_wrap=not text, ratio=1 if text else None)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(escape, row))
        OUTPUT.print(table)
        if html:
            write_html(side_by_side_figure(found, title=title), html)
            OUTPUT.print(f"Page: {html}", markup=False)


def _readings(result: Any, file: Path, *, scored: bool) -> Table:
    """Return every reading, with what a random direction of equal norm says if that was asked."""
    from superscopes_tl.engine import crop_description

    table = Table(title=escape(f"{file.name}, {result.provenance['model']['name']}"))
    for header in ("vector", "into", "α", *(["score"] if scored else []), "reading", "entropy"):
        table.add_column(header, overflow="fold")
    control = "random_direction_text" in result.table
    if control:
        table.add_column("random direction", overflow="fold")
    for row in result.table.to_dict("records"):
        cells = [row["token"], str(row["target_layer"]), f"{row['alpha']:g}"]
        cells += [f"{row['score']:.2f}"] if scored else []
        cells += [row["description"], f"{row['entropy']:.2f}"]
        cells += [crop_description(row["random_direction_text"])] if control else []
        table.add_row(*map(escape, cells))
    return table
