"""The options that several commands share, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import typer

from superscopes_tl.cli.shell import parse_layers
from superscopes_tl.errors import bad_value

Model: TypeAlias = Annotated[
    str,
    typer.Option(help="'mini' (bundled), a fetched model, a directory, a GGUF file, a hub name."),
]
Layers: TypeAlias = Annotated[
    str, typer.Option(help="Source layers, such as 0-5,8. Every layer if empty.")
]
Kinds: TypeAlias = Annotated[
    str, typer.Option(help="resid_pre, attn_out, resid_mid, mlp_out, resid_post.")
]
Alphas: TypeAlias = Annotated[str, typer.Option(help="Amplifiers; 1 is Patchscopes.")]
Token: TypeAlias = Annotated[
    str, typer.Option(help="The token to read: an index, a substring, or 'all'.")
]
Target: TypeAlias = Annotated[
    str, typer.Option(help="Where to patch: 'same' as the source, a layer, or several: 0,3,6.")
]
TargetText: TypeAlias = Annotated[
    str | None,
    typer.Option(help="A text with the placeholder. The paper's, with --chat a question."),
]
Placeholder: TypeAlias = Annotated[str, typer.Option(help="The placeholder's word.")]
Chat: TypeAlias = Annotated[
    bool, typer.Option("--chat", help="Put both prompts as messages in the model's chat template.")
]
Answer: TypeAlias = Annotated[
    str, typer.Option(help="With --chat: how the model's answer begins, such as 'It is'.")
]
MaxNewTokens: TypeAlias = Annotated[
    int | None, typer.Option(help="Longest text. The model's own default, else 10, with --chat 24.")
]
Template: TypeAlias = Annotated[
    str, typer.Option(help="What stands around the source prompt, such as 'Tell me about {}'.")
]
Generate: TypeAlias = Annotated[
    str,
    typer.Option(help="Cells to write out: all, best (one α per site), none (recovered alone)."),
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(help="Cells per batch. Chosen by memory unless given.")
]
ScorerName: TypeAlias = Annotated[
    str, typer.Option(help="A SentenceTransformer. all-MiniLM-L6-v2 unless given.")
]
ScoreOn: TypeAlias = Annotated[
    str, typer.Option(help="The 'description', or as the paper did the whole 'text'.")
]
Controls: TypeAlias = Annotated[
    str, typer.Option(help="Such as random_direction,other_prompt: columns beside each cell.")
]
Backend: TypeAlias = Annotated[str, typer.Option(help="auto, hooked or bridge (faster).")]
DType: TypeAlias = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device: TypeAlias = Annotated[
    str, typer.Option(help="cuda, mps or cpu; the best there is unless given.")
]


def names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_target(text: str) -> Literal["same"] | list[int]:
    """Return the target layer setting.

    Raises:
        ValueError: neither "same" nor layers.
    """
    if text.strip().lower() == "same":
        return "same"
    try:
        return parse_layers(text, "--target-layer")
    except ValueError as error:
        raise bad_value(
            "--target-layer", "'same' or layers such as 0,3,6", text,
            "write for example --target-layer same",
        ) from error  # fmt: skip


def parse_token(text: str) -> Any:
    """Return the position setting: every token, an index or a substring."""
    if text == "all":
        return slice(None)
    try:
        return int(text)
    except ValueError:
        return text


def target_prompt(text: str | None, placeholder: str, answer: str = "", chat: bool = False) -> Any:
    """Return the target prompt; unless given the paper's, or the question for chat models."""
    from superscopes_tl.engine import TargetPrompt, default_target_prompt

    if text is None:
        default = default_target_prompt(None, chat=chat)
        return replace(default, answer=answer) if answer else default
    return TargetPrompt(text, placeholder, answer)


def load(model: str, backend: str, dtype: str = "float32", device: str = "") -> Any:
    """Load a model as the options say."""
    from superscopes_tl.model import load_model

    chosen: Any = backend  # load_model checks it and says what is expected
    return load_model(model, backend=chosen, dtype=dtype, device=device or None)
