"""Where pretrained weights come from: packaged models, GGUF files, directories, the hub."""

from superscopes_tl.weights.gguf import read_header as read_gguf_header
from superscopes_tl.weights.library_output import quiet
from superscopes_tl.weights.packaged import (
    PACKAGED,
    PackagedModel,
    fetch,
    find_packaged,
    megabytes,
    remove_packaged,
)
from superscopes_tl.weights.pretrained import (
    Pretrained,
    absolute,
    check_hugging_face,
    load_pretrained,
)

__all__ = [
    "PACKAGED",
    "PackagedModel",
    "Pretrained",
    "absolute",
    "check_hugging_face",
    "fetch",
    "find_packaged",
    "load_pretrained",
    "megabytes",
    "quiet",
    "read_gguf_header",
    "remove_packaged",
]
