"""Next-token evaluation: every number against plain Hugging Face, and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from superscopes_tl import LanguageModel, load_model
from superscopes_tl.engine import IDENTITY_PROMPT
from superscopes_tl.neighbours import LOGIT_LENS, PATCHED, NextTokens, next_tokens
from superscopes_tl.statistics import bootstrap
from superscopes_tl.vectors import Head
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

Tiny = Callable[[str, str], LanguageModel]

TEXTS = ("Red Hot Chili Peppers", "Syria: Country in the Middle East")


def _ids(text: str) -> list[int]:
    return [0, *tiny_tokenizer().encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_equals_plain_hugging_face(backend: str, tiny: Tiny) -> None:
    """Own token, patched and unpatched prediction, logit lens: each from whole forward passes."""
    model, hf = tiny("llama", backend), tiny_hf("llama")
    found = next_tokens(
        model, TEXTS, layers=[5, 2], target_layer=[4, 1], alphas=[1, 3], positions=[2, -1]
    )
    prompt = _ids(IDENTITY_PROMPT.text)
    nothing = plain_hf.patched_logits(hf, prompt, (), torch.zeros(32), 0)[-1]
    checked = 0
    for row in found.table.to_dict("records"):
        ids, p = _ids(row["prompt"]), row["position"]
        with torch.no_grad():
            own = int(hf(torch.tensor([ids])).logits[0, p].argmax())
        vector = plain_hf.source_vectors(hf, ids, "resid_post", row["source_layer"])[p]
        if row["method"] == PATCHED:
            at, layer = (len(prompt) - 1,), row["target_layer"]
            logits = plain_hf.patched_logits(hf, prompt, at, row["alpha"] * vector, layer)[-1]
        elif row["method"] == LOGIT_LENS:
            assert pd.isna(row["target_layer"])
            with torch.no_grad():
                logits = hf.lm_head(hf.model.norm(vector))
        elif row["method"] == "unpatched":
            logits = nothing
        else:
            continue
        checked += 1
        assert row["own"] == model.tokenizer.decode([own])
        assert row["predicted"] == model.tokenizer.decode([int(logits.argmax())])
        assert row["hit"] == (int(logits.argmax()) == own)
        assert row["surprisal"] == pytest.approx(-float(logits.log_softmax(-1)[own]), abs=1e-3)
    assert checked == 2 * 2 * (8 + 8 + 2), "patched and unpatched cells, and a lens per site"
    assert found.table["target_layer"].dtype == "Int64"
    assert set(found.table["method"]) == {PATCHED, "unpatched", "random_direction", LOGIT_LENS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_last_layer_into_itself_predicts_what_the_model_does(
    architecture: str, backend: str, tiny: Tiny
) -> None:
    """After the last block only the unembedding is left: precision 1, the lens's surprisal."""
    model = tiny(architecture, backend)
    found = next_tokens(model, TEXTS, layers=[5], positions=[-1, 2])
    rows = found.table.set_index("method")
    assert rows.loc[PATCHED, "hit"].all()
    assert rows.loc[LOGIT_LENS, "hit"].all()
    np.testing.assert_allclose(
        rows.loc[PATCHED, "surprisal"], rows.loc[LOGIT_LENS, "surprisal"], atol=1e-3
    )
    assert not rows.loc["random_direction", "hit"].all()


def test_the_batch_size_changes_nothing(tiny: Tiny) -> None:
    """Cells of several texts share their batches, whatever the batches' size."""
    model = tiny("llama", "bridge")
    one, other = (
        next_tokens(model, TEXTS, layers=[5, 2], target_layer=[4, 1], batch_size=size).table
        for size in (3, 64)
    )
    near = ["surprisal", "predicted", "hit"]  # two tokens may be as likely
    pd.testing.assert_frame_equal(one.drop(columns=near), other.drop(columns=near))
    assert (one["predicted"] == other["predicted"]).mean() > 0.98
    assert len(one) == sum(len(_ids(text)) - 1 for text in TEXTS) * (3 * 4 + 2)
    np.testing.assert_allclose(one["surprisal"], other["surprisal"], atol=1e-3)


def test_a_text_given_twice_counts_once(tiny: Tiny) -> None:
    """Rows of the same text would pass for more evidence than there is."""
    found = next_tokens(tiny("llama", "bridge"), [TEXTS[0], TEXTS[0]], layers=2, controls=())
    assert not found.table.duplicated(["method", "prompt", "position"]).any()
    assert found.provenance["prompts"] == [TEXTS[0]]
    assert found.provenance["config"]["mapping"] == "Scale()"
    assert "scorer" not in found.provenance["config"]


def _table(hits: dict[str, list[int]]) -> pd.DataFrame:
    """Return the rows of two methods; surprisal is twice the miss."""
    rows = [
        {"prompt": text, "position": p, "token": "t", "method": method, "kind": "resid_post",
         "source_layer": 2, "target_layer": target_layer, "alpha": alpha, "own": "a",
         "predicted": "b", "hit": bool(hit), "surprisal": 2.0 * (1 - hit)}
        for method, target_layer, alpha in ((PATCHED, 1, 3.0), (LOGIT_LENS, pd.NA, np.nan))
        for text, marks in hits.items()
        for p, hit in enumerate(marks)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"target_layer": "Int64"})


def test_a_summary_weights_prompts_equally() -> None:
    """Means of each text's mean; the interval is the bootstrap over texts."""
    hits = {"long": [1, 1, 1, 0], "short": [0], "third": [1, 0]}
    summary = NextTokens(_table(hits), {}).summary()
    assert summary["method"].tolist() == [PATCHED, LOGIT_LENS]
    assert summary["prompts"].tolist() == [3, 3]
    shares = np.array([[0.75], [0.0], [0.5]])
    (low,), (high,) = bootstrap(shares)
    for row in summary.to_dict("records"):
        assert row["precision"] == pytest.approx(shares.mean())
        assert row["surprisal"] == pytest.approx(2 * (1 - shares.mean()))
        assert (row["precision_low"], row["precision_high"]) == pytest.approx((low, high))
    alone = NextTokens(_table({"long": [1, 0]}), {}).summary()
    assert alone["precision"].tolist() == [0.5, 0.5]
    assert alone["precision_low"].isna().all(), "one text has no interval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: "),
        ({"prompts": "Syria"}, "prompts: "),
        ({"draw": 1}, "settings: "),
        ({"scorer": None}, "settings: "),
        ({"layers": 9}, "layers: "),
        ({"controls": "unpatched_log_probability"}, "controls: "),
    ],
)
def test_bad_input_says_what_was_expected(
    arguments: dict[str, Any], message: str, tiny: Tiny
) -> None:
    """Refused by name, settings without effect included."""
    asked = {"prompts": TEXTS, **arguments}
    with pytest.raises(ValueError, match=message):
        next_tokens(tiny("llama", "bridge"), asked.pop("prompts"), **asked)


def test_models_of_other_tokens_are_refused(tiny: Tiny) -> None:
    """A next token of one tokenizer is none of another."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["<more>"])
    other = load_model(tiny_hf("gpt2"), tokenizer, backend="bridge")
    with pytest.raises(ValueError, match="target_model: "):
        next_tokens(tiny("llama", "bridge"), TEXTS, target_model=other)


def test_smollm2_predicts_the_next_token(smollm2: LanguageModel) -> None:
    """A late state predicts the next token more often than the lens, the prompt and a control."""
    texts = ("Red Hot Chili Peppers", "Alexander the Great", "Back to the Future")
    summary = next_tokens(smollm2, texts, layers=[26]).summary().set_index("method")["precision"]
    assert summary[PATCHED] > summary[LOGIT_LENS] > summary["unpatched"]
    assert summary[LOGIT_LENS] > summary["random_direction"]


def test_the_lens_is_left_out_where_v_is_something_else(tiny: Tiny) -> None:
    """With a source of vectors, v is not the vector that the logit lens would read."""
    model = tiny("llama", "bridge")
    asked: dict[str, Any] = {"layers": [5, 2], "kinds": "attn_out", "controls": ()}
    plain = next_tokens(model, ["Red Hot Chili Peppers"], **asked).table
    headed = next_tokens(model, ["Red Hot Chili Peppers"], vectors=Head(1), **asked).table
    assert set(plain["method"]) == {PATCHED, LOGIT_LENS}
    assert set(headed["method"]) == {"patched"}
