"""A worker of an experiment: what it is told, and what it does.

1. It is sent little: how to load the model (not its weights), the settings, and the cells to read.
   A function stands for the model: `load_model` and a name, or one of the user's.
2. It loads the model when it is first asked for, and keeps it until another one is asked for.
3. It does one task at a time, whatever threads it is called in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from superscopes_tl.errors import bad_value
from superscopes_tl.evaluation.shares import Outline, Share, outline, read_shares
from superscopes_tl.experiment import Reading, SweepConfig, SweepPlan, plan_sweep
from superscopes_tl.model import LanguageModel, load_model
from superscopes_tl.weights import absolute

Loader: TypeAlias = Callable[[], Any]
"""Returns a model, or anything that `load_model` takes, in whatever process it is called."""


def as_loader(model: Any, argument: str = "model") -> Loader:
    """Return how another process gets the same model.

    Args:
        model: a name, a directory, a model that `load_model` made of one, or a function.
        argument: how messages call it.

    Raises:
        ValueError: an object that only this process has.
    """
    if isinstance(model, str | Path):
        return partial(load_model, absolute(model))
    found = model.origin if isinstance(model, LanguageModel) else model
    key = _key(found)
    if found is None or any(part in key for part in ("<locals>", "<lambda>", " at 0x")):
        raise bad_value(
            argument,
            "a model that every worker can load for itself",
            " ".join(repr(model).split()),
            "pass a name, a directory, or a function of no arguments, defined with def at the "
            "top of a module, that returns the loaded model; such as "
            "functools.partial(load_model, 'smollm2', backend='bridge')",
        )
    loader: Loader = found
    return loader


def _key(load: Any) -> str:
    """Return what tells loaders apart: the function's name and its arguments."""
    if isinstance(load, partial):
        return f"{_key(load.func)} {load.args!r} {sorted(load.keywords.items())!r}"
    name = getattr(load, "__qualname__", None)
    return f"{load.__module__}.{name}" if callable(load) and name else object.__repr__(load)


def kept_under(load: Loader, run: str) -> str:
    """Return what a worker keeps a model under.

    By the next run a notebook's function may be another one, and a directory may hold other files.
    """
    key = _key(load)
    named = (*load.args, *load.keywords.values()) if isinstance(load, partial) else ()
    for folder in (Path(part) for part in named if isinstance(part, str | Path)):
        if folder.is_dir():
            key += f" {max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)}"
    return f"{key} {run}" if "__main__." in key else key


@dataclass(frozen=True)
class Experiment:
    """What a worker is told.

    Attributes:
        run: tells this experiment from every other one.
        prompt: one of the source prompts.
        config: the settings, without a target model.
        load: gives the model.
        load_target: gives the model that is asked, where it is another one.
    """

    run: str
    prompt: str
    config: SweepConfig
    load: Loader
    load_target: Loader | None


_TURN = threading.Lock()
_MODELS: dict[str, LanguageModel] = {}
_PLANS: dict[str, SweepPlan] = {}


def _first_plan(experiment: Experiment) -> SweepPlan:
    """Return this worker's own plan of an experiment, made when it is first asked for."""
    if experiment.run not in _PLANS:
        _PLANS.clear()  # it holds a model: the last experiment's has to go first
        loaders = [load for load in (experiment.load, experiment.load_target) if load]
        keys = [kept_under(load, experiment.run) for load in loaders]
        for key in set(_MODELS).difference(keys):
            del _MODELS[key]
        for key, load in zip(keys, loaders, strict=True):
            if key not in _MODELS:
                _MODELS[key] = load_model(load())
        target = _MODELS[keys[1]] if experiment.load_target else None
        config = replace(experiment.config, target_model=target)
        _PLANS[experiment.run] = plan_sweep(_MODELS[keys[0]], experiment.prompt, config)
    return _PLANS[experiment.run]


def outline_there(experiment: Experiment, prompts: Sequence[str]) -> Outline:
    """Say what the experiment reads, in a worker."""
    with _TURN:
        return outline(_first_plan(experiment), prompts)


def read_there(
    experiment: Experiment, shares: Sequence[Share], fingerprints: tuple[str, str]
) -> list[Reading]:
    """Read some cells, in a worker.

    Raises:
        ValueError: its weights are not those of the other workers.
    """
    with _TURN:
        plan = _first_plan(experiment)
        found = plan.model.fingerprint, plan.generator.model.fingerprint
        if found != fingerprints:
            raise bad_value(
                "model", f"weights with the fingerprints {fingerprints} in every worker",
                found, "give all machines the same files, or name a revision",
            )  # fmt: skip
        return [reading for batch in read_shares(plan, shares) for reading in batch]
