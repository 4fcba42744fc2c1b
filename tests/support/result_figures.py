"""Draw README's pictures of results anew, from the result files alone.

python -m tests.support.result_figures        (needs a Chromium or Chrome on the PATH)

1. `figure_3`: what MLP outputs recover per layer of two models, over the paper's 48 prompts.
2. `headline`: the same over α, of SmolLM2 in its chat form, for the layer that was fixed
   beforehand, over 120 names; `headline_layers`: over layers, for the α that was fixed beforehand.
"""

from __future__ import annotations

import base64
import json
import time

import pandas as pd
import plotly.graph_objects as go

from superscopes_tl import SweepResult
from superscopes_tl.figures import share_curves, share_panels
from superscopes_tl.figures.grid import interval
from superscopes_tl.figures.shares import CURVES
from superscopes_tl.statistics import layer_shares
from tests.support.notebooks import FOLDER, drawing
from tests.support.pictures import IMAGES, record

RESULTS = FOLDER / "results"
MODELS = {"gemma-3-270m_paper": "Gemma-3-270M", "smollm2_paper": "SmolLM2-135M-Instruct"}
LAYER, ALPHA = 8, 6.0
"""Of the claim, fixed before the names were read."""
LABELS = {
    "amplified": "the name's own vector",
    "other_prompt": "six other names' vectors",
    "random_direction": "random directions",
}


def table(name: str) -> pd.DataFrame:
    """Return the readings of a result file."""
    return SweepResult.load(RESULTS / f"{name}.zip").table


def confirmed(chat: pd.DataFrame) -> dict[str, float]:
    """Return the shares of the confirming test, patched into layer 0 as the claim was found."""
    rows = chat[chat["source_layer"] == LAYER]
    (found,) = layer_shares(rows, alpha=ALPHA, target_layer=0).to_dict("records")
    return {str(name): value for name, value in found.items()}


def over_alpha(rows: pd.DataFrame) -> go.Figure:
    """Draw what one layer's MLP output recovers over α, patched into layer 0."""
    alphas = sorted(rows.loc[rows["target_layer"] == 0, "alpha"].unique())
    found = pd.concat([layer_shares(rows, alpha=alpha, target_layer=0) for alpha in alphas])
    figure = go.Figure()
    for name, (_, color, dash) in list(CURVES.items())[1:]:
        figure.add_scatter(
            x=alphas,
            y=found[name],
            name=LABELS[name],
            line={"color": color, "dash": dash},
            error_y=interval(found[name], found[f"{name}_low"], found[f"{name}_high"]),
        )
    return figure.update_layout(
        title=f"SmolLM2-135M-Instruct, chat form: mlp_out of layer {LAYER}, "
        f"{found['prompts'].max()} names, 95 % intervals",
        template="plotly_white",
        xaxis_title="α",
        yaxis_title="share of the model's own words recovered",
        height=420,
        width=860,
    )


def figures() -> dict[str, go.Figure]:
    """Return every picture whose result files are there, by its name."""
    there = {name: title for name, title in MODELS.items() if (RESULTS / f"{name}.zip").is_file()}
    panels = {title: layer_shares(table(name)) for name, title in there.items()}
    found = {"figure_3": share_panels(panels, "mlp_out")}
    chat = table("smollm2_chat")
    found["headline"] = over_alpha(chat[chat["source_layer"] == LAYER])
    if (RESULTS / "smollm2_chat_layers.zip").is_file():
        title = f"SmolLM2-135M-Instruct in its chat form, α = {ALPHA:g}"
        every = layer_shares(table("smollm2_chat_layers"), alpha=ALPHA)
        found["headline_layers"] = share_curves(every, title=title)
    return found


def main() -> None:
    """Draw them."""
    started = time.monotonic()
    with drawing() as draw:
        for name, figure in figures().items():
            path = IMAGES / f"{name}.png"
            path.write_bytes(base64.b64decode(draw(json.loads(figure.to_json()))))
            seconds, started = time.monotonic() - started, time.monotonic()
            record(path, command="make figures", seconds=seconds, source="the stored results")


if __name__ == "__main__":
    main()
