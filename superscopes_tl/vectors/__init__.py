"""What is patched and how: sources of v, mapping functions f(v), and ways to write."""

from superscopes_tl.vectors.affine import AffineMap, load_maps, mapped, save_maps
from superscopes_tl.vectors.affine_fit import fit_affine
from superscopes_tl.vectors.amplify import (
    PAPER_MAPPING,
    MappingFamily,
    MappingFunction,
    family_name,
    in_units_of,
    random_direction,
    scale,
)
from superscopes_tl.vectors.directions import difference_of_means, mlp_keys, mlp_values
from superscopes_tl.vectors.guided import mean_activation, placeholder_state, resid_mid
from superscopes_tl.vectors.protocols import PlaceVectors, SourceRun, Write
from superscopes_tl.vectors.sources import accumulated, head, sum_of, window
from superscopes_tl.vectors.stored import load_vectors
from superscopes_tl.vectors.writes import SELFIE_PROMPT, add, at_layers, both, interpolate

__all__ = [
    "PAPER_MAPPING",
    "SELFIE_PROMPT",
    "AffineMap",
    "MappingFamily",
    "MappingFunction",
    "PlaceVectors",
    "SourceRun",
    "Write",
    "accumulated",
    "add",
    "at_layers",
    "both",
    "difference_of_means",
    "family_name",
    "fit_affine",
    "head",
    "in_units_of",
    "interpolate",
    "load_maps",
    "load_vectors",
    "mapped",
    "mean_activation",
    "mlp_keys",
    "mlp_values",
    "placeholder_state",
    "random_direction",
    "resid_mid",
    "save_maps",
    "scale",
    "sum_of",
    "window",
]
