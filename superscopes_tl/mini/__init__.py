"""The bundled model: a small Llama trained from a table of facts, for demonstrations and tests."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The folder of the shipped weights and tokenizer, in Hugging Face format."""

FACTS_PATH = Path(__file__).parent / "facts.tsv"
"""The table of facts that the model was trained from."""


def measured() -> dict[str, str]:
    """Return in a few lines what was measured of the bundled model."""
    from superscopes_tl.mini.report import headline, load_figures

    return headline(load_figures(MODEL_DIR))
