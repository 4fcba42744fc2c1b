"""Figures of a sweep: values, marks and hover texts of the cells."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import SweepResult, alpha_curve, heatmap
from superscopes_tl.figures import layer_grid, value_range
from tests.support.readings import NAN, heatmaps, marks, reading, result_of, rows_of

EVIL = "<script>alert('x')</script>"

MAP = result_of(
    # layers and amplifiers out of order, one cell of mlp_out missing, one description empty
    reading(5, 9, 0.40),
    reading(5, 1, 0.20),
    reading(5, 3, 0.70),
    reading(2, 9, 0.30),
    reading(2, 1, 0.10),
    reading(2, 3, NAN),
    reading(5, 9, -0.50, kind="mlp_out"),
    reading(5, 1, 0.60, kind="mlp_out"),
    reading(5, 3, 0.65, kind="mlp_out"),
    reading(2, 9, 0.35, kind="mlp_out"),
    reading(2, 3, 0.15, kind="mlp_out"),
)
GRID = result_of(
    reading(5, 1, 0.10, target_layer=3),
    reading(5, 9, 0.50, target_layer=3),
    reading(5, 1, 0.40, target_layer=0),
    reading(5, 9, 0.30, target_layer=0),
    reading(2, 1, 0.20, target_layer=3),
    reading(2, 9, NAN, target_layer=3),
    reading(2, 1, NAN, target_layer=0),
    reading(5, 1, 0.70, target_layer=0, kind="mlp_out", description="<b>bold</b>"),
)
TOKENS = result_of(
    reading(5, 1, 0.11, position=6),
    reading(2, 1, 0.12, position=6),
    reading(5, 1, 0.21, position=4),
    reading(2, 1, 0.22, position=4),
)


def test_the_map_has_a_panel_per_kind_in_the_order_of_the_sweep() -> None:
    """Panels are titled by kind, share one colour scale and have axes that say what they show."""
    figure = heatmap(MAP)
    assert [(panel.xaxis, panel.yaxis) for panel in heatmaps(figure)] == [("x", "y"), ("x2", "y2")]
    assert [a.text for a in figure.layout.annotations] == ["resid_post (block output)", "mlp_out"]
    assert {panel.coloraxis for panel in heatmaps(figure)} == {"coloraxis"}
    assert figure.layout.coloraxis.colorbar.title.text == "score"
    assert figure.layout.coloraxis.colorscale[0][1] == "#00224e"  # cividis
    assert figure.layout.xaxis.title.text == figure.layout.xaxis2.title.text == "α"
    assert figure.layout.yaxis.title.text == "source layer"
    assert figure.layout.yaxis2.title.text is None
    assert figure.layout.yaxis2.matches == "y"
    assert figure.layout.title.text == "Red Hot Chili Peppers · a-model · token <b>·token6</b>"


@given(
    cells=st.dictionaries(
        st.tuples(st.sampled_from([5, 2, 11]), st.sampled_from([-1.5, 0.0, 1.0, 9.0])),
        st.one_of(st.just(NAN), st.floats(-1, 1)),
        min_size=1,
    )
)
@settings(max_examples=15)
def test_every_cell_of_any_sweep_is_where_its_axes_say(
    cells: dict[tuple[int, float], float],
) -> None:
    """Reading the picture back by its axes gives the table, with `None`, never NaN, for holes."""
    result = result_of(*(reading(layer, a, score) for (layer, a), score in cells.items()))
    figure = heatmap(result)
    json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(name))
    (panel,) = heatmaps(figure)
    drawn = {
        (int(layer), float(a)): z
        for layer, line in zip(panel.y, panel.z, strict=True)
        for a, z in zip(panel.x, line, strict=True)
    }
    assert set(drawn) == {(layer, a) for layer, _ in cells for _, a in cells}
    for cell, z in drawn.items():
        score = cells.get(cell, NAN)
        assert z == (None if math.isnan(score) else score)


def test_hovering_shows_the_generated_text() -> None:
    """Each cell carries its description, place, α, score and norm, at the place of its value."""
    post, mlp = heatmaps(heatmap(MAP))
    assert post.hovertemplate == "%{customdata}<extra></extra>"
    assert post.customdata[1][1] == (
        "<b>resid_post 5 x 3</b><br>resid_post of layer 5 → layer 0, α = 3<br>"
        "score 0.700 · norm ratio 0.80<br><i>: resid_post 5 x 3</i>"
    )
    assert post.customdata[0][1].startswith("<b>(no description)</b><br>resid_post of layer 2 → ")
    assert "no score" in post.customdata[0][1]
    assert mlp.customdata[0][0] == "not computed"
    copied = heatmap(result_of(reading(5, 3, 0.7, few_shot_copy=True)))
    assert "repeats a name of the target prompt" in heatmaps(copied)[0].customdata[0][0]


def test_untrusted_text_is_escaped() -> None:
    """Plotly would render some tags and links: in hover texts, and in titles."""
    cell = replace(reading(5, 3, 0.7, description=EVIL), token=EVIL)
    result = SweepResult.from_readings([cell], {"model": {"name": EVIL}, "prompt": EVIL})
    for figure in (heatmap(result), alpha_curve(result)):
        assert "<script" not in str(figure)
        assert figure.layout.title.text.count(html.escape(EVIL, quote=False)) == 3
        assert html.escape(EVIL, quote=False) in str(figure.data[0].customdata)


def test_long_texts_are_wrapped_and_lose_nothing() -> None:
    """A long text takes lines of at most 60 characters, and an entity is never cut in two."""
    text = "a&b " * 40
    figure = heatmap(result_of(reading(5, 3, 0.7, description=text.strip())))
    shown = re.search(r"<b>(.*?)</b>", heatmaps(figure)[0].customdata[0][0])
    assert shown is not None
    lines = [html.unescape(line) for line in shown[1].split("<br>")]
    assert max(map(len, lines)) <= 60
    assert " ".join(lines) == text.strip()
    assert shown[1].count("&amp;") == 40


def test_cells_not_computed_have_crosses_and_those_without_description_rings() -> None:
    """What a colour cannot say is marked in its own panel, whatever is drawn, and nothing else."""
    for value in ("score", "norm_ratio"):
        figure = heatmap(MAP, value=value)
        assert marks(figure, "not computed") == [("x2", "1", "2")]
        assert marks(figure, "no description") == [("x", "3", "2")]
        symbols = {t.name: t.marker.symbol for t in figure.data if t.type == "scatter"}
        assert symbols == {"not computed": "x-thin-open", "no description": "circle-open"}
    complete = heatmap(result_of(reading(5, 3, 0.7), reading(2, 3, 0.7)))
    assert [trace.type for trace in complete.data] == ["heatmap"]


def test_a_kind_that_was_not_read_yet_has_a_panel_of_crosses() -> None:
    """An interrupted sweep shows which cells are missing, kind by kind."""
    figure = heatmap(
        result_of(
            reading(5, 1, 0.5, position=4),
            reading(5, 1, 0.5, position=4, kind="mlp_out"),
            reading(5, 1, 0.5),
            reading(2, 1, 0.5),
        )
    )
    assert rows_of(heatmaps(figure)[1].z) == [[None], [None]]
    assert marks(figure, "not computed") == [("x2", "1", "2"), ("x2", "1", "5")]


@pytest.mark.parametrize(("count", "labelled"), [(8, True), (9, False)])
def test_values_are_printed_where_there_is_room(count: int, labelled: bool) -> None:
    """Up to eight columns each cell shows its number."""
    figure = heatmap(result_of(*(reading(5, a, 0.5) for a in range(1, count + 1))))
    panel = heatmaps(figure)[0]
    assert panel.texttemplate == ("%{text}" if labelled else None)
    assert (panel.text is not None) == labelled
    assert not labelled or ">0.50<" in panel.text[0][0]


def test_another_value_can_be_drawn() -> None:
    """Any numeric column colours the cells, and the colour bar names it; so does a difference."""
    figure = heatmap(MAP, value="norm_ratio")
    post, mlp = heatmaps(figure)
    assert rows_of(post.z) == [[0.3, 0.5, 1.1], [0.6, 0.8, 1.4]]
    assert rows_of(mlp.z) == [[None, 0.5, 1.1], [0.6, 0.8, 1.4]]
    assert figure.layout.coloraxis.colorbar.title.text == "norm_ratio"
    assert "score 0.700" in post.customdata[1][1]
    less = heatmap(MAP, minus="norm_ratio")
    assert heatmaps(less)[0].z[1][2] == pytest.approx(0.4 - 1.4)
    assert less.layout.coloraxis.colorbar.title.text == "score − norm_ratio"


def test_a_text_without_a_score_is_not_called_empty() -> None:
    """A scorer may have no number for a text that is there."""
    figure = heatmap(result_of(reading(5, 3, NAN, description="a text"), reading(2, 3, 0.5)))
    assert rows_of(heatmaps(figure)[0].z) == [[0.5], [None]]
    assert marks(figure, "no description") == []


def test_colours_of_shares_and_scores_do_not_move_with_the_data() -> None:
    """A share runs from 0 to 1, scores over at least 0 to 0.6 in tenths, the rest over its data."""
    table = MAP.table
    assert value_range(table, "recovered") == value_range(table, "unpatched_recovered") == (0, 1)
    assert value_range(table, "score") == (-0.5, 0.7)
    assert value_range(table.head(1), "score") == value_range(table.head(0), "score") == (0, 0.6)
    assert value_range(table, "norm_ratio") == (0.3, 1.4)
    assert value_range(table.assign(score=2e8), "score") == (0, 2e8)


def test_one_token_is_drawn_by_default_the_last() -> None:
    """Each picture shows one token and names it in the title."""
    last, chosen = heatmap(TOKENS), heatmap(TOKENS, position=4)
    assert rows_of(heatmaps(last)[0].z) == [[0.12], [0.11]]
    assert rows_of(heatmaps(chosen)[0].z) == [[0.22], [0.21]]
    assert "·token6" in last.layout.title.text
    assert "·token4" in chosen.layout.title.text
    curve = alpha_curve(TOKENS, position=4)
    assert [list(trace.y) for trace in curve.data] == [[0.22], [0.21]]
    assert "·token4" in curve.layout.title.text


def test_one_of_several_target_layers_is_drawn() -> None:
    """The chosen target layer's cells are shown and no other's."""
    panel = heatmaps(heatmap(GRID, target_layer=3))[0]
    assert rows_of(panel.z) == [[0.20, None], [0.10, 0.50]]
    curve = alpha_curve(GRID, target_layer=0, layers=[5])
    assert list(curve.data[0].y) == [0.40, 0.30]


def test_a_grid_of_layers_shows_the_best_amplifier_of_each_cell() -> None:
    """Source layer x target layer: the best score over α, whichever column is drawn."""
    figure = layer_grid(GRID)
    post, mlp = heatmaps(figure)
    assert (list(post.y), list(post.x)) == (["2", "5"], ["0", "3"])
    assert rows_of(post.z) == [[None, 0.20], [0.40, 0.50]]
    assert rows_of(mlp.z) == [[None, None], [0.70, None]]
    assert "→ layer 3, α = 9" in post.customdata[1][1]
    assert "α = 1" in post.customdata[1][0]
    assert "&lt;b&gt;bold" in mlp.customdata[1][0]
    assert figure.layout.xaxis.title.text == "target layer"
    assert figure.layout.title.text.endswith("best α")
    assert marks(figure, "no description") == [("x", "0", "2")]
    norms = heatmaps(layer_grid(GRID, value="norm_ratio"))[0]
    assert rows_of(norms.z)[1] == [pytest.approx(0.6), pytest.approx(1.4)]


def test_a_grid_of_one_kind_and_alpha() -> None:
    """One panel; what was not computed carries a cross, as off the diagonal of target "same"."""
    figure = layer_grid(GRID, kind="resid_post", alpha=9)
    (panel,) = heatmaps(figure)
    assert rows_of(panel.z) == [[None, None], [0.30, 0.50]]
    assert marks(figure, "not computed") == [("x", "0", "2")]
    assert figure.layout.title.text.endswith("α = 9")
    same = result_of(reading(5, 1, 0.5, target_layer=5), reading(2, 1, 0.2, target_layer=2))
    assert rows_of(heatmaps(layer_grid(same))[0].z) == [[0.2, None], [None, 0.5]]
    assert rows_of(heatmaps(heatmap(same))[0].z) == [[0.2], [0.5]]


def test_the_curve_has_a_line_per_layer_from_low_to_high_alpha() -> None:
    """Layers ascend, points run from the lowest α to the highest, missing scores are gaps."""
    figure = alpha_curve(MAP)
    assert [trace.name for trace in figure.data] == ["layer 2", "layer 5"]
    assert [list(trace.x) for trace in figure.data] == [[1, 3, 9], [1, 3, 9]]
    assert [list(trace.y) for trace in figure.data] == [[0.10, None, 0.30], [0.20, 0.70, 0.40]]
    assert "NaN" not in figure.to_json()
    assert figure.layout.xaxis.title.text == "α"
    assert figure.layout.yaxis.title.text == "score"
    assert figure.layout.title.text == (
        "Red Hot Chili Peppers · a-model · resid_post of token <b>·token6</b>"
    )
    assert figure.data[1].customdata[1].startswith("<b>resid_post 5 x 3</b>")
    assert figure.data[0].line.color != figure.data[1].line.color


def test_the_curve_of_another_kind_layer_and_value() -> None:
    """Kind, layers and value choose what is drawn."""
    figure = alpha_curve(MAP, kind="mlp_out", layers=[2], value="norm_ratio")
    assert [trace.name for trace in figure.data] == ["layer 2"]
    assert list(figure.data[0].x) == [3, 9]
    assert list(figure.data[0].y) == [0.5, 1.1]
    assert figure.layout.yaxis.title.text == "norm_ratio"
    assert "mlp_out of token" in figure.layout.title.text


@pytest.mark.parametrize(
    ("draw", "result", "arguments", "argument"),
    [
        *[
            (draw, result, arguments, argument)
            for draw in (heatmap, alpha_curve, layer_grid)
            for result, arguments, argument in (
                (MAP, {"value": "description"}, "value"),
                (MAP, {"value": "few_shot_copy"}, "value"),
                (MAP, {"value": ""}, "value"),
                (TOKENS, {"position": 5}, "position"),
                (result_of(), {}, "table"),
            )
        ],
        (heatmap, GRID, {}, "target_layer"),
        (alpha_curve, GRID, {}, "target_layer"),
        (heatmap, GRID, {"target_layer": 2}, "target_layer"),
        (heatmap, MAP, {"minus": "description"}, "minus"),
        (alpha_curve, MAP, {"kind": "attn_out"}, "kind"),
        (alpha_curve, MAP, {"layers": [5, 3]}, "layers"),
        (layer_grid, GRID, {"kind": "resid_mid"}, "kind"),
        (layer_grid, GRID, {"alpha": 2}, "alpha"),
    ],
)
def test_what_was_not_computed_is_refused(
    draw: Any, result: SweepResult, arguments: dict[str, Any], argument: str
) -> None:
    """Columns, tokens, kinds, layers and α that are not there, and several to choose from."""
    with pytest.raises(ValueError, match=f"^{argument}: "):
        draw(result, **arguments)


def test_readings_of_two_mappings_need_two_figures() -> None:
    """One cell cannot show both."""
    both = result_of(reading(5, 1, 0.1), replace(reading(5, 1, 0.2), mapping="cube"))
    for draw in (heatmap, alpha_curve, layer_grid):
        with pytest.raises(ValueError, match="^result: "):
            draw(both)


def test_drawing_does_not_change_the_table() -> None:
    """The functions are pure: the table is the same after every picture."""
    before = MAP.table.copy(deep=True)
    heatmap(MAP, value="norm_ratio", minus="score")
    layer_grid(MAP)
    alpha_curve(MAP)
    assert MAP.table.equals(before)
