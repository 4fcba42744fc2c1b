"""The Explorer's widgets: what there is to see and to touch, and where it stands.

1. `View` makes the controls, in the order in which a reader uses them: what to read, how to run
   it, what came out, one cell of it, what to keep.
2. It knows layout and labels, no model and no sweep; `Settings`, `Panel` and `Explorer` give it
   meaning. Its status line and its lock serve all of them: notebook kernels run callbacks on
   several threads, and show nobody an exception of a callback.

Every control is an ordinary form element with a label, so the keyboard and a screen reader reach
it; cells are selected by a click on the map or with the cursors beside it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from superscopes_tl.engine import CHAT_PROMPT, DESCRIPTION_PROMPT, IDENTITY_PROMPT, PAPER_ALPHAS
from superscopes_tl.evaluation import LONG_PROMPT, SHORT_PROMPT
from superscopes_tl.explorer import markup
from superscopes_tl.model import PAPER_KINDS

STATIC = Path(__file__).parent / "static"  # the style sheet and the scripts

ALPHA_PRESETS: Mapping[str, tuple[float, ...]] = {
    "paper": PAPER_ALPHAS,
    "fine": (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20),
    "around 1 (for residual norms)": (0.25, 0.5, 1, 2, 4, 8),
    "1 (Patchscopes)": (1,),
}
TARGET_PRESETS = {
    "description (paper)": DESCRIPTION_PROMPT,
    "description, short": SHORT_PROMPT,
    "description, long": LONG_PROMPT,
    "identity": IDENTITY_PROMPT,
}
CHAT_PRESETS = {**TARGET_PRESETS, "question (chat)": CHAT_PROMPT}
"""Those of a model with a chat template."""
CUSTOM = "custom"
BEST = "best"
FORMATS = [
    ("page, opens offline (.html)", ".html"), ("picture (.png)", ".png"), ("table (.csv)", ".csv"),
    ("table (.parquet)", ".parquet"), ("run file (.zip)", ".zip"),
]  # fmt: skip


class CopyButton(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is untyped
    """A button that copies `text` to the clipboard."""

    _esm = STATIC / "copy_button.js"
    text = traitlets.Unicode("").tag(sync=True)


class Page(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is untyped
    """The style sheet; and what a page needs of scripts: names of sliders, widths of figures."""

    _esm = STATIC / "page.js"
    _css = STATIC / "explorer.css"


class View:
    """The widgets, by name; `root` holds them all.

    Attributes:
        lock: held by every callback and by threads that change widgets; reentrant.
        run_number: the number of the latest run, for scripts that wait for its end.

    Args:
        kinds: the kinds of activation to choose from.
        n_layers: the model's number of layers.
        scorers: label to scorer.
        chat: whether the model has a chat template.
    """

    def __init__(
        self, kinds: Sequence[str], n_layers: int, scorers: Mapping[str, Any], *, chat: bool = False
    ) -> None:
        self.lock = threading.RLock()
        self.run_number = 0
        self.presets = CHAT_PRESETS if chat else TARGET_PRESETS
        self._quiet = False
        self._make_source(kinds, n_layers)
        self._make_prompts(chat)
        self._make_settings(n_layers, scorers)
        self._make_run()
        self._make_map()
        self._make_cell()
        self._make_export()
        bar = [self.run, self.cancel, self.find, self.progress, self.status, self.estimate]
        main = _box("ssx-main", self.stage_side, self.panel, self.below)
        self.root = _column(
            "ssx", Page(), self.source, _row("ssx-bar", *bar), self.found, self.caption,
            self.findings, main, self.export,
        )  # fmt: skip

    def on_change(self, action: Callable[[], object], *controls: Any) -> None:
        """Do `action` when a control's value changes, but not `quietly`; show its exception."""

        def react() -> None:
            if not self._quiet:
                action()

        for control in controls:
            control.observe(self.guarded(react), "value")

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Change controls without reacting to each change."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def guarded(self, action: Callable[..., object], *given: object) -> Callable[..., None]:
        """Return a callback that does `action` under the lock and shows its exception."""

        def callback(*_: object) -> None:
            try:
                with self.lock:
                    action(*given)
            except Exception as error:  # noqa: BLE001  # a notebook shows no callback's exception
                self.alert(error)

        return callback

    def say(self, text: str, state: str) -> None:
        """Show the state of the run."""
        self.status.value = markup.render("status", text, state, self.run_number)

    def alert(self, error: Exception) -> None:
        """Show why something failed."""
        self.status.value = markup.alert(error, run=self.run_number)

    def _make_source(self, kinds: Sequence[str], n_layers: int) -> None:
        last = n_layers - 1
        self.prompt = _area("Prompt").add_class("ssx-prompt")
        self.prompt.layout.width = "auto"
        self.tokens = widgets.ToggleButtons(options=[("∅", 0)], description="Token")
        self.tokens.add_class("ssx-tokens")
        self.own = range(1)  # which of the tokens are the prompt's own, not a template's
        self.kinds = {
            kind: widgets.Checkbox(value=kind in PAPER_KINDS, description=kind, indent=False)
            for kind in kinds
        }
        self.layers = widgets.IntRangeSlider(
            value=(0, last), min=0, max=last, description="Layers", continuous_update=False
        )
        self.step = widgets.BoundedIntText(
            value=1, min=1, max=max(1, last), description="Every k-th",
            tooltip="1 is every layer of the range, 3 every third",
        )  # fmt: skip

    def _make_prompts(self, chat: bool) -> None:
        """Make the controls of both prompts, and of what readings are compared with."""
        self.chat = widgets.Checkbox(
            value=False, description="Chat template", indent=False,
            tooltip="Render both prompts as user messages in the model's chat template",
        )  # fmt: skip
        self.chat.layout.display = "" if chat else "none"
        self.template = _text("Source in", "A text around the prompt, such as: Tell me about {}")
        self.template.value = "{}"
        self.about = _text("About", "The text that readings are scored against")
        self.about.placeholder = "the text up to the token"
        self.reference = _text(
            "Reference", "A true text to recover instead of the model's own words"
        )
        self.reference.placeholder = "the model's own words"
        self.target_preset = _choice("Target prompt", [*self.presets, CUSTOM])
        self.target_text = _area("Custom text").add_class("ssx-wide")
        self.placeholder = _text("Placeholder")
        self.target_text.disabled = self.placeholder.disabled = True

    def _make_settings(self, n_layers: int, scorers: Mapping[str, Any]) -> None:
        self.alpha_preset = _choice("Amplifiers", [*ALPHA_PRESETS, CUSTOM])
        self.alphas = _text("α")
        self.unit = _choice(
            "α times", [("the vector (paper)", "vector"), ("the residual norm", "residual")],
            "The residual norm: every vector is first as long as what it replaces",
        )  # fmt: skip
        self.target = _choice(
            "Patch into",
            [
                ("layer 0", 0),
                ("source layer", "same"),
                ("fixed layer", "fixed"),
                ("input embedding", "embed"),
            ],
        )
        self.fixed = widgets.BoundedIntText(
            min=0, max=n_layers - 1, description="Fixed layer", disabled=True
        )
        self.scorer = _choice("Scorer", list(scorers.items()))
        self.score_on = _choice(
            "Score", [("the description", "description"), ("the full generation (paper)", "text")]
        )
        several = {"all cells": "all", "the best α of each site": "best", "none: map only": "none"}
        self.generate = _choice(
            "Generate", list(several.items()),
            "Which cells to generate a text for; recovered is computed for every cell",
        )  # fmt: skip
        grid = _box(
            "ssx-controls",
            self.layers, self.step, self.template,
            self.target, self.fixed, self.generate,
            self.alpha_preset, self.alphas, self.unit,
            self.scorer, self.target_preset, self.placeholder,
            self.score_on, self.about, self.reference,
            self.chat, self.target_text,
            _box("ssx-kinds", widgets.HTML("Kinds"), *self.kinds.values()),
        )  # fmt: skip
        self.source = widgets.VBox([self.prompt, self.tokens, grid])

    def _make_run(self) -> None:
        self.run = _button("Run", "play", "Start the sweep", "ssx-run")
        stop = "Stop after this batch, keep finished cells"
        self.cancel = _button("Cancel", "stop", stop, "ssx-cancel")
        self.cancel.disabled = True
        search = "Try target prompts and layers on a dozen names; keep what reads this model best"
        self.find = _button("Find a setting", "search", search, "ssx-find")
        self.progress = widgets.IntProgress(min=0, max=1)
        self.status, self.estimate = _html("ssx-status"), _html("ssx-estimate")
        self.found = _html("ssx-found")

    def _make_map(self) -> None:
        views = [("All α", "all"), ("Best α", "best"), ("Decomposition", "parts")]
        tooltips = [
            "Heatmaps over layer and α", "The best reading of every layer and kind",
            "resid_mid + mlp_out = resid_post at the selected layer",
        ]  # fmt: skip
        self.show = widgets.ToggleButtons(options=views, tooltips=tooltips).add_class("ssx-views")
        self.colour = _choice(
            "Colour", ["recovered", "score"],
            "The share of the model's own words recovered, or similarity to the name",
        ).add_class("ssx-colour")  # fmt: skip
        self.best_alpha = _choice("α", [(BEST, BEST)]).add_class("ssx-narrow")
        self.caption, self.findings = _html(), _html("ssx-findings")
        self.stage = _box("ssx-stage").add_class("ssx-map")
        self.stage_side = _column("ssx-stack", _row("ssx-row", self.show, self.colour), self.stage)

    def _make_cell(self) -> None:
        """Make the panel of the selected cell, with the cursors that select it."""
        self.kind = _choice("Kind", ["–"])
        self.layer = widgets.SelectionSlider(options=["–"], description="Layer")
        self.alpha = widgets.SelectionSlider(options=["–"], description="α")
        self.position, self.into = _choice("Token", ["–"]), _choice("Into", ["–"])
        self.cursors = (self.kind, self.layer, self.alpha, self.position, self.into)
        self.detail, self.ladder, self.probe = _html("ssx-detail"), _html(), _html("ssx-probe")
        self.curve = _box("ssx-stage")
        self.pin = _button("Pin", "thumb-tack", "Keep this cell for comparison", "ssx-pin")
        self.unpin = _button("Clear pins", "", "Remove the pinned cells", "ssx-unpin")
        self.copy = CopyButton()
        self.code, self.pins = _html("ssx-code"), _html("ssx-pins")
        buttons = _row("ssx-row", self.pin, self.unpin, self.copy)
        cell = (self.detail, *self.cursors, self.curve, buttons, self.code)
        self.panel = _column("ssx-panel", *cell)
        self.below = _column("ssx-below", self.ladder, self.probe, self.pins)

    def _make_export(self) -> None:
        self.file = widgets.Text(value="superscopes", description="Save as")
        self.format = _choice("Format", FORMATS)
        self.save = _button("Save", "download", "Save the result", "ssx-save")
        self.saved = _html("ssx-saved")
        self.export = _row("ssx-row", self.file, self.format, self.save, self.saved)


def _box(name: str, *children: Any, kind: Any = widgets.Box) -> Any:
    return kind(children).add_class(name)


_row, _column = partial(_box, kind=widgets.HBox), partial(_box, kind=widgets.VBox)


def _html(name: str = "") -> Any:
    return widgets.HTML().add_class(name) if name else widgets.HTML()


def _button(label: str, icon: str, tooltip: str, name: str) -> Any:
    return widgets.Button(description=label, icon=icon, tooltip=tooltip).add_class(name)


def _text(label: str, tooltip: str | None = None) -> Any:
    return widgets.Text(description=label, continuous_update=False, tooltip=tooltip)


def _area(label: str) -> Any:
    return widgets.Textarea(description=label, rows=2, continuous_update=False)


def _choice(label: str, options: Sequence[Any], tooltip: str | None = None) -> Any:
    return widgets.Dropdown(options=options, description=label, tooltip=tooltip)
