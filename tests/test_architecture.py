"""The shape of the package: data flows one way, modules stay small, the top level is clean."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import superscopes_tl

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "superscopes_tl"
FLOW = """
    errors files untrusted vector_files gguf_files sites keys_values backends verification
    models chat repairs conversion packaged mini loading tokens prompts capture directions
    amplify lenses tuned_lens memory decoding patches patching own_words interventions scoring
    contextualization doubts results selectors metric significance comparison replay config
    selfie replacements causal plan sources affine affine_fit cells controls recovery
    readability next_token sweep vectors refine guided evaluation shares workers spread evaluate
    plots figures lens_figures causal_figures paper_figures grid_figures metric_figures
    readability_figure neighbours snapshot export background relevancy details plotly_widget
    live markup explorer_view explorer_config explorer_panel explorer_desk explorer serve demo
    shell cli_options cli_neighbours cli_experiments cli_models cli
"""
ORDER = FLOW.split()
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def _imports(path: Path) -> set[str]:
    """Return the package's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("superscopes_tl."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """A module imports only modules that come before it in the flow of data."""
    assert module in ORDER, f"say where {module} stands in the flow"
    later = ORDER[ORDER.index(module) :]
    assert not _imports(PACKAGE / f"{module}.py") & set(later)


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


def test_importing_the_package_loads_no_model_library_that_it_may_not_need() -> None:
    """TransformerLens and sentence-transformers are slow to import: only their users pay."""
    code = (
        "import sys, superscopes_tl;"
        "print([m for m in ('transformer_lens', 'sentence_transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_changelog_names_this_version() -> None:
    """A version without a word to its users is not finished."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(superscopes_tl.__version__)}\b", changelog, re.MULTILINE)


def test_nothing_unpickles_or_shows_by_itself() -> None:
    """No pickle in the package, no figure that pops up."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(pickle|torch\.load\b|torch\.save\b|\.show\(\))", source), path
