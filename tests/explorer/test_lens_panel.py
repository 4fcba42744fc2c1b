"""The Explorer's panel: what lenses read at the selected cell's site."""

from __future__ import annotations

import html
from collections.abc import Iterator

import pytest

from superscopes_tl import Explorer, LanguageModel, Site, SweepConfig
from superscopes_tl.explorer.cell import LensReading, Probe
from superscopes_tl.explorer.markup import probe as probe_markup
from superscopes_tl.figures import Shades
from superscopes_tl.neighbours import LENSES, LOGIT_LENS, TunedLens, lens_table
from superscopes_tl.neighbours.lenses import control_name
from tests.conftest import tiny_model

PROMPT = "Red Hot Chili Peppers"
WAIT = 120
CONFIG = SweepConfig(
    layers=(2, 3, 4, 5),
    alphas=(1, 3),
    max_new_tokens=2,
    scorer=lambda references, candidates: [0.5] * len(candidates),
)


@pytest.fixture
def model() -> LanguageModel:
    """A tiny model."""
    return tiny_model("llama", "bridge")


@pytest.fixture
def explorer(model: LanguageModel) -> Iterator[Explorer]:
    """An Explorer with a second lens, that has run."""
    made = Explorer(
        model, PROMPT, CONFIG, lenses={**LENSES, "tuned lens": TunedLens.untrained(model)}
    )
    assert made.run().wait(WAIT)
    yield made
    made.cancel()
    assert made.wait(WAIT)


def test_the_panel_names_what_each_lens_reads_at_the_site(
    explorer: Explorer, model: LanguageModel
) -> None:
    """The tokens and probabilities are the lens table's, each lens beside its control."""
    explorer.select(kind="mlp_out", layer=5, alpha=3)
    assert explorer.wait(WAIT)
    shown = explorer.view.probe.value
    table = lens_table(model, PROMPT, [Site("mlp_out", 5, -1)])
    rows = table[table["lens"] == LOGIT_LENS]
    assert len(rows) == 5
    for row in rows.to_dict("records"):
        token = row["top_token"] if row["top_token"].isprintable() else repr(row["top_token"])
        assert f"<bdi>{html.escape(token)}</bdi></code> <small>{row['probability']:.2f}" in shown
    names = (LOGIT_LENS, control_name(LOGIT_LENS), "tuned lens", control_name("tuned lens"))
    assert all(f"<th scope='row'>{name}</th>" in shown for name in names)


def test_what_lenses_read_is_the_same_at_every_alpha(explorer: Explorer) -> None:
    """α changes the cell and its text, not what a lens says of its site; another site does."""
    parts = []
    for layer, alpha in ((2, 1), (2, 3), (5, 3)):
        explorer.select(kind="resid_post", layer=layer, alpha=alpha)
        assert explorer.wait(WAIT)
        shown = explorer.view.probe.value
        assert "takes a positive α away" in shown
        parts.append(shown[shown.index("as lenses read this site") :])
    assert parts[0] == parts[1] != parts[2]


def test_tokens_of_white_space_can_be_seen() -> None:
    """A line break is named, not drawn."""
    found = Probe((), (), (LensReading(LOGIT_LENS, (("\n", 0.25), ("<i>", 0.125))),))
    shown = probe_markup(found, Shades())
    assert "<bdi>&#x27;\\n&#x27;</bdi></code> <small>0.25" in shown
    assert "<bdi>&lt;i&gt;</bdi></code> <small>0.12" in shown
