"""The method's invariants for every model, prompt, layer and α, as properties.

Examples are sampled with a fixed seed. Models are as small as possible; their texts are compared
only where no token was a near tie.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from superscopes_tl import (
    LanguageModel,
    Patch,
    PatchedGenerator,
    SweepResult,
    TargetPrompt,
    capture,
    load_model,
    sweep,
)
from superscopes_tl.vectors import Scale
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.hooks import hooks_on
from tests.support.same import same_text
from tests.support.scorers import half
from tests.support.tiny_models import random_hf, tiny_tokenizer

CLEAR = 1e-3
"""A margin above this, in logits, does not depend on the order of sums."""

TARGET = TargetPrompt("Syria: a land, x")
KINDS = ("resid_mid", "mlp_out", "resid_post")
EXAMPLES = 25

models = st.builds(
    lambda *parts: parts,
    st.sampled_from(["llama", "gpt2", "qwen2", "gemma2"]),
    st.sampled_from([2, 3, 4]),  # layers
    st.sampled_from([(16, 2), (24, 3), (32, 4)]),  # width, heads
    st.sampled_from(BACKENDS),
)
prompts = st.text(min_size=1, max_size=8).filter(lambda text: text.strip())
alphas = st.floats(-20, 20).map(lambda alpha: round(alpha, 3))
shares = st.floats(0, 1, exclude_max=True)
"""Where in a list: a model's layers are as many as it has."""

by_chance = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@cache
def plain(chosen: tuple[str, int, tuple[int, int], str]) -> Any:
    """Return a Hugging Face model of random weights."""
    architecture, n_layers, (width, heads), _ = chosen
    return random_hf(architecture, n_layers=n_layers, width=width, heads=heads)


@cache
def small(chosen: tuple[str, int, tuple[int, int], str]) -> LanguageModel:
    """Return the same model for the package."""
    architecture, *_, backend = chosen
    if architecture == "gemma2" and backend == "hooked":
        backend = "bridge"  # HookedTransformer loads Gemma by hub name alone
    return load_model(copy.deepcopy(plain(chosen)), tiny_tokenizer(), backend=backend)


@cache
def generator(chosen: Any, batch_size: int | None = None) -> PatchedGenerator:
    """Return a generator of three tokens."""
    return PatchedGenerator(small(chosen), TARGET, max_new_tokens=3, batch_size=batch_size)


def at(share: float, n: int) -> int:
    """Return the place in a list of `n` that a share points to."""
    return int(share * n)


def vector(model: LanguageModel, seed: int) -> torch.Tensor:
    """Return a random vector."""
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))


def swept(chosen: Any, prompt: str, **changes: Any) -> SweepResult:
    """Return a sweep of two tokens."""
    given = {"target_prompt": TARGET, "max_new_tokens": 2, "progress": False, "scorer": half}
    return sweep(small(chosen), prompt, **given, **changes)


@by_chance
@given(models, shares)
def test_a_block_output_in_its_own_place_changes_nothing(chosen: Any, share: float) -> None:
    """Patched with itself at α = 1, the placeholder's text is the unpatched one."""
    model, writer = small(chosen), generator(chosen)
    layer = at(share, model.n_layers)
    own = capture(model, TARGET.text, kinds="resid_post", layers=[layer])
    patch = Patch(Scale()(1.0)(own["resid_post", layer][writer.target.positions[0]]), layer)
    assert same_text(writer.generate([patch])[0], writer.unpatched(), CLEAR)


@by_chance
@given(models, prompts, shares, st.sampled_from(KINDS), alphas.map(abs).filter(lambda a: a > 0.05))
def test_at_the_last_layer_every_positive_alpha_has_the_same_text(
    chosen: Any, prompt: str, share: float, kind: str, alpha: float
) -> None:
    """No block follows, and the final norm removes the length."""
    last = small(chosen).n_layers - 1
    table = swept(
        chosen, prompt, kinds=kind, layers=at(share, last + 1), target_layer=last,
        alphas=(1.0, alpha),
    ).table  # fmt: skip
    if table["margin"].min() > CLEAR:
        assert table["text"].nunique() == 1


@by_chance
@given(
    models,
    st.lists(st.lists(st.integers(2, 299), min_size=2, max_size=5), min_size=1, max_size=3),
    st.lists(st.tuples(shares, st.integers(0, 2), alphas), min_size=2, max_size=9),
    st.sampled_from([1, 3, 64]),
)
def test_known_texts_are_as_likely_as_in_plain_hugging_face(
    chosen: Any, texts: list[list[int]], rows: list[tuple[float, int, float]], batch_size: int
) -> None:
    """Whatever target layers and texts share a batch: within 1e-4 of each token's nats."""
    model, hf = small(chosen), plain(chosen)
    writer = PatchedGenerator(model, TARGET, batch_size=batch_size)
    ids, position = list(writer.target.tokens.ids), writer.target.positions
    patches = [
        Patch(alpha * vector(model, number), at(share, model.n_layers))
        for number, (share, _, alpha) in enumerate(rows)
    ]
    several = [texts[which % len(texts)] for _, which, _ in rows]
    for patch, text, found in zip(
        patches, several, writer.log_probabilities(patches, several), strict=True
    ):
        place = (position, patch.vector, patch.target_layer)
        expected = plain_hf.log_probability(hf, ids, text, place)  # type: ignore[arg-type]
        assert abs(sum(found) - expected) <= 1e-4 * len(text) * max(1.0, abs(expected) / 10)


@by_chance
@given(models, st.randoms(use_true_random=False), st.integers(2, 7), st.sampled_from([1, 2, 3]))
def test_a_text_does_not_depend_on_its_batch(
    chosen: Any, random: Any, count: int, batch_size: int
) -> None:
    """Each patch has the same text alone, in another order and in batches of another size."""
    model = small(chosen)
    patches = [
        Patch(random.uniform(-9, 9) * vector(model, seed), random.randrange(model.n_layers))
        for seed in range(count)
    ]
    together = generator(chosen).generate(patches)
    order = random.sample(range(count), count)
    batches = generator(chosen, batch_size).generate([patches[i] for i in order])
    alone = generator(chosen).generate([patches[order[0]]])[0]
    assert same_text(alone, together[order[0]], CLEAR)
    for place, i in enumerate(order):
        assert same_text(batches[place], together[i], CLEAR)


@by_chance
@given(models, alphas, st.floats(0.01, 100), shares, st.integers(0, 99))
def test_only_the_product_of_alpha_and_length_counts(
    chosen: Any, alpha: float, factor: float, share: float, seed: int
) -> None:
    """α·(c·v) and (α·c)·v are one patch."""
    model = small(chosen)
    layer, v = at(share, model.n_layers), vector(model, seed)
    patches = [Patch(Scale()(alpha)(factor * v), layer), Patch(Scale()(alpha * factor)(v), layer)]
    one, other = generator(chosen).generate(patches)
    likely = generator(chosen).next_token(patches)
    torch.testing.assert_close(likely[0], likely[1], rtol=1e-3, atol=1e-3)
    assert same_text(one, other, CLEAR)


@by_chance
@given(models, prompts, shares)
def test_a_block_output_is_its_middle_plus_its_mlp(chosen: Any, prompt: str, share: float) -> None:
    """resid_post = resid_mid + mlp_out at every token."""
    model = small(chosen)
    layer = at(share, model.n_layers)
    found = capture(model, prompt, kinds=KINDS, layers=[layer])
    total = found["resid_mid", layer] + found["mlp_out", layer]
    torch.testing.assert_close(found["resid_post", layer], total, rtol=1e-5, atol=1e-5)


@by_chance
@given(
    models,
    prompts,
    st.permutations(KINDS).flatmap(lambda kinds: st.integers(1, 3).map(lambda n: kinds[:n])),
    st.permutations([1, 0]),
    st.one_of(st.just("same"), st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True)),
    st.lists(alphas, min_size=1, max_size=3, unique=True),
    st.sampled_from([1, 2, 5]),
)
def test_rows_are_the_cells_in_the_order_of_the_settings(
    chosen: Any, prompt: str, kinds: Any, layers: Any, into: Any, scales: Any, batch_size: int
) -> None:
    """One row each, with finite norms; afterwards the model carries no hook."""
    model = small(chosen)
    before = hooks_on(model)
    table = swept(
        chosen, prompt, kinds=kinds, layers=layers, target_layer=into, alphas=scales,
        batch_size=batch_size,
    ).table  # fmt: skip
    expected = [
        (kind, layer, target, alpha)
        for kind in kinds
        for layer in layers
        for target in ([layer] if into == "same" else into)
        for alpha in scales
    ]
    columns = ["kind", "source_layer", "target_layer", "alpha"]
    assert list(table[columns].itertuples(index=False, name=None)) == expected
    assert np.isfinite(table[["vector_norm", "norm_ratio"]]).all(axis=None)
    assert hooks_on(model) == before
