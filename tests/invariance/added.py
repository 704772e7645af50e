"""What a side loss adds to the gradient: a run with it minus the same run without it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megasft.ranks.layout import Layout
from tests.invariance.runs import record_all


class Added(NamedTuple):
    """The gradient a side loss adds on one layout under one objective."""

    layout: Layout
    objective: str
    gradients: dict[str, torch.Tensor]

    @property
    def vector(self) -> torch.Tensor:
        return torch.cat([self.gradients[name].flatten() for name in sorted(self.gradients)])


def added_gradients(
    pairs: Sequence[tuple[Layout, str]],
    *,
    flags: Callable[[Layout, str, bool], list[str]],
    folder: Path,
) -> list[Added]:
    """Run every pair of layout and objective twice; ``flags`` gets whether the side loss is on."""
    found = []
    for ranks in sorted({layout.ranks for layout, _ in pairs}):
        here = [(x, o) for x, o in pairs if x.ranks == ranks]
        one_step = ("--train-iters", "1")
        runs = [[*flags(x, o, is_on), *one_step] for x, o in here for is_on in (False, True)]
        records = [torch.load(r) for r in record_all(ranks, runs, folder / f"runs{ranks}")]
        for (layout, objective), off, on in zip(here, records[::2], records[1::2], strict=True):
            without, with_it = off["gradients"], on["gradients"]
            gradients = {n: with_it[n].double() - without[n].double() for n in without}
            found.append(Added(layout, objective, gradients))
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
