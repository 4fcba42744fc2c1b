"""The map and the selected cell, without a browser: widgets are plain objects."""

from __future__ import annotations

import gzip
import html
import math
import re
from importlib.resources import files

import plotly.graph_objects as go
import pytest

from superscopes_tl import Explorer, LanguageModel, SweepConfig, SweepResult, sweep
from superscopes_tl.experiment import Cell
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.cell import ControlReading, LensReading, Probe
from superscopes_tl.explorer.live_map import Axes, SharedFigureWidget
from superscopes_tl.figures import MARKS, Shades
from superscopes_tl.model import EMBED
from superscopes_tl.neighbours import TokenEffect
from tests.explorer.conftest import PROMPT, WAIT, heatmaps, marked, numbers
from tests.support.scorers import by_length

ATTACKS = ("<script>", "<img", "<b>&</b>")


def test_click_cursors_and_python_select_the_same_cell(ran: Explorer) -> None:
    """Each way leads to the same selection, panel and outline."""
    from plotly.callbacks import InputDeviceState, Points

    figure = ran.view.stage.children[0]
    trace = next(t for t in heatmaps(ran) if t.meta == "mlp_out")
    points = Points(point_inds=[[1, 1]], xs=["3"], ys=["1"], trace_name="", trace_index=3)
    trace._dispatch_on_click(points, InputDeviceState())
    clicked = ran.selection
    assert clicked is not None
    assert clicked == Cell(clicked.position, "mlp_out", 1, 1, 3.0)
    assert "data-cell='mlp_out/1/3'" in ran.view.detail.value
    ran.view.layer.value = 2
    ran.view.kind.value = "resid_post"
    ran.view.alpha.value = 1.0
    assert "data-cell='resid_post/2/1'" in ran.view.detail.value
    assert ran.select(kind="mlp_out", layer=1, alpha=3) == clicked
    assert (ran.view.kind.value, ran.view.layer.value, ran.view.alpha.value) == ("mlp_out", 1, 3.0)
    shape = figure.layout.shapes[0]
    assert (shape.xref, shape.x0, shape.y0) == ("x2", 0.5, 0.5)
    with pytest.raises(ValueError, match="^selection:"):
        ran.select(alpha=2)
    with pytest.raises(ValueError, match="^select:"):
        ran.select(row=1)


def test_the_panel_shows_text_ladder_controls_and_token_effects(ran: Explorer) -> None:
    """What the panel says is what the table and the model say."""
    ran.select(kind="resid_post", layer=1, alpha=3)
    assert ran.wait(WAIT)
    table = ran.result.table  # type: ignore[union-attr]
    row = table[[Cell.of(r) == ran.selection for r in table.itertuples()]].iloc[0]
    assert f"{row['norm_ratio']:.2f}" in ran.view.detail.value
    assert ran.view.ladder.value.count("<tr") == 3  # head and two α
    for control in ("unpatched", "random direction of equal norm"):
        assert f">{control}</th>" in ran.view.probe.value
    assert ran.view.probe.value.count("powers of ten") == 2 * row["n_tokens"]


def test_views(ran: Explorer) -> None:
    """Best α is the table of `by_layer`; the decomposition shows the three kinds."""
    view = ran.view
    view.show.value = "best"
    assert view.stage.children[1].value.count("<tr>") == 1 + ran.model.n_layers  # type: ignore[union-attr]
    view.best_alpha.value = 1.0
    assert "α = 1" in view.stage.children[1].value
    view.show.value = "parts"
    assert all(kind in view.stage.children[0].value for kind in view.kinds if kind[0] == "m")
    view.show.value = "all"
    assert numbers(ran) == sorted(ran.result.table["score"].dropna())  # type: ignore[union-attr]


def test_pins_stay_for_comparison(ran: Explorer) -> None:
    """Two pinned cells stand side by side until they are cleared."""
    for layer in (0, 1):
        ran.select(kind="mlp_out", layer=layer, alpha=1)
        ran.view.pin.click()
    assert [reading.source_layer for reading in ran.pins] == [0, 1]
    assert ran.view.pins.value.count("<article>") == 2
    ran.view.unpin.click()
    assert (ran.pins, ran.view.pins.value) == ([], "")


def test_a_saved_grid_has_cursors_for_token_and_target(
    model: LanguageModel, config: SweepConfig
) -> None:
    """Several tokens and target layers: one map at a time, chosen by the cursors."""
    result = sweep(
        model, PROMPT, alphas=(1, 2), positions=(1, 2), target_layer=(0, 2), scorer=by_length,
        max_new_tokens=2, progress=False,
    )  # fmt: skip
    shown = Explorer(result=result)
    assert shown.view.position.layout.display == shown.view.into.layout.display == ""
    shown.view.into.value = 2
    shown.view.position.value = 1
    chosen = shown.selection
    assert (chosen.position, chosen.target_layer) == (1, 2)  # type: ignore[union-attr]
    assert "target layer 2" in shown.view.caption.value
    shown.view.show.value = "best"
    table = result.table[(result.table["target_layer"] == 2) & (result.table["position"] == 1)]
    expected = SweepResult(table, result.provenance).by_layer()["mlp_out"]["score"]
    scores = re.findall(r"ssx-chip[^>]*>([^<]*)<", shown.view.stage.children[1].value)
    assert scores[1::3] == ["–" if math.isnan(s) else f"{s:.2f}" for s in expected]


def test_the_map_shows_what_is_recovered_until_score_is_chosen(best: Explorer) -> None:
    """Colours, range and title are of the chosen column; cells without a text are marked."""
    table = best.result.table  # type: ignore[union-attr]
    assert numbers(best) == sorted(table["recovered"])
    scale = best.view.stage.children[0].layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (0, 1, "recovered")
    assert [marked(best, name) for name in MARKS] == [0, 0, 0, 0]
    best.view.colour.value = "score"
    assert numbers(best) == sorted(table["score"].dropna())
    assert (scale.cmin, scale.colorbar.title.text) == (0, "score")
    assert marked(best, "not written out") == (~table["written"]).sum() == 4
    assert "– not written out" in best.view.caption.value


def test_the_best_cell_is_that_of_the_shown_column(best: Explorer) -> None:
    """A result opens at the cell that recovers most, with own words and shares of controls."""
    table = best.result.table  # type: ignore[union-attr]
    row = table.loc[table["recovered"].idxmax()]
    opened = Explorer(result=best.result)  # type: ignore[arg-type]
    assert opened.selection == Cell.of(row)
    shown = opened.view.detail.value
    assert f"<bdi>{html.escape(row['own_words'])}</bdi>" in shown
    for name in ("recovered", "other_prompt_recovered", "random_direction_recovered", "specific"):
        assert f">{row[name]:.2f}</span>" in shown


def test_a_cell_that_was_not_written_says_so(best: Explorer) -> None:
    """It has its share and no text, in the panel, in the ladder and under the mouse."""
    table = best.result.table  # type: ignore[union-attr]
    row = table[~table["written"]].iloc[0]
    saved = Explorer(result=best.result)  # type: ignore[arg-type]
    saved.select(kind=row["kind"], layer=row["source_layer"], alpha=row["alpha"])
    for shown in (saved.view.detail.value, saved.view.ladder.value):
        assert "<i>not written out</i>" in shown
        assert f">{row['recovered']:.2f}</span>" in shown
    assert "<i>no description</i>" not in saved.view.detail.value
    assert "without a model: no text" in saved.view.probe.value
    hover = [text for trace in heatmaps(saved) for line in trace.customdata for text in line]
    assert sum("(not written out)" in text for text in hover) == (~table["written"]).sum()


def test_every_view_takes_the_shown_column(best: Explorer) -> None:
    """Best α of each site, and cells at one α that have no text."""
    table = best.result.table  # type: ignore[union-attr]
    best.view.show.value = "best"
    for column in ("score", "recovered"):
        best.view.colour.value = column
        top = best.result.best(by=column)  # type: ignore[union-attr,arg-type]
        assert all(f"{v:.2f}</span>" in best.view.stage.children[1].value for v in top[column])
    best.view.best_alpha.value = 6.0
    unwritten = (~table[table["alpha"] == 6]["written"]).sum()
    assert best.view.stage.children[1].value.count("not written out") == unwritten


def test_a_finished_run_shows_its_layer_and_its_caveats(best: Explorer) -> None:
    """The line is that of the shown token; caveats are the result's own; a saved one agrees."""
    result = best.result
    assert result is not None
    shown = best.view.findings.value
    assert f"layer {result.contextualization_layer().layer}" in shown
    assert shown.count("<li>") == len(result.caveats) <= 3
    assert Explorer(result=result).view.findings.value == shown


def test_undefined_shares_leave_the_score(shared: Explorer) -> None:
    """Where nothing is recovered the map shows the score, until the reader chooses."""
    result = shared.result
    assert result is not None
    table = result.table.assign(recovered=math.nan, score=0.4, description="x")
    shown = Explorer(result=SweepResult(table, result.provenance))
    assert shown.view.colour.value == "score"
    shown.view.colour.value = "recovered"
    assert marked(shown, "not defined") == len(table)
    assert "◇ not defined" in shown.view.caption.value
    nothing = table.assign(score=math.nan, written=False)
    shown = Explorer(result=SweepResult(nothing, result.provenance))
    assert shown.view.colour.value == "recovered"
    assert marked(shown, "not defined") == len(table)
    assert shown.selection is not None


def test_text_from_outside_is_escaped(ran: Explorer) -> None:
    """Neither a prompt nor a generated text can bring markup into the page."""
    table = ran.result.table.assign(  # type: ignore[union-attr]
        description="<img src=x>", text="<b>&</b>", own_words="<b>&</b>", about="<b>&</b>",
        prompt="<script>alert(1)</script>", token="<b>&</b>",
    )  # fmt: skip
    provenance = {**ran.result.provenance, "prompt": "<script>alert(1)</script>"}  # type: ignore[union-attr]
    shown = Explorer(result=SweepResult(table, provenance))
    shown.pin()
    view, stages = shown.view, []
    for name in ("best", "parts"):
        view.show.value = name
        stages.append(view.stage.children[-1].value)
    view.show.value = "all"
    nasty = Probe(
        tokens=(TokenEffect("<img src=x>", -1.0, -2.0),),
        controls=(ControlReading("<b>&</b>", "<b>&</b>", "<img src=x>", 0.1),),
        lenses=(LensReading("<b>&</b>", (("<img src=x>", 0.5), ("\n", 0.25))),),
    )
    probed = markup.render("probe", nasty, Shades())
    assert "<bdi>&#39;\\n&#39;</bdi></code> <small>0.25" in probed, "white space is named"
    widgets = (view.detail, view.ladder, view.code, view.pins, view.caption, view.findings)
    hover = [text for trace in heatmaps(shown) for row in trace.customdata for text in row]
    alert = markup.alert(RuntimeError("<b>&</b>"))
    for page in (*(w.value for w in widgets), *stages, *hover, probed, alert):
        assert "&lt;" in page
        assert not [attack for attack in ATTACKS if attack in page]


def test_a_reloaded_page_gets_the_present_figure(ran: Explorer) -> None:
    """The state that a page reads when it is opened holds the numbers, not the empty start."""
    state = ran.view.stage.children[0].get_state()
    kept = [list(row) for row in state["_widget_data"][0]["z"]]
    assert kept == [list(row) for row in heatmaps(ran)[0].z]
    assert any(number is not None for row in kept for number in row)
    assert state["_widget_layout"]["shapes"]


def test_a_target_layer_may_be_named_as_in_a_sweep() -> None:
    """The name "embed" is the input embedding, "same" the source layer; each is found again."""
    several = Axes(("mlp_out",), (2, 5), (1.0,), (3,), (EMBED, 4))
    cells = [several.cell("mlp_out", 5, 1.0, 3, into) for into in ("embed", EMBED, 4)]
    assert [cell.target_layer for cell in cells] == [EMBED, EMBED, 4]
    assert [several.target_of(cell) for cell in cells] == [EMBED, EMBED, 4]
    assert all(map(several.have, cells))
    same = Axes(("mlp_out",), (2, 5), (1.0,), (3,), ("same",))
    assert same.cell("mlp_out", 5, 1.0, 3, "same").target_layer == 5


def test_figures_share_plotlys_own_script_at_a_third_of_its_size() -> None:
    """What the page unpacks is the installed plotly's script; what it waits for is short."""
    script = files("plotly").joinpath("package_data", "widgetbundle.js").read_bytes()
    line = go.Scatter(x=[1, 2], y=[3, 4])
    first, second = SharedFigureWidget(), SharedFigureWidget(line)
    sent = first.get_state()["_script"]
    assert gzip.decompress(sent) == script
    assert len(sent) < len(script) / 3
    assert second.get_state()["_script"] is sent
    assert len(str(first.get_state()["_esm"])) < 4000
    assert isinstance(second, go.FigureWidget)
