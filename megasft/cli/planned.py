"""The rows of a run, from flags of the command line, by the code that trains.

Shared by the commands that look at a run from outside. Their flags are those of training without
the ``--megasft-``, with training's defaults, so a command line can be copied over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from megasft.draw import Draw
    from megasft.packing.cost_window import CostWindow
    from megasft.packing.plan import RowPlan
    from megasft.store import TokenStore

DEFAULT_SEED: Final = 1234
"""Megatron's own default of ``--seed``."""
DEFAULT_ALIGN_TOKENS: Final = 8
"""Default of ``--megasft-align-tokens``; it already covers context parallelism up to 4."""

Stores = Annotated[
    list[Path],
    typer.Argument(metavar="STORE...", help="folders made by megasft build, as the run has them"),
]
Seed = Annotated[int | None, typer.Option(metavar="S", help=f"the run's --seed, or {DEFAULT_SEED}")]
MixtureFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="the run's --megasft-mixture")
]
PackerName = Annotated[
    str | None, typer.Option(metavar="NAME", help="the run's --megasft-packer, or balanced")
]
Packings = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="the run's --megasft-packings, or 1")
]
WindowBatches = Annotated[
    int | None,
    typer.Option("--cost-window", min=2, metavar="W", help="the run's --megasft-cost-window"),
]


class RowFlags(NamedTuple):
    """What the rows of a run depend on, beside its stores; None where training has a default.

    Attributes:
        seq_length: Tokens of a row.
        align_tokens: Multiple of every document's length, that of the layout counted.
        seed: Of draw, packing and order.
        mixture: What is drawn; every sample once without it.
        packer: A name of ``PACKERS``.
        packings: Epochs until the rows of the first come again.
    """

    seq_length: int
    align_tokens: int | None = None
    seed: int | None = None
    mixture: Path | None = None
    packer: str | None = None
    packings: int | None = None

    @property
    def run_seed(self) -> int:
        """The seed of the run."""
        return DEFAULT_SEED if self.seed is None else self.seed


class Planned(NamedTuple):
    """The rows of a run, and what its mixture drew."""

    plan: RowPlan
    draw: Draw | None


def plan_as_trained(store: TokenStore, flags: RowFlags) -> Planned:
    """Plan the rows of a run, and print what there is to warn of.

    The plan is cached where training looks for it.

    Raises:
        FlagError: There is no such packer, or several packings have no effect with it.
        DataError: The mixture file does not fit the stores.
        PlanError: Rows cannot be made with these sizes.
    """
    from megasft.draw import draw
    from megasft.mixture import read_mixture
    from megasft.packing.pack import DEFAULT_PACKER, KEEP_ORDER, PACKERS
    from megasft.store_group import population_of

    packer = flags.packer or DEFAULT_PACKER
    if packer not in PACKERS:
        raise FlagError(f"--packer {packer} is not one of {', '.join(PACKERS)}")
    if (flags.packings or 1) > 1 and packer in KEEP_ORDER:
        raise FlagError(
            f"--packings {flags.packings} has no effect with --packer {packer}, which makes the "
            "same rows each time; drop one of the two"
        )
    drawn = None
    if flags.mixture is not None:
        drawn = draw(read_mixture(flags.mixture), population_of(store), seed=flags.run_seed)
    plan = _plan(store, flags, drawn, packer)
    for warning in (*store.meta.get("warnings", ()), *plan.warnings):
        typer.echo(warning, err=True)
    return Planned(plan, drawn)


def plans_by_packer(
    store: TokenStore, flags: RowFlags, planned: Planned
) -> Iterator[tuple[str, RowPlan]]:
    """Yield the plan of every packer, the run's own as it is; others leave no file behind."""
    from tempfile import TemporaryDirectory

    from megasft.packing.pack import DEFAULT_PACKER, PACKERS

    for packer in PACKERS:
        if packer == (flags.packer or DEFAULT_PACKER):
            yield packer, planned.plan
            continue
        one_packing = flags._replace(packings=None)
        with TemporaryDirectory() as folder:
            yield packer, _plan(store, one_packing, planned.draw, packer, Path(folder))


def document_alignment(
    flags: RowFlags, *, cp_size: int, tp_size: int, sequence_parallel: bool
) -> int:
    """Return what document lengths are multiples of on a layout, as training does.

    Args:
        flags: Their ``align_tokens`` is what the run asks for, the layout not counted.
        cp_size: Ranks that share one row.
        tp_size: Tensor-parallel ranks.
        sequence_parallel: Whether activations are cut over the tensor-parallel ranks as well.

    Raises:
        FlagError: Rows cannot be cut for the layout.
    """
    from megasft.cp_layout import require_alignment

    return require_alignment(
        flags.seq_length,
        cp_size=cp_size,
        tp_size=tp_size,
        sequence_parallel=sequence_parallel,
        asked=flags.align_tokens or DEFAULT_ALIGN_TOKENS,
    )


def window_of(num_batches: int | None, global_batch_size: int) -> CostWindow | None:
    """Return how far ``--cost-window`` lets rows move; None without it."""
    from megasft.packing.cost_window import CostWindow

    return None if num_batches is None else CostWindow(num_batches, global_batch_size)


def _plan(
    store: TokenStore,
    flags: RowFlags,
    drawn: Draw | None,
    packer: str,
    cache: Path | None = None,
) -> RowPlan:
    from megasft.packing.plan import plan_rows

    return plan_rows(
        store,
        row_tokens=flags.seq_length,
        align_tokens=flags.align_tokens or DEFAULT_ALIGN_TOKENS,
        seed=flags.run_seed,
        cache=cache,
        draw=drawn,
        packer=packer,
        num_packings=flags.packings or 1,
    )
