"""What was measured, as a table, as JSON and as a figure."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superscopes_tl import write_html
from superscopes_tl.files import written_whole
from tests.benchmarks.measure import Row
from tests.benchmarks.roofline import Roofline

LIBRARIES = ("torch", "transformers", "transformer_lens")


@dataclass(frozen=True)
class Report:
    """The result of one run.

    Attributes:
        size: the name of the model or of its size.
        title: what the model is.
        rows: what was measured of each way; those that write cells out come first.
        limit: the name of the way that is the limit.
        roofline: what arithmetic alone would allow.
        dtype: number type of the weights.
        device: where it ran.
        threads: of a CPU.
        rounds: of which the median counts.
        batch_size: cells per batch.
        peak_memory: bytes.
        map_memory: bytes that the map takes at most above the loaded model.
        equal: the share of compared texts that are equal.
        notes: which ways are absent, and why.
    """

    size: str
    title: str
    rows: Sequence[Row]
    limit: str
    roofline: Roofline
    dtype: str
    device: str
    threads: int
    rounds: int
    batch_size: int
    peak_memory: int
    map_memory: int
    equal: float
    notes: Sequence[str] = ()

    @property
    def groups(self) -> list[list[Row]]:
        """The rows, those that are held against the same one together."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.against)]

    @property
    def setting(self) -> str:
        """What was measured where, in a line."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        where = threads if self.device == "cpu" else self.device
        rounds = "one round" if self.rounds == 1 else f"median of {self.rounds} rounds"
        return f"{self.title}, {self.dtype}, {where}, {rounds}"

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "rows": [
                {
                    "name": row.name,
                    "cells_per_second": row.rate,
                    "ratio": row.ratio,
                    "against": row.against,
                    "share_of_arithmetic": row.share,
                }
                for row in self.rows
            ],
            "size": self.size,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "rounds": self.rounds,
            "batch_size": self.batch_size,
            "versions": {name: version(name) for name in LIBRARIES},
            "peak_memory_bytes": self.peak_memory,
            "map_memory_bytes": self.map_memory,
            "roofline": {
                "flop_per_cell": self.roofline.flop_per_cell,
                "flop_per_second": self.roofline.flop_per_second,
                "cells_per_second": self.roofline.cells_per_second,
            },
            "equal_texts": self.equal,
            "notes": list(self.notes),
        }


def table_of(report: Report) -> Table:
    """Return the ways as a table; below those of the first group what arithmetic would allow."""
    table = Table(title=escape(report.setting))
    table.add_column("way", overflow="fold")
    for header in ("per second", "ratio", "of the limit", "of the arithmetic"):
        table.add_column(header, justify="right")
    (limit,) = (row.rate for row in report.rows if row.name == report.limit)
    for group in report.groups:
        writes = group[0].against == report.rows[0].name
        for row in group:
            table.add_row(
                escape(row.name),
                f"{_short(row.rate)} {row.unit}",
                f"{row.ratio:.1f}x",
                f"{row.rate / limit:.0%}" if writes else "",
                f"{row.share:.1%}",
            )
        if writes:
            bound = report.roofline.cells_per_second
            table.add_row(
                "arithmetic alone", f"{_short(bound)} cells", "", f"{bound / limit:.0%}", "100.0%"
            )
        table.add_section()
    return table


def _short(rate: float) -> str:
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"


def lines_of(report: Report) -> list[str]:
    """Return what is to be said below the table."""
    roof = report.roofline
    return [
        f"{report.equal:.1%} of the compared texts are equal, token for token.",
        f"Arithmetic: {roof.flop_per_cell / 1e9:.3g} GFLOP per cell at "
        f"{roof.flop_per_second / 1e9:.3g} GFLOP/s, the speed of a matrix product of "
        f"{report.batch_size} rows; the prompt's common part is not counted.",
        f"Peak memory, all ways together: {report.peak_memory / 2**30:.2f} GiB.",
        *report.notes,
    ]


def rate_figure(report: Report) -> go.Figure:
    """Draw the rates as bars, with a line at what arithmetic alone would allow the first group."""
    colors = {"cells": "#4c78a8", "sites": "#e8a33d"}
    bars = go.Bar(
        x=[row.rate for row in report.rows],
        y=[f"{row.name} (sites/s)" if row.unit == "sites" else row.name for row in report.rows],
        orientation="h",
        text=[f"{_short(row.rate)} ({row.ratio:.1f}x, {row.share:.0%})" for row in report.rows],
        marker_color=[
            "#888888" if row.name == report.limit else colors[row.unit] for row in report.rows
        ],
        hovertemplate="%{y}: %{x:.3g} per second<extra></extra>",
    )
    figure = go.Figure(bars)
    bound, low, high = report.roofline.cells_per_second, -0.5, len(report.groups[0]) - 0.5
    figure.add_shape(
        type="line", x0=bound, x1=bound, y0=low, y1=high, line={"dash": "dash", "width": 1}
    )
    figure.add_annotation(
        x=math.log10(bound), y=low, text="arithmetic alone", showarrow=False, yanchor="bottom"
    )
    figure.update_layout(
        template="plotly_white",
        title=report.setting,
        xaxis={
            "title": "cells per second, or sites/s (ratio, share of the arithmetic)",
            "type": "log",
        },
        yaxis={"autorange": "reversed", "automargin": True},
        height=140 + 50 * len(report.rows),
    )
    return figure


def show(
    report: Report, console: Console, *, json: Path | None = None, html: Path | None = None
) -> list[Path]:
    """Print the report, and write it to the files that are asked for; return these."""
    console.print(table_of(report))
    for line in lines_of(report):
        console.print(line, markup=False)
    if json:
        with written_whole(json) as fresh:
            fresh.write_text(json_format.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    if html:
        write_html(rate_figure(report), html, title="Cells per second")
    return [file for file in (json, html) if file]
