"""The language model: loading, text and tokens, positions, hook points, and its KV cache."""

from superscopes_tl.model.chat import check_answer
from superscopes_tl.model.conversion import quiet
from superscopes_tl.model.language_model import Hook, LanguageModel
from superscopes_tl.model.load import BUNDLED_MODEL, DEFAULT_MODEL, absolute, load_model
from superscopes_tl.model.packaged import (
    PACKAGED,
    fetch,
    listing,
    megabytes,
    packaged_model,
    remove_packaged,
)
from superscopes_tl.model.sites import (
    KINDS,
    PAPER_KINDS,
    HookKind,
    Site,
    check_kinds,
    check_layers,
    hook_name,
)
from superscopes_tl.model.text import (
    Position,
    Positions,
    TokenizedText,
    check_template,
    check_text,
    covering,
    named_positions,
    resolve_positions,
    tokenize,
)

__all__ = [
    "BUNDLED_MODEL",
    "DEFAULT_MODEL",
    "KINDS",
    "PACKAGED",
    "PAPER_KINDS",
    "Hook",
    "HookKind",
    "LanguageModel",
    "Position",
    "Positions",
    "Site",
    "TokenizedText",
    "absolute",
    "check_answer",
    "check_kinds",
    "check_layers",
    "check_template",
    "check_text",
    "covering",
    "fetch",
    "hook_name",
    "listing",
    "load_model",
    "megabytes",
    "named_positions",
    "packaged_model",
    "quiet",
    "remove_packaged",
    "resolve_positions",
    "tokenize",
]
