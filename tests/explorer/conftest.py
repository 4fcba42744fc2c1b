"""Models, scorers and finished Explorers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from superscopes_tl import Explorer, LanguageModel, SweepConfig, load_model
from tests.model.test_chat import TEMPLATES, with_template
from tests.support.hooks import hooks_on
from tests.support.scorers import by_length
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

PROMPT = "Will Smith"
WAIT = 120


def finished(explorer: Explorer) -> Explorer:
    """Run a sweep to its end."""
    assert explorer.run().wait(WAIT)
    assert explorer.state == "done", explorer.error
    return explorer


def heatmaps(explorer: Explorer) -> list[Any]:
    """Return the coloured panels of the map."""
    return [trace for trace in explorer.view.stage.children[0].data if trace.type == "heatmap"]


def numbers(explorer: Explorer) -> list[float]:
    """Return the numbers of the map, in ascending order."""
    shown = [value for trace in heatmaps(explorer) for row in trace.z for value in row]
    return sorted(value for value in shown if value is not None)


def marked(explorer: Explorer, name: str) -> int:
    """Return how many cells of the map carry a mark."""
    figure = explorer.view.stage.children[0]
    return sum(len(trace.x) for trace in figure.data if trace.name == name)


@pytest.fixture
def model(tiny: Callable[[str, str], LanguageModel]) -> LanguageModel:
    """A tiny model without a chat template."""
    return tiny("llama", "bridge")


@pytest.fixture(scope="session")
def chatty() -> LanguageModel:
    """A tiny model with a chat template."""
    tokenizer = with_template(tiny_tokenizer(), TEMPLATES["chatml"])
    return load_model(tiny_hf("llama"), tokenizer, backend="bridge")


@pytest.fixture
def config() -> SweepConfig:
    """A small sweep."""
    return SweepConfig(alphas=(1, 3), max_new_tokens=4, scorer=by_length)


@pytest.fixture
def explorer(model: LanguageModel, config: SweepConfig) -> Iterator[Explorer]:
    """An Explorer that has not run; no hook is left when its test ends."""
    made = Explorer(model, PROMPT, config)
    yield made
    made.cancel()
    assert made.wait(WAIT)
    assert hooks_on(model) == 0


@pytest.fixture(scope="module")
def shared(tiny: Callable[[str, str], LanguageModel]) -> Explorer:
    """A finished Explorer that the tests of a module look at."""
    config = SweepConfig(alphas=(1, 3), max_new_tokens=4, scorer=by_length)
    return finished(Explorer(tiny("llama", "bridge"), PROMPT, config))


@pytest.fixture
def ran(shared: Explorer) -> Explorer:
    """The finished Explorer, as it was after its run."""
    shared.unpin()
    shared.view.show.value, shared.view.best_alpha.value = "all", "best"
    return shared


@pytest.fixture(scope="session")
def best_written(llama: LanguageModel, word_overlap: Any) -> Explorer:
    """An Explorer that generated the best α of each site."""
    return finished(
        Explorer(
            llama, "Red Hot Chili Peppers", layers=(3, 5), kinds=("mlp_out", "resid_post"),
            alphas=(1, 6), generate="best", controls=("other_prompt", "random_direction"),
            scorer=word_overlap, max_new_tokens=4,
        )
    )  # fmt: skip


@pytest.fixture
def best(best_written: Explorer) -> Explorer:
    """The same, coloured by what is recovered."""
    best_written.view.colour.value = "recovered"
    best_written.view.show.value, best_written.view.best_alpha.value = "all", "best"
    return best_written
