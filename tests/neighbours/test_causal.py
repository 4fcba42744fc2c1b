"""Effects of ablating and restoring sites, against plain Hugging Face."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from superscopes_tl import (
    DESCRIPTION_PROMPT,
    LanguageModel,
    Site,
    TargetPrompt,
    capture,
    load_model,
    sweep,
)
from superscopes_tl.engine import Run
from superscopes_tl.model import tokenize
from superscopes_tl.neighbours import (
    Amplified,
    Noise,
    OtherTokens,
    Resampled,
    Without,
    beside,
    causal_effects,
    causal_trace,
)
from superscopes_tl.scores import Contains
from superscopes_tl.vectors import Head, MeanActivation, RandomDirection
from tests.conftest import BACKENDS
from tests.support.plain_hf import blocks_of, mlp_branch, tensor_of
from tests.support.same import ROUNDING
from tests.support.tiny_models import tiny_hf

PROMPT = "Syria: Country in the Middle East, Red Hot Chili Peppers"
OTHER = "Syria: American band in the Middle rock, Hot Red Chili"
LAYERS = (5, 2)

Tiny = Callable[[str, str], LanguageModel]
Writes = Mapping[Site, torch.Tensor]


def _attention_branch(block: Any) -> Any:
    if type(block).__name__.startswith("Gemma2"):
        return block.post_attention_layernorm
    return next(
        getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name)
    )


def _mlp_of(block: Any, middle: torch.Tensor) -> torch.Tensor:
    """Return what the MLP adds to a given residual stream."""
    if type(block).__name__.startswith("Gemma2"):
        normed = block.mlp(block.pre_feedforward_layernorm(middle))
        return block.post_feedforward_layernorm(normed)
    norm = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
    return block.mlp(norm(middle))


@contextlib.contextmanager
def _written(hf: Any, writes: Writes) -> Iterator[None]:
    """Write the vectors by hooks on the model's own modules."""
    handles = []
    for site, vector in writes.items():
        block = blocks_of(hf)[site.layer]

        def before(m: Any, inputs: Any, site: Site = site, v: Any = vector) -> Any:
            stream = inputs[0].clone()
            stream[0, site.position] = v
            return (stream, *inputs[1:])

        def after(m: Any, i: Any, output: Any, site: Site = site, v: Any = vector) -> Any:
            stream = tensor_of(output).clone()
            # After the middle comes the MLP of that very vector: a closed form of the block.
            new = v + _mlp_of(m, v) if site.kind == "resid_mid" else v
            stream[0, site.position] = new
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        if site.kind == "resid_pre":
            handles.append(block.register_forward_pre_hook(before))
        else:
            module = {"attn_out": _attention_branch, "mlp_out": mlp_branch}.get(
                site.kind, lambda block: block
            )(block)
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Plain:
    """A prompt's greedy continuation in plain Hugging Face, by whole uncached forward passes."""

    def __init__(self, hf: Any, ids: Sequence[int], count: int) -> None:
        self.hf, self.ids, self.answer = hf, ids, list[int]()
        for _ in range(count):
            self.answer.append(int(self.logits(ids, {})[-1].argmax()))
        self.clean = self.logits(ids, {})[-count - 1 : -1].log_softmax(dim=-1)

    def logits(self, ids: Sequence[int], writes: Writes) -> torch.Tensor:
        """Return the logits at every token of a prompt and the continuation."""
        with _written(self.hf, writes), torch.no_grad():
            return self.hf(torch.tensor([[*ids, *self.answer]]), use_cache=False).logits[0]

    def patched(
        self, writes: Writes, ids: Sequence[int] | None = None
    ) -> tuple[float, float, bool]:
        """Return log-probability and KL(clean ‖ patched) per token, and whether a top one moved."""
        count = len(self.answer)
        likely = self.logits(ids or self.ids, writes)[-count - 1 : -1].log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(likely, self.clean, log_target=True, reduction="none")
        changed = bool((self.clean.argmax(dim=-1) != likely.argmax(dim=-1)).any())
        of_answer = likely.gather(1, torch.tensor(self.answer)[:, None])
        return float(of_answer.mean()), float(kl.sum(dim=-1).mean()), changed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "neox"])
def test_every_kind_is_replaced_as_in_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Effect, KL, top token and control of each kind, layer and token; three tokens are followed.

    `resid_mid` included, which TransformerBridge's own hook point would not replace.
    """
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    ids = tokenize(model, PROMPT).ids
    plain = Plain(hf, ids, 3)
    table = causal_effects(
        model, PROMPT, kinds=model.kinds, layers=LAYERS, positions=(3, -1), continuation=3,
        replacement=Resampled(OTHER),
    )  # fmt: skip
    own = capture(model, PROMPT, kinds=model.kinds, layers=LAYERS)
    other = capture(model, OTHER, kinds=model.kinds, layers=LAYERS)
    assert len(table) == 2 * 2 * len(model.kinds)
    assert set(table["replacement"]) == {repr(Resampled(OTHER))}
    for row in table.to_dict("records"):
        site = Site(row["kind"], row["source_layer"], row["position"])
        shifted = dataclasses.replace(site, position=site.position - len(ids))  # from the end
        new, v = other.at(shifted), own.at(site)
        likely, kl, changed = plain.patched({site: new})
        assert row["patched_log_probability"] == pytest.approx(likely, abs=2e-4)
        before = plain.patched({})[0]
        assert row["effect"] == pytest.approx(likely - before, abs=2e-4)
        assert row["clean_log_probability"] == pytest.approx(before, abs=2e-4)
        assert row["kl"] == pytest.approx(kl, abs=2e-4)
        assert row["top_changed"] == changed
        random = v + RandomDirection(0)(1.0)(new - v)
        torch.testing.assert_close((random - v).norm(), (new - v).norm(), rtol=1e-4, atol=1e-4)
        likely, kl, _ = plain.patched({site: random})
        assert row["control_effect"] == pytest.approx(likely - before, abs=2e-4)
        assert row["control_kl"] == pytest.approx(kl, abs=2e-4)
    assert table["kl"].max() > 0.01  # something happened


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_restoring_into_other_tokens_as_in_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """The clean vector in the other prompt's run; and the share of the damage that it undoes."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    ids, corrupt = tokenize(model, PROMPT).ids, tokenize(model, OTHER).ids
    plain = Plain(hf, ids, 2)
    before, after = plain.patched({})[0], plain.patched({}, corrupt)[0]
    table = causal_trace(
        model, PROMPT, corruption=OtherTokens(OTHER), kinds=model.kinds, layers=LAYERS,
        positions=(-1, 3), continuation=2,
    )  # fmt: skip
    own = capture(model, PROMPT, kinds=model.kinds, layers=LAYERS)
    for row in table.to_dict("records"):
        site = Site(row["kind"], row["source_layer"], row["position"])
        likely, kl, changed = plain.patched({site: own.at(site)}, corrupt)
        assert row["corrupted_log_probability"] == pytest.approx(after, abs=2e-4)
        assert row["effect"] == pytest.approx(likely - after, abs=2e-4)
        assert row["restored"] == pytest.approx((likely - after) / (before - after), abs=1e-3)
        assert row["kl"] == pytest.approx(kl, abs=2e-4)
        assert row["top_restored"] == (not changed)
        random = RandomDirection(0)(1.0)(own.at(site))
        likely, kl, _ = plain.patched({site: random}, corrupt)
        assert row["control_effect"] == pytest.approx(likely - after, abs=2e-4)
        assert row["control_kl"] == pytest.approx(kl, abs=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_noise_is_averaged_over_draws_as_in_plain_hugging_face(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """Noise on the embeddings of the subject's tokens alone, effects meaned over the draws."""
    model, hf = tiny(architecture, backend), tiny_hf(architecture)
    source = tokenize(model, PROMPT)
    plain = Plain(hf, source.ids, 1)
    corruption = Noise("Chili Peppers", draws=3)
    draws = corruption(Run(model, source))
    subject = {i for i, (_, end) in enumerate(source.spans) if end > PROMPT.index("Chili")}
    assert all({site.position for site in draw.writes} == subject for draw in draws)
    table = causal_trace(model, PROMPT, corruption=corruption, layers=LAYERS)
    own = capture(model, PROMPT, layers=LAYERS)
    after = sum(plain.patched(draw.writes)[0] for draw in draws) / 3
    assert table["corrupted_log_probability"][0] == pytest.approx(after, abs=2e-4)
    for row in table.to_dict("records"):
        site = Site(row["kind"], row["source_layer"], row["position"])
        restored = [plain.patched({**d.writes, site: own.at(site)})[0] for d in draws]
        assert row["patched_log_probability"] == pytest.approx(sum(restored) / 3, abs=2e-4)


def test_noise_has_its_strength_and_repeats(tiny: Tiny) -> None:
    """Three standard deviations of the prompt's embeddings; another draw is another noise."""
    model = tiny("llama", "bridge")
    source = tokenize(model, PROMPT)
    embedded = capture(model, PROMPT, kinds="resid_pre", layers=0)["resid_pre", 0]
    rows = Noise(PROMPT, draws=40)(Run(model, source))
    added = torch.stack(
        [v - embedded[site.position] for row in rows for site, v in row.writes.items()]
    )
    assert float(added.std() / embedded[1:].std()) == pytest.approx(3, rel=0.03)
    again = Noise(PROMPT, draws=40)(Run(model, source))
    site = Site("resid_pre", 0, 3)
    assert torch.equal(rows[1].writes[site], again[1].writes[site])
    assert not torch.equal(rows[0].writes[site], rows[1].writes[site])


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms_of_ablation(backend: str, tiny: Tiny) -> None:
    """Own vector: no effect. Last block, earlier token: none. Last block, last token: b_U alone."""
    model = tiny("llama", backend)
    same = causal_effects(model, PROMPT, kinds=model.kinds, replacement=Amplified(1))
    assert same["kl"].max() < 1e-5
    assert set(same["replacement"]) == {"Amplified(alpha=1, mapping=Scale())"}
    assert not same["top_changed"].any()
    last: dict[str, Any] = {"kinds": "resid_post", "layers": -1}
    assert causal_effects(model, PROMPT, positions=3, **last)["kl"][0] < 1e-5
    flat = causal_effects(model, PROMPT, **last)  # zeros, normed and unembedded: all tokens alike
    likely = flat["patched_log_probability"][0]
    assert likely == pytest.approx(-math.log(model.tl.cfg.d_vocab), abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms_of_restoring(backend: str, tiny: Tiny) -> None:
    """The next token depends on nothing but the last block's output at the last token."""
    table = causal_trace(
        tiny("llama", backend), PROMPT, corruption=Noise("Chili Peppers", draws=2),
        kinds=("resid_mid", "resid_post"), layers=(5, 0),
    )  # fmt: skip
    assert table["top_restored"].between(0, 1).all()
    assert table["restored"][:2].to_numpy() != pytest.approx(0, abs=1e-3)
    whole = table[table["source_layer"] == 5]
    assert whole["restored"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert whole["kl"].max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_replaces_several_layers_at_once(backend: str, tiny: Tiny) -> None:
    """Three layers around the site's, fewer at the edges, as plain Hugging Face with all hooks."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    ids = tokenize(model, PROMPT).ids
    plain = Plain(hf, ids, 1)
    table = causal_effects(model, PROMPT, kinds="mlp_out", layers=(5, 2), window=3)
    for row, layers in zip(table.to_dict("records"), ((4, 5), (1, 2, 3)), strict=True):
        writes = {Site("mlp_out", n, len(ids) - 1): torch.zeros(32) for n in layers}
        kl = plain.patched(writes)[1]
        assert row["kl"] == pytest.approx(kl, abs=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_head_is_o_proj_of_the_other_heads(backend: str, tiny: Tiny) -> None:
    """Ablating one head: plain Hugging Face with that head's part of z set to zero."""
    model, hf = tiny("gpt2", backend), tiny_hf("gpt2")
    ids = tokenize(model, PROMPT).ids
    plain = Plain(hf, ids, 1)
    table = causal_effects(
        model, PROMPT, kinds="attn_out", layers=LAYERS, replacement=Without(Head(3))
    )
    assert set(table["replacement"]) == {"Without(Head(3))"}
    for row in table.to_dict("records"):

        def mask(module: Any, inputs: Any) -> Any:
            z = inputs[0].clone()
            z[0, -1, 24:] = 0
            return (z,)

        projection = blocks_of(hf)[row["source_layer"]].attn.c_proj
        handle = projection.register_forward_pre_hook(mask)
        kl = plain.patched({})[1]
        handle.remove()
        assert row["kl"] == pytest.approx(kl, abs=2e-4)


def test_a_base_is_a_replacement(tiny: Tiny) -> None:
    """Mean ablation; the table names the replacement."""
    model = tiny("llama", "bridge")
    mean = MeanActivation([OTHER, "x"])
    table = causal_effects(model, PROMPT, layers=LAYERS, replacement=mean)
    assert set(table["replacement"]) == {repr(mean)}
    ends = [capture(model, text, layers=LAYERS) for text in (OTHER, "x")]

    def mean_of(run: Any, places: Any) -> torch.Tensor:
        return torch.stack([sum(end[s.kind, s.layer][-1] for end in ends) / 2 for s, _ in places])

    again = causal_effects(model, PROMPT, layers=LAYERS, replacement=mean_of)
    assert table["effect"].to_numpy() == pytest.approx(again["effect"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sites_cost_a_batch_not_a_loop(
    backend: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites and controls in one patched step; the batch size does not change the numbers."""
    model = tiny("llama", backend)
    asked: dict[str, Any] = {"kinds": model.kinds, "layers": LAYERS, "continuation": 2}
    whole = causal_effects(model, PROMPT, **asked)
    for size in (1, 7):
        parts = causal_effects(model, PROMPT, batch_size=size, **asked)
        pd.testing.assert_frame_equal(parts, whole, atol=ROUNDING, rtol=ROUNDING)
    rows: list[int] = []
    own = type(model.decoder).step

    def counted(self: Any, tokens: Any, cache: Any) -> Any:
        rows.append(len(tokens))
        return own(self, tokens, cache)

    monkeypatch.setattr(type(model.decoder), "step", counted)
    causal_effects(model, PROMPT, **asked)
    assert [n for n in rows if n > 1] == [2 * len(whole)] * 2  # one step per followed token


def test_a_text_can_be_the_continuation(smollm2: LanguageModel) -> None:
    """The model's own greedy tokens given as a text are the same question."""
    asked: dict[str, Any] = {"kinds": "resid_post", "layers": (5, 2)}
    prompt = DESCRIPTION_PROMPT.filled("Titanic")
    own = causal_effects(smollm2, prompt, continuation=6, **asked)
    text = own["continuation"][0]
    assert len(tokenize(smollm2, prompt + text)) == len(tokenize(smollm2, prompt)) + 6
    same = causal_effects(smollm2, prompt, continuation=text, **asked)
    pd.testing.assert_frame_equal(own, same, atol=ROUNDING, rtol=ROUNDING)


def test_a_bfloat16_model_is_patched_too(llama_folder: Path) -> None:
    """Effects are computed in float32 from the model's own logits."""
    model = load_model(llama_folder, backend="bridge", device="cpu", dtype="bfloat16")
    table = causal_effects(model, PROMPT, kinds=model.kinds, layers=(5, 2))
    assert table["kl"].between(0, 50).all()
    same = causal_effects(model, PROMPT, layers=(5, 2), replacement=Amplified(1))
    assert same["kl"].max() < 0.01


def _hooks_on(model: LanguageModel) -> int:
    return sum(
        len(point.fwd_hooks) + len(point._forward_hooks) for point in model.tl.hook_dict.values()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_stays_on_the_model_after_a_failure(
    backend: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass that fails under the hooks leaves the model as it was."""
    model = tiny("llama", backend)
    before = _hooks_on(model)
    own = type(model.decoder).step

    def fails(self: Any, tokens: Any, cache: Any) -> Any:
        if len(tokens) > 1:
            assert _hooks_on(model) > before
            raise RuntimeError("the power went out")
        return own(self, tokens, cache)

    monkeypatch.setattr(type(model.decoder), "step", fails)
    with pytest.raises(RuntimeError, match="power"):
        causal_effects(model, PROMPT, kinds=model.kinds, layers=LAYERS)
    assert _hooks_on(model) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"continuation": 0}, "continuation: "),
        ({"continuation": 1.5}, "continuation: "),
        ({"continuation": ""}, "continuation: "),
        ({"continuation": "s"}, "continuation: "),
        ({"continuation": 999}, "prompt: "),
        ({"window": 0}, "window: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"replacement": lambda run, places: 3}, "replacement: "),
        ({"replacement": Resampled("x")}, "text: "),
        ({"replacement": Amplified(1e39)}, "replacement: "),
        ({"kinds": "mlp"}, "kinds: "),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_expected(
    settings: dict[str, Any], message: str, tiny: Tiny
) -> None:
    """Every bad argument is refused by name."""
    asked = {"kinds": "mlp_out", "positions": 1, **settings}
    with pytest.raises((ValueError, TypeError), match=message):
        causal_effects(tiny("llama", "bridge"), "Red Hot Chili Pepper", **asked)


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        (lambda: OtherTokens("x"), "text: "),
        (lambda: Noise("Pink Floyd"), "positions: "),
        (lambda: Noise("x", draws=0), "draws: "),
    ],
)
def test_a_corruption_that_does_not_fit_is_refused(
    corruption: Any, message: str, tiny: Tiny
) -> None:
    """Another length, a subject that is not there, or no draw."""
    with pytest.raises(ValueError, match=message):
        causal_trace(tiny("llama", "bridge"), PROMPT, corruption=corruption())


def test_effects_stand_beside_the_readings(llama: LanguageModel, word_overlap: Any) -> None:
    """Every best reading gets the effect of its own site; unknown sites have none."""
    result = sweep(
        llama, PROMPT, layers=(5, 2), alphas=(1, 3), max_new_tokens=3, scorer=word_overlap,
        progress=False,
    )  # fmt: skip
    effects = causal_effects(llama, PROMPT, kinds=("mlp_out", "resid_post"), layers=(5, 2))
    both = beside(result.best(), effects)
    assert both["description"].tolist() == result.best()["description"].tolist()
    assert both["token"].tolist() == result.best()["token"].tolist()
    of = effects.set_index(["kind", "source_layer"])["effect"]
    for row in both.to_dict("records"):
        expected = of.get((row["kind"], row["source_layer"]), float("nan"))
        assert row["effect"] == pytest.approx(expected, nan_ok=True)
    assert both["effect"].isna().sum() == 2  # resid_mid was not ablated
    with pytest.raises(ValueError, match="effects: "):
        beside(result.best(), pd.concat([effects, effects]))
    with pytest.raises(ValueError, match="effects: "):
        beside(result.best(), effects.drop(columns="kind"))


def test_smollm2_uses_the_vector_that_reads_right(smollm2: LanguageModel) -> None:
    """Where a country's block output is read as its capital, it restores that answer.

    Twelve layers later it is read as nothing and restores nothing; a random direction of equal
    norm does not restore it either.
    """
    name, answer = "France", " Paris"
    prompt = "The capital of France is the city of"
    asked: dict[str, Any] = {"positions": name, "kinds": "resid_post", "layers": (24, 12)}
    used = causal_trace(
        smollm2, prompt, corruption=Noise(name, draws=3), continuation=answer, **asked
    )
    said = sweep(
        smollm2, prompt, alphas=1, scorer=Contains("Paris"), max_new_tokens=2, progress=False,
        target_prompt=TargetPrompt("The capital of x is the city of"), **asked,
    )  # fmt: skip
    both = beside(said.best(), used).set_index("source_layer")
    assert both["score"].to_dict() == {12: 1.0, 24: 0.0}
    assert both["restored"][12] > 0.9
    assert both["restored"][24] < 0.2
    assert both["control_effect"][12] < 0.4 * both["effect"][12]
