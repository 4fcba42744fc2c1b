"""The code that reads a cell again gives the same cell."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest

from superscopes_tl import LanguageModel, sweep
from superscopes_tl.experiment import Cell
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.vectors import MappingFamily, in_units_of, random_direction, scale


@pytest.mark.parametrize(
    "mapping", [scale, random_direction(3), in_units_of(40.0)], ids=["scale", "random", "units"]
)
@pytest.mark.parametrize("target_layer", [4, "same"])
def test_the_code_gives_the_same_text(
    mini: LanguageModel, mapping: MappingFamily, target_layer: Any, word_overlap: Any
) -> None:
    """Layers out of order, any mapping of the package, a late target: the text is the same."""
    settings: dict[str, Any] = {
        "layers": (5, 2),
        "kinds": ("mlp_out", "resid_post"),
        "alphas": (1, 6),
        "target_layer": target_layer,
        "mapping": mapping,
    }
    result = sweep(mini, "Alexander the Great", progress=False, scorer=word_overlap, **settings)
    for index in (0, 3, 6):
        row = result.table.iloc[index]
        code = code_for(result, Cell.of(row))
        space: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, space)
        assert space["table"]["text"].iloc[0] == row["text"], code


def test_an_own_mapping_is_named_and_left_to_fill_in(
    mini: LanguageModel, word_overlap: Any
) -> None:
    """A lambda has no source to print: the code has a name in its place and says so."""
    result = sweep(
        mini,
        "Pearl Jam",
        layers=(5,),
        alphas=(2,),
        mapping=lambda alpha: lambda v: alpha * v,
        scorer=word_overlap,
        progress=False,
    )
    code = code_for(result, Cell.of(result.table.iloc[0]))
    compile(code, "code", "exec")
    assert "mapping=my_mapping" in code
    assert "# my_mapping: the sweep's own, <lambda>" in code


def test_the_code_says_what_a_provenance_cannot_hold(
    mini: LanguageModel, word_overlap: Any
) -> None:
    """Models that are not the bundled one may need their path; half precision is not exact."""
    result = sweep(mini, "Pearl Jam", layers=(5,), alphas=(2,), scorer=word_overlap, progress=False)
    assert "# load_model" not in code_for(result, Cell.of(result.table.iloc[0]))
    result.provenance["model"] |= {"name": "my-llama", "dtype": "bfloat16"}
    code = code_for(result, Cell.of(result.table.iloc[0]))
    assert "give the path if the model came from a folder" in code
    assert "in half precision another batch size" in code
    assert "dtype='bfloat16'" in code
