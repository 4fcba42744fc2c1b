"""Can this model be read, and in which setting?

1. Take about a dozen names of many kinds, and settings to try: target prompts (the paper's, a
   shorter and a longer one, and the chat form where the model has a template), target layers
   (0, 1, 2, a middle one, and the same as the source), and texts with or without a BOS.
2. Screen: for a few names and every few layers, measure the share of the model's own words that
   block outputs recover at α = 1, and the share that another name's vectors recover. Only the own
   words are generated. Every prompt is tried at target layer 0 and at the same as the source; the
   best one also at the other layers, and with the other choice of BOS.
3. The setting that recovers most above other names (or above 0, where those recover less), over
   its best third of layers, is measured on all names and on up to `MEASURED_LAYERS` layers.
4. The verdict: readable where the own share exceeds the others' by more than a bootstrap interval
   over names.

The setting is chosen on some of the names that it is measured on, so its share is slightly
optimistic; the verdict rests on the difference to other names' vectors in the same setting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pandas as pd
import platformdirs
from tqdm.auto import tqdm

from superscopes_tl.engine import (
    CHAT_PROMPT,
    DESCRIPTION_PROMPT,
    MANY_KINDS,
    Patch,
    PatchedGenerator,
    TargetPrompt,
)
from superscopes_tl.errors import bad_value
from superscopes_tl.experiment import SweepConfig, make_patches, mean, plan_sweep
from superscopes_tl.files import written_whole
from superscopes_tl.model import LanguageModel, load_model
from superscopes_tl.scores import OwnWords, above_others, no_scores, words_of
from superscopes_tl.statistics import bootstrap

SHORT_PROMPT = TargetPrompt("Syria: Country in the Middle East, x")
"""A target prompt with one example."""
LONG_PROMPT = TargetPrompt(
    DESCRIPTION_PROMPT.text.removesuffix("x")
    + "Oxygen: Chemical element with the symbol O, Guernica: Painting by Pablo Picasso, x"
)
"""The paper's target prompt with two more examples, of other kinds."""
SENTENCE = "Tell me about {}"
"""A source template in which the first token of a name is no attention sink."""

NAMES = MANY_KINDS[:12]
"""The dozen names of many kinds that `readability` asks about."""
SCREENED_NAMES = 3
SCREENED_LAYERS = 5
MEASURED_LAYERS = 9
SCREENED_OTHERS, MEASURED_OTHERS = 1, 2
"""How many other names' vectors are compared with each own one."""
CHAT_TOKENS = 8
"""How many tokens of a chat model's own words count."""
BETTER = 0.1
"""The verdict names the other choice of BOS if it recovers this much more."""
EQUAL = 0.05
"""Settings within this of the best one are as good: the first tried wins."""
LEAST_SHARE = 0.2
"""A layer that recovers less of the model's own words is not called readable."""
FORMAT = "superscopes_tl.readability 1"

Target: TypeAlias = int | Literal["same"]
Generators: TypeAlias = dict[tuple[str, TargetPrompt, bool], PatchedGenerator]


@dataclass(frozen=True)
class Setting:
    """One way to read a model.

    Attributes:
        prompt: the display name of the target prompt.
        config: the settings of the sweep.
        bos: whether texts begin as the tokenizer begins them ("own"), or not ("other").
    """

    prompt: str
    config: SweepConfig
    bos: Literal["own", "other"] = "own"

    @property
    def target_layer(self) -> Target:
        """Where it patches."""
        return cast("Target", self.config.target_layer)

    def __str__(self) -> str:
        into = "same layer" if self.target_layer == "same" else f"layer {self.target_layer}"
        framed = "" if self.config.source_template == "{}" else (
            f", source {self.config.source_template.format('NAME')!r}"
        )  # fmt: skip
        return f"the {self.prompt} prompt, target {into}{framed}"


@dataclass(frozen=True, eq=False)
class Readability:
    """Whether and how a model can be read.

    Attributes:
        model: the model's name.
        readable: whether the model's own words are recovered above other names' vectors.
        verdict: the same in words, with numbers.
        config: the best setting found, for `sweep(model, prompt, config)`.
        layers: per source layer in that setting, over names: `recovered`, `others` and `specific`
            (means), with `specific_low` and `specific_high`, a bootstrap interval with a joint
            level of 95 % over all layers.
        settings: the settings screened, one row each, best first.
        words: the model's own words of each name in the best setting.
    """

    model: str
    readable: bool
    verdict: str
    config: SweepConfig
    layers: pd.DataFrame
    settings: pd.DataFrame
    words: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        target, config = self.config.prompt_with_placeholder, self.config
        names = ("chat", "source_template", "target_layer")
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("model", "readable", "verdict")},
            "config": {
                "target_prompt": [target.text, target.placeholder, target.answer],
                **{name: getattr(config, name) for name in names},
            },
            "layers": json.loads(self.layers.to_json(orient="records")),
            "settings": json.loads(self.settings.to_json(orient="records")),
            "words": self.words,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Readability:
        """Return the check from the data of `to_json`; raise a `ValueError` for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("no check of this version")
        config = dict(data["config"])
        prompt = TargetPrompt(*config.pop("target_prompt"))
        return cls(
            str(data["model"]),
            bool(data["readable"]),
            str(data["verdict"]),
            SweepConfig(target_prompt=prompt, **config),
            pd.DataFrame(data["layers"]),
            pd.DataFrame(data["settings"]),
            dict(data["words"]),
        )


def readability(
    model: LanguageModel | Any,
    names: Sequence[str] = NAMES,
    *,
    prompts: dict[str, TargetPrompt] | None = None,
    progress: bool = True,
) -> Readability:
    """Find out whether and how a model can be read.

    Example:
        >>> check = readability(load_model())  # doctest: +SKIP
        >>> print(check.verdict)  # doctest: +SKIP
        >>> sweep(load_model(), "Isaac Newton", check.config)  # doctest: +SKIP

    Args:
        model: from `load_model`, or anything that it takes.
        names: names that the model should know, of different kinds; at least three.
        prompts: further target prompts to try, by display name.
        progress: whether to show a progress bar.

    Raises:
        ValueError: too few names, or a target prompt that does not fit.
    """
    model = load_model(model)
    several = list(dict.fromkeys(names))
    if isinstance(names, str) or len(several) < SCREENED_NAMES:
        wanted = f"at least {SCREENED_NAMES} names of different kinds"
        raise bad_value("names", wanted, names, "leave it out for the dozen of NAMES")
    few = several[:SCREENED_NAMES]
    first = list(_settings(model, prompts or {}))
    middle = model.n_layers // 2
    more = [layer for layer in dict.fromkeys((1, 2, middle)) if 0 < layer < model.n_layers]
    steps = len(first) + len(more) + 2
    known: Generators = {}
    with tqdm(total=steps, unit="setting", desc="reading", disable=not progress) as bar:
        screened: list[dict[str, Any]] = []

        def screen(model: LanguageModel, setting: Setting) -> None:
            screened.append(_screen(model, setting, few, known))
            bar.update()

        for setting in first:
            screen(model, setting)
        prompt = _best(screened)
        for layer in more:
            screen(model, replace(prompt, config=replace(prompt.config, target_layer=layer)))
        best = _best(screened)
        other = None if best.config.chat else _other_bos(model)  # a template writes its own
        if other is not None:
            screen(other, replace(best, bos="other"))
        table, words = _measure(model, best, several, known)
        bar.update(steps - bar.n)
    rows = sorted(screened, key=_worth, reverse=True)
    settings = pd.DataFrame([_plain(row) for row in rows])
    readable, verdict = _verdict(model, best, table, words, settings)
    config = replace(best.config, max_new_tokens=None)
    return Readability(
        model.name, readable, verdict, config, table, settings, {w.about: w.text for w in words}
    )


def best_config(model: LanguageModel | Any, *, progress: bool = True) -> SweepConfig:
    """Return the setting that reads a model best, measured once and cached."""
    return kept_readability(load_model(model), progress=progress).config


def kept_readability(model: LanguageModel, *, progress: bool = True) -> Readability:
    """Return the check of a model, from the cache folder if it is there."""
    path = _kept_at(model)
    try:
        return Readability.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        found = readability(model, progress=progress)
    keep(model, found)
    return found


def keep(model: LanguageModel, found: Readability) -> None:
    """Write a check to the cache folder, if that can be written."""
    path = _kept_at(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as fresh:
            fresh.write_text(json.dumps(found.to_json()), encoding="utf-8")
    except OSError:
        return


def _kept_at(model: LanguageModel) -> Path:
    """Return the file of a model, by its weights and its BOS."""
    prefix = "-".join(map(str, model.prefix_ids)) or "none"
    folder = platformdirs.user_cache_path("superscopes_tl") / "checks"
    return folder / f"{model.fingerprint}-{prefix}.json"


def _settings(model: LanguageModel, more: dict[str, TargetPrompt]) -> Iterator[Setting]:
    """Yield the settings to screen first."""
    prompts = {"paper's": DESCRIPTION_PROMPT, "short": SHORT_PROMPT, "long": LONG_PROMPT, **more}
    targets: list[Target] = ["same", 0]
    for name, prompt in prompts.items():
        for into in targets:
            config = SweepConfig(target_prompt=prompt, target_layer=into)
            yield Setting(name, config)
            if not model.prefix_ids and name == "paper's":
                yield Setting(name, replace(config, source_template=SENTENCE))
    if getattr(model.tokenizer, "chat_template", None):
        for into in targets:
            config = SweepConfig(
                target_prompt=CHAT_PROMPT, chat=True, target_layer=into,
                source_template=SENTENCE, max_new_tokens=CHAT_TOKENS,
            )  # fmt: skip
            yield Setting("chat", config)


def _other_bos(model: LanguageModel) -> LanguageModel | None:
    """Return the model with its BOS left out or added; `None` if it has none."""
    bos = model.tokenizer.bos_token_id
    if bos is None:
        return None
    return replace(model, prefix_ids=() if model.bos_token_id is not None else (bos,))


def _spread(n_layers: int, count: int) -> tuple[int, ...]:
    """Return some layers, evenly spaced, without the last, which affects one token alone."""
    return tuple(dict.fromkeys(round(i) for i in np.linspace(0, max(0, n_layers - 2), count)))


def _screen(
    model: LanguageModel, setting: Setting, names: Sequence[str], known: Generators
) -> dict[str, Any]:
    """Return the shares that a setting recovers over its best third of layers."""
    layers = _spread(model.n_layers, SCREENED_LAYERS)
    own, others, _ = _shares(model, setting, names, layers, SCREENED_OTHERS, known)
    table = _per_layer(own, others, layers)
    best = table.sort_values("worth", ascending=False).head(math.ceil(len(layers) / 3))
    return {"setting": setting, **best[["recovered", "others", "specific", "worth"]].mean()}


def _best(screened: Sequence[dict[str, Any]]) -> Setting:
    """Return the first setting that is as good as the best one."""
    least = max(map(_worth, screened)) - EQUAL
    setting: Setting = next(row["setting"] for row in screened if _worth(row) >= least)
    return setting


def _worth(row: dict[str, Any]) -> float:
    return -math.inf if math.isnan(row["worth"]) else float(row["worth"])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    setting: Setting = row["setting"]
    return {
        "prompt": setting.prompt,
        "target_layer": str(setting.target_layer),
        "source": setting.config.source_template,
        "bos": setting.bos,
        **{name: row[name] for name in ("recovered", "others", "specific")},
    }


def _measure(
    model: LanguageModel, setting: Setting, names: Sequence[str], known: Generators
) -> tuple[pd.DataFrame, list[OwnWords]]:
    """Return the shares that a setting recovers at every layer, with intervals over names."""
    layers = _spread(model.n_layers, min(MEASURED_LAYERS, model.n_layers))
    own, others, words = _shares(model, setting, names, layers, MEASURED_OTHERS, known)
    table = _per_layer(own, others, layers)
    there = ~np.isnan(own[:, 0])
    ends: Any = (math.nan, math.nan)
    if there.any():  # a joint level of 95 % over all layers (Bonferroni)
        ends = bootstrap((own - others)[there], level=1 - 0.05 / len(layers))
    table["specific_low"], table["specific_high"] = ends
    return table.drop(columns="worth"), words


def _per_layer(own: np.ndarray, others: np.ndarray, layers: Sequence[int]) -> pd.DataFrame:
    """Return the means over names, a row per layer."""
    there = ~np.isnan(own[:, 0])
    if there.sum() < 2:  # no mean over one name
        own = others = np.full((1, len(layers)), np.nan)
        there = np.array([True])
    mine, theirs = own[there].mean(axis=0), others[there].mean(axis=0)
    table = pd.DataFrame({"source_layer": list(layers), "recovered": mine, "others": theirs})
    return table.assign(specific=mine - theirs, worth=above_others(mine, theirs))


def _shares(
    model: LanguageModel,
    setting: Setting,
    names: Sequence[str],
    layers: Sequence[int],
    beside: int,
    known: Generators,
) -> tuple[np.ndarray, np.ndarray, list[OwnWords]]:
    """Return the shares that own vectors recover, and the mean of other names': name x layer.

    They are NaN for a name without own words, or whose own words all other names share.
    """
    config = replace(
        setting.config, layers=tuple(layers), kinds="resid_post", alphas=1.0, scorer=no_scores
    )
    first = plan_sweep(model, names[0], config)
    # One per prompt, whatever the target layer: the own words are the same.
    key = (setting.bos, setting.config.prompt_with_placeholder, setting.config.chat)
    first = replace(first, generator=known.setdefault(key, first.generator))
    plans = [first, *map(first.at_prompt, names[1:])]
    words = words_of(first.generator, names)
    made = [make_patches(plan) for plan in plans]
    rows: list[tuple[int, int, list[Patch]]] = []  # whose words, whose vectors
    for i, one in enumerate(words):
        after = [*range(i + 1, len(names)), *range(i)]
        different = [j for j in after if words[j].text != one.text][:beside]
        if not one.undefined and different:
            rows += [(i, j, made[j]) for j in (i, *different)]
    likely = iter(
        first.generator.log_probabilities(
            [patch for _, _, patches in rows for patch in patches],
            [words[i].token_ids for i, _, patches in rows for _ in patches],
        )
    )
    own = np.full((len(names), len(layers)), np.nan)
    theirs: dict[int, list[list[float]]] = {}
    for i, j, patches in rows:
        shares = [words[i].recovered(sum(next(likely))) for _ in patches]
        if i == j:
            own[i] = shares
        else:
            theirs.setdefault(i, []).append(shares)
    others = np.full_like(own, np.nan)
    for i, several in theirs.items():
        others[i] = [mean(column) for column in zip(*several, strict=True)]
    return own, others, words


def _verdict(
    model: LanguageModel,
    best: Setting,
    table: pd.DataFrame,
    words: Sequence[OwnWords],
    settings: pd.DataFrame,
) -> tuple[bool, str]:
    """Return whether a model can be read, and the verdict in words."""
    sure = table[(table["specific_low"] > 0) & (table["recovered"] >= LEAST_SHARE)]
    named = sum(not one.undefined for one in words)
    if sure.empty:
        order = table.sort_values("specific", ascending=False)
        top: Any = order.iloc[0] if table["specific"].notna().any() else None
        at_best = "nothing could be recovered" if top is None else (
            f"at best layer {top['source_layer']:.0f} recovers {top['recovered']:.2f} of the "
            f"model's own words, other names' vectors {top['others']:.2f} (specific "
            f"{top['specific']:.2f}, 95 % interval {top['specific_low']:.2f} to "
            f"{top['specific_high']:.2f})"
        )  # fmt: skip
        return False, (
            f"{model.name}: not readable in the settings tried: {at_best}, over {named} names."
        )
    strong = sure[sure["specific"] >= sure["specific"].max() / 2]
    where = layer_ranges(strong["source_layer"], among=table["source_layer"])
    verdict = (
        f"{model.name}: readable: {where} recover "
        f"{strong['recovered'].mean():.2f} of the model's own words, other names' vectors "
        f"{strong['others'].mean():.2f} (α = 1, {named} names); best: {best}."
    )
    for row in settings[settings["bos"] == "other"].to_dict("records"):
        own = settings[settings["bos"] == "own"].iloc[0]
        if row["specific"] > own["specific"] + BETTER and row["recovered"] > own["recovered"]:
            other = model.bos_token_id is None
            verdict += (
                f" With load_model(..., prepend_bos={other}) a first look recovers "
                f"{row['recovered']:.2f}, others {row['others']:.2f}."
            )
    return True, verdict


def layer_ranges(layers: Iterable[int], *, among: Iterable[int]) -> str:
    """Return layer numbers as ranges of those that were measured, such as `layers 3 to 9, 12`."""
    chosen = set(map(int, layers))
    runs: list[list[int]] = [[]]
    for layer in map(int, among):
        if layer in chosen:
            runs[-1].append(layer)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ("layers " if len(runs) > 1 or len(runs[0]) > 1 else "layer ") + ", ".join(parts)
