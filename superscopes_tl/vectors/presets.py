"""Strengths and places by the name of the method that writes so: settings of a sweep.

    sweep(model, prompt, **PRESETS["oracle"])

1. `superscopes`: replace by α·v, with the paper's grid of α (section 5.1).
2. `patchscopes`: replace by v itself, α = 1 (Ghandeharioun et al. 2024, section 3).
3. `selfie`: SelfIE (Chen et al. 2024): mix with the old state at five placeholders, after block 0,
   (1 − α)·old + α·v; its code has α = 1, which replaces the state.
4. `oracle`: activation oracles (arXiv 2512.15674): add to the output of block 1, as long as what is
   there, h' = h + c·‖h‖·v/‖v‖ with c = 1. The oracle itself is a fine-tuned model, to be passed as
   `target_model`; of several placeholders ‖h‖ is their mean.
5. `self-explaining`: self-explaining features (Kharlapenko et al. 2024): replace the output of
   block 2 at every placeholder by a multiple of the direction. Its grid is 0 to 200 times a unit
   vector; here it is geometric, in norms of what is replaced, which suits any model.

A preset says how strongly a vector is written and where. What it does not say stays the default:
`{**PRESETS["oracle"], "alphas": (0.5, 1, 2)}` changes one setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from superscopes_tl.engine import PAPER_ALPHAS
from superscopes_tl.vectors.writes import SELFIE_PROMPT, Add, Interpolate

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "superscopes": {"alphas": PAPER_ALPHAS},
        "patchscopes": {"alphas": (1,)},
        "selfie": {
            "target_prompt": SELFIE_PROMPT,
            "write": Interpolate(),
            "alphas": (0.25, 0.5, 0.75, 1),
            "target_layer": 0,
        },
        "oracle": {"write": Add(), "unit": "residual", "alphas": (1,), "target_layer": 1},
        "self-explaining": {
            "unit": "residual",
            "alphas": (0.25, 0.5, 1, 2, 4, 8),
            "target_layer": 2,
        },
    }
)
"""Settings of `SweepConfig` by the name of the method."""
