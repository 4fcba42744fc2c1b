"""Shared fixtures; the environment is set before any model library is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker of pytest-xdist per core, a thread each

import pytest
from hypothesis import settings

from superscopes_tl import LanguageModel, load_model
from superscopes_tl.weights import find_packaged
from tests.support import scorers
from tests.support.tiny_models import hooked_gemma2, sharp_llama, tiny_hf, tiny_tokenizer

# A shared machine may take any time for an example; whether it is right does not depend on it.
settings.register_profile("patient", deadline=None, max_examples=40)
settings.load_profile("patient")


def has_hooked_transformer() -> bool:
    """Tell whether the installed TransformerLens still has `HookedTransformer`."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    """What an Explorer still does in the background ends with its test."""
    yield
    background = sys.modules.get("superscopes_tl.explorer.background")
    if background is not None:
        background._stop_all()


BACKENDS = ("hooked", "bridge") if has_hooked_transformer() else ("bridge",)


@cache
def tiny_model(architecture: str, backend: str) -> LanguageModel:
    """Return a random-weight model, wrapped for the package by the given class."""
    hf = tiny_hf(architecture)
    if backend == "hooked" and architecture == "gemma2":
        return load_model(hooked_gemma2(hf), tiny_tokenizer())
    return load_model(hf, tiny_tokenizer(), backend=backend)


ON_BOTH_LINES = ("test_patches.py", "test_verification.py")
"""Test modules that depend on TransformerLens as a whole; elsewhere the tests with a backend do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs per backend; begin with what takes longest, so that no worker ends alone."""
    for item in items:
        backend = "backend" in getattr(getattr(item, "callspec", None), "params", {})
        if backend or item.path.name in ON_BOTH_LINES:
            item.add_marker(pytest.mark.transformer_lens)
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str, str], LanguageModel]:
    """The factory of random-weight models: `tiny("llama", "bridge")`."""
    return tiny_model


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random-weight Llama of sharp predictions and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sharp_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LanguageModel:
    """The random-weight Llama of that directory, through the faster class: 6 layers and a BOS."""
    return load_model(llama_folder, backend="bridge", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct, through the faster class, for tests of what a model reads."""
    if find_packaged("smollm2") is None:
        pytest.skip("superscopes fetch smollm2")
    return load_model("smollm2", backend="bridge", device="cpu")


@pytest.fixture(scope="session")
def word_overlap() -> Any:
    """A cheap scorer."""
    return scorers.word_overlap
