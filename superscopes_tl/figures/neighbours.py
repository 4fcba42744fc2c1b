"""Figures of the neighbouring methods.

1. `lens_heatmap`: the most likely token per layer and position or kind, one panel per lens.
   `lens_kl_curve`: the divergence of each lens from the model's final prediction.
2. `effect_heatmap`: effects of ablating or restoring sites, over layers and kinds or tokens.
3. `next_token_curve` and `next_token_grid`: precision@1 or surprisal over source layers, and over
   source layer x target layer (Patchscopes, sections 4.1 and 4.2).
4. `relevancy_heatmap`: the tokens of some readings, coloured by their relevancy.
5. `side_by_side_table`: one site by all methods.
6. `mixture_curve`: what mixtures of two vectors recover of either name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from superscopes_tl.errors import bad_value, check_choice, check_count
from superscopes_tl.experiment import SITE
from superscopes_tl.figures.grid import (
    HOVER,
    SYMBOLS,
    Grid,
    Row,
    check_numeric,
    draw,
    draw_table,
    escape,
    finite,
    interval,
    method_style,
    only,
    shades,
    text_lines,
)
from superscopes_tl.model import EMBED, PatchedLayer, layer_name
from superscopes_tl.neighbours import LOGIT_LENS, PATCHED, Mixture, NextTokens, lens_label

Measure = Literal["precision", "surprisal"]

_MEASURES = {"precision": "precision@1", "surprisal": "surprisal (nats)"}
_LONGEST_TOKEN = 9
"""Characters of a token that fit into a cell."""


def lens_heatmap(
    table: pd.DataFrame,
    *,
    x: Literal["position", "kind"] = "position",
    kind: str | None = None,
    position: int | None = None,
    lenses: Sequence[str] | None = None,
    controls: bool = True,
) -> go.Figure:
    """Draw the most likely token of every cell, coloured by its probability, one panel per lens.

    Hovering over a cell shows all tokens of the table. Cells that were not read stay grey.

    Args:
        table: from `lens_table`; of one prompt.
        x: the column along the horizontal axis.
        kind: which kind, where `x` is "position"; defaults to the first.
        position: which token, where `x` is "kind"; defaults to the rightmost.
        lenses: default to all.
        controls: whether to draw each lens on random directions as well.

    Raises:
        ValueError: several prompts, or a kind, position or lens that the table does not have.
    """
    check_choice("x", x, ("position", "kind"))
    prompts = table["prompt"].unique().tolist()
    if len(prompts) != 1:
        raise bad_value("table", "rows of one prompt", prompts, "draw one prompt at a time")
    if x == "position":
        rows = only(table, "kind", table["kind"].iloc[0] if kind is None else kind)
        what = escape(str(rows["kind"].iloc[0]))
    else:
        rows = only(table, "position", table["position"].max() if position is None else position)
        what = f"token <b>{escape(str(rows['token'].iloc[0]))}</b>"
    rows = only(rows.sort_values("rank", kind="stable"), "lens", lenses)
    rows = rows if controls else rows[~rows["control"]]
    site = ["lens", "control", "kind", "position", "source_layer"]
    tokens = [
        f"{probability:.3f}  {escape(repr(token))}"
        for probability, token in zip(rows["probability"], rows["top_token"], strict=True)
    ]
    hover = rows.assign(tokens=tokens).groupby(site)["tokens"].agg("<br>".join).reset_index()
    first = table.drop_duplicates(site).merge(hover, on=site)
    labels = map(lens_label, first["lens"], first["control"])
    grid = Grid.of(first.assign(label=list(labels)), x=x, panel="label")
    return draw(
        grid,
        "probability",
        lambda row: f"{_site(row)}<br>{row['tokens']}",
        title=f"{escape(prompts[0][:60])} · {what} · most likely next token",
        x_title="token" if x == "position" else "kind",
        color_range=(0, 1),
        text=lambda row: escape(_short(str(row["top_token"]))),
        labels=_tokens(first) if x == "position" else None,
        stacked=x == "position",  # many tokens are wide
        cell_width=64,
    )


def _tokens(rows: pd.DataFrame) -> list[str]:
    """Return the tokens of a table, in the order of their positions."""
    tokens = dict(zip(rows["position"], rows["token"], strict=True))
    return [escape(str(tokens[position])) for position in sorted(tokens)]


def _short(token: str) -> str:
    """Return a token stripped of white space, or its repr if nothing else is left."""
    shown = token.strip() if token.strip().isprintable() and token.strip() else repr(token)
    return shown if len(shown) <= _LONGEST_TOKEN else f"{shown[: _LONGEST_TOKEN - 1]}…"


def _site(row: Row) -> str:
    place = f"{row['kind']} of layer {row['source_layer']}, token {row['token']}"
    return escape(place)


def lens_kl_curve(table: pd.DataFrame) -> go.Figure:
    """Draw what `lens_kl` returned over layers, a line per lens and kind; controls are dashed."""
    names = list(dict.fromkeys(table["lens"]))
    colors = dict(zip(names, shades(len(names), last=0.75), strict=True))
    kinds = list(dict.fromkeys(table["kind"]))
    figure = go.Figure()
    which = ["lens", "control", "kind"]
    for at in table[which].drop_duplicates().to_dict("records"):
        line = table[(table[which] == pd.Series(at)).all(axis=1)].sort_values("source_layer")
        label = lens_label(at["lens"], at["control"])
        figure.add_scatter(
            x=line["source_layer"].tolist(),
            y=[finite(value) for value in line["kl"]],
            name=escape(f"{label}, {at['kind']}" if len(kinds) > 1 else label),
            mode="lines+markers",
            line={"color": colors[at["lens"]], "dash": "dash" if at["control"] else "solid"},
            marker_symbol=SYMBOLS[kinds.index(at["kind"]) % len(SYMBOLS)],
        )
    return figure.update_layout(
        title="How far a lens is from the model's final prediction",
        template="plotly_white",
        xaxis={"title": "source layer", "dtick": 1},
        yaxis={"title": "KL(final ‖ lens), nats per token", "rangemode": "tozero"},
    )


def effect_heatmap(
    effects: pd.DataFrame,
    *,
    x: Literal["kind", "position"] = "kind",
    value: str = "effect",
    position: int | None = None,
    color_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw the effect of each site, source layer x kind or token.

    Args:
        effects: from `causal_effects`, `causal_trace` or `beside`; one row per site.
        x: "kind" for all kinds at one token, or "position" for all tokens, one panel per kind.
        value: the numeric column to colour by.
        position: the token, where `x` is "kind"; defaults to the rightmost one.
        color_range: the values of the darkest and the lightest colour.

    Raises:
        ValueError: another `x`, a column or token that is not there, or several rows per site.
    """
    check_choice("x", x, ("kind", "position"))
    check_numeric(effects, value)
    if position is None and x == "kind":
        position = effects["position"].max()
    rows = only(effects, "position", position)
    if rows.empty or rows.duplicated(["kind", "source_layer", "position"]).any():
        raise bad_value(
            "effects", "one row per kind, layer and token", f"{len(rows)} rows",
            "draw one prompt, replacement and reading per site at a time",
        )  # fmt: skip
    grid = Grid.of(rows, x=x, panel="kind" if x == "position" else None)
    return draw(
        grid,
        value,
        _effect_hover,
        title=_effect_title(rows, x),
        x_title="token" if x == "position" else "kind",
        color_range=color_range,
        labels=_tokens(rows) if x == "position" else None,
        cell_width=46 if x == "position" else 150,
    )


def _effect_hover(row: Row) -> str:
    lines = [
        _site(row),
        f"effect {row['effect']:+.3f} nats (control {row['control_effect']:+.3f})",
        f"KL {row['kl']:.3f} nats (control {row['control_kl']:.3f})",
    ]
    if "top_tokens" in row:
        lines.append(f"top tokens: {text_lines(row['top_tokens'], 60)}")
    if "description" in row:
        lines.append(f"read as: {text_lines(row['description'], 60)} (α = {row['alpha']:g})")
    return "<br>".join(lines)


def _effect_title(rows: pd.DataFrame, x: str) -> str:
    first = rows.iloc[0]
    ablated = "replacement" in rows
    done = f"replaced by {first['replacement']}" if ablated else f"restored ({first['corruption']})"
    at = f" · token <b>{escape(str(first['token']))}</b>" if x == "kind" else ""
    text = text_lines(f"{first['prompt']} →{first['continuation']}", 50)
    return f"{text}{at}<br><sub>{text_lines(done, 70)}</sub>"


def next_token_curve(
    found: NextTokens,
    *,
    value: Measure = "precision",
    kind: str | None = None,
    alpha: float | None = None,
    target_layer: PatchedLayer | None = None,
) -> go.Figure:
    """Draw precision@1 or surprisal over source layers, one line per method.

    Args:
        found: from `next_tokens`.
        value: what to draw.
        kind: which kind, if there are several.
        alpha: which α, if there are several.
        target_layer: which target layer, if there are several per source layer.

    Raises:
        ValueError: something that was not computed, or several to choose from.
    """
    rows = _one_cell(found, value, kind, alpha)
    lens = rows["method"] == LOGIT_LENS
    into = EMBED if target_layer == "embed" else target_layer
    rows = pd.concat([only(rows[~lens], "target_layer", into), rows[lens]])
    if rows.duplicated(["method", "source_layer"]).any():
        raise _several("target_layer", rows["target_layer"])
    figure = go.Figure()
    lines = rows.sort_values("source_layer", kind="stable").groupby("method", sort=False)
    for rank, method in enumerate(dict.fromkeys(rows["method"])):
        line = lines.get_group(method)
        color, symbol = method_style(rank)
        figure.add_scatter(
            x=line["source_layer"].tolist(),
            y=[finite(v) for v in line[value]],
            error_y=interval(line[value], line[f"{value}_low"], line[f"{value}_high"]),
            name=escape(method.replace("_", " ")),
            mode="lines+markers",
            line_color=color,
            marker_symbol=symbol,
            customdata=[_next_hover(row) for row in line.to_dict("records")],
            hovertemplate=HOVER,
        )
    return figure.update_layout(
        title=_next_title(found, rows),
        template="plotly_white",
        xaxis={"title": "source layer", "dtick": 1},
        yaxis={"title": _MEASURES[value], "rangemode": "tozero"},
    )


def next_token_grid(
    found: NextTokens,
    *,
    value: Measure = "precision",
    method: str = PATCHED,
    kind: str | None = None,
    alpha: float | None = None,
) -> go.Figure:
    """Draw precision@1 or surprisal of one method over source layer x target layer.

    Arguments as in `next_token_curve`; `method` is "patched" or a control.

    Raises:
        ValueError: something that was not computed, or several to choose from.
    """
    rows = _one_cell(found, value, kind, alpha)
    rows = only(rows[rows["target_layer"].notna()], "method", method)
    grid = Grid.of(rows, x="target_layer")
    return draw(
        grid,
        value,
        _next_hover,
        title=f"{_next_title(found, rows)} · {escape(method)}",
        x_title="target layer",
        labels=[str(layer_name(layer)) for layer in grid.xs],
        name=_MEASURES[value],
    )


def _one_cell(
    found: NextTokens, value: Measure, kind: str | None, alpha: float | None
) -> pd.DataFrame:
    """Return a summary's rows of one kind and α; the logit lens has no α."""
    check_choice("value", value, tuple(_MEASURES))
    rows = only(found.summary(), "kind", kind)
    lens = rows["method"] == LOGIT_LENS
    patched = only(rows[~lens], "alpha", alpha)
    for name in ("kind", "alpha"):
        if patched[name].nunique() > 1:
            raise _several(name, patched[name])
    return pd.concat([patched, rows[lens]])


def _several(column: str, there: pd.Series) -> ValueError:
    values = sorted(there.dropna().unique().tolist())
    return bad_value(column, f"one of {values}", None, "choose one, or draw next_token_grid")


def _next_hover(row: Row) -> str:
    where = f"{escape(row['kind'])} of layer {row['source_layer']}"
    if row["method"] != LOGIT_LENS:
        where += f" → layer {layer_name(row['target_layer'])}, α = {row['alpha']:g}"
    numbers = []
    for name, title in _MEASURES.items():
        low, high = finite(row[f"{name}_low"]), row[f"{name}_high"]
        ends = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        numbers.append(f"{title} {row[name]:.3f}{ends}")
    method = escape(row["method"].replace("_", " "))
    return "<br>".join([f"<b>{method}</b>", where, *numbers, f"{row['prompts']} prompts"])


def _next_title(found: NextTokens, rows: pd.DataFrame) -> str:
    model = escape(str(found.provenance.get("model", {}).get("name", "unknown model")))
    return f"next token · {model} · {escape(str(rows['kind'].iloc[0]))}"


def relevancy_heatmap(table: pd.DataFrame, *, tokens: int = 16) -> go.Figure:
    """Draw the tokens of some readings, coloured by their relevancy.

    Args:
        table: from `relevancy`, of a few cells: each is a line.
        tokens: how many tokens of each text to draw.
    """
    check_count("tokens", tokens, least=1, fix="16 is the default")
    table = table[table["step"] < tokens]
    if table.empty:
        raise bad_value("table", "tokens", "none", "pass cells that generated a text")
    number = table.groupby([*SITE, "alpha"], sort=False).ngroup()
    cells = [
        f"{i}: {row['kind']} of layer {row['source_layer']} → layer "
        f"{layer_name(row['target_layer'])}, "
        f"α = {row['alpha']:g}"
        for i, row in zip(number, table.to_dict("records"), strict=True)
    ]
    prompts = escape(", ".join(dict.fromkeys(table["prompt"])))
    figure = draw(
        Grid.of(table.assign(cell=[escape(cell) for cell in cells]), x="step", y="cell"),
        "relevancy",
        lambda row: f"{escape(row['generated_token'])}<br>{row['relevancy']:.2f}",
        title=f"{prompts} · p(token | patched) − p(token | unpatched)",
        x_title="token of the text",
        y_title="",
        color_range=(-1, 1),
        text=lambda row: escape(row["generated_token"]),
        cell_width=56,
        color_scale="RdBu",
    )
    return figure.update_yaxes(autorange="reversed", automargin=True)


def cells_of(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the table of `side_by_side` as text, columns by header."""

    def numbers(column: str, form: str) -> list[str]:
        return ["" if pd.isna(cell) else format(cell, form) for cell in table[column]]

    return {
        "method": [str(cell) for cell in table["method"]],
        "reading": [str(cell) for cell in table["description"]],
        "α": numbers("alpha", "g"),
        "into": ["" if pd.isna(n) else str(layer_name(n)) for n in table["target_layer"]],
        "tries": numbers("tries", "d"),
        "score": numbers("score", ".2f"),
        "random": numbers("control", ".2f"),
    }


def side_by_side_table(table: pd.DataFrame, *, title: str = "One site, all methods") -> go.Figure:
    """Draw what `side_by_side` returned as a table."""
    columns = {
        name: [text_lines(cell, 60, empty="") for cell in cells]
        for name, cells in cells_of(table).items()
    }
    return draw_table(columns, [220, 390, 50, 50, 50, 50, 70], escape(title))


def mixture_curve(found: Mixture) -> go.Figure:
    """Draw what mixtures of two vectors recover over a: a color per name, a dash per way to mix."""
    table, figure = found.table, go.Figure()
    for way, dash in zip(dict.fromkeys(table["vectors"]), ("solid", "dash", "dot"), strict=True):
        line = table[table["vectors"] == way]
        for number, name in enumerate(found.prompts):
            color, symbol = method_style(number)
            figure.add_scatter(
                x=line["share"].tolist(),
                y=[finite(value) for value in line[f"recovered_{number + 1}"]],
                name=escape(f"{name}, {way}"),
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker_symbol=symbol,
                customdata=[text_lines(text, 60) for text in line["text"]],
                hovertemplate=HOVER,
            )
    first, second = map(escape, found.prompts)
    return figure.update_layout(
        title=f"{first} and {second} in one vector",
        template="plotly_white",
        xaxis={"title": f"a, the share of {first}"},
        yaxis={"title": "recovered of the own words of"},
    )
