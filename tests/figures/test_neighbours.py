"""Figures of the neighbouring methods show the numbers of their tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from superscopes_tl import LanguageModel, Site
from superscopes_tl.figures import (
    effect_heatmap,
    lens_heatmap,
    lens_kl_curve,
    next_token_curve,
    next_token_grid,
    side_by_side_table,
)
from superscopes_tl.neighbours import (
    LOGIT_LENS,
    PATCHED,
    NextTokens,
    causal_effects,
    lens_kl,
    lens_label,
    lens_table,
)
from tests.conftest import tiny_model
from tests.support.readings import rows_of


def found(
    targets: dict[int, tuple[int, ...]], *, texts: int = 3, alphas: tuple[float, ...] = (1.0,),
    kinds: tuple[str, ...] = ("resid_post",),
) -> NextTokens:  # fmt: skip
    """Return an evaluation; a patched cell hits at `text < source layer − target layer`."""
    rows = [
        {"prompt": f"text {text}", "position": 1, "token": "t", "method": method, "kind": kind,
         "source_layer": layer, "target_layer": target, "alpha": alpha, "own": "a",
         "predicted": "b", "hit": method == PATCHED and text < layer - target,
         "surprisal": float(layer + target)}
        for method in (PATCHED, "random_direction")
        for kind in kinds
        for layer, into in targets.items()
        for target in into
        for alpha in alphas
        for text in range(texts)
    ]  # fmt: skip
    rows += [
        {**row, "method": LOGIT_LENS, "target_layer": pd.NA, "alpha": np.nan, "hit": True}
        for row in rows
        if row["method"] == PATCHED
    ]
    return NextTokens(
        pd.DataFrame(rows).astype({"target_layer": "Int64"}), {"model": {"name": "<i>m</i>"}}
    )


def test_a_curve_has_a_line_and_intervals_per_method() -> None:
    """Precision@1 over source layers, and the distance of each end of its interval."""
    evaluation = found({5: (4,), 2: (1,)})
    figure = next_token_curve(evaluation)
    lines = {line.name: line for line in figure.data}
    assert list(lines) == ["patched", "random direction", "logit lens"]
    assert list(lines["patched"].y) == pytest.approx([1 / 3, 1 / 3])
    assert list(lines["patched"].x) == [2, 5]
    assert list(lines["random direction"].y) == [0, 0]
    assert list(lines["logit lens"].y) == [1, 1]
    row = evaluation.summary().iloc[0]
    assert lines["patched"].error_y.array[0] == row["precision_high"] - row["precision"]
    assert lines["patched"].error_y.arrayminus[0] == row["precision"] - row["precision_low"]
    assert "resid_post of layer 2 → layer 1, α = 1" in lines["patched"].customdata[0]
    assert "→" not in lines["logit lens"].customdata[0]
    assert "&lt;i&gt;m&lt;/i&gt;" in figure.layout.title.text
    assert list(next_token_curve(evaluation, value="surprisal").data[0].y) == [3, 9]


def test_one_text_has_no_interval() -> None:
    """None where there is no number: plotly cannot send NaN."""
    line = next_token_curve(found({5: (4,)}, texts=1)).data[0]
    assert list(line.error_y.array) == [None]
    assert "[" not in line.customdata[0]


def test_a_curve_of_several_cells_per_layer_asks_for_one() -> None:
    """Target layer, α and kind have to be chosen where there are several."""
    evaluation = found({5: (4, 1), 2: (4, 1)})
    with pytest.raises(ValueError, match="^target_layer: "):
        next_token_curve(evaluation)
    assert list(next_token_curve(evaluation, target_layer=1).data[0].y) == pytest.approx([1 / 3, 1])
    with pytest.raises(ValueError, match="^alpha: "):
        next_token_curve(found({5: (4,)}, alphas=(1.0, 3.0)))
    with pytest.raises(ValueError, match="^kind: "):
        next_token_curve(found({5: (4,)}, kinds=("mlp_out", "resid_post")))
    with pytest.raises(ValueError, match="^value: "):
        next_token_curve(evaluation, value="score")  # type: ignore[arg-type]


def test_a_grid_of_next_tokens_leaves_out_what_was_not_computed() -> None:
    """Source layer x target layer of one method, None where there is no cell."""
    evaluation = found({5: (4, 1), 2: (1,)})
    (panel,) = next_token_grid(evaluation).data
    assert (list(panel.x), list(panel.y)) == (["1", "4"], ["2", "5"])
    assert rows_of(panel.z) == [[pytest.approx(1 / 3), None], [1.0, pytest.approx(1 / 3)]]
    assert panel.customdata[0][1] == "not computed"
    (panel,) = next_token_grid(evaluation, value="surprisal", method="random_direction").data
    assert rows_of(panel.z) == [[3.0, None], [6.0, 9.0]]
    with pytest.raises(ValueError, match="^method: "):
        next_token_grid(evaluation, method=LOGIT_LENS)


@pytest.fixture(scope="module")
def effects(llama: LanguageModel) -> pd.DataFrame:
    """Two kinds, two layers, two tokens."""
    return causal_effects(
        llama,
        "Syria: Country, Pearl Jam",
        kinds=("mlp_out", "resid_post"),
        layers=(5, 2),
        positions=("Syria", -1),
    )


def test_the_figure_shows_layer_by_kind(effects: pd.DataFrame) -> None:
    """The rightmost token, a column per kind, the smallest layer at the bottom."""
    trace = effect_heatmap(effects).data[0]
    last = effects[effects["position"] == effects["position"].max()]
    of = last.set_index(["source_layer", "kind"])["effect"]
    assert list(trace.x) == ["mlp_out", "resid_post"]
    assert list(trace.y) == ["2", "5"]
    for line, layer in zip(trace.z, (2, 5), strict=True):
        assert list(line) == [of[layer, kind] for kind in trace.x]


def test_the_figure_shows_layer_by_token(effects: pd.DataFrame) -> None:
    """A panel per kind on one colour scale; what is not there is None, never NaN."""
    part = effects.drop(index=0).assign(kl=[float("nan"), *effects["kl"][2:]])
    figure = effect_heatmap(part, x="position", value="kl", color_range=(0, 3))
    assert [list(trace.x) for trace in figure.data] == [
        [str(at) for at in part["position"].unique()]
    ] * 2
    assert figure.data[0].z[1][0] is None  # no row
    assert figure.data[0].z[0][0] is None  # NaN
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 3)
    assert len(figure.layout.xaxis.ticktext) == 2


def test_the_figure_escapes_what_a_model_wrote(effects: pd.DataFrame) -> None:
    """Token, continuation, reading and prompt are text, not markup."""
    bad = "<img src=x>"
    table = effects.assign(
        token=bad, top_tokens=bad, prompt=bad, continuation=bad, description=bad, alpha=3.0
    )
    for x in ("kind", "position"):
        shown = effect_heatmap(table, x=x).to_json()  # type: ignore[arg-type]
        assert "<img" not in shown
        assert "\\u003cimg" not in shown
        assert "&lt;img" in shown


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({"x": "alpha"}, "x"), ({"value": "token"}, "value"), ({"position": 99}, "position")],
)
def test_effects_that_are_not_there_are_refused(
    settings: dict[str, Any], argument: str, effects: pd.DataFrame
) -> None:
    """Nothing is drawn that is not in the table."""
    with pytest.raises(ValueError, match=f"^{argument}: "):
        effect_heatmap(effects, **settings)
    with pytest.raises(ValueError, match="^effects: "):
        effect_heatmap(pd.concat([effects, effects]))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A tiny model."""
    return tiny_model("llama", "bridge")


@pytest.fixture(scope="module")
def table(model: LanguageModel) -> pd.DataFrame:
    """What two lenses read at layers out of order, at three tokens."""
    sites = [
        Site(kind, layer, position)
        for position in (4, 1, 3)
        for kind in ("resid_post", "mlp_out")
        for layer in (5, 2)
    ]
    return lens_table(model, "Red Hot Chili Peppers", sites, top_k=3)


def first(table: pd.DataFrame, **at: object) -> pd.Series:
    """Return the most likely token's row of one cell."""
    for column, value in at.items():
        table = table[table[column] == value]
    return table[table["rank"] == 1].iloc[0]


def test_each_cell_shows_its_most_likely_token_and_probability(table: pd.DataFrame) -> None:
    """Layer x position, one panel per lens with its control; the hover has all the tokens."""
    figure = lens_heatmap(table)
    assert [a.text for a in figure.layout.annotations] == [LOGIT_LENS, lens_label(LOGIT_LENS, True)]
    assert len(figure.data) == 2
    assert figure.data[0].y == ("2", "5")
    labels = table.drop_duplicates("position").set_index("position")["token"]
    assert figure.layout.xaxis.ticktext == tuple(labels[[1, 3, 4]])
    for panel, control in zip(figure.data, (False, True), strict=True):
        for row, layer in enumerate((2, 5)):
            for column, position in enumerate((1, 3, 4)):
                at = {"position": position, "kind": "resid_post", "source_layer": layer}
                cell = first(table, control=control, **at)
                assert panel.z[row][column] == pytest.approx(cell["probability"])
                assert f"{cell['probability']:.3f}" in panel.customdata[row][column]
                assert panel.customdata[row][column].count("<br>") == 3
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_kinds_can_run_along_the_axis(table: pd.DataFrame) -> None:
    """Layer x kind of one token, of the chosen lens."""
    figure = lens_heatmap(table, x="kind", position=3, lenses=[LOGIT_LENS], controls=False)
    (panel,) = figure.data
    assert list(panel.x) == ["resid_post", "mlp_out"]
    cell = first(table, position=3, kind="mlp_out", source_layer=5, control=False)
    assert panel.z[1][1] == pytest.approx(cell["probability"])
    latest = lens_heatmap(table, x="kind").data[0].z
    assert latest == lens_heatmap(table, x="kind", position=4).data[0].z


def test_cells_that_were_not_read_are_empty(table: pd.DataFrame) -> None:
    """A missing site is None, not NaN, and says so."""
    part = table[~((table["position"] == 3) & (table["source_layer"] == 5))]
    (panel,) = lens_heatmap(part, lenses=[LOGIT_LENS], controls=False).data
    assert panel.z[1][1] is None
    assert panel.customdata[1][1] == "not computed"
    assert panel.text[1][1] == ""


def test_tokens_cannot_bring_markup_into_a_figure(table: pd.DataFrame) -> None:
    """Tokens, prompts and names of lenses are escaped; white space and long tokens stay legible."""
    nasty = table.assign(top_token="<b>x", token="<i>y", lens="<s>z", prompt="<u>w")
    figure = lens_heatmap(nasty)
    page = figure.to_json()
    for markup in ("<b>x", "<i>y", "<s>z", "<u>w"):
        assert markup not in page.replace("\\u003c", "<").replace("\\u003e", ">")
    assert ">&lt;b&gt;x<" in figure.data[0].text[0][0]
    for token, shown in (("\n", r"'\n'"), (" Syria", "Syria"), (" ", "' '"), ("Mediterranean", "")):
        text = lens_heatmap(table.assign(top_token=token)).data[0].text[0][0]
        expected = shown or "Mediterr…"
        assert text.replace("&#x27;", "'").endswith(f">{expected}</span>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "layer"}, "x"),
        ({"kind": "attn_out"}, "kind"),
        ({"x": "kind", "position": 2}, "position"),
        ({"lenses": ["tuned lens"]}, "lens"),
    ],
)
def test_what_the_table_does_not_have_is_refused(
    change: dict[str, object], message: str, table: pd.DataFrame
) -> None:
    """Bad choices are refused by name, and several prompts."""
    with pytest.raises(ValueError, match=f"^{message}: "):
        lens_heatmap(table, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^table: "):
        lens_heatmap(pd.concat([table, table.assign(prompt="Syria")]))


def test_the_divergence_is_drawn_over_layers(model: LanguageModel) -> None:
    """A line per lens and kind; a control is dashed in its lens's colour."""
    found = lens_kl(model, ["Red Hot", "Syria"], kinds=("mlp_out", "resid_post"), layers=(5, 2))
    figure = lens_kl_curve(found)
    assert len(figure.data) == 4
    lines = {line.name: line for line in figure.data}
    line = lines[f"{LOGIT_LENS}, resid_post"]
    assert line.x == (2, 5)
    of = found[~found["control"] & (found["kind"] == "resid_post")]
    assert list(line.y) == of.sort_values("source_layer")["kl"].tolist()
    control = lines[f"{lens_label(LOGIT_LENS, True)}, resid_post"]
    assert (control.line.dash, line.line.dash) == ("dash", "solid")
    assert control.line.color == line.line.color


def test_the_table_of_a_site_is_drawn_as_it_is() -> None:
    """A line per method; generated text is escaped, what has no number is empty."""
    table = pd.DataFrame(
        {
            "method": ["Patchscopes", "logit lens"], "description": ["<script>", "a"],
            "alpha": [1.0, np.nan], "target_layer": pd.array([5, pd.NA], "Int64"),
            "tries": pd.array([1, pd.NA], "Int64"), "score": [0.25, np.nan],
            "control": [0.5, np.nan],
        }
    )  # fmt: skip
    cells = side_by_side_table(table).data[0].cells["values"]
    assert [column[0] for column in cells] == [
        "Patchscopes", "&lt;script&gt;", "1", "5", "1", "0.25", "0.50"
    ]  # fmt: skip
    assert [column[1] for column in cells] == ["logit lens", "a", "", "", "", "", ""]
