"""The Explorer's HTML: pure functions from data to a piece of markup.

Every text that a model wrote or a user typed is escaped; `bdi` keeps right-to-left text from
turning the rest around. Colours that carry a value are cividis, with black or white on them,
whichever contrasts more; everything else takes its colour from the style sheet.
"""

from __future__ import annotations

import html
import math
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from plotly.colors import sample_colorscale

from superscopes_tl.experiment import Cell, Reading, SweepResult
from superscopes_tl.explorer.cell import Control, LensReading, Probe
from superscopes_tl.figures import COLOR_SCALE, MARKS, USUAL_SCORES, Shades, at_target, unsaid
from superscopes_tl.model import PAPER_KINDS
from superscopes_tl.neighbours import TokenEffect


def status(text: str, *, state: str, run: int) -> str:
    """Return the line that says how the run is; scripts wait on its `data-` attributes."""
    return (
        f"<div role='status' aria-live='polite' data-state='{state}' data-run='{run}'>"
        f"{html.escape(text)}</div>"
    )


def alert(error: BaseException, *, state: str = "failed", run: int = 0) -> str:
    """Return a message that a screen reader announces, with the traceback to unfold."""
    trace = "".join(traceback.format_exception(error))
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return (
        f"<div role='alert' class='ssx-alert' data-state='{state}' data-run='{run}'>"
        f"<b>{html.escape(name)}</b>{html.escape(str(error))}"
        f"<details><summary>traceback</summary><pre>{html.escape(trace)}</pre></details></div>"
    )


def note(text: str) -> str:
    """Return a quiet remark."""
    return f"<div class='ssx-note'>{html.escape(text)}</div>"


def chip(value: float, shades: Shades) -> str:
    """Return a number on its colour."""
    if math.isnan(value):
        return f"<span class='ssx-chip ssx-none' title='no {shades.column}'>–</span>"
    style = _coloured(value, shades.low, shades.high)
    return f"<span class='ssx-chip' style='{style}'>{value:.2f}</span>"


def _said(description: str, written: bool) -> str:
    """Return a description escaped, or why there is none."""
    nothing = "no description" if written else "not written out"
    return f"<bdi>{html.escape(description) or f'<i>{nothing}</i>'}</bdi>"


def caption(result: SweepResult, token: str, target: int | str, marks: Sequence[str]) -> str:
    """Return what the heatmaps show, and what their marks mean."""
    model = result.provenance.get("model", {}).get("name", "unknown model")
    prompt = str(result.provenance.get("prompt", ""))
    shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
    into = "the same layer" if target == "same" else f"layer {target}"
    legend = ", ".join(f"{MARKS[name][1]} {name}" for name in marks)
    return (
        f"<div class='ssx-caption'><b><bdi>{html.escape(shown)}</bdi></b> · token <code><bdi>"
        f"{html.escape(token)}</bdi></code> · into {into} · {html.escape(str(model))}"
        f"{f'<span class=ssx-note> · {legend}</span>' if legend else ''}</div>"
    )


def findings(layer: str, doubts: Sequence[str]) -> str:
    """Return what a finished sweep says of itself: its contextualization layer, its doubts."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in doubts)
    found = f"<div class='ssx-layer'><bdi>{html.escape(layer)}</bdi></div>" if layer else ""
    doubtful = f"<div class='ssx-doubts'>Doubtful:<ul>{lines}</ul></div>" if lines else ""
    return f"<div role='note'>{found}{doubtful}</div>" if found or doubtful else ""


def detail(reading: Reading | None, selection: Cell | None, shades: Shades) -> str:
    """Return the selected cell: where it is, what was read, the whole text."""
    if selection is None:
        return note("Click a cell, or move the cursors below, to read it here.")
    place = (
        f"{html.escape(selection.kind)} · layer {selection.source_layer} → "
        f"{selection.target_layer} · α {selection.alpha:g}"
    )
    cell = f"{selection.kind}/{selection.source_layer}/{selection.alpha:g}"
    head = f"<div class='ssx-cell' data-cell='{html.escape(cell)}' aria-live='polite'>"
    if reading is None:
        return f"{head}<b>{place}</b>{note('not computed')}</div>"
    flags = "".join(
        f"<li>{text}</li>"
        for text, there in (
            ("repeats the name", reading.echo),
            ("repeats a name of the target prompt", reading.few_shot_copy),
            ("a close call: another batch size may write another text", reading.margin < 5e-5),
        )
        if there
    )
    whole = (
        f"<details><summary>whole text ({reading.n_tokens} tokens)</summary>"
        f"<pre><bdi>{html.escape(reading.text)}</bdi></pre></details>"
    )
    return (
        f"{head}<b>{place}</b>"
        f"<blockquote>{_said(reading.description, reading.written)}</blockquote>"
        f"<dl>{''.join(_numbers(reading, shades))}</dl>"
        f"{f'<ul>{flags}</ul>' if flags else ''}{whole if reading.written else ''}</div>"
    )


_CONTROL_SHARES = {
    "other_prompt_recovered": "other prompts recover",
    "random_direction_recovered": "a random vector recovers",
    "specific": "specific",
}


def _numbers(reading: Reading, shades: Shades) -> Iterator[str]:
    """Yield what is known of a cell as terms and definitions, the shown column first."""
    shares = Shades("recovered")
    own = f"<dt>own words</dt><dd><bdi>{html.escape(reading.own_words)}</bdi></dd>"
    scores = shades if shades.column == "score" else Shades("score", *USUAL_SCORES)
    score = f"<dt>score</dt><dd>{chip(reading.score, scores)}</dd>" if reading.written else ""
    recovered = f"<dt>recovered</dt><dd>{chip(reading.recovered, shares)}</dd>"
    yield from (recovered, score) if shades.column == "recovered" else (score, recovered)
    yield own if reading.own_words else ""
    for name, label in _CONTROL_SHARES.items():
        if name in reading.controls:
            yield f"<dt>{label}</dt><dd>{chip(float(reading.controls[name]), shares)}</dd>"
    yield f"<dt>‖α·v‖ / residual norm</dt><dd>{reading.norm_ratio:.2f}</dd>"


def ladder(rows: pd.DataFrame, alpha: float, shades: Shades) -> str:
    """Return the site's readings at all α as a small table."""
    body = "".join(
        f"<tr{' aria-current=true' if row['alpha'] == alpha else ''}><th scope='row'>"
        f"{row['alpha']:g}</th><td>{row['norm_ratio']:.2f}</td>"
        f"<td>{chip(row[shades.column], shades)}</td>"
        f"<td>{_said(row['description'], row['written'])}</td></tr>"
        for row in rows.to_dict("records")
    )
    return (
        "<table class='ssx-table'><caption>This site at every α</caption><thead><tr>"
        "<th scope='col'>α</th><th scope='col' title='norm of α·v over the residual norm'>norm"
        f"</th><th scope='col'>{shades.column}</th><th scope='col'>reading</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def probe(found: Probe, shades: Shades) -> str:
    """Return the controls of a cell and the tokens of its text, coloured by the patch's effect."""
    controls = "".join(
        f"<tr><th scope='row'>{html.escape(c.name)}</th><td>{chip(_of(c, shades), shades)}</td>"
        f"<td>{_said(c.description, True)}</td></tr>"
        for c in found.controls
    )
    tokens = "".join(map(_token, found.tokens))
    return (
        "<div data-probe='done'><table class='ssx-table'><caption>Without this vector</caption>"
        f"<tbody>{controls}</tbody></table>"
        "<div class='ssx-sub'>How much the patch raised each token</div>"
        f"<p class='ssx-text'>{tokens}</p>{_legend()}{_lenses(found) if found.lenses else ''}</div>"
    )


def _lenses(found: Probe) -> str:
    """Return the likeliest next tokens by every lens."""
    return (
        "<table class='ssx-table'><caption>The next token, as lenses read this site"
        "<span class='ssx-note'> · v itself: the final norm takes a positive α away</span>"
        f"</caption><tbody>{''.join(map(_lens, found.lenses))}</tbody></table>"
    )


def _lens(reading: LensReading) -> str:
    """Return a row: a lens and the tokens that it names, each with its probability."""
    named = " ".join(
        f"<span><code><bdi>{html.escape(token if token.isprintable() else repr(token))}</bdi>"
        f"</code> <small>{probability:.2f}</small></span>"
        for token, probability in reading.tokens
    )
    return f"<tr><th scope='row'>{html.escape(reading.lens)}</th><td>{named}</td></tr>"


def _token(effect: TokenEffect) -> str:
    change = f"{effect.raised:+.1f} powers of ten"
    title = (
        f"probability {_probability(effect.patched)} with the patch, "
        f"{_probability(effect.unpatched)} without ({change})"
    )
    return (
        f"<span tabindex='0' title='{title}' aria-label='{html.escape(effect.token, quote=True)}: "
        f"{change}' style='{_coloured(effect.raised, 0, 4)}'>{html.escape(effect.token)}</span>"
    )


def _legend() -> str:
    steps = "".join(
        f"<span style='{_coloured(power, 0, 4)}'>{label}</span>"
        for power, label in ((0, "×1"), (1, "×10"), (2, "×100"), (4, "×10⁴ or more"))
    )
    return f"<div class='ssx-legend'>{steps}</div>"


def _probability(log: float) -> str:
    return f"{math.exp(log):.2g}"


def pins(pinned: Sequence[tuple[Cell, Reading, str]], shades: Shades) -> str:
    """Return the pinned cells side by side; each comes with its source prompt's token."""
    cards = "".join(
        f"<article><b>{html.escape(s.kind)} · layer {s.source_layer} → {s.target_layer} · "
        f"α {s.alpha:g}</b>{chip(_of(reading, shades), shades)}"
        f"<blockquote>{_said(reading.description, reading.written)}</blockquote>"
        f"<span class='ssx-note'><bdi>{html.escape(reading.prompt)}</bdi> · token "
        f"<code>{html.escape(token)}</code></span></article>"
        for s, reading, token in pinned
    )
    return f"<div class='ssx-cards' aria-label='Pinned cells'>{cards}</div>" if pinned else ""


def best(
    result: SweepResult,
    shades: Shades,
    *,
    alpha: float | None,
    position: int | None,
    target_layer: int | None = None,
) -> str:
    """Return the reading of each layer and kind at one α or the best (Figures 5 and 6)."""
    by: Any = shades.column
    wide = at_target(result, target_layer).by_layer(alpha=alpha, position=position, by=by)
    kinds = list(wide.columns.get_level_values(0).unique())
    head = "".join(f"<th scope='col'>{html.escape(kind)}</th>" for kind in kinds)
    body = "".join(
        f"<tr><th scope='row'>{layer}</th>"
        + "".join(
            _best_cell(row[kind], unsaid(result, kind, layer, row[kind]), shades) for kind in kinds
        )
        + "</tr>"
        for layer, (_, row) in zip(map(int, wide.index), wide.iterrows(), strict=True)
    )
    title = "Best α of every site" if alpha is None else f"α = {alpha:g}"
    return (
        f"<table class='ssx-table ssx-best'><caption>{title}</caption><thead><tr>"
        f"<th scope='col'>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _best_cell(cell: pd.Series, nothing: str, shades: Shades) -> str:
    if pd.isna(cell["alpha"]):
        return "<td class='ssx-note'>not computed</td>"
    return (
        f"<td>{chip(float(cell[shades.column]), shades)} <small>α {cell['alpha']:g}</small><br>"
        f"<bdi>{html.escape(str(cell['description'])) or f'<i>{nothing}</i>'}</bdi></td>"
    )


def parts(result: SweepResult, selection: Cell, shades: Shades) -> str:
    """Return resid_mid + mlp_out = resid_post of one layer, each with its readings (Figure 1)."""
    table = result.table
    there = table[
        (table["source_layer"] == selection.source_layer)
        & (table["position"] == selection.position)
        & (table["target_layer"] == selection.target_layer)
    ]
    cards = []
    for kind, sign in zip(PAPER_KINDS, ("", "+", "="), strict=True):
        rows = there[there["kind"] == kind].sort_values(shades.column, ascending=False)
        if sign:
            cards.append(f"<div class='ssx-sign' aria-hidden='true'>{sign}</div>")
        cards.append(f"<article><b>{kind}</b>{_part(rows, shades)}</article>")
    return (
        f"<div class='ssx-sub'>Layer {selection.source_layer}: what goes into the MLP, what it "
        f"adds, and what comes out</div><div class='ssx-parts'>{''.join(cards)}</div>"
    )


def _part(rows: pd.DataFrame, shades: Shades) -> str:
    if rows.empty:
        return note("not computed")
    best_alpha = rows["alpha"].iloc[0]
    chosen = {1.0: "unamplified", best_alpha: "best"}
    if best_alpha == 1:
        chosen = {1.0: "unamplified, and best"}
    return "".join(
        f"<div class='ssx-part'>{chip(float(row[shades.column]), shades)} "
        f"<small>α {alpha:g}, {name}</small>"
        f"<blockquote>{_said(row['description'], row['written'])}</blockquote></div>"
        for alpha, name in chosen.items()
        for row in rows[rows["alpha"] == alpha].head(1).to_dict("records")
    )


def _of(cell: Reading | Control, shades: Shades) -> float:
    """Return the shown number of a cell."""
    return cell.recovered if shades.column == "recovered" else cell.score


def _coloured(value: float, low: float, high: float) -> str:
    """Return the style of a value's colour, with the text colour that contrasts more."""
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    colour: str = sample_colorscale(COLOR_SCALE, [share])[0]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (float(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(","))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # 0.179 is where black and white contrast equally, both above 4.5 : 1.
    return f"background:{colour};color:{'#000' if luminance > 0.179 else '#fff'}"
