"""The Explorer as a page of its own, through Voilà.

1. Write a notebook whose one cell shows the Explorer, into a folder that only the user can read.
2. Beside it the server's settings, the token among them: a command line can be read by others.
3. Run Voilà until it is stopped. Every page that is opened has a Python process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from superscopes_tl.errors import bad_value


def serve(
    cell: str,
    *,
    ip: str = "127.0.0.1",
    port: int = 8866,
    token: str | None = None,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> int:
    """Serve a page that shows what `cell` shows, until interrupted; return Voilà's exit status.

    Args:
        cell: the code of the page; see `explorer_cell`.
        ip: the address to listen on; this machine alone unless given.
        port: the port.
        token: what a visitor has to show; a random one unless given.
        open_browser: whether to open the page in the default browser.
        announce: called with the address of the page.

    Raises:
        ValueError: Voilà is not installed, or an empty token.
    """
    if importlib.util.find_spec("voila") is None:
        raise bad_value(
            "app", expected="Voilà", got="no package voila",
            fix="pip install 'superscopes-tl[app]'",
        )  # fmt: skip
    token = secrets.token_urlsafe(24) if token is None else token
    if not token.strip():
        raise bad_value(
            "token", expected="a secret", got=token, fix="leave it out for a random one"
        )
    with tempfile.TemporaryDirectory(prefix="superscopes-") as name:  # readable by its owner alone
        folder = Path(name)
        page = folder / "superscopes.ipynb"
        page.write_text(json.dumps(notebook(cell)), encoding="utf-8")
        settings = {
            "Voila": {"ip": ip, "port": port, "token": token, "open_browser": open_browser},
            "VoilaConfiguration": {"show_tracebacks": True},
        }
        (folder / "voila.json").write_text(json.dumps(settings), encoding="utf-8")
        paths = os.pathsep.join(filter(None, [name, os.environ.get("JUPYTER_CONFIG_PATH")]))
        announce(f"http://{ip}:{port}/?token={token}")
        process = subprocess.Popen(
            [sys.executable, "-m", "voila", str(page)],
            env={**os.environ, "JUPYTER_CONFIG_PATH": paths},
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # it got the same signal, and stops its kernels
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def explorer_cell(*, prompt: str | None = None, result: str | None = None, **loading: Any) -> str:
    """Return code that shows an Explorer: of a run file, or of a model that is loaded.

    Args:
        prompt: the source prompt to begin with.
        result: a run file; no model is loaded then.
        **loading: the arguments of `load_model`.
    """
    if result is not None:
        return (
            "from superscopes_tl import Explorer, SweepResult\n"
            f"Explorer.from_result(SweepResult.load({result!r}))"
        )
    given = ", ".join(f"{name}={value!r}" for name, value in loading.items())
    start = f", {prompt!r}" if prompt else ""
    return (
        "from superscopes_tl import Explorer, load_model\n"
        f"Explorer(load_model({given}){start})"
    )  # fmt: skip


def notebook(cell: str) -> dict[str, Any]:
    """Return a notebook of one code cell, as JSON data."""
    code: dict[str, Any] = {
        "cell_type": "code", "id": "explorer", "metadata": {}, "source": cell,
        "outputs": [], "execution_count": None,
    }  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [code],
        "metadata": {"kernelspec": kernel, "title": "Superscopes"},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
