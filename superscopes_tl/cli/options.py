"""What the commands share: their options, how these are parsed, and how a command ends.

1. A group of options is a frozen dataclass: `Loading` (how to load a model), `Sampling` (what the
   target model generates) and `Cells` (which cells of a sweep to compute).
2. `command` turns each field of such a group into an option. Bad input ends with exit code 2 and
   one line; errors of the system end with 1.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from superscopes_tl.engine import TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_value, check_choice
from superscopes_tl.evaluation import PromptFile, load_prompts
from superscopes_tl.model import LanguageModel, load_model
from superscopes_tl.vectors import PRESETS

# Generated text is printed as it is: a `:x:` in it is no emoji, a `[b]` no markup.
OUTPUT = Console(emoji=False)
ERRORS = Console(stderr=True, emoji=False)

Model: TypeAlias = Annotated[
    str, typer.Option(help="A fetched model such as smollm2, a directory, a GGUF file, a hub name.")
]
Controls: TypeAlias = Annotated[str, typer.Option(help="Such as random_direction,other_prompt.")]
RunFile: TypeAlias = Annotated[Path | None, typer.Option(help="Save to this run file (.zip).")]
Page: TypeAlias = Annotated[Path | None, typer.Option(help="Write figures to this page.")]
Backend: TypeAlias = Annotated[str, typer.Option(help="auto, hooked or bridge (faster).")]
Scorer: TypeAlias = Annotated[
    str, typer.Option(help="A SentenceTransformer; default: the paper's.")
]
ScoreOn: TypeAlias = Annotated[str, typer.Option(help="'description' or the whole 'text'.")]
Json: TypeAlias = Annotated[Path | None, typer.Option(help="Write the numbers to this file.")]


@dataclass(frozen=True)
class Loading:
    """How to load a model."""

    backend: Backend = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, typer.Option(help="cuda, mps or cpu; default: cuda, else cpu.")] = ""

    def load(self, model: str) -> LanguageModel:
        """Return the model of this name."""
        backend: Any = self.backend  # load_model checks it
        return load_model(model, backend=backend, dtype=self.dtype, device=self.device or None)


@dataclass(frozen=True)
class FastLoading(Loading):
    """How to load a model; through the bridge by default."""

    backend: Backend = "bridge"


@dataclass(frozen=True)
class Sampling:
    """The target prompt, and how much the target model generates."""

    target_prompt: Annotated[
        str | None,
        typer.Option(help="Text with a placeholder. Defaults to the paper's; in chat a question."),
    ] = None
    placeholder: Annotated[str, typer.Option(help="The placeholder's word.")] = "x"
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest generation. Defaults to the model's, else 10, or 24 in chat."),
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Cells per batch; default: what fits.")] = (
        None
    )
    scorer: Scorer = ""

    def settings(self) -> dict[str, Any]:
        """Return them as settings of a sweep."""
        return {
            "target_prompt": self.target(),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "scorer": self.scorer or None,
        }

    def target(self, answer: str = "", *, chat: bool = False) -> TargetPrompt:
        """Return the target prompt."""
        if self.target_prompt is not None:
            return TargetPrompt(self.target_prompt, self.placeholder, answer)
        default = default_target_prompt(None, chat=chat)
        return replace(default, answer=answer) if answer else default


@dataclass(frozen=True)
class Cells(Sampling):
    """Which cells a sweep or an evaluation computes."""

    layers: Annotated[str, typer.Option(help="Such as 0-5,8; default: all, or the section's.")] = ""
    kinds: Annotated[str, typer.Option(help="resid_pre,attn_out,resid_mid,mlp_out,resid_post.")] = (
        ""
    )
    alphas: Annotated[
        str, typer.Option(help="Amplifiers, such as 1,3,9; default: the paper's.")
    ] = ""
    token: Annotated[str, typer.Option(help="Source token: an index, a substring or 'all'.")] = "-1"
    target_layer: Annotated[
        str, typer.Option("--target-layer", "--target", help="Such as 0,3,6 or embed; or 'same'.")
    ] = "same"
    source_template: Annotated[str, typer.Option(help="Such as 'Tell me about {}'.")] = "{}"
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False
    answer: Annotated[str, typer.Option(help="With --chat: the answer begins so, 'It is'.")] = ""
    unit: Annotated[
        str, typer.Option(help="α = 1 is the 'vector' as it is, or the norm of the 'residual'.")
    ] = "vector"
    others: Annotated[int, typer.Option(help="Vectors that the control other_prompt averages.")] = 3
    generate: Annotated[str, typer.Option(help="all, best (one α per site) or none.")] = "all"
    score_on: ScoreOn = ""
    preset: Annotated[str, typer.Option(help=f"As a method does it: {', '.join(PRESETS)}.")] = ""

    def settings(self) -> dict[str, Any]:
        """Return them as settings; what is left empty keeps its default, or is the preset's."""
        own = self._settings()
        if not self.preset:
            return own
        usual = Cells(chat=self.chat, answer=self.answer)._settings()
        preset = PRESETS[check_choice("--preset", self.preset, PRESETS)]
        left = {n: value for n, value in preset.items() if own.get(n) == usual.get(n)}
        if self.answer and "target_prompt" in left:
            left["target_prompt"] = replace(left["target_prompt"], answer=self.answer)
        return own | left

    def _settings(self) -> dict[str, Any]:
        given = {
            "layers": parse_layers(self.layers, "--layers") if self.layers else None,
            "kinds": parse_names(self.kinds),
            "alphas": parse_numbers(self.alphas, "--alphas"),
            "score_on": self.score_on,
        }
        return {
            **super().settings(),
            **{name: value for name, value in given.items() if value},
            "target_prompt": self.target(self.answer, chat=self.chat),
            "positions": parse_token(self.token),
            "target_layer": parse_targets(self.target_layer),
            "source_template": self.source_template,
            "chat": self.chat,
            "generate": self.generate,
            "unit": self.unit,
            "others": self.others,
        }


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function as a typer command: dataclass fields as options, errors as exit codes."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        if (group := groups.get(parameter.name)) is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        types = get_type_hints(group, include_extras=True)
        parameters += [
            parameter.replace(name=f.name, default=f.default, annotation=types[f.name])
            for f in fields(group)
        ]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        try:
            function(**given)
        except (ValueError, TypeError) as error:
            ERRORS.print(f"Error: {error}", style="red", markup=False)
            raise typer.Exit(2) from error
        except (OSError, MemoryError) as error:
            ERRORS.print(f"Error: {type(error).__name__}: {error}", style="red", markup=False)
            raise typer.Exit(1) from error

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def table_of(
    title: str, headers: Iterable[str], rows: Iterable[Iterable[object]], caption: str = ""
) -> Table:
    """Return a table of plain text; a cell that is a `Text` keeps its own style."""
    shown = Table(title=Text(title), caption=caption, title_justify="left", caption_justify="left")
    for header in headers:
        shown.add_column(Text(header), overflow="fold")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return shown


def say(line: str) -> None:
    """Print a line verbatim: not wrapped, coloured or interpreted."""
    OUTPUT.print(line, markup=False, highlight=False, soft_wrap=True)


def parse_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_numbers(text: str, option: str) -> list[float]:
    """Return the numbers of a comma-separated list."""
    try:
        return [float(part) for part in parse_names(text)]
    except ValueError as error:
        raise bad_value(option, "numbers such as 1,3,6", text, "separate by commas") from error


def parse_layers(text: str, option: str) -> list[int]:
    """Return the layers (or other whole numbers) of a list such as `0-5,8`."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)-(\d+)|(-?\d+)", part.strip())
        first, last, single = found.groups() if found else ("1", "0", None)
        chosen = range(int(single or first), int(single or last) + 1)
        if not chosen:
            raise bad_value(option, "numbers such as 0-5,8", text, "write ranges from low to high")
        layers += chosen
    return layers


def parse_targets(text: str) -> Any:
    """Return target layers such as `embed,0-5`, or "same"."""
    if text.strip().lower() == "same":
        return "same"
    parts = [part.strip() for part in text.split(",")]
    several = [["embed"] if p == "embed" else parse_layers(p, "--target-layer") for p in parts]
    return [layer for some in several for layer in some]


def parse_token(text: str) -> Any:
    """Return the source positions: every token, an index or a substring."""
    if text == "all":
        return slice(None)
    try:
        return int(text)
    except ValueError:
        return text


def read_prompts(
    path: Path, option: str, column: str | None = None, reference_column: str | None = None
) -> PromptFile:
    """Return the prompts of a file, and say what was left out."""
    try:
        found = load_prompts(path, column=column, reference_column=reference_column)
    except FileNotFoundError as error:
        expected = "a text file with one entry per line, or a table"
        raise bad_value(option, expected, f"{path} (no such file)", "correct the path") from error
    for note in found.notes:
        say(f"{path.name}: {note}")
    return found


def check_folders(**paths: Path | None) -> None:
    """Raise before a long run unless its files, by the names of their options, can be written."""
    for option, path in paths.items():
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            expected = "a file in a folder that exists"
            raise bad_value(f"--{option}", expected, str(path), f"mkdir -p {path.parent}")
