"""The `superscopes` command.

1. Each command is a thin layer over a function of the package: it parses, calls, prints. Bad input
   ends with exit code 2; an interrupted sweep saves its finished cells, if a file was given, and
   ends with 130.
2. A command's module is imported when the command is used, for it imports torch: the list of
   commands and the version are printed at once. The list shows the first lines of docstrings, read
   from the source.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

COMMANDS = {
    "sweep": "experiments",
    "check": "models",
    "evaluate": "experiments",
    "replay": "experiments",
    "side-by-side": "neighbours",
    "read-vector": "neighbours",
    "models": "models",
    "fetch": "models",
    "demo": "demonstration",
    "app": "application",
    "bench": "application",
}
"""The module of each command."""

_PASSED_ON: dict[str, Any] = {
    "add_help_option": False,  # the benchmark has its own
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

app = typer.Typer(
    help="Amplify a model's internal activations and let the model say what they mean.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
"""The `superscopes` command, as a typer application."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"superscopes_tl {installed_version('superscopes-tl')}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take the options that stand before the command."""


def command_of(name: str) -> Any:
    """Import a command and return it as typer runs it."""
    from superscopes_tl.cli.options import command

    module = import_module(f"superscopes_tl.cli.{COMMANDS[name]}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    options = _PASSED_ON if name == "bench" else {}
    alone.command(name, **options)(command(getattr(module, _function(name))))
    return typer.main.get_command(alone)


def _function(name: str) -> str:
    return name.replace("-", "_")


def _summary(name: str) -> str:
    """Return a command's docstring without importing its module."""
    source = Path(__file__).with_name(f"{COMMANDS[name]}.py").read_text(encoding="utf-8")
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    function = next(node for node in found if node.name == _function(name))
    return ast.get_docstring(function) or ""


def _register(name: str) -> None:
    """List a command, which is imported once its arguments are parsed."""

    class Later(TyperCommand):
        def make_context(self, *arguments: Any, **extra: Any) -> Any:
            return command_of(name).make_context(*arguments, **extra)

    app.command(name, cls=Later, help=_summary(name))(lambda: None)


for _name in COMMANDS:
    _register(_name)
