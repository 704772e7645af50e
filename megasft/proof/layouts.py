"""The ways to split a run that the proof goes through.

The sizes (TP x CP x PP x DP) are all that fit the ranks; what can be switched on beside them is
distributed over these by hand, so that every option meets several sizes without the product of all.
"""

from collections.abc import Iterator
from typing import Final

from megasft.ranks.layout import Layout

DIST_OPT: Final = ("--use-distributed-optimizer",)
GATHER: Final = ("--megasft-attention", "all_gather")
SDPA: Final = ("--megasft-attention", "sdpa")
RECOMPUTE: Final = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
ALLGATHER_DISPATCH: Final = ("--moe-token-dispatcher-type", "allgather")
ALLTOALL_DISPATCH: Final = ("--moe-token-dispatcher-type", "alltoall")

DENSE: Final = (
    Layout(),
    Layout(mbs=2, note="sdpa", more=SDPA),
    Layout(mbs=8, note="recompute", more=RECOMPUTE),
    Layout(2, tp=2),
    Layout(2, tp=2, sp=True, mbs=2),
    Layout(2, cp=2),
    Layout(2, cp=2, mbs=4, note="gather", more=GATHER),
    Layout(2, cp=2, note="recompute", more=RECOMPUTE),
    Layout(2, pp=2),
    Layout(2, pp=2, vp=2, mbs=2),
    Layout(2, mbs=4),
    Layout(2, note="dist opt", more=DIST_OPT),
    Layout(4, tp=2, sp=True, cp=2),
    Layout(4, tp=4, sp=True),
    Layout(4, tp=2, pp=2, mbs=2),
    Layout(4, cp=2, pp=2),
    Layout(4, cp=4),
    Layout(4, cp=4, note="gather", more=GATHER),
    Layout(4, pp=4, mbs=2),
    Layout(4, cp=2, note="dist opt", more=DIST_OPT),
    Layout(4, tp=2, note="dist opt", more=DIST_OPT),
    Layout(4, pp=2, vp=2),
    Layout(4, mbs=2),
    Layout(8, tp=2, sp=True, cp=2, pp=2),
    Layout(8, tp=2, sp=True, cp=2, note="dist opt", more=DIST_OPT),
    Layout(8, cp=4, pp=2, note="recompute", more=RECOMPUTE),
    Layout(8, tp=2, pp=2, vp=2),
    Layout(8, cp=2, mbs=2),
)
"""For any model without experts."""

MOE: Final = (
    Layout(),
    Layout(2, ep=2, note="alltoall", more=ALLTOALL_DISPATCH),
    Layout(2, ep=2, mbs=2, note="allgather", more=ALLGATHER_DISPATCH),
    Layout(2, tp=2, sp=True),
    Layout(2, cp=2, ep=2),
    Layout(2, pp=2),
    Layout(4, tp=2, sp=True, ep=2),
    Layout(4, cp=2, ep=2, note="dist opt", more=DIST_OPT),
    Layout(4, pp=2, ep=2, note="recompute", more=RECOMPUTE),
    Layout(4, ep=4, note="allgather", more=ALLGATHER_DISPATCH),
    Layout(8, tp=2, sp=True, cp=2, ep=2),
    Layout(8, cp=2, pp=2, vp=2, ep=4),
)
"""For models with experts."""


def select(layouts: tuple[Layout, ...], *, max_ranks: int, names: list[str]) -> Iterator[Layout]:
    """Yield the layouts up to so many ranks; by name, when names are given.

    Args:
        layouts: To choose from.
        max_ranks: Most processes one layout may take.
        names: Parts of names, any case; none means all.
    """
    for layout in layouts:
        fits = layout.ranks <= max_ranks
        if fits and (not names or any(name.lower() in layout.name.lower() for name in names)):
            yield layout
