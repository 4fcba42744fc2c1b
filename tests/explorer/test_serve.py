"""`superscopes app` without a browser: what is served, and what is refused."""

from __future__ import annotations

import http.client
import http.server
import importlib.util
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

from superscopes_tl.cli import app
from superscopes_tl.explorer import explorer_cell, serve
from tests.support.browser import ROOT

SERVER = "superscopes_tl.explorer.server"


class Recorded:
    """Stands in for the Voilà process: keeps how it was started; ends when it is waited for."""

    def __init__(self, command: list[str], cwd: str) -> None:
        self.status: int | None = None
        folder = Path(cwd)
        Recorded.command, Recorded.folder = command, folder
        Recorded.settings = json.loads((folder / "voila.json").read_text())["Voila"]
        Recorded.mode = stat.S_IMODE(folder.stat().st_mode)
        Recorded.notebook = json.loads(Path(command[-1]).read_text())
        Recorded.cell = Recorded.notebook["cells"][0]["source"]

    def wait(self, timeout: float | None = None) -> int:
        self.status = 0
        return 0

    def poll(self) -> int | None:
        return self.status


class Answer:
    """Stands in for a connection to Voilà: answers at once, with the proof that it was given."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        pass

    def request(self, method: str, path: str) -> None:
        assert path == "/login"

    def getresponse(self) -> Any:
        return self

    def getheader(self, name: str) -> Any:
        return Recorded.settings["tornado_settings"]["headers"].get(name)

    def close(self) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that is not started."""
    monkeypatch.setattr(f"{SERVER}.subprocess.Popen", Recorded)
    monkeypatch.setattr(f"{SERVER}.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(f"{SERVER}.http.client.HTTPConnection", Answer)
    monkeypatch.setattr(f"{SERVER}.webbrowser.open", lambda url: True)
    return Recorded


def test_the_default_is_loopback_with_a_random_token(recorded: Any) -> None:
    """The token is in the address that is announced, and in no command line."""
    announced: list[str] = []
    for _ in range(2):
        assert serve("1", announce=announced.append) == 0
        token = recorded.settings["token"]
        assert recorded.settings["ip"] == "127.0.0.1"
        assert len(token) >= 24
        assert announced[-1] == f"http://127.0.0.1:8866/?token={token}"
        assert token not in " ".join(recorded.command)
        assert recorded.mode == 0o700
    assert announced[0] != announced[1]
    nbformat.validate(nbformat.from_dict(recorded.notebook))


def test_the_command_passes_its_options_on(recorded: Any) -> None:
    """Model, prompt, address and token reach the page and its server."""
    run = CliRunner().invoke(
        app,
        ["app", "--model", "gpt2", "--prompt", "It's", "--port", "9", "--token", "t",
         "--ip", "192.0.2.1", "--no-browser"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Open http://192.0.2.1:9/?token=t" in run.output
    assert (recorded.settings["ip"], recorded.settings["port"]) == ("192.0.2.1", 9)
    assert "model='gpt2'" in recorded.cell
    assert '"It\'s"' in recorded.cell
    compile(recorded.cell, "cell", "exec")


def test_a_run_file_is_checked_before_it_is_served(recorded: Any, tmp_path: Path) -> None:
    """A bad file ends with a message and exit code 2, not with a page that fails."""
    bad = tmp_path / "bad.zip"
    bad.write_text("no zip")
    run = CliRunner().invoke(app, ["app", "--result", str(bad)])
    assert run.exit_code == 2
    assert "Explorer(result=" in explorer_cell(result="run.zip")


def test_without_voila_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setattr(f"{SERVER}.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^app: .*superscopes-tl\[app\]"):
        serve("1")


@pytest.mark.parametrize(("argument", "bad"), [("token", " "), ("token", ""), ("port", 0)])
def test_what_would_let_anyone_in_or_nobody_is_refused(
    recorded: Any, argument: str, bad: Any
) -> None:
    """An empty token; port 0, which nobody would find."""
    with pytest.raises(ValueError, match=f"^{argument}:"):
        serve("1", **{argument: bad})


@pytest.mark.parametrize(
    ("ip", "here", "others"),
    [
        ("0.0.0.0", "127.0.0.1", True), ("", "127.0.0.1", True), ("::", "[::1]", True),
        ("::1", "[::1]", False), ("localhost", "localhost", False),
        ("192.0.2.1", "192.0.2.1", None), ("some.host", "some.host", None),
    ],
)  # fmt: skip
def test_the_addresses_can_be_opened(
    recorded: Any, ip: str, here: str, others: bool | None
) -> None:
    """Where it listens everywhere, this machine's name is announced too.

    Foreign names are served only where others are: a name that is made to resolve to this machine
    is no way in.
    """
    announced: list[str] = []
    serve("1", ip=ip, token="a&b c", announce=announced.append)
    there = [f"http://{socket.gethostname()}:8866/?token=a%26b%20c"] if others else []
    assert announced == [f"http://{here}:8866/?token=a%26b%20c", *there]
    assert recorded.settings["tornado_settings"]["allow_remote_access"] is (others is not False)


def test_the_browser_gets_the_page_with_the_token(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By way of a file in the private folder, since its command line can be read by others."""
    opened: list[tuple[str, str]] = []
    done = threading.Event()

    def browser(url: str) -> bool:
        opened.append((url, (recorded.folder / "open.html").read_text()))
        done.set()
        return True

    class Waits(Recorded):
        def wait(self, timeout: float | None = None) -> int:
            assert done.wait(30)
            return super().wait(timeout)

    monkeypatch.setattr(f"{SERVER}.subprocess.Popen", Waits)
    monkeypatch.setattr(f"{SERVER}.webbrowser.open", browser)
    serve("1", token="s3cret", announce=lambda url: None)
    [(url, text)] = opened
    assert url == (recorded.folder / "open.html").as_uri()
    assert "url=http://127.0.0.1:8866/?token=s3cret" in text
    assert recorded.settings["open_browser"] is False  # Voilà would open it without the token


@pytest.fixture
def foreign() -> Iterator[list[str]]:
    """The port of another program, followed by what that was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_request(self, code: object = "-", size: object = "-") -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        asked.append(str(server.server_port))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def test_nothing_is_announced_while_another_program_answers(
    foreign: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is neither printed nor sent to a server that is not ours."""

    class Fails(Recorded):
        """Ends, as Voilà does at a port that is taken, once the other program was asked."""

        def poll(self) -> int | None:
            return 1 if len(foreign) > 2 else None

        def wait(self, timeout: float | None = None) -> int:
            return 1

    monkeypatch.setattr(f"{SERVER}.subprocess.Popen", Fails)
    monkeypatch.setattr(f"{SERVER}.importlib.util.find_spec", lambda name: True)
    announced: list[str] = []
    assert serve("1", port=int(foreign[0]), token="s3cret", announce=announced.append) == 1
    assert announced == []
    assert set(foreign[1:]) == {"/login"}
    assert Fails.settings["port_retries"] == 0


def test_the_page_works_in_the_folder_of_the_command(
    recorded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model's relative path is found and a saved file stays, but no module is taken there."""
    monkeypatch.chdir(tmp_path)
    serve("1", announce=lambda url: None)
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", ["", "somewhere"])
    exec(recorded.cell, {})
    assert Path.cwd() == tmp_path.resolve()
    assert sys.path == ["somewhere"]


def reachable(host: str, port: int) -> bool:
    """Return whether anything listens there."""
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def answer_of(
    port: int, path: str, *, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPResponse, str]:
    """Return the status of an answer, the answer and its text."""
    page = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    page.request(method, path, headers={name.replace("_", "-"): v for name, v in headers.items()})
    answer = page.getresponse()
    # A page that was let through to a kernel's channel stays open: it has no text.
    text = "" if answer.status == 101 else answer.read().decode(errors="replace")
    page.close()
    return answer.status, answer, text


UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "MDAwMDAwMDAwMDAwMDAwMA==",
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="not installed: voila")
def test_a_real_server_lets_nobody_in_and_leaves_nothing(tmp_path: Path) -> None:
    """A hostile folder does not configure it; the token is needed for the page and its kernel.

    SIGTERM ends it, removes the token and gives 143.
    """
    work, kept = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    kept.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    hostile = {"Voila": {"ip": "0.0.0.0", "token": "", "port": port + 1}}
    (work / "voila.json").write_text(json.dumps(hostile))
    (work / "voila.py").write_text("raise SystemExit('taken from the working folder')")
    command = (
        "import sys; sys.path.remove(''); from superscopes_tl.explorer import serve;"
        f"sys.exit(serve('1', port={port}, token='s3cret', open_browser=False,"
        "announce=lambda url: print(url, flush=True)))"
    )
    environment = {**os.environ, "TMPDIR": str(kept), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", command], cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}/?token=s3cret" in process.stdout.readline()
            assert not reachable("127.0.0.2", port)  # a server on 0.0.0.0 answers here too
            assert list(kept.glob("superscopes-*/voila.json"))
            check_doors(port)
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert list(kept.glob("superscopes-*")) == []
    assert not reachable("127.0.0.1", port)


def check_doors(port: int) -> None:
    """Neither to the page nor to a kernel, from no other site and under no other name."""
    for wrong in ({}, {"Authorization": "token wrong"}):
        for path in ("/", "/?token=wrong", "/voila/render/superscopes.ipynb", "/api/kernels"):
            status, answer, _ = answer_of(port, path, **wrong)
            assert status == 302
            assert str(answer.getheader("Location")).startswith("/login")
        for path in ("/api/kernels", "/api/shutdown/x"):
            assert answer_of(port, path, method="POST", **wrong)[0] == 403
    for name in ("voila.json", "superscopes.ipynb"):  # with the token, too
        assert answer_of(port, f"/voila/files/{name}?token=s3cret")[0] == 403
    for host in ("evil.example", f"evil.example:{port}"):
        assert answer_of(port, "/?token=s3cret", Host=host)[0] == 403
        assert answer_of(port, "/login", Host=host)[0] == 403
    status, answer, page = answer_of(port, "/?token=s3cret")
    assert status == 200
    cookie = str(answer.getheader("Set-Cookie")).split(";")[0]
    kernel = re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", page)[0]
    own, evil = f"http://127.0.0.1:{port}", "http://evil.example"
    for headers, expected in (
        ({}, 403),
        ({"Authorization": "token wrong"}, 403),
        ({"Cookie": cookie, "Origin": evil}, 403),
        ({"Cookie": cookie, "Origin": evil, "Host": "evil.example"}, 403),
        ({"Cookie": cookie, "Origin": own}, 101),
    ):
        channel = f"/api/kernels/{kernel}/channels"
        assert answer_of(port, channel, **UPGRADE, **headers)[0] == expected, headers
