"""The Explorer's controls and its runs.

1. A change of a control checks the settings and says what a run would cost: cells, those that are
   there already, and seconds, from a short warm-up in a thread.
2. `run` freezes what the controls show at that moment; later changes are for the next run.
3. The run's batches go to the panel as they come, its end to the status line.
4. `find` has a thread find out how the model is read best, and sets the controls to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from superscopes_tl.engine import PatchedGenerator, TargetPrompt, default_target_prompt
from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation import Readability, kept_readability
from superscopes_tl.experiment import Reading, SweepConfig, SweepPlan, check_config, plan_sweep
from superscopes_tl.explorer import markup
from superscopes_tl.explorer.background import (
    BackgroundSweep,
    CellStore,
    Latest,
    Progress,
    wait_for_all,
)
from superscopes_tl.explorer.live_map import axes_of_plan
from superscopes_tl.explorer.panel import Guard, Panel
from superscopes_tl.explorer.settings import (
    alphas_text,
    read_config,
    same_token,
    show_reference,
    show_tokens,
    units_of,
    write_config,
)
from superscopes_tl.explorer.view import ALPHA_PRESETS, OWN, View
from superscopes_tl.model import LanguageModel, TokenizedText, check_text, tokenize
from superscopes_tl.scores import no_scores
from superscopes_tl.vectors import scale

WATCHED_ROWS = 256
"""The largest batch of a run on the screen: larger ones are faster, and fill in less often."""


class Desk:
    """Where a sweep is set up and run.

    Attributes:
        check: whether and how the model can be read, once that was asked for.

    Args:
        model: the model.
        view: the widgets.
        panel: shows the result.
        guard: wraps the callbacks.
        on_end: called after a run.
    """

    def __init__(
        self,
        model: LanguageModel,
        view: View,
        panel: Panel,
        guard: Guard,
        on_end: Callable[[], None],
    ) -> None:
        self._model, self._view, self._panel, self._guard = model, view, panel, guard
        self._on_end = on_end
        self._base = SweepConfig()
        self.check: Readability | None = None
        self._store, self._estimator, self._finder = CellStore(), Latest(), Latest()
        self._finding = False
        self._seconds: dict[tuple[object, ...], float] = {}
        self._norms: dict[tuple[TargetPrompt, int, bool], float] = {}
        self._sweep: BackgroundSweep | None = None
        self._quiet = False
        self._say("Ready", "idle")
        view.run.on_click(guard(self.run))
        view.cancel.on_click(guard(self.cancel))
        view.find.on_click(guard(self.find))
        view.prompt.observe(guard(self._prompt_changed), "value")
        view.alpha_preset.observe(guard(self._preset_changed), "value")
        view.alphas.observe(guard(self._alphas_changed), "value")
        view.chat.observe(guard(self._chat_changed), "value")
        view.template.observe(guard(self._source_changed), "value")
        for control in (view.target, view.target_preset):
            control.observe(guard(self._enable), "value")
        for control in (
            view.tokens, view.layers, view.units, view.target, view.fixed, view.alphas,
            view.target_preset, view.target_text, view.placeholder, view.scorer, view.score_on,
            view.step, view.write, view.about, view.reference, *view.kinds.values(),
        ):  # fmt: skip
            control.observe(guard(self._estimate), "value")

    @property
    def prompt(self) -> str:
        """The source prompt."""
        return str(self._view.prompt.value)

    @property
    def config(self) -> SweepConfig:
        """What the controls show."""
        return read_config(self._view, self._base, self._norm_at)

    @property
    def state(self) -> str:
        """The state of the latest run, or idle; finding while a setting is looked for."""
        if self._finding:
            return "finding"
        return self._sweep.state if self._sweep else "idle"

    @property
    def error(self) -> Exception | None:
        """Why the latest run failed."""
        return self._sweep.error if self._sweep else None

    def set_prompt(self, text: str) -> None:
        """Show another prompt; its last token is chosen."""
        with self._guard.lock:
            tokens = self._tokens(text)
            self._quietly(lambda: setattr(self._view.prompt, "value", text))
            self._quietly(lambda: self._show_prompt(tokens))
            self._estimate()

    def set_config(self, config: SweepConfig) -> None:
        """Show other settings."""
        with self._guard.lock:
            given = (config, self._model, self.prompt, self._norm_at)
            self._quietly(lambda: write_config(self._view, *given))
            self._base = config
            self._enable()
            self._estimate()

    def run(self) -> None:
        """Start the sweep that the controls show."""
        with self._guard.lock:
            model, prompt, config = self._model, self.prompt, self.config
            check_text(prompt, "prompt")
            self._check_rest("run")
            self._guard.run += 1
            view = self._view
            view.run.disabled = view.find.disabled = True
            view.cancel.disabled = False
            view.progress.value, view.progress.bar_style = 0, "info"
            self._say("Preparing", "running")
            self._sweep = BackgroundSweep(
                lambda: _watched(model, prompt, config),
                store=self._store,
                on_plan=self._opened,
                on_batch=self._filled,
                on_end=self._guard(self._ended),
                lock=self._guard.lock,
            ).start()

    def cancel(self) -> None:
        """Stop after the batch that is being computed."""
        with self._guard.lock:  # else a run that ends meanwhile would be said to be stopping
            if self._sweep is not None and self.state == "running":
                self._sweep.cancel()
                self._say("Stopping after this batch", "running")

    def find(self) -> None:
        """Find out how the model is read best, in a thread, and set the controls to that."""
        with self._guard.lock:
            self._check_rest("find")
            view = self._view
            self._finding = True
            view.run.disabled = view.find.disabled = True
            self._say("Finding a setting: reading a dozen names in several ways", "finding")
            self._finder.submit(self._look)

    def _look(self) -> None:
        """Check the model, and show what was found or why nothing was."""
        found, failed = None, None
        try:
            found = kept_readability(self._model, progress=False)
        except Exception as error:  # noqa: BLE001  # a thread has nobody to raise to
            failed = error
        with self._guard.lock:
            self._finding = False
            self._view.run.disabled = self._view.find.disabled = False
            if found is None:
                self._guard.show(failed or RuntimeError("no setting was found"))
            else:
                self._guard(lambda: self._take(found))()

    def _take(self, found: Readability) -> None:
        """Set the controls to the setting that was found; what it does not name stays."""
        self.check = found
        self._view.found.value = f"<div role='status'>{markup.note(found.verdict)}</div>"
        now, best = self.config, found.config
        # An α in units of one layer's norm has no meaning where each layer has its own.
        tokens = tokenize(self._model, self.prompt, chat=best.chat, template=best.source_template)
        units = units_of(now.mapping) is not None
        new = replace(
            now, target_prompt=best.target_prompt, target_layer=best.target_layer, chat=best.chat,
            source_template=best.source_template, positions=same_token(self._view, tokens),
            mapping=scale if units else now.mapping, unit="residual" if units else now.unit,
        )  # fmt: skip
        self.set_config(new)
        self._say("Set to what reads this model best; press Run", "idle")

    def _check_rest(self, what: str) -> None:
        """Raise if a run or a search is under way."""
        if self.state in ("running", "finding"):
            raise bad_value(
                what, "no run or search under way", self.state,
                "cancel the run or wait first",
            )  # fmt: skip

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the run and for the warm-up."""
        sweep = [self._sweep.wait] if self._sweep is not None else []
        return wait_for_all([*sweep, self._finder.wait, self._estimator.wait], timeout)

    def _norm_at(self, target_prompt: TargetPrompt, layer: int, chat: bool) -> float:
        key = (target_prompt, layer, chat)
        if key not in self._norms:
            generator = PatchedGenerator(
                self._model, target_prompt, max_new_tokens=1, batch_size=1, chat=chat
            )
            self._norms[key] = float(generator.placeholder_norms[layer])
        return self._norms[key]

    def _opened(self, plan: SweepPlan) -> None:
        if self._sweep is not None:
            progress = self._sweep.progress
            self._view.progress.max = progress.total + progress.to_write
            self._panel.open(self._sweep.result(), axes_of_plan(plan), plan)

    def _filled(self, readings: Sequence[Reading]) -> None:
        if self._sweep is not None:
            progress = self._sweep.progress
            self._view.progress.value = progress.done + progress.written
            self._panel.draw(self._sweep.result())
            self._panel.refresh(readings)
            self._say(_under_way(progress), "running")

    def _ended(self) -> None:
        view, sweep = self._view, self._sweep
        view.run.disabled = view.find.disabled = False
        view.cancel.disabled = True
        if sweep is None:
            return
        styles = {"done": "success", "cancelled": "warning", "failed": "danger"}
        view.progress.bar_style = styles[sweep.state]
        progress = sweep.progress
        if sweep.plan is not None:
            self._panel.finish(sweep.result())
            if self._panel.selection is None:
                self._panel.select_best()
        if sweep.error is not None:
            self._guard.show(sweep.error)
        else:
            self._say(_at_end(sweep.state, progress), sweep.state)
        self._on_end()
        self._estimate()

    def _prompt_changed(self) -> None:
        """Show another prompt's tokens; what the old one was held against goes with it."""
        if not self._quiet:
            self._view.tokens.options = [("∅", 0)]
            tokens = self._tokens(self.prompt)
            self._quietly(lambda: self._show_prompt(tokens))
            self._rest()

    def _show_prompt(self, tokens: TokenizedText) -> None:
        show_tokens(self._view, tokens)
        self._view.about.value = ""
        several = isinstance(self._base.reference, Mapping)
        show_reference(self._view, self._base if several else SweepConfig(), tokens.text)

    def _source_changed(self) -> None:
        """Show the same prompt in another template."""
        if not self._quiet:
            tokens = self._tokens(self.prompt)
            place = same_token(self._view, tokens)
            self._quietly(lambda: show_tokens(self._view, tokens))
            self._quietly(lambda: setattr(self._view.tokens, "value", place))
            self._rest()

    def _chat_changed(self) -> None:
        """Show the same prompt with or without the chat template, with a question to match."""
        view, chat = self._view, bool(self._view.chat.value)
        if self._quiet:
            return
        before, now = (default_target_prompt(None, chat=c) for c in (not chat, chat))
        names = {prompt: name for name, prompt in view.presets.items()}
        if view.target_preset.value == names[before]:
            self._quietly(lambda: setattr(view.target_preset, "value", names[now]))
            self._enable()
        self._source_changed()

    def _rest(self) -> None:
        """Take a message of earlier settings away, and say what these would cost."""
        if self.state not in ("running", "finding"):
            self._say("Ready", "idle")
        self._estimate()

    def _tokens(self, prompt: str) -> TokenizedText:
        """Return a prompt's tokens in the template that the controls show.

        Raises:
            ValueError, TypeError: a bad prompt or template.
        """
        chat, template = bool(self._view.chat.value), self._view.template.value or "{}"
        check_config(None, {"source_template": template})
        return tokenize(self._model, prompt, chat=chat, template=template)

    def _preset_changed(self) -> None:
        preset = ALPHA_PRESETS.get(self._view.alpha_preset.value)
        if preset and not self._quiet:
            self._view.alphas.value = alphas_text(preset)

    def _alphas_changed(self) -> None:
        shown = self._view.alphas.value
        names = {alphas_text(preset): name for name, preset in ALPHA_PRESETS.items()}
        if not self._quiet:
            self._view.alpha_preset.value = names.get(shown, OWN)

    def _enable(self) -> None:
        view = self._view
        view.fixed.disabled = view.target.value != "fixed"
        own = view.target_preset.value == OWN
        view.target_text.disabled = view.placeholder.disabled = not own
        view.target_text.layout.display = view.placeholder.layout.display = "" if own else "none"
        if not own and not self._quiet:
            preset = view.presets[view.target_preset.value]
            view.target_text.value, view.placeholder.value = preset.text, preset.placeholder

    def _estimate(self) -> None:
        """Say what a run would cost, or what is wrong with the settings."""
        if self._quiet:
            return
        view, model = self._view, self._model
        try:
            config = replace(self.config, scorer=no_scores)
            plan = _watched(model, self.prompt, config)
        except (ValueError, TypeError) as error:
            view.estimate.value = markup.note(str(error))
            return
        plan = replace(plan, finished=self._store.cells(plan))
        view.estimate.value = markup.note(_cost(plan, None))
        if self.state not in ("running", "finding"):  # a warm-up would slow the run down
            self._estimator.submit(lambda: self._warm_up(plan))

    def _warm_up(self, plan: SweepPlan) -> None:
        """Time a batch, once per target prompt and size, and complete the estimate."""
        generator = plan.generator
        rows = min(generator.batch_size, _texts(plan))
        key = (generator.target, generator.max_new_tokens, rows)
        try:
            if rows and key not in self._seconds:
                self._seconds[key] = generator.seconds_per_batch(rows)
            batches = math.ceil(_texts(plan) / generator.batch_size)
            cost = _cost(plan, self._seconds.get(key, 0.0) * batches)
        except Exception as error:  # noqa: BLE001  # a thread has nobody to raise to
            cost = f"{len(plan.cells)} cells; the warm-up failed: {error}"
        with self._guard.lock:
            if self._view.estimate.value == markup.note(_cost(plan, None)):
                self._view.estimate.value = markup.note(cost)

    def _quietly(self, change: Callable[[], None]) -> None:
        """Change controls without answering to each change."""
        before, self._quiet = self._quiet, True
        try:
            change()
        finally:
            self._quiet = before

    def _say(self, text: str, state: str) -> None:
        self._view.status.value = markup.status(text, state=state, run=self._guard.run)


def _watched(model: LanguageModel, prompt: str, config: SweepConfig) -> SweepPlan:
    """Return the plan of a sweep that somebody watches: the map fills in batch by batch."""
    plan = plan_sweep(model, prompt, config)
    if config.batch_size is None:
        plan.generator.batch_size = min(plan.generator.batch_size, WATCHED_ROWS)
    return plan


def _cost(plan: SweepPlan, seconds: float | None) -> str:
    there = len(plan.all_cells) - len(plan.cells)
    kept = f", {there} of them from earlier runs" if there else ""
    texts = _texts(plan)
    some = "" if plan.config.generate == "all" else f", {texts} to write out"
    time = "" if seconds is None or not texts else f" · {_about(seconds)}"
    return f"A run: {len(plan.all_cells)} cells{kept}{some}{time}"


def _texts(plan: SweepPlan) -> int:
    """Return how many texts a run would write."""
    if plan.config.generate == "all":
        return len(plan.cells)
    return len({cell.place for cell in plan.cells}) if plan.config.generate == "best" else 0


def _under_way(progress: Progress) -> str:
    if progress.to_write and progress.done == progress.total:
        return f"{progress.total} cells · {progress.written} of {progress.to_write} texts"
    left = None if progress.to_write else progress.remaining_seconds
    rate = f" · {progress.rate:.0f} cells/s" if progress.rate else ""
    rest = f" · {_about(left)} left" if left is not None else ""
    return f"{progress.done} of {progress.total} cells{rate}{rest}"


def _at_end(state: str, progress: Progress) -> str:
    word = {"done": "Done", "cancelled": "Cancelled"}[state]
    reused = f", {progress.reused} from earlier runs" if progress.reused else ""
    texts = f", {progress.written} texts" if progress.to_write else ""
    cells = f"{progress.done} of {progress.total} cells{texts}"
    return f"{word}: {cells} in {progress.seconds:.1f} s{reused}"


def _about(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
