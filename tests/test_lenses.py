"""Reading with the unembedding, against plain Hugging Face and closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from superscopes_tl import LanguageModel, capture
from tests.conftest import BACKENDS
from tests.tiny_models import ARCHITECTURES, tiny_hf

Tiny = Callable[[str, str], LanguageModel]

SOURCE = "Red Hot Chili Peppers"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembedding_the_last_block_gives_the_models_logits(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Final norm, W_U and soft cap are the model's own: the logits are plain Hugging Face's."""
    model = tiny(architecture, backend)
    activations = capture(model, SOURCE, kinds="resid_post", layers=(5, 2))
    with torch.no_grad():
        expected = tiny_hf(architecture)(torch.tensor([activations.tokens.ids])).logits[0]
        last = activations["resid_post", 5]
        got = model.decoder.unembed(last)
        alone = model.decoder.unembed(last[3])
        earlier = model.decoder.unembed(activations["resid_post", 2])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected[3], rtol=1e-4, atol=1e-4)
    assert (earlier - expected).abs().max() > 0.1
