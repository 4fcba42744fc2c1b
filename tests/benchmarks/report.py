"""What was measured, as a table, as JSON and as a figure."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superscopes_tl import write_html
from superscopes_tl.files import written_whole
from tests.benchmarks.roofline import Roofline

LIBRARIES = ("torch", "transformers", "transformer_lens")


@dataclass(frozen=True)
class Report:
    """The result of one run.

    Attributes:
        size: the name of the model's size.
        title: what the model is.
        rates: cells per second of each way; the first is what the others are held against.
        limit: the name of the way that is the limit.
        roofline: what arithmetic alone would allow.
        dtype: number type of the weights.
        device: where it ran.
        threads: of a CPU.
        rounds: of which the median counts.
        batch_size: cells per batch.
        peak_memory: bytes.
        equal: the share of compared texts that are equal.
        notes: which ways are absent, and why.
    """

    size: str
    title: str
    rates: dict[str, float]
    limit: str
    roofline: Roofline
    dtype: str
    device: str
    threads: int
    rounds: int
    batch_size: int
    peak_memory: int
    equal: float
    notes: Sequence[str] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Each way's rate over the first one's."""
        first = next(iter(self.rates.values()))
        return {name: rate / first for name, rate in self.rates.items()}

    @property
    def setting(self) -> str:
        """What was measured where, in a line."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        where = threads if self.device == "cpu" else self.device
        return f"{self.title}, {self.dtype}, {where}, median of {self.rounds} rounds"

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "rows": [
                {"name": name, "cells_per_second": rate, "ratio": self.ratios[name]}
                for name, rate in self.rates.items()
            ],
            "size": self.size,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "rounds": self.rounds,
            "batch_size": self.batch_size,
            "versions": {name: version(name) for name in LIBRARIES},
            "peak_memory_bytes": self.peak_memory,
            "roofline": {
                "flop_per_cell": self.roofline.flop_per_cell,
                "flop_per_second": self.roofline.flop_per_second,
                "cells_per_second": self.roofline.cells_per_second,
            },
            "equal_texts": self.equal,
            "notes": list(self.notes),
        }


def table_of(report: Report) -> Table:
    """Return the ways as a table; the last row is what arithmetic alone would allow."""
    table = Table(title=escape(report.setting))
    table.add_column("way", overflow="fold")
    for header in ("cells/s", "ratio", "of the limit", "of the arithmetic"):
        table.add_column(header, justify="right")
    bound, limit = report.roofline.cells_per_second, report.rates[report.limit]
    rows = {**report.rates, "arithmetic alone": bound}
    first = next(iter(report.rates.values()))
    for name, rate in rows.items():
        if name == "arithmetic alone":
            table.add_section()
        table.add_row(
            escape(name),
            f"{rate:.3g}" if rate < 100 else f"{rate:.0f}",
            f"{rate / first:.1f}x",
            f"{rate / limit:.0%}",
            f"{rate / bound:.1%}",
        )
    return table


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
    """Draw cells per second as bars, with a line at what arithmetic alone would allow."""
    names = list(report.rates)
    bars = go.Bar(
        x=list(report.rates.values()),
        y=names,
        orientation="h",
        text=[f"{rate:.3g} ({report.ratios[name]:.1f}x)" for name, rate in report.rates.items()],
        marker_color=["#888888" if name == report.limit else "#4c78a8" for name in names],
        hovertemplate="%{y}: %{x:.3g} cells/s<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.add_vline(
        x=report.roofline.cells_per_second, line_dash="dash", annotation_text="arithmetic alone"
    )
    figure.update_layout(
        template="plotly_white",
        title=report.setting,
        xaxis={"title": "cells per second", "type": "log"},
        yaxis={"autorange": "reversed", "automargin": True},
        height=140 + 50 * len(names),
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
