"""What tells a good α without generating a text, and without knowing the source prompt.

1. Take the target prompt's own greedy continuation, with nothing patched: it knows no answer.
2. Run prompt and continuation once with every cell's patch, a whole batch in one forward pass, and
   keep the block outputs that the signals need.
3. *Self-similarity*: S(α) = cos(r(α), v) - cos(r(0), v), where r is the residual stream of a late
   layer one token after the placeholder (at the placeholder itself it holds the vector anyway), and
   r(0) that of the unpatched prompt.
4. *First entropy*: H(α), the entropy of the first token of the description, minus its unpatched
   value.
5. *Dose*: the 95th percentile, over the tokens of the continuation, of KL(p_α || p_0).

S and H are those of self-explaining SAE features (Kharlapenko et al. 2024,
https://www.alignmentforum.org/posts/8ev6coxChSWcxCDy8/self-explaining-sae-features). The dose is
that of iso-KL steering calibration (https://github.com/wassname/isokl_steering_calibration).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import Patch, PatchedGenerator, crop_description, no_patch
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepPlan, make_patches
from superscopes_tl.model import Decoder, check_layers

PROBE_DEPTH = 0.9
"""Where S is measured, as a share of the layers: the authors took layer 16 of Gemma 2B's 18."""
DOSE_QUANTILE = 0.95
LOGITS = 2**23
"""How many logits are made at a time."""


def alpha_signals(
    plans: SweepPlan | Iterable[SweepPlan], *, probe_layer: int | None = None
) -> pd.DataFrame:
    """Return the signals of every cell of a plan, or of several that share a target prompt.

    The cost is that of one forward pass per batch of cells, whatever the length of the text.

    Example:
        >>> result = sweep(load_model(), "Paris", generate="none")  # doctest: +SKIP
        >>> table = result.table.merge(alpha_signals(result.plan))  # doctest: +SKIP

    Args:
        plans: of a `SweepResult` (`plan`), or from `plan_sweep` and `SweepPlan.at_prompt`.
        probe_layer: where S is measured, above the target layers: what is patched reaches no later
            token before; defaults to nine tenths of the depth. Of cells that are patched there or
            above it S is NaN.

    Returns:
        One row per cell, with `prompt`, the columns of its `Cell`, `mapping`, and

        - `self_similarity`, S. v is the vector that α = 1 patches; of several the mean;
        - `first_entropy`, H, in nats;
        - `kl_unpatched`, the dose, in nats.

        A table of the same plans joins on what the two have in common: `table.merge(signals)`.

    Raises:
        ValueError: no plans, plans that do not share the generator, α on logits (which leaves the
            residual stream as it is), a target prompt after which the model writes nothing, a layer
            out of range, or a model whose logits are not made by its unembedding alone.
    """
    several = [plans] if isinstance(plans, SweepPlan) else list(plans)
    generator = _checked(several)
    model = generator.model
    probe = round(PROBE_DEPTH * model.n_layers) if probe_layer is None else probe_layer
    (probe,) = check_layers(probe, model.n_layers, "probe_layer")
    text = generator.unpatched().token_ids
    if not text:
        fix = "try another target prompt"
        raise bad_value("target_prompt", "a prompt that the model continues", "no text", fix)
    patches, vectors = zip(*chain(*map(_patches_and_vectors, several)), strict=True)
    prompt = generator.target.tokens.ids
    last = model.n_layers - 1
    places = [
        (probe, generator.target.positions[-1] + 1),
        *((last, len(prompt) - 1 + step) for step in range(len(text))),
    ]
    states = generator.residuals([no_patch(model), *patches], text, places)
    similar = torch.cosine_similarity(states[1:, 0], torch.stack(vectors), dim=-1)
    similar -= torch.cosine_similarity(states[:1, 0], torch.stack(vectors), dim=-1)
    first = _first_of_description(generator, text)
    entropy, dose = _entropy_and_dose(model.decoder, states[:, 1:], first)
    cells = [(plan, cell) for plan in several for cell in plan.all_cells]
    similar[[cell.target_layer >= probe for _, cell in cells]] = torch.nan  # not 0: not measured
    rows = [
        {"prompt": plan.source.text, **asdict(cell), "mapping": plan.mapping_name}
        for plan, cell in cells
    ]
    measured = {
        "self_similarity": similar.tolist(),
        "first_entropy": (entropy[1:] - entropy[0]).tolist(),
        "kl_unpatched": dose[1:].tolist(),
    }
    return pd.DataFrame(rows).assign(**measured)


def _checked(plans: Sequence[SweepPlan]) -> PatchedGenerator:
    """Return the generator that all plans share."""
    if not plans or any(plan.generator is not plans[0].generator for plan in plans):
        fix = "make the others from the first: plan.at_prompt(name)"
        raise bad_value("plans", "plans that share one generator", f"{len(plans)} plans", fix)
    if any(plan.config.guide == "logits" for plan in plans):
        fix = "leave out guide='logits', or rank by recovered"
        raise bad_value("guide", "α that acts on the vector", "logits", fix)
    return plans[0].generator


def _patches_and_vectors(plan: SweepPlan) -> list[tuple[Patch, Float[Tensor, " d_model"]]]:
    """Return every cell's patch, and the vector that α = 1 patches there."""
    wide = plan.with_settings(alphas=tuple(dict.fromkeys((1.0, *plan.alphas))))
    wide = wide.only(wide.all_cells)  # the source prompt is read once for both
    made = dict(zip(wide.cells, make_patches(wide), strict=True))
    found = []
    for cell in plan.all_cells:
        vector = made[replace(cell, alpha=1.0)].vector
        found.append((made[cell], vector.mean(dim=0) if vector.ndim > 1 else vector))
    return found


def _first_of_description(generator: PatchedGenerator, text: Sequence[int]) -> int:
    """Return which token of a text is the first of its description; 0 without one."""
    ends = range(len(text))
    return next((n for n in ends if crop_description(generator.text_of(text[: n + 1]))), 0)


def _entropy_and_dose(
    decoder: Decoder, states: Float[Tensor, "rows steps d_model"], first: int
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the entropy at the step `first`, and the dose of every row against row 0."""
    with torch.no_grad():
        unpatched = decoder.unembed(states[0]).log_softmax(dim=-1)
        size = max(1, LOGITS // unpatched.numel())
        entropies, doses = [], []
        for some in torch.split(states, size):
            likely = decoder.unembed(some).log_softmax(dim=-1)
            share = likely.exp()
            entropies.append(-(share[:, first] * likely[:, first]).sum(dim=-1).cpu())
            divergence = (share * (likely - unpatched)).sum(dim=-1).clamp_min(0)
            doses.append(divergence.float().quantile(DOSE_QUANTILE, dim=-1).cpu())
    return torch.cat(entropies), torch.cat(doses)
