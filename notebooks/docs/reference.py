"""The reference, written from the package itself: a page per folder.

1. The names of a folder's page are those of its `__all__`, so a new public name has its entry.
2. Signatures and docstrings are read from the source, by mkdocstrings; nothing is typed twice.
3. The page of the folder `cli` lists the options that `superscopes COMMAND --help` shows.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "superscopes_tl"


@cache
def _package() -> Any:
    return griffe.load(PACKAGE, search_paths=[ROOT])


def faces() -> dict[str, list[str]]:
    """Return the public names of each folder, in the order in which data flows through them."""
    order = re.findall(r'"(\w+)"', re.search(r"_FOLDERS = \((.*?)\)", _source(), re.DOTALL)[1])
    folders = {name: module for name, module in _package().modules.items() if module.exports}
    known = [*(name for name in order if name in folders), *sorted(set(folders) - set(order))]
    return {name: [str(export) for export in folders[name].exports] for name in known}


def home(name: str) -> str:
    """Return the folder that a name of the package's own face comes from, or nothing."""
    return next((folder for folder, names in faces().items() if name in names), "")


def pages() -> dict[str, str]:
    """Return the Markdown of every page of the reference, by its path."""
    found = {f"reference/{name}.md": _folder(name, names) for name, names in faces().items()}
    found["reference/cli.md"] += command_page()
    return {"reference/index.md": _index(), **found}


def _index() -> str:
    names = [str(name) for name in _package().exports if home(str(name))]
    folders = "\n".join(
        f"| [`{name}`]({name}.md) | {_first(_package()[name])} | {len(exports)} |"
        for name, exports in faces().items()
    )
    short = "\n".join(
        f"| [`{name}`]({home(name)}.md#{PACKAGE}.{home(name)}.{name}) | "
        f"{_first(_package()[home(name)][name])} |"
        for name in sorted(names, key=str.lower)
    )
    return (
        f"# Reference\n\nWritten from the docstrings. Shapes stand in the types: "
        '`Float[Tensor, "n d_model"]` is a tensor of n rows.\n\n'
        f"## Usual names\n\n`from {PACKAGE} import ...`:\n\n| name | |\n|---|---|\n{short}\n\n"
        f"## Folders\n\nData flows from top to bottom. Names that are not above are a folder away: "
        f"`from {PACKAGE}.vectors import Head`.\n\n"
        f"| folder | what it is for | names |\n|---|---|---|\n{folders}\n\n"
        "The options of the command `superscopes` stand under [cli](cli.md).\n"
    )


def _folder(folder: str, names: list[str]) -> str:
    """Return the page of one folder."""
    module = _package()[folder]
    rows = "\n".join(
        f"| [`{name}`](#{PACKAGE}.{folder}.{name}) | {_first(module[name])} |" for name in names
    )
    entries = "\n\n".join(f"::: {PACKAGE}.{folder}.{name}" for name in names)
    about = module.docstring.value if module.docstring else ""
    return f"# {folder}\n\n{about}\n\n| name | |\n|---|---|\n{rows}\n\n{entries}\n"


def _first(thing: Any) -> str:
    """Return the first sentence of a docstring, as a cell of a table."""
    text = thing.docstring.value if thing.docstring else ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0].rstrip(":").replace("|", r"\|")


def _source() -> str:
    return (ROOT / PACKAGE / "__init__.py").read_text("utf-8")


def command_page() -> str:
    """Return what the `superscopes` command can do, with every option."""
    from superscopes_tl.cli.main import COMMANDS, command_of

    parts = ["\n`superscopes COMMAND --help` shows these, too."]
    for name in COMMANDS:
        command: Any = command_of(name)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["superscopes", name, *(p.name.upper() for p in arguments)])
        parts.append(f"## superscopes {name}\n\n{command.help}\n\n```bash\n{usage}\n```")
        rows = [_option(p) for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            parts.append("| option | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _option(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    name = parameter.name.upper() if argument else " ".join([*parameter.opts])
    value = parameter.default
    default = "" if value is None or callable(value) or value in ("", False, ()) else f"`{value}`"
    text = " ".join((getattr(parameter, "help", "") or "").split())
    return f"| `{name}` | {default} | {text} |".replace("<", "&lt;")
