"""The lists of names are what their descriptions say."""

from __future__ import annotations

from superscopes_tl.engine import MANY_KINDS, PAPER_PROMPTS
from superscopes_tl.evaluation import ALL_NAMES, NAMES_BY_KIND, SECOND_LIST

FOUND_ON = (
    "Pink Floyd", "Alexander the Great", "Red Hot Chili Peppers", "Star Wars", "George Washington",
    "Titanic", "Samsung", "Python", "Paris", "Albert Einstein", "Microsoft", "Amazon River",
    "Diabetes", "The Beatles", "Isaac Newton", "Toyota", "Led Zeppelin", "Napoleon",
    "Photosynthesis", "Mount Everest", "Shakespeare", "Coca-Cola",
)  # fmt: skip
"""The names on which layer 8 and α = 6 were found."""


def test_the_names_of_the_confirming_test_are_new() -> None:
    """No name of the confirming test was used to find a setting."""
    seen = {name.casefold() for name in (*FOUND_ON, *MANY_KINDS, *PAPER_PROMPTS)}
    assert not seen & {name.casefold() for name in ALL_NAMES}


def test_every_kind_has_six_names_and_three_are_in_the_second_list() -> None:
    """120 distinct names of 20 kinds, of which 60 are in the second list."""
    assert {len(names) for names in NAMES_BY_KIND.values()} == {6}
    assert len(NAMES_BY_KIND) == 20
    assert len(set(ALL_NAMES)) == 120
    assert len(set(SECOND_LIST) & set(ALL_NAMES)) == 60
