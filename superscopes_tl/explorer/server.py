"""The Explorer as a page of its own, through Voilà.

1. Write a notebook whose one cell shows the Explorer, into a folder that only the user can read.
2. Beside it the server's settings, the token among them: command lines can be read by others.
3. Run Voilà in that folder, so that no file of the working folder configures it.
4. Announce the address, with the token, once it is certain that this Voilà answers there.
5. Wait until it is stopped. Every page that is opened has a Python process of its own.
"""

from __future__ import annotations

import contextlib
import html
import http.client
import importlib.util
import ipaddress
import json
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from superscopes_tl.errors import bad_value

EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean "all of this machine's", and where the machine itself reaches each."""
PROOF = "X-Superscopes"  # the header by which Voilà proves to be the one that was started here
STOP_SECONDS = 10.0  # Voilà gives its kernels 5 to stop


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

    The page works in the current folder: relative paths mean what they mean here, and files that
    it saves stay.

    Args:
        cell: the code of the page; see `explorer_cell`.
        ip: the address to listen on; defaults to this machine alone.
        port: the port.
        token: what a visitor has to present; defaults to a random one.
        open_browser: whether to open the page in the default browser.
        announce: called with each address of the page once it can be opened.

    Raises:
        ValueError: Voilà is not installed, no port, or an empty token.
        SystemExit: stopped by a signal.
    """
    token = _checked(port, token)
    proof = secrets.token_hex(16)
    # Only its owner can read this folder.
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix="superscopes-") as name:
        folder = Path(name)
        page = folder / "superscopes.ipynb"
        page.write_text(json.dumps(_notebook(_in_folder(Path.cwd(), cell))), encoding="utf-8")
        settings = _settings(folder, ip, port, token, proof)
        (folder / "voila.json").write_text(json.dumps(settings), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "voila", f"--Voila.config_file_paths={name}", str(page)],
            cwd=name,  # Voilà would read a voila.json of the working folder, Python a voila.py
        )
        try:
            if _is_up(process, EVERYWHERE.get(ip, ip), port, proof):
                several = _addresses(ip, port, token)
                for url in several:
                    announce(url)
                if open_browser:
                    _open(folder, several[0])
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # it got the same signal, and stops its kernels
        finally:
            _stop(process)


def explorer_cell(*, prompt: str | None = None, result: str | None = None, **loading: Any) -> str:
    """Return code that shows an Explorer of a run file, or of a model that is loaded.

    Args:
        prompt: the source prompt to begin with.
        result: a run file; no model is loaded then.
        **loading: the arguments of `load_model`.
    """
    if result is not None:
        return (
            "from superscopes_tl import Explorer, SweepResult\n"
            f"Explorer(result=SweepResult.load({result!r}))"
        )
    given = ", ".join(f"{name}={value!r}" for name, value in loading.items())
    start = f", {prompt!r}" if prompt else ""
    return f"from superscopes_tl import Explorer, load_model\nExplorer(load_model({given}){start})"


def _notebook(cell: str) -> dict[str, Any]:
    """Return a notebook of one code cell, as JSON data."""
    code: dict[str, Any] = {
        "cell_type": "code", "id": "explorer", "metadata": {}, "source": cell,
        "outputs": [], "execution_count": None,
    }  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "title": "Superscopes"}
    return {"cells": [code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _addresses(ip: str, port: int, token: str) -> list[str]:
    """Return the page's addresses: for this machine, then for others if it listens there."""
    hosts = [EVERYWHERE[ip], socket.gethostname()] if ip in EVERYWHERE else [ip]
    return [
        f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={quote(token, safe='')}"
        for host in hosts
    ]


def _checked(port: int, token: str | None) -> str:
    """Return the token of a page that can be served."""
    if importlib.util.find_spec("voila") is None:
        raise bad_value("app", "Voilà", "no package voila", "pip install 'superscopes-tl[app]'")
    if not 1 <= port <= 65535:
        raise bad_value("port", "1 to 65535", port, "for example 8866")
    if token is not None and not token.strip():
        raise bad_value("token", "a secret", token, "leave it out for a random one")
    return token or secrets.token_urlsafe(24)


def _settings(folder: Path, ip: str, port: int, token: str, proof: str) -> dict[str, Any]:
    """Return Voilà's settings; it reads no others."""
    voila = {
        "ip": ip,
        "port": port,
        "port_retries": 0,  # nobody would find it on another port than the announced one
        "token": token,
        "open_browser": False,  # it would open the page without the token
        "connection_dir_root": str(folder),  # the kernels' keys go when the folder goes
        "tornado_settings": {
            "headers": {PROOF: proof},
            # A foreign page whose name was made to resolve to here sends that name.
            "allow_remote_access": not _is_loopback(ip),
        },
    }
    return {"Voila": voila, "VoilaConfiguration": {"show_tracebacks": True}}


def _is_loopback(ip: str) -> bool:
    """Return whether only this machine reaches the address."""
    try:
        return ip == "localhost" or ipaddress.ip_address(ip).is_loopback
    except ValueError:  # a name
        return False


def _in_folder(folder: Path, cell: str) -> str:
    """Return `cell` as it runs in `folder`, without importing a torch.py that lies there."""
    path = "sys.path[:] = filter(None, sys.path)"
    return f"import os, sys\nos.chdir({str(folder)!r})\n{path}\n{cell}"


def _is_up(process: subprocess.Popen[bytes], host: str, port: int, proof: str) -> bool:
    """Wait until the process has ended, or a server at the port answers with `proof`.

    Another program may have taken the port first, and must not see the token.
    """
    while process.poll() is None:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(http.client.HTTPConnection(host, port, timeout=5)) as connection,
        ):
            connection.request("GET", "/login")
            if connection.getresponse().getheader(PROOF) == proof:
                return True
        time.sleep(0.1)
    return False


def _open(folder: Path, url: str) -> None:
    """Open the page in the default browser, by way of a file: its command line can be read."""
    start = folder / "open.html"
    goal = html.escape(f"0; url={url}", quote=True)
    start.write_text(f'<meta http-equiv="refresh" content="{goal}">', encoding="utf-8")
    # A browser of the terminal returns only when it is closed.
    threading.Thread(target=webbrowser.open, args=(start.as_uri(),), daemon=True).start()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, and with it its kernels."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind: by default they end Python at once, without clean-up."""

    def leave(number: int, frame: FrameType | None) -> None:
        for each in before:  # a second one would interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
