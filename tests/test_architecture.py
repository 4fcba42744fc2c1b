"""The shape of the package: data flows one way, modules stay small, the top level is clean."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import superscopes_tl

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "superscopes_tl"
STOREYS = """
    errors files
    weights
    model
    engine
    vectors scores
    experiment
    statistics
    evaluation
    neighbours
    figures
    explorer
    cli
"""
STOREY = {name: i for i, line in enumerate(STOREYS.split("\n")) for name in line.split()}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
FOLDERS = sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))


def _imports(path: Path) -> set[str]:
    """Return what of the package a file imports, anywhere in it, as dotted paths below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == PACKAGE.name}
    return {name.removeprefix(f"{PACKAGE.name}.") for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way_and_through_the_faces(path: Path) -> None:
    """A folder imports from the folders below it alone, and from their `__init__` alone."""
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert home in STOREY, f"say on which storey {home} stands"
    for name in _imports(path):
        folder, *rest = name.split(".")
        if folder == home:
            continue
        assert folder in STOREY, f"{path}: imports {name} from the package's own face"
        lower = STOREY[folder] < STOREY[home] or (folder, home) == ("errors", "files")
        assert lower, f"{path}: imports {name}, which is not below it"
        assert len(rest) == 1, f"{path}: imports {name} past the face of {folder}"
        assert not (PACKAGE / folder / f"{rest[0]}.py").exists(), f"{path}: imports a room, {name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_folders_have_few_rooms_and_a_face_that_no_room_shadows(folder: Path) -> None:
    """At most nine rooms; every name of the face exists, and none is also a room of the folder."""
    rooms = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert len(rooms) <= 9
    face = importlib.import_module(f"{PACKAGE.name}.{folder.name}")
    assert face.__doc__
    names = set(getattr(face, "__all__", ()))
    assert not names & rooms
    for name in names:
        thing = getattr(face, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name


def test_the_top_face_is_small() -> None:
    """At most thirty names at the top; the rest is found by its folder."""
    assert len(superscopes_tl.__all__) <= 30
    assert not set(superscopes_tl.__all__) & {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    """At most 600 lines a module; at most 60 a function, docstring and signature aside."""
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) else 0 :]
            lines = (node.end_lineno or 0) - first[0].lineno + 1 if first else 0
            assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_everything_exported_exists_and_is_documented() -> None:
    """Each public name can be imported and, where it can carry one, has a docstring."""
    for name in superscopes_tl.__all__:
        thing = getattr(superscopes_tl, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name


def test_changelog_and_citation_name_this_version() -> None:
    """A version without a word to its users is not finished, nor one that is cited as another."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(superscopes_tl.__version__)}\b", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [superscopes_tl.__version__]


def test_nothing_unpickles_or_shows_by_itself() -> None:
    """No pickle in the package, no torch.load but of weights alone, no figure that pops up."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(pickle|\.show\(\))", source), path
        for node in ast.walk(ast.parse(source)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called != "torch.save", path
            if called == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", path
