"""The wheel: what it holds, and that the package's face costs nothing to import."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import wheel as wheels

HEAVY = (
    "torch", "transformers", "transformer_lens", "sentence_transformers", "numpy", "pandas",
    "plotly", "ipywidgets", "matplotlib",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone."""
    pytest.importorskip("build")
    return wheels.build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Modules, styles, scripts, templates and the licence; no test, no notebook; below 1 MB."""
    assert wheels.faults(wheel) == []


def test_a_fault_of_a_wheel_is_told(wheel: Path, tmp_path: Path) -> None:
    """A file that is missing, one too many, and another version."""
    spoilt = tmp_path / wheel.name
    with ZipFile(wheel) as old, ZipFile(spoilt, "w") as new:
        for info in old.infolist():
            if info.filename.endswith("explorer.css"):
                continue
            data = old.read(info)
            if info.filename.endswith("METADATA"):
                data = re.sub(rb"^Version: .*$", b"Version: 9", data, count=1, flags=re.MULTILINE)
            new.writestr(info, data)
        new.writestr("tests/__init__.py", "")
    stated = version("superscopes-tl")
    assert wheels.faults(spoilt) == [
        "lacks superscopes_tl/explorer/static/explorer.css",
        "holds tests/__init__.py",
        f"is version 9, not {stated}",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import superscopes_tl; superscopes_tl.__version__",
        "from superscopes_tl.cli import app; app(['--help'], standalone_mode=False)",
        "from superscopes_tl.cli import app; app(['--version'], standalone_mode=False)",
    ],
)
def test_face_list_of_commands_and_version_load_no_heavy_library(code: str) -> None:
    """Neither `import superscopes_tl` nor `superscopes --help` waits for torch."""
    code += f"; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
