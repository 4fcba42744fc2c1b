"""The Explorer's widgets: what there is to see and to touch, and where it stands.

1. `View` makes the controls, in the order in which a reader uses them: what to read, how to run
   it, what came out, one cell of it, what to keep.
2. It knows layout and labels, no model and no sweep; `explorer.Explorer` gives it meaning.

Every control is an ordinary form element with a label, so the keyboard and a screen reader reach
it; cells are chosen by a click on the map or with the three cursors below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from superscopes_tl.engine import CHAT_PROMPT, DESCRIPTION_PROMPT, IDENTITY_PROMPT, PAPER_ALPHAS
from superscopes_tl.evaluation import LONG_PROMPT, SHORT_PROMPT
from superscopes_tl.model import PAPER_KINDS

ALPHA_PRESETS: Mapping[str, tuple[float, ...]] = {
    "paper": PAPER_ALPHAS,
    "fine": (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20),
    "around 1 (for residual norms)": (0.25, 0.5, 1, 2, 4, 8),
    "Patchscopes (1 alone)": (1,),
}
TARGET_PRESETS = {
    "description (paper)": DESCRIPTION_PROMPT,
    "description, short": SHORT_PROMPT,
    "description, long": LONG_PROMPT,
    "identity": IDENTITY_PROMPT,
}
CHAT_PRESETS = {**TARGET_PRESETS, "question (chat)": CHAT_PROMPT}
"""Those of a model with a chat template."""
OWN = "own"
BEST = "best"
FORMATS = {
    "page, opens offline (.html)": ".html",
    "picture (.png)": ".png",
    "table (.csv)": ".csv",
    "table (.parquet)": ".parquet",
    "run file (.zip)": ".zip",
}

_COPY = """
function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-button widget-button";
  button.textContent = "Copy as Python";
  button.title = "Copy code that reads exactly this cell";
  const said = document.createElement("span");
  said.setAttribute("role", "status");
  said.style.marginLeft = "6px";
  button.addEventListener("click", async () => {
    const text = model.get("text");
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    said.textContent = "copied";
    setTimeout(() => { said.textContent = ""; }, 2000);
  });
  const able = () => { button.disabled = !model.get("text"); };
  model.on("change:text", able);
  able();
  el.append(button, said);
}
export default { render };
"""


class CopyButton(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is untyped
    """A button that copies `text` to the clipboard."""

    _esm = _COPY
    text = traitlets.Unicode("").tag(sync=True)


_FIT = """
function name(root) {
  for (const slider of root.querySelectorAll(".widget-slider")) {
    const label = slider.querySelector(".widget-label")?.textContent ?? "";
    const handles = [...slider.querySelectorAll("[role=slider]")];
    const names = handles.length > 1 ? [`${label}, first`, `${label}, last`] : [label];
    handles.forEach((handle, i) => handle.setAttribute("aria-label", names[i]));
    const readout = slider.querySelector("[contenteditable=true]");
    if (readout) {
      readout.setAttribute("role", "textbox");
      readout.setAttribute("aria-label", label);
    }
  }
}
function render({ el }) {
  el.style.display = "none";
  const fit = () => requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
  requestAnimationFrame(() => {
    const root = el.closest(".ssx");
    if (!root) return;
    name(root);
    new ResizeObserver(fit).observe(root);
    new MutationObserver((changes) => {
      name(root);
      const drawn = (node) => node.nodeType === 1
        && (node.matches(".svg-container") || node.querySelector(".svg-container"));
      if (changes.some((change) => [...change.addedNodes].some(drawn))) fit();
    }).observe(root, { childList: true, subtree: true });
  });
}
export default { render };
"""


class Fit(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is untyped
    """Makes plotly measure again when a figure or the Explorer's width is new; names sliders.

    Plotly itself looks when it first draws, which may be before there is a page around it, and
    when the window changes, which is not the only way for a notebook's column to change.
    A slider's handles come without an accessible name: the widgets put it beside them only.
    """

    _esm = _FIT


class View:
    """The widgets, by name; `root` holds them all.

    Args:
        kinds: the kinds of activation to choose from.
        n_layers: the model's number of layers.
        scorers: label to scorer.
        chat: whether the model has a chat template.
    """

    def __init__(
        self, kinds: Sequence[str], n_layers: int, scorers: Mapping[str, Any], *, chat: bool = False
    ) -> None:
        self.presets = CHAT_PRESETS if chat else TARGET_PRESETS
        self._make_source(kinds, n_layers)
        self._make_frame(chat)
        self._make_alphas()
        self._make_settings(n_layers, scorers)
        self._make_run()
        self._make_result()
        self._make_cell()
        self._make_export()
        self.root = widgets.VBox(
            [
                _classed(widgets.HTML(f"<style>{_style()}</style>"), "ssx-style"),
                Fit(),
                self.source,
                _classed(
                    widgets.HBox(
                        [
                            self.run,
                            self.cancel,
                            self.find,
                            self.progress,
                            self.status,
                            self.estimate,
                        ]
                    ),
                    "ssx-bar",
                ),
                self.found,
                self.caption,
                self.findings,
                _classed(widgets.Box([self.stage_side, self.panel, self.below]), "ssx-main"),
                self.export,
            ]
        )
        self.root.add_class("ssx")

    def _make_source(self, kinds: Sequence[str], n_layers: int) -> None:
        self.prompt = widgets.Textarea(description="Prompt", rows=2, continuous_update=False)
        self.prompt.layout.width = "auto"
        self.prompt.add_class("ssx-prompt")
        self.tokens = widgets.ToggleButtons(options=[("∅", 0)], description="Token")
        self.tokens.add_class("ssx-tokens")
        self.own = range(1)  # which of the tokens are the prompt's own, not a template's
        self.kinds = {
            kind: widgets.Checkbox(value=kind in PAPER_KINDS, description=kind, indent=False)
            for kind in kinds
        }
        self.layers = widgets.IntRangeSlider(
            value=(0, n_layers - 1),
            min=0,
            max=n_layers - 1,
            description="Layers",
            continuous_update=False,
        )
        self.step = widgets.BoundedIntText(
            value=1, min=1, max=max(1, n_layers - 1), description="Every k-th",
            tooltip="1 is every layer of the range, 3 every third",
        )  # fmt: skip

    def _make_frame(self, chat: bool) -> None:
        """Make the controls of what stands around the prompt, and what it is held against."""
        self.chat = widgets.Checkbox(
            value=False, description="Chat template", indent=False,
            tooltip="Both prompts are messages of a user in the model's chat template",
        )  # fmt: skip
        self.chat.layout.display = "" if chat else "none"
        self.template = widgets.Text(
            value="{}", description="Source in", continuous_update=False,
            tooltip="What stands around the prompt, such as: Tell me about {}",
        )  # fmt: skip
        self.about = widgets.Text(
            description="About", continuous_update=False, placeholder="the text up to the token",
            tooltip="What readings are scored against",
        )  # fmt: skip
        self.reference = widgets.Text(
            description="Reference", continuous_update=False,
            placeholder="the model's own words", tooltip="A true text instead of the own words",
        )  # fmt: skip

    def _make_alphas(self) -> None:
        self.alpha_preset = widgets.Dropdown(
            options=[*ALPHA_PRESETS, OWN], description="Amplifiers"
        )
        self.alphas = widgets.Text(description="α", continuous_update=False)
        self.units = widgets.Dropdown(
            options=[("the vector (paper)", "vector"), ("the residual norm", "norm")],
            description="α times",
            tooltip="The residual norm: what α·v weighs against what it replaces",
        )

    def _make_settings(self, n_layers: int, scorers: Mapping[str, Any]) -> None:
        self.target = widgets.Dropdown(
            options=[("layer 0", 0), ("same layer", "same"), ("fixed layer", "fixed")],
            description="Patch into",
        )
        self.fixed = widgets.BoundedIntText(
            min=0, max=n_layers - 1, description="Fixed layer", disabled=True
        )
        self.target_preset = widgets.Dropdown(
            options=[*self.presets, OWN], description="Target text"
        )
        self.target_text = widgets.Textarea(
            description="Own text", rows=2, continuous_update=False, disabled=True
        )
        self.placeholder = widgets.Text(
            description="Placeholder", continuous_update=False, disabled=True
        )
        self.scorer = widgets.Dropdown(options=list(scorers.items()), description="Scorer")
        self.score_on = widgets.Dropdown(
            options=[("the description", "description"), ("the whole text (paper)", "text")],
            description="Score",
        )
        self.write = widgets.Dropdown(
            options=[
                ("all cells", "all"),
                ("the best α of each site", "best"),
                ("none: the map alone", "none"),
            ],
            description="Write",
            tooltip="Which cells to write out; every cell has what it recovers",
        )
        kinds = widgets.Box([widgets.HTML("Kinds"), *self.kinds.values()])
        grid = widgets.Box(
            [
                self.layers,
                self.step,
                self.template,
                self.target,
                self.fixed,
                self.write,
                self.alpha_preset,
                self.alphas,
                self.units,
                self.scorer,
                self.target_preset,
                self.placeholder,
                self.score_on,
                self.about,
                self.reference,
                self.chat,
                _classed(self.target_text, "ssx-wide"),
                _classed(kinds, "ssx-kinds"),
            ]
        )
        self.source = widgets.VBox([self.prompt, self.tokens, _classed(grid, "ssx-controls")])

    def _make_run(self) -> None:
        self.run = widgets.Button(description="Run", icon="play", tooltip="Start the sweep")
        self.run.add_class("ssx-run")
        self.cancel = widgets.Button(
            description="Cancel", icon="stop", disabled=True, tooltip="Stop, keep what is finished"
        )
        self.cancel.add_class("ssx-cancel")
        self.find = widgets.Button(
            description="Find a setting", icon="search",
            tooltip="Try target prompts and layers on a dozen names; keep what reads this model",
        )  # fmt: skip
        self.find.add_class("ssx-find")
        self.found = _classed(widgets.HTML(), "ssx-found")
        self.progress = widgets.IntProgress(min=0, max=1)
        self.status = _classed(widgets.HTML(), "ssx-status")
        self.estimate = _classed(widgets.HTML(), "ssx-estimate")

    def _make_result(self) -> None:
        self.show = widgets.ToggleButtons(
            options=[("All α", "all"), ("Best α", "best"), ("Decomposition", "parts")],
            description="",
            tooltips=[
                "Heatmaps over layer and α",
                "The best reading of every layer and kind",
                "resid_mid + mlp_out = resid_post of the selected layer",
            ],
        )
        self.show.add_class("ssx-views")
        self.colour = widgets.Dropdown(
            options=["recovered", "score"],
            description="Colour",
            tooltip="The share of the model's own words, or the likeness to the name",
        )
        self.colour.add_class("ssx-colour")
        self.best_alpha = widgets.Dropdown(options=[(BEST, BEST)], description="α")
        self.best_alpha.add_class("ssx-narrow")
        self.caption = widgets.HTML()
        self.findings = _classed(widgets.HTML(), "ssx-findings")
        self.stage = _classed(widgets.Box(), "ssx-stage")
        self.stage.add_class("ssx-map")
        self.kind = widgets.Dropdown(options=["–"], description="Kind")
        self.layer = widgets.SelectionSlider(options=["–"], description="Layer")
        self.alpha = widgets.SelectionSlider(options=["–"], description="α")
        self.position = widgets.Dropdown(options=["–"], description="Token")
        self.into = widgets.Dropdown(options=["–"], description="Into")
        self.stage_side = _classed(
            widgets.VBox([_classed(widgets.HBox([self.show, self.colour]), "ssx-row"), self.stage]),
            "ssx-stack",
        )

    def _make_cell(self) -> None:
        self.detail = _classed(widgets.HTML(), "ssx-detail")
        self.ladder = widgets.HTML()
        self.curve = _classed(widgets.Box(), "ssx-stage")
        self.probe = _classed(widgets.HTML(), "ssx-probe")
        self.pin = widgets.Button(
            description="Pin", icon="thumb-tack", tooltip="Keep this cell to compare"
        )
        self.pin.add_class("ssx-pin")
        self.unpin = widgets.Button(description="Clear pins", tooltip="Remove the pinned cells")
        for button in (self.pin, self.unpin):
            button.layout.width = "auto"
        self.copy = CopyButton()
        self.code = _classed(widgets.HTML(), "ssx-code")
        self.panel = widgets.VBox(
            [
                self.detail,
                self.kind,
                self.layer,
                self.alpha,
                self.position,
                self.into,
                self.curve,
                _classed(widgets.HBox([self.pin, self.unpin, self.copy]), "ssx-row"),
                self.code,
            ]
        )
        self.panel.add_class("ssx-panel")
        self.pins = _classed(widgets.HTML(), "ssx-pins")
        self.below = _classed(widgets.VBox([self.ladder, self.probe, self.pins]), "ssx-below")

    def _make_export(self) -> None:
        self.file = widgets.Text(value="superscopes", description="Save as")
        self.format = widgets.Dropdown(options=list(FORMATS.items()), description="Format")
        self.save = widgets.Button(description="Save", icon="download")
        self.save.add_class("ssx-save")
        self.saved = _classed(widgets.HTML(), "ssx-saved")
        self.export = _classed(
            widgets.HBox([self.file, self.format, self.save, self.saved]), "ssx-row"
        )


def _classed(widget: Any, name: str) -> Any:
    widget.add_class(name)
    return widget


def _style() -> str:
    return files("superscopes_tl.explorer").joinpath("explorer.css").read_text(encoding="utf-8")
