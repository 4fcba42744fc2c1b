"""Shares per layer as curves, for one model and for several."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
import pytest

from superscopes_tl.figures import share_curves, share_panels
from superscopes_tl.statistics import MEASURES


def table(**columns: list[float]) -> pd.DataFrame:
    """Return a `layer_shares` of three layers in which only the second holds."""
    found = pd.DataFrame({"kind": "mlp_out", "source_layer": [2, 0, 1], "target_layer": 0})
    found = found.assign(
        prompts=48, alpha=[6.0, 3.0, 6.0], p=0.01, q=0.02, holds=[False, False, True]
    )
    for name in MEASURES:
        means = pd.Series(columns.get(name, [0.3, 0.1, 0.2]))
        found[name] = means
        found[f"{name}_low"], found[f"{name}_high"] = means - 0.1, means + 0.1
    return found


def line(figure: go.Figure, label: str) -> go.Scatter:
    """Return the first line whose name begins so."""
    return next(trace for trace in figure.data if (trace.name or "").startswith(label))


def test_four_curves_their_bands_and_a_star() -> None:
    """Layers ascend; a band around every line; the star stands over the layer that holds."""
    figure = share_curves(table(amplified=[0.4, 0.5, 0.6]), title="a <b>")
    names = ["unamplified", "amplified, ", "other prompts", "random directions"]
    for name in names:
        assert line(figure, name).x == (0, 1, 2)
    assert line(figure, "amplified, ").y == (0.5, 0.6, 0.4)
    assert sum(trace.fill == "toself" for trace in figure.data) == len(names)
    star = line(figure, "amplified beats")
    assert (star.x, star.y) == ((1,), (pytest.approx(0.75),))
    assert "a &lt;b&gt;" in figure.layout.annotations[0].text
    assert "q = 0.02" in line(figure, "amplified, ").customdata[0]


def test_one_alpha_for_all_layers_is_named() -> None:
    """The legend does not speak of a choice where α was fixed."""
    assert line(share_curves(table().assign(alpha=6.0)), "amplified (α = 6)").x == (0, 1, 2)


def test_curves_far_below_zero_leave_the_picture_with_a_note() -> None:
    """Random directions at -6 do not squash the rest."""
    figure = share_curves(table(random_direction=[-6.25, 0.0, 0.1]))
    assert figure.layout.yaxis.range[0] > -0.6
    head = figure.layout.annotations[0].text
    assert "below the picture: random directions" in head
    assert "6.2" in head
    assert "below" not in share_curves(table()).layout.annotations[0].text


def test_models_stand_side_by_side_on_one_axis() -> None:
    """A panel each; the legend names every curve once; an absent control has no curve."""
    without = table(random_direction=[math.nan] * 3)
    figure = share_panels({"Gemma": table(), "SmolLM2": without}, "mlp_out", title="both")
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert len(shown) == len(set(shown)) == 5
    heads = [note.text.partition("<br>")[0] for note in figure.layout.annotations]
    assert heads == ["Gemma", "SmolLM2"]
    alone = share_panels({"SmolLM2": without, "Gemma": table()})
    assert sum((trace.name or "").startswith("random") and trace.showlegend
               for trace in alone.data) == 1  # fmt: skip


def test_what_cannot_be_one_curve_is_refused() -> None:
    """Several kinds or target layers, and no table."""
    two = pd.concat([table(), table().assign(kind="resid_post")])
    with pytest.raises(ValueError, match="^kind: "):
        share_curves(two)
    with pytest.raises(ValueError, match="^kind: "):
        share_curves(table(), "resid_mid")
    assert len(share_curves(two, "resid_post").data) == len(share_curves(table()).data)
    for shares in ({"": pd.concat([table(), table()])}, {}):
        with pytest.raises(ValueError, match="^shares: "):
            share_panels(shares)
