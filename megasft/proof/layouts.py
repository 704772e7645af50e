"""The ways to split a run that the proof goes through, and their Megatron flags.

The sizes (TP x CP x PP x DP) are all that fit the ranks; what can be switched on beside them is
dealt over these by hand, so that every option meets several sizes without the product of all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to run the same global batch.

    Attributes:
        ranks: Processes; what TP, CP and PP leave is data-parallel.
        tp: Tensor-parallel ranks; ``sp`` cuts activations over them, too.
        vp: Chunks of the model per pipeline rank (interleaved schedule) when above 1.
        ep: Expert-parallel ranks, taken from the data- and context-parallel ones.
        mbs: Rows of a micro-batch.
        more: Further flags; ``note`` is how the table calls them.
    """

    ranks: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    mbs: int = 1
    note: str = ""
    more: tuple[str, ...] = ()

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tp * self.cp * self.pp)

    @property
    def name(self) -> str:
        """The layout in the words of the table, as in ``TP 2 + SP x CP 2``."""
        tp = f"TP {self.tp}" + (" + SP" if self.sp else "")
        pp = f"PP {self.pp}" + (f" x VP {self.vp}" if self.vp > 1 else "")
        sizes = (
            *((tp, self.tp), (f"CP {self.cp}", self.cp), (pp, self.pp)),
            *((f"DP {self.dp}", self.dp), (f"EP {self.ep}", self.ep)),
        )
        parts = [text for text, size in sizes if size > 1] or ["1 rank"]
        options = ([f"mbs {self.mbs}"] if self.mbs > 1 else []) + ([self.note] if self.note else [])
        return " x ".join(parts) + "".join(f", {option}" for option in options)

    def flags(self, *, num_layers: int) -> list[str]:
        """Return Megatron's flags for a model of so many layers."""
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--context-parallel-size": self.cp,
            "--pipeline-model-parallel-size": self.pp,
            "--micro-batch-size": self.mbs,
        }
        if self.vp > 1:
            sizes["--num-layers-per-virtual-pipeline-stage"] = num_layers // (self.pp * self.vp)
        if self.ep > 1:
            sizes["--expert-model-parallel-size"] = self.ep
        flags = [text for flag, size in sizes.items() for text in (flag, str(size))]
        return [*flags, *(["--sequence-parallel"] if self.sp else []), *self.more]


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
