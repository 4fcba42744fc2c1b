"""What the workers of a test are sent: functions that another process can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superscopes_tl import LanguageModel, Site, load_model
from superscopes_tl.experiment import SweepPlan
from tests.support.scorers import letters


def loaded(folder: str, log: str) -> LanguageModel:
    """Load a model and write down which process did."""
    with Path(log).open("a", encoding="utf-8") as lines:
        lines.write(f"{os.getpid()}\n")
    return load_model(folder, backend="bridge", device="cpu")


@dataclass(frozen=True)
class Deadly:
    """A scorer that kills its process at one prompt, as often as it is said, then scores."""

    folder: str
    prompt: str
    times: int
    name: str = "letters"

    def __call__(self, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        if self.prompt in references:
            for time in range(self.times):
                try:
                    (Path(self.folder) / f"death {time}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return letters(references, candidates)


def short(plan: SweepPlan, places: Sequence[tuple[Site, int]]) -> Any:
    """Give vectors of a wrong width at one prompt."""
    width = 3 if plan.source.text == "Will Smith" else plan.model.d_model
    return torch.ones(len(places), width)
