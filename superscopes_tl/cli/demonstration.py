"""The main job on a real model, with its controls: what `make demo` runs.

1. Read names of many kinds on SmolLM2-135M-Instruct, in the setting that reads it best: each name
   in a sentence, CHAT_PROMPT, target layer 0.
2. Per name and layer print descriptions of block and MLP outputs at α = 1 and at the α that
   recovers most, with the model's own words and the share that other names' vectors recover.
3. List the MLP outputs that only amplification reads, and those that it does not read either.
4. Write heatmaps of the shares recovered, and conclude with hits and misses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from superscopes_tl.cli.experiments import share_table
from superscopes_tl.cli.options import FastLoading, table_of
from superscopes_tl.evaluation import SENTENCE, evaluate
from superscopes_tl.experiment import SweepConfig
from superscopes_tl.figures import heatmap, write_html
from superscopes_tl.model import DEFAULT_MODEL, LanguageModel
from superscopes_tl.scores import above_others, no_scores

NAMES = ("Paris", "Albert Einstein", "Amazon River", "Pink Floyd", "Titanic")
"""One of each kind; the MLP outputs of the last two are known misses."""
HEADLINE = (8, 6.0)
"""The layer and α at which MLP outputs of this model were found to be read, on these names too."""
READ = 0.3
"""A cell reads its name if `read_share` is at least this."""

CONFIG = SweepConfig(
    layers=(4, 8, 16),
    alphas=(1.0, 3.0, 6.0),
    source_template=SENTENCE,
    chat=True,
    target_layer=0,
    max_new_tokens=12,
    controls=("other_prompt",),
    others=2,
    scorer=no_scores,
)


def demo(
    loading: FastLoading,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("output"),
) -> None:
    """Read names of many kinds on SmolLM2-135M-Instruct, with controls, and draw the heatmaps."""
    run_demo(loading.load(DEFAULT_MODEL), output)


def run_demo(
    model: LanguageModel,
    output: Path,
    names: Sequence[str] = NAMES,
    console: Console | None = None,
    config: SweepConfig = CONFIG,
) -> Path:
    """Run the demo; return the path of the page with the heatmaps, in the folder `output`.

    Block outputs are read at α = 1 only.
    """
    console = console or Console(emoji=False)
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    file = output / "demo.sqlite"
    file.unlink(missing_ok=True)  # a demo runs anew; an evaluation would resume
    _print_model(console, model)
    evaluate(model, names, file, config, draws=0, kinds="resid_post", alphas=1)
    found = evaluate(model, names, file, config, draws=0, kinds="mlp_out")
    figures = []
    for name in names:
        result = found.of(name)
        console.print(name_table(result.table))
        figures.append(heatmap(result, value="recovered", color_range=(0.0, 1.0)))
    page = write_html(figures, output / "demo.html", title=f"{model.name}, layer by layer")
    console.print(rescue_table(found.table[found.table["kind"] == "mlp_out"]))
    for kind in ("resid_post", "mlp_out"):
        cells = found.table[found.table["kind"] == kind]
        console.print(share_table(cells, f"Mean over {len(names)} names: recovered by {kind}"))
    console.print(f"\nHeatmaps: [bold]{page}[/bold]; readings: [bold]{file}[/bold]")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")
    console.print(_conclusion(found.table), highlight=False)
    return page


def read_share(table: pd.DataFrame) -> pd.Series[float]:
    """Return the share that each cell recovers above other names' vectors, or above 0."""
    return above_others(table["recovered"], table["other_prompt_recovered"])


def best_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cell of each site that recovers most; among equals the smallest α."""
    order = table.sort_values(["recovered", "alpha"], ascending=[False, True], kind="stable")
    return order.drop_duplicates(["prompt", "kind", "source_layer"])


def name_table(table: pd.DataFrame) -> Table:
    """Return the descriptions of one name per layer."""
    first, plain = table.iloc[0], table[table["alpha"] == 1]
    columns = {
        "block output, α = 1": plain[plain["kind"] == "resid_post"],
        "MLP output, α = 1": plain[plain["kind"] == "mlp_out"],
        "MLP output, best α": best_of(table[table["kind"] == "mlp_out"]),
    }
    rows = [
        [layer, *(_cell(rows[rows["source_layer"] == layer].iloc[0]) for rows in columns.values())]
        for layer in sorted(table["source_layer"].unique())
    ]
    return table_of(
        f"{first['prompt']} · the model's own words: {first['own_words']!r}",
        ["layer", *columns],
        rows,
        "in brackets: α; share of the model's own words recovered / by other names",
    )


def _cell(row: Any) -> Text:
    share = f"{row['recovered']:.2f} / {row['other_prompt_recovered']:.2f}"
    text = str(row["description"]) or "(nothing)"
    return Text.assemble(text, (f" ({row['alpha']:g}; {share})", "dim"))


def rescue_table(mlp: pd.DataFrame) -> Table:
    """Return the MLP outputs that only amplification reads, and those that nothing reads."""
    site = ["prompt", "source_layer"]
    plain = mlp[mlp["alpha"] == 1]
    best = best_of(mlp[mlp["alpha"] != 1])
    best = best.assign(read=read_share(best) >= READ)
    silent = plain[read_share(plain) < READ]
    both = silent[[*site, "description"]].merge(best, on=site, suffixes=("_plain", ""))
    both = both[both["read"] | (both["source_layer"] == HEADLINE[0])]
    both = both.sort_values(["read", "recovered"], ascending=False, kind="stable")
    rows = [
        [
            Text("read", "green") if row["read"] else Text("not read", "red"),
            row["prompt"], row["source_layer"], row["description_plain"], f"{row['alpha']:g}",
            row["description"],
        ]
        for row in both.to_dict("records")
    ]  # fmt: skip
    return table_of(
        f"MLP outputs that are not read at α = 1 ({len(silent)} of {len(plain)}), amplified",
        ("", "name", "layer", "at α = 1", "α", "at that α"),
        rows,
        f"read: recovers at least {READ:g} more of the own words than other names do",
    )


def _conclusion(table: pd.DataFrame) -> str:
    """Return what was found and what was not, in one line."""
    names = table["prompt"].nunique()
    outputs = table[(table["kind"] == "resid_post") & (table["alpha"] == 1)]
    best = outputs.groupby("source_layer")["recovered"].mean()
    layer, alpha = HEADLINE
    mlp = table[(table["kind"] == "mlp_out") & (table["source_layer"] == layer)]
    plain, loud = (mlp[mlp["alpha"] == a] for a in (1.0, alpha))
    if plain.empty or loud.empty:
        return f"Found: block outputs of layer {best.idxmax()} recover {best.max():.2f}."
    hits = [int((read_share(rows) >= READ).sum()) for rows in (plain, loud)]
    missed = loud.loc[read_share(loud) < READ, "prompt"]
    return (
        f"Found: block outputs of layer {best.idxmax()} recover {best.max():.2f} of the model's "
        f"own words at α = 1; MLP outputs of layer {layer} read {hits[0]} of {names} names at "
        f"α = 1 and {hits[1]} at α = {alpha:g}. Not found: "
        + (f"{', '.join(missed)} there, and " if len(missed) else "")
        + f"any claim about names in general: {names} cannot carry it, and layer and α were chosen "
        "on names like these."
    )


def _print_model(console: Console, model: LanguageModel) -> None:
    console.print(f"[bold]{escape(repr(model))}[/bold]")
    if source := model.provenance().get("source"):
        console.print(escape(", ".join(f"{key}: {value}" for key, value in source.items())))
    console.print(
        "Each name is read at its last token in 'Tell me about NAME', amplified by α, and patched "
        "over x in 'What is x?' at layer 0; the model continues from 'It is'.\n"
    )
