"""The script of plotly's widget: what a figure sends to the page."""

from __future__ import annotations

import gzip
from importlib.resources import files

import plotly.graph_objects as go

from superscopes_tl.explorer.live_map import LiveCurve
from superscopes_tl.explorer.plotly_widget import SharedFigureWidget, packed_script


def test_a_figure_sends_plotlys_own_script_at_a_third_of_its_size() -> None:
    """What the page unpacks is the installed plotly's script, byte for byte."""
    script = files("plotly").joinpath("package_data", "widgetbundle.js").read_bytes()
    sent = SharedFigureWidget().get_state(["_script"])["_script"]
    assert gzip.decompress(sent) == script
    assert len(sent) < len(script) / 3


def test_what_begins_a_figure_is_short() -> None:
    """The script that anywidget waits for holds no plotly."""
    assert len(SharedFigureWidget().get_state(["_esm"])["_esm"]) < 3500
    assert isinstance(LiveCurve().widget, SharedFigureWidget)


def test_two_figures_share_one_packed_script() -> None:
    """It is compressed once a process, not once a figure."""
    first, second = SharedFigureWidget(), SharedFigureWidget(go.Scatter(y=[1]))
    assert first._script is second._script is packed_script()


def test_it_is_a_figure_like_plotlys() -> None:
    """Traces, layout and the state that a page reads are those of a FigureWidget."""
    line = go.Scatter(x=[1, 2], y=[3, 4])
    shared, plain = SharedFigureWidget(line), go.FigureWidget(line)
    shared.update_layout(height=150)
    plain.update_layout(height=150)
    assert isinstance(shared, go.FigureWidget)
    assert shared.to_dict()["layout"] == plain.to_dict()["layout"]
    assert shared._widget_data[0]["y"] == plain._widget_data[0]["y"]
