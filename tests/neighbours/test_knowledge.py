"""Whose words a reading says, and two names in one vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superscopes_tl import LanguageModel, sweep
from superscopes_tl.experiment import make_patches, plan_sweep
from superscopes_tl.figures import mixture_curve
from superscopes_tl.neighbours import flip_point, mixture, whose_knowledge
from superscopes_tl.neighbours.knowledge import _told
from superscopes_tl.scores import no_scores
from tests.support import plain_hf
from tests.support.tiny_models import sharp_llama

ONE, TWO = "Red Hot Chili Peppers", "Alexander the Great"
SITE: dict[str, Any] = {"layer": 5, "kind": "resid_post", "target_layer": 2, "max_new_tokens": 4}
SWEPT: dict[str, Any] = {
    "layers": 5, "kinds": "resid_post", "target_layer": 2, "max_new_tokens": 4, "progress": False,
    "scorer": no_scores,
}  # fmt: skip


def test_a_reading_stands_beside_what_is_said_without_it(llama: LanguageModel) -> None:
    """Every row is the cell, or the control, of a sweep."""
    names = ("unpatched", "alpha_zero", "random_direction", "other_prompt")
    (row,) = sweep(llama, ONE, alphas=3, controls=names, **SWEPT).table.to_dict("records")
    found = whose_knowledge(llama, ONE, alpha=3, **SITE).set_index("given")
    others = found.loc["another prompt's vector"]
    assert len(found) == 8
    assert len(set(others["of"])) == 3
    near = {"rel": 1e-3, "abs": 1e-3}
    assert found.loc["the vector", "recovered"] == pytest.approx(row["recovered"], **near)
    assert others["recovered"].mean() == pytest.approx(row["other_prompt_recovered"], **near)
    assert found.loc["the vector", "text"] == row["description"]
    assert others["text"].iloc[0] in row["other_prompt_text"]
    for given_, name in (("α = 0", "alpha_zero"), ("a random direction", "random_direction")):
        assert found.loc[given_, "recovered"] == pytest.approx(row[f"{name}_recovered"], **near)
        assert found.loc[given_, "text"] in row[f"{name}_text"]
    assert found.loc["the name", "text"] == row["own_words"]
    assert found.loc["the name", "recovered"] == pytest.approx(1)
    assert found.loc["nothing", ["recovered", "gain"]].tolist() == pytest.approx([0, 0], abs=1e-3)
    gap = row["plain_nats"] - row["unpatched_nats"]
    assert found["gain"].tolist() == pytest.approx((found["recovered"] * gap).tolist(), abs=1e-3)


def test_a_mixture_is_between_the_two_readings(llama: LanguageModel) -> None:
    """At either end it is one prompt's cell; in between, plain Hugging Face with the mixed v."""
    found = mixture(llama, ONE, TWO, alpha=3, shares=(0, 0.3, 1), **SITE)
    table = found.table.set_index(["vectors", "share"])
    cells = [sweep(llama, name, alphas=3, **SWEPT).table.iloc[0] for name in (ONE, TWO)]
    ends = [table.loc[("as they are", share)] for share in (1.0, 0.0)]
    for number, (end, cell) in enumerate(zip(ends, cells, strict=True), start=1):
        assert end[f"recovered_{number}"] == pytest.approx(cell["recovered"], rel=1e-3, abs=1e-3)
        assert end["text"] == cell["description"]
    plan = plan_sweep(llama, ONE, layers=5, kinds="resid_post", target_layer=2, alphas=3,
                      max_new_tokens=4, scorer=no_scores)  # fmt: skip
    v = [make_patches(one)[0].vector for one in (plan, plan.at_prompt(TWO))]
    assert found.norms == pytest.approx([float(one.norm()) for one in v])
    mean = sum(found.norms) / 2
    equal = [one * mean / one.norm() for one in v]
    hf, target = sharp_llama(), plan.generator.target
    for way, (first, second) in {"as they are": v, "equal norms": equal}.items():
        for number, words in enumerate(found.own_words, start=1):
            patch = (target.positions, 0.3 * first + 0.7 * second, 2)
            ids, text = list(target.tokens.ids), list(words.token_ids)
            likely = plain_hf.log_probability(hf, ids, text, patch)
            row = table.loc[(way, 0.3)]
            expected = words.recovered(likely)
            assert row[f"recovered_{number}"] == pytest.approx(expected, rel=1e-2, abs=1e-2)
    mixed = found.table.to_dict("records")
    for row in mixed:
        shares = [row["recovered_1"], row["recovered_2"]]
        name = found.prompts[shares.index(max(shares))] if max(shares) > 0 else ""
        assert row["told"] == name
    assert {row["told"] for row in mixed} == {ONE, TWO}
    assert _told((ONE, TWO), (-0.2, -0.1)) == ""
    ends = [table.loc[(way, 0.0), "recovered_2"] for way in ("equal norms", "the second random")]
    assert ends[0] != pytest.approx(ends[1], abs=1e-2)  # that vector is another one
    drawn = mixture_curve(found)
    assert len(drawn.data) == 6
    assert list(drawn.data[1].y) == table.loc["as they are", "recovered_2"].tolist()


def test_two_prompts_exchanged_mirror_the_mixture(llama: LanguageModel) -> None:
    """The share a of one is the share 1 − a of the other."""
    one = mixture(llama, ONE, TWO, alpha=3, shares=(0, 0.25, 1), **SITE)
    other = mixture(llama, TWO, ONE, alpha=3, shares=(0, 0.75, 1), **SITE)
    for way in ("as they are", "equal norms"):
        a, b = (found.table[found.table["vectors"] == way] for found in (one, other))
        for mine, theirs in (("recovered_1", "recovered_2"), ("recovered_2", "recovered_1")):
            expected = b[theirs].tolist()[::-1]
            assert a[mine].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert a["told"].tolist() == b["told"].tolist()[::-1]
        if (flip := one.flips[way]) is not None:
            assert 0 <= flip <= 1
    random = one.table[one.table["vectors"] == "the second random"].iloc[-1]
    equal = one.table[one.table["vectors"] == "equal norms"].iloc[-1]
    assert random["recovered_1"] == pytest.approx(equal["recovered_1"], rel=1e-3, abs=1e-3)


lines = st.tuples(st.floats(0.05, 0.95), st.floats(0.5, 5))


@given(line=lines, shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6, unique=True))
def test_a_straight_line_flips_where_it_is_zero(
    line: tuple[float, float], shares: list[float]
) -> None:
    """Whatever the shares between, in either direction; a line that stays above 0 never does."""
    zero, slope = line
    asked = [0.0, *sorted(shares), 1.0]
    values = [slope * (share - zero) for share in asked]
    assert flip_point(asked, values) == pytest.approx(zero, abs=1e-6)
    assert flip_point(asked, [-value for value in values]) == pytest.approx(zero, abs=1e-6)
    assert flip_point(asked, [abs(value) + 0.1 for value in values]) is None
    assert flip_point(asked, [float("nan")] * len(asked)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.5]}, "shares: "),
        ({"shares": [0, float("nan")]}, "shares: "),
        ({"prompt_2": ONE}, "prompt_2: "),
        ({"reference": " the"}, "prompt_2: .* adds .* nats"),
        ({"target_layer": (0, 2)}, "layer: expected one cell"),
        ({"controls": "unpatched"}, "settings: "),
        ({"kind": "mlp"}, "kinds: "),
    ],
)
def test_bad_input_is_named(settings: dict[str, Any], message: str, llama: LanguageModel) -> None:
    """Before anything is generated."""
    asked = {"prompt_2": TWO, **SITE, **settings}
    with pytest.raises(ValueError, match=message):
        mixture(llama, ONE, asked.pop("prompt_2"), **asked)


def test_zero_vectors_are_mixed_without_dividing_by_their_norm(llama: LanguageModel) -> None:
    """α = 0 leaves nothing to mix: every share reads the same."""
    found = mixture(llama, ONE, TWO, alpha=0, shares=(0, 1), **SITE)
    assert found.norms == (0, 0)
    assert torch.tensor(found.table["recovered_1"].to_numpy()).isfinite().all()
    assert found.table["recovered_1"].nunique() == 1
