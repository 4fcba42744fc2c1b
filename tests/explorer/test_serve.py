"""`superscopes app` without a browser: what is served, and what is refused."""

from __future__ import annotations

import contextlib
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

import pytest
from typer.testing import CliRunner

from superscopes_tl.cli.main import app
from superscopes_tl.explorer import explorer_cell, serve
from superscopes_tl.explorer.server import notebook
from tests.support.browser import ROOT


class Recorded:
    """Stands in for the Voilà process: keeps how it was started; ends when it is waited for."""

    def __init__(self, command: list[str], cwd: str) -> None:
        self.status: int | None = None
        folder = Path(cwd)
        Recorded.command = command
        Recorded.folder = folder
        Recorded.settings = json.loads((folder / "voila.json").read_text())["Voila"]
        Recorded.mode = stat.S_IMODE(folder.stat().st_mode)
        Recorded.cell = json.loads(Path(command[-1]).read_text())["cells"][0]["source"]

    def wait(self, timeout: float | None = None) -> int:
        self.status = 0
        return 0

    def poll(self) -> int | None:
        return self.status


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("superscopes_tl.explorer.server.subprocess.Popen", Recorded)
    monkeypatch.setattr(
        "superscopes_tl.explorer.server.importlib.util.find_spec", lambda name: True
    )
    monkeypatch.setattr("superscopes_tl.explorer.server._answers", lambda host, port, proof: True)
    monkeypatch.setattr("superscopes_tl.explorer.server.webbrowser.open", lambda url: True)
    return Recorded


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def foreign() -> Iterator[list[str]]:
    """What another program was asked at its port, which is the first entry."""
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


def reachable(host: str, port: int) -> bool:
    """Return whether anything listens there."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_the_default_is_loopback_with_a_random_token(recorded: Any) -> None:
    """The token is in the address that is printed, and in no command line."""
    said: list[str] = []
    for _ in range(2):
        assert serve("1", announce=said.append) == 0
        assert recorded.settings["ip"] == "127.0.0.1"
        token = recorded.settings["token"]
        assert len(token) >= 24
        assert said[-1] == f"http://127.0.0.1:8866/?token={token}"
        assert token not in " ".join(recorded.command)
        assert recorded.mode == 0o700
    assert said[0] != said[1]


def test_the_command_passes_its_options_on(recorded: Any) -> None:
    """Model, prompt, address and token reach the page and its server."""
    run = CliRunner().invoke(
        app,
        ["app", "--model", "gpt2", "--prompt", "It's", "--port", "9", "--token", "t",
         "--ip", "192.0.2.1", "--no-browser"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Open http://192.0.2.1:9/?token=t" in run.output
    assert recorded.settings["ip"] == "192.0.2.1"
    assert recorded.settings["port"] == 9
    assert "model='gpt2'" in recorded.cell
    assert '"It\'s"' in recorded.cell
    compile(recorded.cell, "cell", "exec")


def test_a_run_file_is_checked_before_it_is_served(recorded: Any, tmp_path: Path) -> None:
    """A bad file ends with a message and exit code 2, not with a page that fails."""
    bad = tmp_path / "bad.zip"
    bad.write_text("no zip")
    run = CliRunner().invoke(app, ["app", "--result", str(bad)])
    assert run.exit_code == 2
    assert "Explorer.from_result" in explorer_cell(result="run.zip")


def test_without_voila_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setattr(
        "superscopes_tl.explorer.server.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(ValueError, match=r"app: expected Voilà.*superscopes-tl\[app\]"):
        serve("1")


def test_an_empty_token_is_refused(recorded: Any) -> None:
    """It would let anyone in."""
    with pytest.raises(ValueError, match="token: expected a secret"):
        serve("1", token=" ")


def test_a_port_that_is_none_is_refused(recorded: Any) -> None:
    """With 0 nobody would know where the page is."""
    with pytest.raises(ValueError, match="port: expected 1 to 65535, got 0"):
        serve("1", port=0)


@pytest.mark.parametrize(
    ("ip", "here"), [("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")]
)
def test_the_addresses_can_be_opened(recorded: Any, ip: str, here: str) -> None:
    """Where it listens everywhere, this machine's own address and its name are said."""
    said: list[str] = []
    serve("1", ip=ip, token="a&b c", announce=said.append)
    there = [] if ip == "::1" else [f"http://{socket.gethostname()}:8866/?token=a%26b%20c"]
    assert said == [f"http://{here}:8866/?token=a%26b%20c", *there]


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

    monkeypatch.setattr("superscopes_tl.explorer.server.subprocess.Popen", Waits)
    monkeypatch.setattr("superscopes_tl.explorer.server.webbrowser.open", browser)
    serve("1", token="s3cret", announce=lambda url: None)
    [(url, text)] = opened
    assert url == (recorded.folder / "open.html").as_uri()
    assert "url=http://127.0.0.1:8866/?token=s3cret" in text
    assert recorded.settings["open_browser"] is False  # Voilà would open it without the token


def test_nothing_is_announced_while_another_program_answers(
    foreign: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is neither printed nor sent to a server that is not ours."""
    number = int(foreign[0])

    class Fails(Recorded):
        """Ends, as Voilà does at a port that is taken, once the other program was asked."""

        def poll(self) -> int | None:
            return 1 if len(foreign) > 2 else None

        def wait(self, timeout: float | None = None) -> int:
            return 1

    monkeypatch.setattr("superscopes_tl.explorer.server.subprocess.Popen", Fails)
    monkeypatch.setattr(
        "superscopes_tl.explorer.server.importlib.util.find_spec", lambda name: True
    )
    said: list[str] = []
    assert serve("1", port=number, token="s3cret", announce=said.append) == 1
    assert said == []
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


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="not installed: voila")
def test_a_real_server_heeds_no_settings_of_the_folder_and_leaves_nothing(
    tmp_path: Path, port: int
) -> None:
    """A voila.json opens it to nobody; SIGTERM ends it, removes the token and gives 143."""
    work, kept = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    kept.mkdir()
    hostile = {"Voila": {"ip": "0.0.0.0", "token": "", "port": port + 1}}
    (work / "voila.json").write_text(json.dumps(hostile))
    (work / "voila.py").write_text("raise SystemExit('taken from the working folder')")
    command = "import sys; sys.path.remove(''); from superscopes_tl.cli.main import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "app", f"--port={port}", "--token=s3cret", "--no-browser"],
        cwd=work, env={**os.environ, "TMPDIR": str(kept)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert f"Open http://127.0.0.1:{port}/?token=s3cret" in said
            page = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            page.request("GET", "/")
            answer = page.getresponse()
            page.close()
            assert answer.status == 302
            assert str(answer.getheader("Location")).startswith("/login")
            assert not reachable("127.0.0.2", port)  # a server on 0.0.0.0 answers here too
            assert list(kept.glob("superscopes-*/voila.json"))
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert list(kept.glob("superscopes-*")) == []
    assert not reachable("127.0.0.1", port)


@contextlib.contextmanager
def real(port: int, work: Path) -> Iterator[None]:
    """Serve the Explorer until the block ends."""
    command = "import sys; sys.path.remove(''); from superscopes_tl.cli.main import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "app", f"--port={port}", "--token=s3cret", "--no-browser"],
        cwd=work, env={**os.environ, "TMPDIR": str(work), "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            assert "Open" in process.stdout.readline()
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def asked(
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
def test_a_real_server_lets_nobody_in_but_who_has_the_token(tmp_path: Path, port: int) -> None:
    """Neither to the page nor to a kernel, from no other site and under no other name."""
    with real(port, tmp_path):
        for wrong in ({}, {"Authorization": "token wrong"}):
            for path in ("/", "/?token=wrong", "/voila/render/superscopes.ipynb", "/api/kernels"):
                status, answer, _ = asked(port, path, **wrong)
                assert status == 302
                assert str(answer.getheader("Location")).startswith("/login")
            for path in ("/api/kernels", "/api/shutdown/x"):
                assert asked(port, path, method="POST", **wrong)[0] == 403
        for name in ("voila.json", "superscopes.ipynb"):  # with the token, too
            path = f"/voila/files/{name}?token=s3cret"
            assert asked(port, path)[0] == 403
        for host in ("evil.example", f"evil.example:{port}"):
            assert asked(port, "/?token=s3cret", Host=host)[0] == 403
            assert asked(port, "/login", Host=host)[0] == 403
        status, answer, page = asked(port, "/?token=s3cret")
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
            assert asked(port, channel, **UPGRADE, **headers)[0] == expected, headers


@pytest.mark.parametrize(
    ("ip", "remote"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("", True),
     ("192.0.2.1", True), ("some.host", True)],
)  # fmt: skip
def test_other_names_are_served_only_where_others_are(recorded: Any, ip: str, remote: bool) -> None:
    """A name that is made to lead to this machine is no way in; a server for others has any."""
    serve("1", ip=ip, announce=lambda url: None)
    assert recorded.settings["tornado_settings"]["allow_remote_access"] is remote


def test_the_notebook_is_valid() -> None:
    """Nbformat agrees."""
    import nbformat

    nbformat.validate(nbformat.from_dict(notebook("1")))
