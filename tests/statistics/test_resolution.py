"""Where a name is resolved, and what amplification reads before that."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from superscopes_tl.figures import earlier_table
from superscopes_tl.statistics import contextualization_layers, reveals_earlier
from tests.support.long_tables import cell, table_of

SHOW, FUTURE = "Saturday Night Live", "Back to the Future"

STORY = table_of(
    # The hidden state of the show is resolved at layer 3 ...
    cell(SHOW, 1, 1, 0.1, "to be alive"),
    cell(SHOW, 2, 1, 0.2, "charity single"),
    cell(SHOW, 3, 1, 0.6, "sketch show"),
    cell(SHOW, 1, 9, 0.2, "alive"),
    cell(SHOW, 2, 3, 0.1, "single"),
    cell(SHOW, 2, -3, 0.5, "negative show"),
    cell(SHOW, 2, 9, 0.9, "the show"),
    cell(SHOW, 3, 3, 0.9, "the show"),
    # ... and amplified MLP outputs name it before, at layers 1 and 2.
    cell(SHOW, 1, 1, math.nan, "", kind="mlp_out"),
    cell(SHOW, 1, 15, 0.4, "live show", kind="mlp_out"),
    cell(SHOW, 2, 1, 0.0, "shortened word", kind="mlp_out"),
    cell(SHOW, 2, 9, 0.3, "variety show", kind="mlp_out"),
    cell(SHOW, 2, 15, 0.9, "sketch show", kind="mlp_out"),
    # The film is resolved at layer 1, and layer 0 was not read as mlp_out at α = 1.
    cell(FUTURE, 0, 1, 0.1, "time to come"),
    cell(FUTURE, 1, 1, 0.5, "film"),
    cell(FUTURE, 0, 3, 0.2, "time"),
    cell(FUTURE, 0, 9, 0.4, "mlp film", kind="mlp_out"),
    cell(FUTURE, 1, 1, 0.4, "film", kind="mlp_out"),
)


def test_every_prompt_has_a_layer_of_its_own() -> None:
    """The first layer at α = 1 whose score reaches 0.3; amplified cells do not count."""
    layers = contextualization_layers(STORY)
    assert layers.to_dict() == {SHOW: 3, FUTURE: 1}
    assert layers.name == "contextualization_layer"
    assert layers.index.name == "prompt"
    assert contextualization_layers(STORY, threshold=0.55)[SHOW] == 3
    assert contextualization_layers(STORY, threshold=0.55)[FUTURE] is pd.NA


def test_a_judge_sees_prompt_and_description() -> None:
    """With `reads` the text decides, per prompt, and the score does not."""
    words = {SHOW: "charity", FUTURE: "time"}
    layers = contextualization_layers(STORY, reads=lambda prompt, text: words[prompt] in text)
    assert layers.to_dict() == {SHOW: 2, FUTURE: 0}


def test_only_greedy_scaled_readings_count() -> None:
    """Drawn texts and other mappings say nothing about ℓ_c."""
    drawn = table_of(cell(SHOW, 0, 1, 0.9, draw=1), cell(SHOW, 0, 1, 0.9, mapping="random"))
    assert contextualization_layers(pd.concat([drawn, STORY]))[SHOW] == 3


def test_the_rightmost_token_of_each_prompt_is_meant() -> None:
    """Prompts end at different positions; a position that is given must be there for all."""
    table = table_of(
        cell(SHOW, 0, 1, 0.9, position=2),
        cell(SHOW, 1, 1, 0.9, position=4),
        cell(FUTURE, 2, 1, 0.9, position=2),
    )
    assert contextualization_layers(table).to_dict() == {SHOW: 1, FUTURE: 2}
    assert contextualization_layers(table, position=2).to_dict() == {SHOW: 0, FUTURE: 2}
    with pytest.raises(ValueError, match="^position: "):
        contextualization_layers(table, position=4)


def test_the_target_same_needs_no_choice_and_several_targets_do() -> None:
    """One target per source layer is unambiguous; two are not."""
    same = [cell(SHOW, 1, 1, 0.1, target_layer=1), cell(SHOW, 2, 1, 0.9, target_layer=2)]
    assert contextualization_layers(table_of(*same)).to_dict() == {SHOW: 2}
    both = table_of(*same, cell(SHOW, 1, 1, 0.9), cell(SHOW, 2, 1, 0.9))
    with pytest.raises(ValueError, match="^target_layer: "):
        contextualization_layers(both)
    assert contextualization_layers(both, target_layer=0).to_dict() == {SHOW: 1}


def test_layers_can_be_judged_by_what_is_recovered() -> None:
    """As for one prompt: the first layer with half of the most that any layer recovers."""
    rows = [
        cell(SHOW, layer, 1, 0.9, recovered=share) for layer, share in enumerate((0.1, 0.5, 0.8))
    ]
    assert contextualization_layers(table_of(*rows)).to_dict() == {SHOW: 0}
    assert contextualization_layers(table_of(*rows), by="recovered").to_dict() == {SHOW: 1}


def test_tables_1_and_2_show_amplified_mlp_outputs() -> None:
    """Per layer before ℓ_c the smallest α that reads, beside the unamplified readings."""
    found = reveals_earlier(STORY, "mlp_out")
    assert found.to_dict("records")[:2] == [
        {
            "prompt": SHOW, "token": "·Live", "kind": "mlp_out", "source_layer": 1,
            "target_layer": 0, "hidden_state": "to be alive", "at_alpha_1": "", "alpha": 15.0,
            "reading": "live show", "score": 0.4, "contextualization_layer": 3,
            "at_contextualization": "sketch show",
        },
        {
            "prompt": SHOW, "token": "·Live", "kind": "mlp_out", "source_layer": 2,
            "target_layer": 0, "hidden_state": "charity single", "at_alpha_1": "shortened word",
            "alpha": 9.0, "reading": "variety show", "score": 0.3, "contextualization_layer": 3,
            "at_contextualization": "sketch show",
        },
    ]  # fmt: skip
    assert found["prompt"].tolist() == [SHOW, SHOW, FUTURE]
    assert pd.isna(found["at_alpha_1"].iloc[2])


def test_table_3_shows_amplified_hidden_states() -> None:
    """The smallest |α| wins; ℓ_c itself and later layers are not before it."""
    found = reveals_earlier(STORY)
    assert found[["source_layer", "alpha", "reading"]].to_numpy().tolist() == [
        [2, -3.0, "negative show"]
    ]
    assert found["hidden_state"].tolist() == found["at_alpha_1"].tolist() == ["charity single"]
    positive = pd.concat([STORY, table_of(cell(SHOW, 2, -9, 0.9), cell(SHOW, 1, -9, 0.9))])
    stricter = reveals_earlier(positive, threshold=0.6)
    assert stricter[["source_layer", "alpha"]].to_numpy().tolist() == [[1, -9.0], [2, 9.0]]


def shares(prompt: str, layer: int, alpha: float, own: float, other: float, **more: Any) -> Any:
    """Return a cell that recovers a share, its text not generated."""
    return cell(
        prompt, layer, alpha, math.nan, "", recovered=own, other_prompt_recovered=other,
        plain_nats=-5.0, unpatched_nats=-15.0, written=False, **more,
    )  # fmt: skip


def test_shares_alone_say_what_amplification_reads_earlier() -> None:
    """A row per prompt: ℓ_c at α = 1, and the first layer at the α that is best for the others."""
    rows = []
    for prompt, first in (("A", 2), ("B", 1), ("C", 9)):
        for layer in range(4):
            resolved = 0.8 if layer >= first else 0.1
            rows += [shares(prompt, layer, 1, resolved, -2.0), shares(prompt, layer, 9, 0.0, 0.0)]
            own = {"A": 0.6, "B": 0.3, "C": 0.6}[prompt] if layer else 0.0
            rows += [
                shares(prompt, layer, 1, 0.0, 0.0, kind="mlp_out"),
                shares(prompt, layer, 3, own, 0.1, kind="mlp_out"),
                shares(prompt, layer, 9, 0.9 if prompt == "A" else -1, 0.0, kind="mlp_out"),
            ]
    table = table_of(*rows)
    found = reveals_earlier(table, "mlp_out", by="recovered").set_index("prompt")
    assert found["contextualization_layer"].to_dict() == {"A": 2, "B": 1, "C": None}
    # A's own numbers would choose 9; B needs 0.4, half of its best block output; C is never read.
    assert found["source_layer"].to_dict() == {"A": 1, "B": None, "C": None}
    assert found["earlier"].to_dict() == {"A": True, "B": False, "C": False}
    read = found.loc["A"]
    assert (read["alpha"], read["recovered"], read["other_prompt_recovered"]) == (3, 0.6, 0.1)
    assert read["recovered_at_contextualization"] == 0.8
    assert read["other_prompt_recovered_at_contextualization"] == -2.0
    assert (
        found[["hidden_state", "at_alpha_1", "reading", "at_contextualization"]]
        .isna()
        .all(axis=None)
    )
    assert found["token"].eq("·Live").all()
    assert "not computed" in str(earlier_table(found.reset_index()).data[0].cells["values"])
    texts = table.assign(written=True, description="text")
    again = reveals_earlier(texts, "mlp_out", by="recovered").set_index("prompt")
    assert again.loc["A", ["hidden_state", "reading", "at_contextualization"]].eq("text").all()
    with pytest.raises(ValueError, match="^kind: "):
        reveals_earlier(table[table["kind"] == "resid_post"], "mlp_out", by="recovered")


def test_a_prompt_that_is_never_resolved_has_no_before() -> None:
    """Without ℓ_c a prompt is left out, however well an α reads it."""
    table = table_of(cell(SHOW, 1, 1, 0.1), cell(SHOW, 1, 9, 0.9))
    found = reveals_earlier(table)
    assert found.empty
    assert list(found.columns) == list(reveals_earlier(STORY).columns)


@pytest.mark.parametrize(
    ("table", "argument"),
    [
        (STORY.head(0), "table"),
        (STORY[STORY["alpha"] != 1], "contextualization_layer"),
        (STORY[STORY["alpha"] == 1], "contextualization_layer"),
        (STORY[STORY["kind"] == "resid_post"], "contextualization_layer"),
    ],
)
def test_what_was_not_swept_is_named(table: pd.DataFrame, argument: str) -> None:
    """Missing kinds and amplifiers are refused instead of shown as `never`."""
    with pytest.raises(ValueError, match=f"^{argument}: "):
        reveals_earlier(table, "mlp_out")


def columns_of(table: pd.DataFrame, kind: Any) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the figure."""
    drawn = earlier_table(reveals_earlier(table, kind)).data[0]
    return list(drawn.header["values"]), [
        list(row) for row in zip(*drawn.cells["values"], strict=True)
    ]


def test_the_figure_is_the_papers_table() -> None:
    """A row per layer before ℓ_c, then ℓ_c, with text escaped."""
    head, rows = columns_of(STORY.replace("live show", "a <b>"), "mlp_out")
    assert head == ["prompt", "token", "layer", "resid_post", "mlp_out", "amplified mlp_out"]
    assert rows == [
        [SHOW, "·Live", "1", "to be alive", "–", "a &lt;b&gt; (α = 15)"],
        [SHOW, "·Live", "2", "charity single", "shortened word", "variety show (α = 9)"],
        [SHOW, "·Live", "3 = ℓ_c", "sketch show", "", ""],
        [FUTURE, "·Live", "0", "time to come", "not computed", "mlp film (α = 9)"],
        [FUTURE, "·Live", "1 = ℓ_c", "film", "", ""],
    ]
    head, rows = columns_of(STORY, "resid_post")
    assert head == ["prompt", "token", "layer", "resid_post", "amplified resid_post"]
    assert rows == [
        [SHOW, "·Live", "2", "charity single", "negative show (α = -3)"],
        [SHOW, "·Live", "3 = ℓ_c", "sketch show", ""],
    ]


def test_the_figure_is_high_enough_for_its_rows() -> None:
    """A row has room for its longest cell, and for one line that is too long for its column."""
    found = reveals_earlier(STORY.replace("negative show", "word " * 20))
    figure = earlier_table(found)
    margins = 80
    head, four_lines, one_line = 32, 12 + 18 * (4 + 1), 12 + 18 * (1 + 1)
    assert figure.layout.margin.t + figure.layout.margin.b == margins
    assert figure.layout.height == margins + head + four_lines + one_line


def test_the_figure_of_nothing_and_of_two_kinds() -> None:
    """The title states that nothing was found; two kinds do not fit one table."""
    nothing = earlier_table(reveals_earlier(STORY).head(0))
    assert nothing.layout.title.text.endswith(": no layer")
    both = pd.concat([reveals_earlier(STORY), reveals_earlier(STORY, "mlp_out")])
    with pytest.raises(ValueError, match="^found: "):
        earlier_table(both)
