"""Figures of lenses: what is drawn is what the table says."""

from __future__ import annotations

import pandas as pd
import pytest

from superscopes_tl import LanguageModel, Site
from superscopes_tl.figures import lens_heatmap, lens_kl_figure
from superscopes_tl.neighbours import LOGIT_LENS, lens_kl, lens_table
from superscopes_tl.neighbours.lenses import control_name
from tests.conftest import tiny_model


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
    """Return the likeliest token's row of one cell."""
    for column, value in at.items():
        table = table[table[column] == value]
    return table[table["rank"] == 1].iloc[0]


def test_each_cell_shows_its_likeliest_token_and_probability(table: pd.DataFrame) -> None:
    """Layer x position, one panel per lens with its control; the hover has all the tokens."""
    figure = lens_heatmap(table)
    assert [a.text for a in figure.layout.annotations] == [LOGIT_LENS, control_name(LOGIT_LENS)]
    assert len(figure.data) == 2
    assert figure.data[0].y == ("2", "5")
    labels = table.drop_duplicates("position").set_index("position")["token"]
    assert figure.layout.xaxis.ticktext == tuple(labels[[1, 3, 4]])
    for panel, lens in zip(figure.data, (LOGIT_LENS, control_name(LOGIT_LENS)), strict=True):
        for row, layer in enumerate((2, 5)):
            for column, position in enumerate((1, 3, 4)):
                at = {"position": position, "kind": "resid_post", "source_layer": layer}
                cell = first(table, lens=lens, **at)
                assert panel.z[row][column] == pytest.approx(cell["probability"])
                assert f"{cell['probability']:.3f}" in panel.customdata[row][column]
                assert panel.customdata[row][column].count("<br>") == 3
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_kinds_can_run_along_the_axis(table: pd.DataFrame) -> None:
    """Layer x kind of one token, of the chosen lens."""
    figure = lens_heatmap(table, x="kind", position=3, lenses=[LOGIT_LENS])
    (panel,) = figure.data
    assert figure.layout.xaxis.ticktext == ("resid_post", "mlp_out")
    cell = first(table, position=3, kind="mlp_out", source_layer=5, lens=LOGIT_LENS)
    assert panel.z[1][1] == pytest.approx(cell["probability"])
    latest = lens_heatmap(table, x="kind").data[0].z
    assert latest == lens_heatmap(table, x="kind", position=4).data[0].z


def test_positions_are_told_apart_where_tokens_repeat(model: LanguageModel) -> None:
    """Two equal tokens are two columns with one label."""
    sites = [Site("resid_post", 5, position) for position in (1, 2)]
    table = lens_table(model, "Syria Syria", sites, top_k=1, control=False)
    assert table["token"].nunique() == 2  # "Syria" and "·Syria"
    same = lens_heatmap(table.assign(token="Syria"))
    assert same.layout.xaxis.ticktext == ("Syria", "Syria")
    assert len(same.data[0].z[0]) == 2


def test_cells_that_were_not_read_are_empty(table: pd.DataFrame) -> None:
    """A missing site is None, not NaN, and says so."""
    part = table[~((table["position"] == 3) & (table["source_layer"] == 5))]
    (panel,) = lens_heatmap(part, lenses=[LOGIT_LENS]).data
    assert panel.z[1][1] is None
    assert panel.customdata[1][1] == "not read"
    assert panel.text[1][1] == ""


def test_tokens_cannot_bring_markup_into_a_figure(table: pd.DataFrame) -> None:
    """Tokens, prompts and names of lenses are escaped; white space and long tokens stay legible."""
    nasty = table.assign(top_token="<b>x", token="<i>y", lens="<s>z", prompt="<u>w")
    figure = lens_heatmap(nasty)
    page = figure.to_json()
    for markup in ("<b>x", "<i>y", "<s>z", "<u>w"):
        assert markup not in page.replace("\\u003c", "<").replace("\\u003e", ">")
    assert figure.data[0].text[0][0] == "&lt;b&gt;x"
    for token, shown in (("\n", r"'\n'"), (" Syria", "Syria"), (" ", "' '"), ("Mediterranean", "")):
        text = lens_heatmap(table.assign(top_token=token)).data[0].text[0][0]
        expected = shown or "Mediterr…"
        assert text.replace("&#x27;", "'") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "layer"}, "x: expected 'position' or 'kind'"),
        ({"kind": "attn_out"}, "kind: expected one of"),
        ({"x": "kind", "position": 2}, "position: expected one of"),
        ({"lenses": ["tuned lens"]}, "lens: expected one of"),
    ],
)
def test_what_the_table_does_not_have_is_refused(
    change: dict[str, object], message: str, table: pd.DataFrame
) -> None:
    """The message names what there is."""
    with pytest.raises(ValueError, match=f"{message}.*Fix: "):
        lens_heatmap(table, **change)  # type: ignore[arg-type]


def test_several_prompts_are_refused(table: pd.DataFrame) -> None:
    """Positions of two prompts do not go into one figure."""
    both = pd.concat([table, table.assign(prompt="Syria")])
    with pytest.raises(ValueError, match="table: expected rows of one prompt.*Fix: draw one"):
        lens_heatmap(both)


def test_the_divergence_is_drawn_over_layers(model: LanguageModel) -> None:
    """A line per lens and kind; a control is dashed in its lens's colour."""
    found = lens_kl(model, ["Red Hot", "Syria"], kinds=("mlp_out", "resid_post"), layers=(5, 2))
    figure = lens_kl_figure(found)
    assert len(figure.data) == 4
    lines = {line.name: line for line in figure.data}
    line = lines[f"{LOGIT_LENS}, resid_post"]
    assert line.x == (2, 5)
    of = found[(found["lens"] == LOGIT_LENS) & (found["kind"] == "resid_post")]
    assert list(line.y) == of.sort_values("source_layer")["kl"].tolist()
    control = lines[f"{control_name(LOGIT_LENS)}, resid_post"]
    assert (control.line.dash, line.line.dash) == ("dash", "solid")
    assert control.line.color == line.line.color
