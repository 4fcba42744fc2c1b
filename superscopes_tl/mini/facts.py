"""The table of facts behind the bundled model.

1. Each line of `facts.tsv` is one fact: kind, name, description, and the title of the article
   where the description can be checked.
2. `load_facts` reads and validates the table.
3. `held_out` picks the names that training shows in text only, never in self-description, so
   that reading them from a hidden state is generalisation.
"""

import csv
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from superscopes_tl.engine import PAPER_PROMPTS
from superscopes_tl.mini import FACTS_PATH

COLUMNS = ("kind", "name", "description", "source")

FEW_SHOT: tuple[tuple[str, str], ...] = (
    ("Syria", "Country in the Middle East"),
    ("Leonardo DiCaprio", "American actor"),
    ("Samsung", "South Korean multinational major appliance and consumer electronics corporation"),
)
"""The entries of the paper's target prompt; their descriptions are kept word for word."""


@dataclass(frozen=True)
class Fact:
    """One name and what it is.

    Attributes:
        kind: Lower-case class of the name, e.g. `band`; `word` marks a common word.
        name: The name as one writes it.
        description: A few attributes, without `,`, `:` or `;`.
        source: Title of the article where the description can be checked.
    """

    kind: str
    name: str
    description: str
    source: str

    def __post_init__(self) -> None:
        """Refuse a row that would break the list format `name: description, name: ...`."""
        if not re.fullmatch(r"[a-z_]+", self.kind):
            raise ValueError(f"kind must be lower_snake, got {self.kind!r}")
        if ":" in self.name or re.search(r"[,:;]", self.description):
            raise ValueError(f"{self.name!r}: ':' in a name, or ',:;' in a description")
        if not (self.name + self.description).isascii():
            raise ValueError(f"{self.name!r}: only ASCII is supported")


def load_facts(path: Path = FACTS_PATH) -> tuple[Fact, ...]:
    """Read the table.

    Args:
        path: A TSV with a header line and the columns kind, name, description and source.

    Returns:
        The facts in the order of the file.

    Raises:
        ValueError: If the header differs, a row is malformed or a name occurs twice.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: the header must be {' '.join(COLUMNS)}")
    facts = []
    seen: set[str] = set()
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS):
            raise ValueError(f"{path}:{number}: {len(row)} columns, want {len(COLUMNS)}")
        fact = Fact(*row)
        if fact.name in seen:
            raise ValueError(f"{path}:{number}: {fact.name!r} occurs twice")
        seen.add(fact.name)
        facts.append(fact)
    return tuple(facts)


def known_facts() -> dict[str, str]:
    """Return what the bundled model was trained to say of each name."""
    return {fact.name: fact.description for fact in load_facts()}


def held_out(facts: Sequence[Fact], share: float = 0.1, seed: int = 0) -> frozenset[str]:
    """Pick the names that are never used in self-description.

    Args:
        facts: The table.
        share: Share of each kind to hold out, rounded to a whole number of names.
        seed: Seed of the draw; the same table and seed give the same names.

    Returns:
        The held-out names. The paper's prompts and the few-shot names are never among them.
    """
    kept = {*PAPER_PROMPTS, *(name for name, _ in FEW_SHOT)}
    by_kind: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        by_kind[fact.kind].append(fact.name)
    rng = random.Random(seed)
    chosen: set[str] = set()
    for kind in sorted(by_kind):
        names = sorted(by_kind[kind])
        candidates = [name for name in names if name not in kept]
        chosen.update(rng.sample(candidates, min(len(candidates), round(share * len(names)))))
    return frozenset(chosen)
