"""The language model: loading, tokens, positions, hook points, and decoding with a KV cache."""

from superscopes_tl.model.chat import check_answer
from superscopes_tl.model.decoder import Decoder, Hook, first_block_input, state_of
from superscopes_tl.model.language_model import LanguageModel
from superscopes_tl.model.load import DEFAULT_MODEL, device_of, load_model
from superscopes_tl.model.sites import (
    EMBED,
    KINDS,
    PAPER_KINDS,
    HookKind,
    PatchedLayer,
    Site,
    check_layers,
    hook_name,
    layer_name,
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
    "DEFAULT_MODEL",
    "EMBED",
    "KINDS",
    "PAPER_KINDS",
    "Decoder",
    "Hook",
    "HookKind",
    "LanguageModel",
    "PatchedLayer",
    "Position",
    "Positions",
    "Site",
    "TokenizedText",
    "check_answer",
    "check_layers",
    "check_template",
    "check_text",
    "covering",
    "device_of",
    "first_block_input",
    "hook_name",
    "layer_name",
    "load_model",
    "named_positions",
    "resolve_positions",
    "state_of",
    "tokenize",
]
