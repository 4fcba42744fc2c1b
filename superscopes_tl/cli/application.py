"""The commands that start something else: the Explorer as a page, and the benchmarks of a clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from superscopes_tl.cli.options import FastLoading, Model, say
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepResult
from superscopes_tl.model import DEFAULT_MODEL


def app(
    loading: FastLoading,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option(help="The initial source prompt.")] = "",
    result: Annotated[
        Path | None, typer.Option(help="Show this run file (.zip); no model is loaded.")
    ] = None,
    ip: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.")] = 8866,
    token: Annotated[
        str | None,
        typer.Option(envvar="SUPERSCOPES_TOKEN", help="Access token. Defaults to a random one."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
) -> None:
    """Serve the Explorer as a page of its own (needs the extra `app`)."""
    from superscopes_tl.explorer import explorer_cell, serve  # widgets take a second to import

    if result is not None:
        SweepResult.load(result)  # a bad file is refused here, not on the page
        cell = explorer_cell(result=str(result.resolve()))
    else:
        cell = explorer_cell(
            prompt=prompt, model=model, backend=loading.backend, dtype=loading.dtype,
            device=loading.device or None,
        )  # fmt: skip
    status = serve(
        cell, ip=ip, port=port, token=token, open_browser=browser,
        announce=lambda url: say(f"Open {url} (Ctrl+C stops)"),
    )  # fmt: skip
    raise typer.Exit(status)


def bench(context: typer.Context) -> None:
    """Measure cells per second against other ways to compute the same cells (needs a clone)."""
    clone = Path(__file__).parent.parent.parent
    if not (clone / "tests" / "benchmarks").is_dir():
        raise bad_value("bench", "a clone of the repository", str(clone), "pip install -e a clone")
    paths = [str(clone), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *context.args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    raise typer.Exit(done.returncode)
