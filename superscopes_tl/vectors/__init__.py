"""What is patched and how: sources of v, mapping functions f(v), and ways to write.

The settings of a sweep are values: `Scale()`, `Head(3)`, `AtLayers(0, 3)`. They are equal if their
parameters are, can be sent to other processes, and print as the Python that makes them, which is
also what results call them (`label`). Plain functions of the same shape do as well.
"""

from superscopes_tl.vectors.adapter import ADAPTER_SETTINGS, Adapter
from superscopes_tl.vectors.affine import AffineMap, Mapped, fit_affine, load_maps, save_maps
from superscopes_tl.vectors.amplify import (
    PAPER_MAPPING,
    MappingFamily,
    MappingFunction,
    MeanActivation,
    PlaceholderState,
    RandomDirection,
    ResidMid,
    Scale,
    label,
    random_direction,
    stable_hash,
)
from superscopes_tl.vectors.formats import Arrays, opened
from superscopes_tl.vectors.presets import PRESETS
from superscopes_tl.vectors.sources import (
    Accumulated,
    Head,
    MinusModel,
    PlaceVectors,
    SourceRun,
    Span,
    SumOf,
    Window,
)
from superscopes_tl.vectors.stored import (
    difference_of_means,
    load_vectors,
    mlp_keys,
    mlp_values,
    vector_names,
)
from superscopes_tl.vectors.writes import SELFIE_PROMPT, Add, AtLayers, Both, Interpolate, Write

__all__ = [
    "ADAPTER_SETTINGS",
    "PAPER_MAPPING",
    "PRESETS",
    "SELFIE_PROMPT",
    "Accumulated",
    "Adapter",
    "Add",
    "AffineMap",
    "Arrays",
    "AtLayers",
    "Both",
    "Head",
    "Interpolate",
    "Mapped",
    "MappingFamily",
    "MappingFunction",
    "MeanActivation",
    "MinusModel",
    "PlaceVectors",
    "PlaceholderState",
    "RandomDirection",
    "ResidMid",
    "Scale",
    "SourceRun",
    "Span",
    "SumOf",
    "Window",
    "Write",
    "difference_of_means",
    "fit_affine",
    "label",
    "load_maps",
    "load_vectors",
    "mlp_keys",
    "mlp_values",
    "opened",
    "random_direction",
    "save_maps",
    "stable_hash",
    "vector_names",
]
