"""Pictures of a sweep: what stands in each cell, what hovering shows, and what a file contains."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superscopes_tl import SweepResult, alpha_curve, heatmap, write_html
from superscopes_tl.experiment import Reading

NAN = math.nan
EVIL = "<script>alert('x')</script>"
PROVENANCE = {"model": {"name": "mini"}, "prompt": "Red Hot Chili Peppers"}


def reading(
    source_layer: int,
    alpha: float,
    score: float,
    *,
    kind: str = "resid_post",
    position: int = 6,
    target_layer: int = 0,
    description: str | None = None,
    few_shot_copy: bool = False,
) -> Reading:
    """Return one cell; its norm ratio is a tenth of layer plus α, to be told from the score."""
    name = f"{kind} {source_layer} x {alpha:g}" if description is None else description
    if math.isnan(score) and description is None:
        name = ""
    return Reading(
        prompt="Red Hot Chili Peppers",
        position=position,
        token=f"·token{position}",
        kind=kind,
        source_layer=source_layer,
        target_layer=target_layer,
        mapping="Scale()",
        alpha=float(alpha),
        vector_norm=2.0,
        norm_ratio=(source_layer + alpha) / 10,
        text=f": {name}" if name else "",
        description=name,
        score=score,
        few_shot_copy=few_shot_copy,
        n_tokens=4,
        margin=0.25,
    )


def result_of(*readings: Reading) -> SweepResult:
    """Return the result that holds these cells."""
    return SweepResult.from_readings(readings, PROVENANCE)


def heatmaps(figure: go.Figure) -> list[go.Heatmap]:
    """Return the coloured panels."""
    return [trace for trace in figure.data if trace.type == "heatmap"]


def marks(figure: go.Figure, name: str) -> list[tuple[str, str, str]]:
    """Return axis, horizontal and vertical place of every mark of one sort."""
    return [
        (trace.xaxis, x, y)
        for trace in figure.data
        if trace.type == "scatter" and trace.name == name
        for x, y in zip(trace.x, trace.y, strict=True)
    ]


def rows_of(values: Any) -> list[list[Any]]:
    """Return nested lists whatever sequence plotly keeps."""
    return [list(row) for row in values]


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
    assert figure.layout.title.text == "Red Hot Chili Peppers · mini · token <b>·token6</b>"


def test_each_cell_has_the_value_of_its_layer_and_amplifier() -> None:
    """Rows are layers and columns amplifiers, each from low to high, whatever came first."""
    post, mlp = heatmaps(heatmap(MAP))
    for panel in (post, mlp):
        assert list(panel.y) == ["2", "5"]
        assert list(panel.x) == ["1", "3", "9"]
    assert rows_of(post.z) == [[0.10, None, 0.30], [0.20, 0.70, 0.40]]
    assert rows_of(mlp.z) == [[None, 0.15, 0.35], [0.60, 0.65, -0.50]]


@given(
    cells=st.dictionaries(
        st.tuples(st.sampled_from([5, 2, 11]), st.sampled_from([-1.5, 0.0, 1.0, 9.0])),
        st.one_of(st.just(NAN), st.floats(-1, 1)),
        min_size=1,
    )
)
@settings(max_examples=25, deadline=None)
def test_every_cell_of_any_sweep_is_where_its_axes_say(
    cells: dict[tuple[int, float], float],
) -> None:
    """Reading the picture back by its axes gives the table, with holes for what is not there."""
    result = result_of(*(reading(layer, a, score) for (layer, a), score in cells.items()))
    (panel,) = heatmaps(heatmap(result))
    drawn = {
        (int(y), float(x)): z
        for y, row in zip(panel.y, panel.z, strict=True)
        for x, z in zip(panel.x, row, strict=True)
    }
    layers, alphas = {layer for layer, _ in cells}, {a for _, a in cells}
    assert list(panel.y) == [str(layer) for layer in sorted(layers)]
    assert list(panel.x) == [f"{a:g}" for a in sorted(alphas)]
    assert set(drawn) == {(layer, a) for layer in layers for a in alphas}
    for cell, z in drawn.items():
        score = cells.get(cell, NAN)
        assert z == (None if math.isnan(score) else score)


def test_no_number_in_a_figure_is_nan() -> None:
    """A notebook cannot send NaN: missing values are null, so that the JSON is strict."""
    for figure in (heatmap(MAP), alpha_curve(MAP)):
        json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(name))
        assert "NaN" not in figure.to_json()


def test_hovering_shows_what_the_model_wrote() -> None:
    """Each cell carries its description, place, α, score and norm, at the place of its value."""
    post, mlp = heatmaps(heatmap(MAP))
    assert post.hovertemplate == "%{customdata}<extra></extra>"
    assert post.customdata[1][1] == (
        "<b>resid_post 5 x 3</b><br>resid_post of layer 5 → layer 0, α = 3<br>"
        "score 0.700 · norm ratio 0.80<br><i>: resid_post 5 x 3</i>"
    )
    assert post.customdata[0][1].startswith(
        "<b>(no description)</b><br>resid_post of layer 2 → layer 0"
    )
    assert "score no description" in post.customdata[0][1]
    assert mlp.customdata[0][0] == "not computed"
    assert mlp.customdata[0][2].startswith("<b>mlp_out 2 x 9</b>")


def test_hovering_escapes_what_the_model_wrote() -> None:
    """Generated text is shown as text: plotly would render some tags and links."""
    figure = heatmap(result_of(reading(5, 3, 0.7, description=EVIL), reading(2, 3, 0.1)))
    hover = heatmaps(figure)[0].customdata[1][0]
    assert html.escape(EVIL) in hover
    assert "<script" not in hover
    curve = alpha_curve(result_of(reading(5, 3, 0.7, description=EVIL)))
    assert html.escape(EVIL) in curve.data[0].customdata[0]
    assert "<script" not in curve.data[0].customdata[0]


def test_titles_escape_prompt_model_and_token() -> None:
    """Whatever comes from outside is escaped in the title too."""
    cell = replace(reading(5, 3, 0.7), token=EVIL)
    result = SweepResult.from_readings([cell], {"model": {"name": EVIL}, "prompt": EVIL})
    for figure in (heatmap(result), alpha_curve(result)):
        assert "<script" not in figure.layout.title.text
        assert figure.layout.title.text.count(html.escape(EVIL)) == 3


def test_long_texts_are_wrapped_and_lose_nothing() -> None:
    """A long text takes lines of 60 characters, and an entity is never cut in two."""
    text = "a&b " * 40
    figure = heatmap(result_of(reading(5, 3, 0.7, description=text.strip())))
    shown = re.search(r"<b>(.*?)</b>", heatmaps(figure)[0].customdata[0][0])
    assert shown is not None
    lines = [html.unescape(line) for line in shown[1].split("<br>")]
    assert [len(line) for line in lines] == [60, 60, 39]
    assert "".join(lines) == text.strip()
    assert shown[1].count("&amp;") == 40


def test_hovering_tells_names_copied_from_the_target_prompt() -> None:
    """A reading that repeats a name of the prompt says so, another one does not."""
    figure = heatmap(result_of(reading(5, 3, 0.7, few_shot_copy=True), reading(2, 3, 0.7)))
    other, copied = (row[0] for row in heatmaps(figure)[0].customdata)
    assert "repeats a name of the target prompt" in copied
    assert "repeats" not in other


def test_cells_not_computed_have_crosses_and_those_without_description_rings() -> None:
    """What a colour cannot say is marked in its own panel, and nothing else is."""
    figure = heatmap(MAP)
    assert marks(figure, "not computed") == [("x2", "1", "2")]
    assert marks(figure, "no description") == [("x", "3", "2")]
    symbols = {t.name: t.marker.symbol for t in figure.data if t.type == "scatter"}
    assert symbols == {"not computed": "x-thin-open", "no description": "circle-open"}


def test_a_complete_map_has_no_marks() -> None:
    """Where every cell has a description there is nothing to mark."""
    figure = heatmap(result_of(reading(5, 3, 0.7), reading(2, 3, 0.7)))
    assert [trace.type for trace in figure.data] == ["heatmap"]


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
    assert heatmaps(figure)[0].texttemplate == ("%{z:.2f}" if labelled else None)


def test_another_value_can_be_drawn() -> None:
    """Any numeric column colours the cells, and the colour bar names it."""
    figure = heatmap(MAP, value="norm_ratio")
    post, mlp = heatmaps(figure)
    assert rows_of(post.z) == [[0.3, 0.5, 1.1], [0.6, 0.8, 1.4]]
    assert rows_of(mlp.z) == [[None, 0.5, 1.1], [0.6, 0.8, 1.4]]
    assert figure.layout.coloraxis.colorbar.title.text == "norm_ratio"
    assert "score 0.700" in post.customdata[1][1]


def test_missing_descriptions_have_rings_whatever_is_drawn() -> None:
    """A cell without a description is marked as that, also where its colour is a norm."""
    assert marks(heatmap(MAP, value="norm_ratio"), "no description") == [("x", "3", "2")]


def test_a_text_without_a_score_is_not_called_empty() -> None:
    """A scorer may have no number for a text that is there."""
    figure = heatmap(result_of(reading(5, 3, NAN, description="a text"), reading(2, 3, 0.5)))
    assert rows_of(heatmaps(figure)[0].z) == [[0.5], [None]]
    assert marks(figure, "no description") == []


@pytest.mark.parametrize("value", ["description", "few_shot_copy", "scores", ""])
@pytest.mark.parametrize("draw", [heatmap, alpha_curve])
def test_a_column_that_is_no_number_is_refused(draw: Any, value: str) -> None:
    """Texts, truth values and misspelt columns list the columns that can be drawn."""
    with pytest.raises(
        ValueError, match=r"^value: expected one of the numeric columns \[.*'score'.*\], got .*Fix"
    ):
        draw(MAP, value=value)


TOKENS = result_of(
    reading(5, 1, 0.11, position=6),
    reading(2, 1, 0.12, position=6),
    reading(5, 1, 0.21, position=4),
    reading(2, 1, 0.22, position=4),
)


def test_one_token_is_drawn_the_last_unless_given() -> None:
    """Each picture shows one token and names it in the title."""
    last, chosen = heatmap(TOKENS), heatmap(TOKENS, position=4)
    assert rows_of(heatmaps(last)[0].z) == [[0.12], [0.11]]
    assert rows_of(heatmaps(chosen)[0].z) == [[0.22], [0.21]]
    assert "·token6" in last.layout.title.text
    assert "·token4" in chosen.layout.title.text
    curve = alpha_curve(TOKENS, position=4)
    assert [list(trace.y) for trace in curve.data] == [[0.22], [0.21]]
    assert "·token4" in curve.layout.title.text


@pytest.mark.parametrize("draw", [heatmap, alpha_curve])
def test_a_token_that_was_not_read_is_refused(draw: Any) -> None:
    """The tokens of the sweep are listed."""
    with pytest.raises(ValueError, match=r"^position: expected one of \[4, 6\], got 5\. Fix"):
        draw(TOKENS, position=5)


GRID = result_of(
    reading(5, 1, 0.10, target_layer=3),
    reading(5, 9, 0.50, target_layer=3),
    reading(5, 1, 0.40, target_layer=0),
    reading(5, 9, 0.30, target_layer=0),
    reading(2, 1, 0.20, target_layer=3),
    reading(2, 9, NAN, target_layer=3),
    reading(2, 1, NAN, target_layer=0),
    reading(2, 9, NAN, target_layer=0),
)


@pytest.mark.parametrize("draw", [heatmap, alpha_curve])
def test_several_target_layers_need_a_choice(draw: Any) -> None:
    """One picture cannot show two target layers in one cell: the message names both ways out."""
    with pytest.raises(
        ValueError,
        match=r"^target_layer: expected one of \[0, 3\], got None\. "
        r"Fix: choose one, or .*heatmap\(result, x='target_layer'\)",
    ):
        draw(GRID)
    with pytest.raises(ValueError, match=r"^target_layer: expected one of \[0, 3\], got 2\. Fix"):
        draw(GRID, target_layer=2)


def test_one_of_several_target_layers_is_drawn() -> None:
    """The chosen target layer's cells are shown and no other's."""
    assert rows_of(heatmaps(heatmap(GRID, target_layer=3))[0].z) == [[0.20, None], [0.10, 0.50]]
    assert rows_of(heatmaps(heatmap(GRID, target_layer=0))[0].z) == [[None, None], [0.40, 0.30]]
    curve = alpha_curve(GRID, target_layer=0, layers=[5])
    assert list(curve.data[0].y) == [0.40, 0.30]


def test_a_grid_of_layers_shows_the_best_amplifier_of_each_cell() -> None:
    """Source layer x target layer: the best score over α, and hovering says which α it was."""
    figure = heatmap(GRID, x="target_layer")
    (panel,) = heatmaps(figure)
    assert (list(panel.y), list(panel.x)) == (["2", "5"], ["0", "3"])
    assert rows_of(panel.z) == [[None, 0.20], [0.40, 0.50]]
    assert "α = 9" in panel.customdata[1][1]
    assert "→ layer 3" in panel.customdata[1][1]
    assert "α = 1" in panel.customdata[1][0]
    assert figure.layout.xaxis.title.text == "target layer"
    assert marks(figure, "no description") == [("x", "0", "2")]


def test_a_grid_of_another_value_still_shows_the_best_amplifier() -> None:
    """The α of a cell is the best-scoring one, also where its norm is drawn."""
    figure = heatmap(GRID, x="target_layer", value="norm_ratio")
    (panel,) = heatmaps(figure)
    assert panel.z[1][0] == pytest.approx(0.6)  # layer 5, target 0: α = 1 scores best
    assert panel.z[1][1] == pytest.approx(1.4)  # layer 5, target 3: α = 9 scores best


def test_the_same_target_layer_leaves_most_of_the_grid_uncomputed() -> None:
    """Patching each layer into itself fills the diagonal."""
    result = result_of(reading(5, 1, 0.5, target_layer=5), reading(2, 1, 0.2, target_layer=2))
    figure = heatmap(result, x="target_layer")
    assert rows_of(heatmaps(figure)[0].z) == [[0.2, None], [None, 0.5]]
    assert marks(figure, "not computed") == [("x", "5", "2"), ("x", "2", "5")]
    assert rows_of(heatmaps(heatmap(result))[0].z) == [[0.2], [0.5]]


def test_an_unknown_axis_is_refused() -> None:
    """Only α and the target layer can run along the horizontal axis."""
    with pytest.raises(
        ValueError, match=r"^x: expected 'alpha' or 'target_layer', got layer\. Fix"
    ):
        heatmap(MAP, x="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [heatmap, alpha_curve])
def test_an_empty_result_cannot_be_drawn(draw: Any) -> None:
    """A sweep that was stopped before its first batch says that, not something about a column."""
    with pytest.raises(
        ValueError, match=r"^result: expected at least one cell, got an empty table"
    ):
        draw(result_of())


def test_the_curve_has_a_line_per_layer_from_low_to_high_alpha() -> None:
    """Layers ascend, points run from the lowest α to the highest, missing scores are gaps."""
    figure = alpha_curve(MAP)
    assert [trace.name for trace in figure.data] == ["layer 2", "layer 5"]
    assert [list(trace.x) for trace in figure.data] == [[1, 3, 9], [1, 3, 9]]
    assert [list(trace.y) for trace in figure.data] == [[0.10, None, 0.30], [0.20, 0.70, 0.40]]
    assert figure.layout.xaxis.title.text == "α"
    assert figure.layout.yaxis.title.text == "score"
    assert figure.layout.title.text == (
        "Red Hot Chili Peppers · mini · resid_post of token <b>·token6</b>"
    )
    assert figure.data[1].customdata[1].startswith("<b>resid_post 5 x 3</b>")
    assert figure.data[1].customdata[2].startswith("<b>resid_post 5 x 9</b>")
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
    ("arguments", "message"),
    [
        ({"kind": "attn_out"}, r"^kind: expected one of \['mlp_out', 'resid_post'\], got attn_out"),
        ({"layers": [5, 3]}, r"^source_layer: expected one of \[2, 5\], got 3"),
    ],
)
def test_a_curve_of_what_was_not_read_is_refused(arguments: dict[str, Any], message: str) -> None:
    """A kind or layer outside the sweep lists what there is."""
    with pytest.raises(ValueError, match=message):
        alpha_curve(MAP, **arguments)


def test_drawing_does_not_change_the_table() -> None:
    """The functions are pure: the table is the same after every picture."""
    before = MAP.table.copy(deep=True)
    heatmap(MAP, value="norm_ratio")
    heatmap(MAP, x="target_layer")
    alpha_curve(MAP)
    assert MAP.table.equals(before)


@pytest.mark.parametrize("draw", [heatmap, alpha_curve])
def test_the_file_opens_offline_and_runs_no_generated_code(tmp_path: Path, draw: Any) -> None:
    """One HTML file holds plotly itself, loads nothing, and keeps generated text inert."""
    result = result_of(reading(5, 3, 0.7, description=EVIL), reading(2, 3, NAN))
    path = write_html(draw(result), tmp_path / "map.html")
    assert path == tmp_path / "map.html"
    page = path.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith(("<html", "<!doctype html"))
    assert "plotly.js v" in page
    assert len(page) > 1_000_000
    assert (
        re.search(r"""<(script|link|img|iframe)[^>]*\s(src|href)=["']?(https?:)?//""", page) is None
    )
    assert 'src="http' not in page
    assert "<script>alert" not in page
    assert "alert(" in page  # it is there, as text


def test_several_figures_share_one_copy_of_plotly(tmp_path: Path) -> None:
    """A page of two figures draws both, is hardly larger than one of one, and has a safe title."""
    one = write_html(heatmap(MAP), tmp_path / "one.html").read_text(encoding="utf-8")
    two = write_html(
        [heatmap(MAP), alpha_curve(MAP)], tmp_path / "two.html", title=f"A & B {EVIL}"
    ).read_text(encoding="utf-8")
    assert one.count("Plotly.newPlot(") + 1 == two.count("Plotly.newPlot(")
    assert len(two) < 1.1 * len(one)
    assert one.count("plotly.js v") == two.count("plotly.js v") == 1
    assert f"<title>{html.escape('A & B ' + EVIL)}</title>" in two
    assert "<title>Superscopes</title>" in one
    assert "<script>alert" not in two
