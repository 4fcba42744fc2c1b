"""What an experiment has to read, as plain data that another process can be sent.

1. `outline` says what the one who keeps the file has to know: where the readings come from, and
   the sites of every prompt. A model is needed for it; to go on with it, none is.
2. `Outline.shares` lays out the cells, a `Share` per prompt and draw.
3. `portions` cuts what is left of them into tasks.
4. `read_shares` makes plans of shares again, where there is a model, and runs them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from superscopes_tl.evaluation.store import common_provenance
from superscopes_tl.experiment import Cell, Reading, SweepPlan, lay_out, run_plans
from superscopes_tl.model import Site
from superscopes_tl.scores import scorer_name


@dataclass(frozen=True)
class Share:
    """Some cells of one source prompt.

    Attributes:
        prompt: the source prompt.
        draw: 0 for the likeliest texts, k for the k-th drawn ones.
        cells: what to read of it.
    """

    prompt: str
    draw: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Outline:
    """What an experiment reads, without a model.

    Attributes:
        provenance: from `common_provenance`.
        mapping: how α acts, as the table's column `mapping` has it.
        scorer: the scorer's name.
        alphas: the amplifiers.
        target_layer: where to patch, "same" or layers.
        batch_size: rows per batch, where the outline was made.
        sites: the places to read, by source prompt.
    """

    provenance: dict[str, Any]
    mapping: str
    scorer: str
    alphas: tuple[float, ...]
    target_layer: Literal["same"] | tuple[int, ...]
    batch_size: int
    sites: Mapping[str, tuple[Site, ...]]

    def shares(self, draws: int) -> Iterator[Share]:
        """Yield what is to be read of each prompt: the sweep, and the draws of α = 1."""
        for prompt, sites in self.sites.items():
            yield Share(prompt, 0, lay_out(sites, self.target_layer, self.alphas))
            for draw in range(1, draws + 1):
                yield Share(prompt, draw, lay_out(sites, self.target_layer, (1.0,)))


def outline(first: SweepPlan, prompts: Sequence[str]) -> Outline:
    """Say what an experiment reads.

    Args:
        first: the plan of any of its prompts.
        prompts: all of them.

    Raises:
        ValueError, TypeError: a bad prompt, or one without the tokens to read.
    """
    return Outline(
        provenance=common_provenance(first),
        mapping=first.mapping_name,
        scorer=scorer_name(first.scorer),
        alphas=first.alphas,
        target_layer=first.target_layer,
        batch_size=first.generator.batch_size,
        sites={prompt: _checked(first.at_prompt(prompt)).sites for prompt in prompts},
    )


def _checked(plan: SweepPlan) -> SweepPlan:
    """Return the plan; refuse one that cannot fit into memory, before any work."""
    plan.check_memory()
    return plan


def portions(shares: Iterable[Share], size: int) -> Iterator[tuple[Share, ...]]:
    """Yield the shares in portions of `size` cells: one may hold several prompts, or a part of one.

    Args:
        shares: in the order of one run.
        size: cells per portion; the last one may have fewer.
    """
    waiting: list[Share] = []
    room = size
    for share in shares:
        cells = share.cells
        while cells:
            waiting.append(replace(share, cells=cells[:room]))
            cells, room = cells[room:], room - len(cells[:room])
            if not room:
                yield tuple(waiting)
                waiting, room = [], size
    if waiting:
        yield tuple(waiting)


def read_shares(first: SweepPlan, shares: Iterable[Share]) -> Generator[list[Reading], None, None]:
    """Yield the readings of some shares, batch by batch; a batch may hold several prompts' cells.

    Args:
        first: the plan of any prompt of the experiment.
        shares: what to read.
    """
    yield from run_plans(_plan(first, share) for share in shares)


def _plan(first: SweepPlan, share: Share) -> SweepPlan:
    plan = first.at_prompt(share.prompt)
    if share.draw:
        plan = plan.with_settings(alphas=1, draw=share.draw)
    return plan.only(share.cells)
