"""A notebook server on loopback and a headless Chromium to look at it, for the browser tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
PATIENCE = 90
"""Seconds to wait for anything: on a loaded machine a test must not fail by accident."""


def browser_path() -> str | None:
    """Return a Chromium or Chrome on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Server:
    """A running notebook server."""

    url: str
    token: str
    folder: Path

    def write(self, name: str, cells: Sequence[str]) -> None:
        """Put a notebook of code cells where the server finds it."""
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.folder / name)


@contextlib.contextmanager
def serve(
    command: Sequence[str], *, theme: str = "JupyterLab Light", temporary: Path | None = None
) -> Iterator[Server]:
    """Run a server until the block ends; `{port}`, `{token}` and `{folder}` are filled in.

    With `temporary` it keeps its temporary files there, where a test sees what it leaves.
    """
    with tempfile.TemporaryDirectory(prefix="explorer-") as name:
        home = Path(name)
        folder = home / "notebooks"
        folder.mkdir()
        _settings(home, theme)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        token = secrets.token_hex(16)
        filled = [part.format(port=port, token=token, folder=folder) for part in command]
        with (home / "server.log").open("w") as log:
            process = subprocess.Popen(
                filled,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(home) | ({"TMPDIR": str(temporary)} if temporary else {}),
                cwd=folder,
                start_new_session=True,
            )
            try:
                _wait(f"http://127.0.0.1:{port}", process, home / "server.log")
                yield Server(f"http://127.0.0.1:{port}", token, folder)
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def lab(theme: str = "JupyterLab Light") -> contextlib.AbstractContextManager[Server]:
    """Run JupyterLab."""
    return serve(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", "--ServerApp.port={port}", "--ServerApp.port_retries=0",
            "--IdentityProvider.token={token}", "--ServerApp.root_dir={folder}",
            "--LabApp.expose_app_in_browser=True",
        ],
        theme=theme,
    )  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    return {
        **os.environ,
        **{name: str(home / folder) for name, folder in folders.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        "PYTHONWARNINGS": "ignore",
    }


def _settings(home: Path, theme: str) -> None:
    folder = home / "settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True)
    settings: dict[str, dict[str, Any]] = {
        "themes": {"theme": theme},
        "notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(values))


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return as soon as the server answers anything."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(log.read_text()[-2000:])


@contextlib.contextmanager
def chromium(playwright: Any, *, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """Open a page in a browser of its own."""
    with browser(playwright) as running, new_page(running, width=width, height=height) as page:
        yield page


@contextlib.contextmanager
def browser(playwright: Any) -> Iterator[Any]:
    """Run a browser until the block ends."""
    running = playwright.chromium.launch(
        executable_path=browser_path(), headless=True, args=list(FLAGS)
    )
    try:
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def new_page(browser: Any, *, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """Open a page that shares nothing with others; `page.failures` collects script errors."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        permissions=["clipboard-read", "clipboard-write"],
        accept_downloads=True,
    )
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.failures = failures
    try:
        yield page
    finally:
        context.close()


@contextlib.contextmanager
def slowed(page: Any, times: float) -> Iterator[None]:
    """Let the page compute several times more slowly than the machine."""
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": times})
    try:
        yield
    finally:
        session.send("Emulation.setCPUThrottlingRate", {"rate": 1})
        session.detach()


def open_notebook(page: Any, server: Server, name: str) -> None:
    """Open a notebook alone on the page and wait for its kernel."""
    page.goto(f"{server.url}/doc/tree/{name}?token={server.token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"
        " === 'idle'"
    )


def run_all(page: Any) -> None:
    """Run all cells of the notebook on the page."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")


def wait_for_state(page: Any, state: str, run: int) -> None:
    """Wait until the Explorer's status says so."""
    page.wait_for_selector(f".ssx-status [data-state='{state}'][data-run='{run}']")


_PLACE = """([panel, column, row]) => {
  const plot = document.querySelector('.ssx-map .js-plotly-plot'), full = plot._fullLayout;
  const s = panel ? panel + 1 : '', x = full['xaxis' + s], y = full['yaxis' + s];
  const box = plot.getBoundingClientRect();
  return [box.x + x._offset + x.l2p(column), box.y + y._offset + y.l2p(row)];
}"""


_OUTLINED = """([panel, column, row]) => {
  const shape = document.querySelector('.ssx-map .js-plotly-plot').layout.shapes?.[0];
  return shape && shape.xref === (panel ? `x${panel + 1}` : 'x')
    && shape.x0 === column - 0.5 && shape.y0 === row - 0.5;
}"""


def place_of(page: Any, panel: int, column: int, row: int) -> tuple[float, float]:
    """Return where a cell of the map is on the page."""
    x, y = page.evaluate(_PLACE, [panel, column, row])
    return x, y


def click_cell(page: Any, panel: int, column: int, row: int) -> None:
    """Click a cell of the map until it is outlined, as a hand would.

    Plotly clicks what was hovered last, and the page moves when the panel's controls arrive: a
    click may miss, once or twice.
    """
    from playwright.sync_api import TimeoutError as TooLate

    for attempt in range(6):
        page.locator(".ssx-map .js-plotly-plot").scroll_into_view_if_needed()
        x, y = place_of(page, panel, column, row)
        page.mouse.move(x - 4, y - 4)
        page.mouse.move(x, y)
        page.wait_for_selector(".ssx-map .js-plotly-plot .hoverlayer .hovertext")
        page.mouse.click(x, y)
        try:
            page.wait_for_function(_OUTLINED, arg=[panel, column, row], timeout=3_000)
            return
        except TooLate:
            if attempt == 5:
                raise
