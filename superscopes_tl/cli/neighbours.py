"""The commands of the neighbouring methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from superscopes_tl.cli.options import (
    OUTPUT,
    Controls,
    Loading,
    Model,
    Page,
    RunFile,
    Sampling,
    check_folders,
    parse_layers,
    parse_names,
    parse_numbers,
    parse_targets,
    parse_token,
    say,
    table_of,
)
from superscopes_tl.engine import crop_description
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import read_vectors
from superscopes_tl.figures import cells_of, side_by_side_table, write_html
from superscopes_tl.model import DEFAULT_MODEL, layer_name
from superscopes_tl.neighbours import side_by_side as read_side_by_side
from superscopes_tl.vectors import load_vectors, vector_names


def read_vector(
    file: Annotated[
        Path, typer.Argument(help="A file of vectors, [n d_model], or the folder of an SAE.")
    ],
    sampling: Sampling,
    loading: Loading,
    name: Annotated[str, typer.Option(help="Which array; default: an SAE's decoder, W_dec.")] = "",
    rows: Annotated[str, typer.Option(help="Which rows, such as 0-5,8. Defaults to all.")] = "",
    model: Model = DEFAULT_MODEL,
    alphas: Annotated[str, typer.Option(help="Amplifiers, in the unit.")] = "1,3",
    unit: Annotated[
        str, typer.Option(help="α = 1 is the norm of 'residual' or of 'vector'.")
    ] = "residual",
    target_layer: Annotated[str, typer.Option(help="Where to patch: 0,3,6 or embed.")] = "0",
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    reference: Annotated[str, typer.Option(help="What to score against.")] = "",
    controls: Controls = "random_direction",
    out: RunFile = None,
) -> None:
    """Let the model describe a vector: a parameter, an SAE row, a steering vector."""
    check_folders(out=out)
    chosen = parse_layers(rows, "--rows") if rows else None
    vectors = load_vectors(file, name or None, rows=chosen)
    wanted: Any = unit  # read_vectors checks it
    loaded = loading.load(model)
    if (width := vectors.shape[-1]) != loaded.d_model:
        expected = f"vectors of width {loaded.d_model}, that of {loaded.name}"
        raise bad_value("file", expected, f"width {width}", "wrong file or wrong --model?")
    result = read_vectors(
        loaded,
        vectors,
        names=vector_names(file, name or None, rows=chosen),
        references=reference or None,
        alphas=parse_numbers(alphas, "--alphas"),
        unit=wanted,
        target_layer=parse_targets(target_layer),
        controls=parse_names(controls),
        chat=chat,
        **sampling.settings() | {"target_prompt": sampling.target(chat=chat)},
    )
    OUTPUT.print(_readings(result, file, scored=bool(reference)))
    if out:
        say(f"Run file: {result.save(out)}")


def side_by_side(
    prompt: Annotated[str, typer.Argument(help="The source prompt.")],
    layer: Annotated[int, typer.Option(help="The source layer.")],
    loading: Loading,
    kind: Annotated[str, typer.Option(help="The kind of activation.")] = "mlp_out",
    token: Annotated[str, typer.Option(help="The token: an index or a substring.")] = "-1",
    model: Model = DEFAULT_MODEL,
    html: Page = None,
) -> None:
    """Read one site by all methods, each beside as many readings of a random direction."""
    check_folders(html=html)
    found = read_side_by_side(
        loading.load(model), prompt, layer=layer, kind=kind, position=parse_token(token)
    )
    title = f"{kind} of layer {layer}, {prompt!r}, {model}"
    columns = cells_of(found)
    OUTPUT.print(table_of(title, columns, zip(*columns.values(), strict=True)))
    if html:
        say(f"Page: {write_html(side_by_side_table(found, title=title), html)}")


def _readings(result: Any, file: Path, *, scored: bool) -> Table:
    """Return every reading, beside that of a random direction of equal norm where there is one."""
    table = result.table
    columns = {
        "vector": table["token"],
        "into": table["target_layer"].map(layer_name),
        "α": table["alpha"].map("{:g}".format),
        "score": table["score"].map("{:.2f}".format),
        "reading": table["description"],
        "entropy": table["entropy"].map("{:.2f}".format),
    }
    if not scored:
        del columns["score"]
    if "random_direction_text" in table:
        columns["random direction"] = table["random_direction_text"].map(crop_description)
    title = f"{file.name}, {result.provenance['model']['name']}"
    return table_of(title, columns, zip(*columns.values(), strict=True))
