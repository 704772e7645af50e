"""``megasft resume-check``: whether a run, resumed so, repeats or skips rows, and what is next."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megasft.run.resume_check import Resume
    from megasft.training.resume_proof import Proof

CONTEXT: Final = {"ignore_unknown_options": True, "allow_extra_args": True}
"""What the command is registered with: flags it does not know are those of the run."""

SAMPLES_SHOWN: Final = 4
"""Samples printed of each of the first rows."""
RANKS_SHOWN: Final = 8
ROWS_SHOWN: Final = 16
"""Rows printed of each of the first ranks."""


class _Size(NamedTuple):
    """A line of the table: what it is called, and the flag's name in Megatron."""

    title: str
    name: str


SIZES: Final = (
    _Size("ranks", "world_size"),
    _Size("data parallel", "data_parallel_size"),
    _Size("tensor parallel", "tensor_model_parallel_size"),
    _Size("pipeline parallel", "pipeline_model_parallel_size"),
    _Size("context parallel", "context_parallel_size"),
    _Size("expert parallel", "expert_model_parallel_size"),
    _Size("micro-batch", "micro_batch_size"),
)


def resume_check(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="--save folder of a run (its newest checkpoint), or an iter_... folder in it",
        ),
    ],
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="ranks of the run to come; default: as many as were"),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="FLAG", help="flag of the checkpoint to leave out; again for more"),
    ] = None,
    rows: Annotated[
        int, typer.Option("--show-rows", min=0, metavar="R", help="rows to print the samples of")
    ] = 3,
) -> None:
    """Show that a run, resumed with these flags, repeats and skips nothing, and what it trains.

    `megasft resume-check ckpt/run`

    checks the same run again; all flags and paths are those saved in the checkpoint. What will be
    different is given behind it, as it will be given to the run, `--megasft-` flags and Megatron's:

    `megasft resume-check ckpt/run --world-size 16 --context-parallel-size 4 --global-batch-size 32`

    Nothing is trained, no GPU and no model is needed. Megatron's own sampler is replayed for every
    rank of the old and of the new layout, over rows planned by the code that trains. Exit code 0:
    each row of the epoch is trained exactly once. 1: it is not, or the rows are other rows, or
    Megatron would refuse the checkpoint; the difference is named.
    """
    from megasft.megatron import cpu

    if str(checkpoint).startswith("-"):
        raise FlagError(f"CHECKPOINT comes before the flags of the run, not {checkpoint}")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megasft.megatron.cpu").setLevel(logging.ERROR)
    # Nothing is computed, so packages that compute on a GPU alone need not be hidden.
    cpu.prepare(hide=())
    with _quiet():
        cpu.skip_missing_makefile()
        from megasft.run import resume_check as checks

        resumed = checks.open_resume(
            checkpoint, context.args, without=without or (), world_size=world_size
        )
        proof = checks.prove(resumed)
        _print(resumed, proof, num_rows=rows)
    raise typer.Exit(0 if proof.is_exact else 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Megatron warns of without its fast kernels and without ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _print(resumed: Resume, proof: Proof, *, num_rows: int) -> None:
    from rich.console import Console

    from megasft.run.resume_check import cautions

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{resumed.folder}: {_place(resumed, proof)}\n", markup=False)
    console.print(_table(resumed))
    for caution in cautions(resumed):
        console.print(f"warning: {caution}", style="yellow", markup=False)
    console.print()
    _print_verdict(console, resumed, proof)
    _print_next(console, resumed, proof, num_rows=num_rows)


def _place(resumed: Resume, proof: Proof) -> str:
    """Say where the run is: rows, epoch and place in it."""
    epoch = proof.epochs[-1]
    place = resumed.consumed - epoch.first
    where = f"{place:,} of its {epoch.end - epoch.first:,} rows" if place else "at its start"
    return (
        f"iteration {resumed.iteration:,}, {resumed.consumed:,} rows consumed, epoch "
        f"{epoch.number + 1:,}, {where}"
    )


def _table(resumed: Resume) -> Table:
    """Return sizes and given flags of the checkpoint and of the run to come, side by side."""
    from rich.table import Table

    from megasft.run.resume_check import batch_rows, learning_rate, num_steps_to_come

    table = Table("", "checkpoint", "run to come", box=None, pad_edge=False)
    old, new, at = resumed.old, resumed.new, resumed.consumed

    def line(title: str, before: Any, after: Any) -> None:
        style = "bold" if before != after else None
        table.add_row(title, _shown(before), _shown(after), style=style)

    for title, name in SIZES:
        line(title, getattr(old, name), getattr(new, name))
    line("global batch", batch_rows(old, max(0, at - 1)), batch_rows(new, at))
    rates = learning_rate(old, resumed.state), learning_rate(new, resumed.state)
    line("learning rate of the next step", *(f"{rate:.6g}" for rate in rates))
    table.add_row("steps to come", "", f"{num_steps_to_come(resumed):,}")
    for flag, (before, after) in resumed.changed.items():
        line(flag, before, after)
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_verdict(console: Console, resumed: Resume, proof: Proof) -> None:
    numbers = " and ".join(f"{epoch.number + 1:,}" for epoch in proof.epochs)
    of_epochs = f"epoch {numbers}" if len(proof.epochs) == 1 else f"epochs {numbers}"
    before, after = proof.num_steps
    console.print(
        f"{of_epochs}: {proof.num_before:,} rows trained before, {proof.num_to_come:,} still to "
        f"come, {proof.num_repeated:,} repeated, {proof.num_skipped:,} skipped"
    )
    ranks = f"{resumed.old.data_parallel_size} and {resumed.new.data_parallel_size}"
    console.print(
        f"replayed: {before:,} steps before the checkpoint and {after:,} after it, with Megatron's "
        f"sampler on each of {ranks} data-parallel ranks"
    )
    if proof.num_unseen:
        console.print(
            f"{proof.num_unseen:,} rows before were trained by steps of another batch size, which "
            "the checkpoint does not tell; they are taken from the plan"
        )
    if proof.is_exact:
        console.print("each row is trained exactly once an epoch", style="bold green")
        return
    if proof.odd_step is not None:
        console.print(f"the step from row {proof.odd_step:,} on trains rows that are not its own")
    console.print("rows are repeated or skipped: please report this", style="bold red")


def _print_next(console: Console, resumed: Resume, proof: Proof, *, num_rows: int) -> None:
    """Print the rows of the next step, and the samples of the first of them."""
    step, plan = proof.next_step, resumed.data.train.plan
    console.print(
        f"\nnext step, iteration {resumed.iteration + 1:,}: {len(step.rows):,} rows", style="bold"
    )
    for rank, rows in enumerate(step.rows_of_rank[:RANKS_SHOWN]):
        more = f" and {len(rows) - ROWS_SHOWN:,} more" if len(rows) > ROWS_SHOWN else ""
        shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
        console.print(f"  data-parallel rank {rank}: rows {shown}{more}")
    if len(step.rows_of_rank) > RANKS_SHOWN:
        console.print(f"  and {len(step.rows_of_rank) - RANKS_SHOWN:,} more ranks")
    for row in step.rows[:num_rows]:
        console.print(
            f"row {row:,}: {len(plan.rows[row]):,} samples, {int(plan.labels[row]):,} labels, "
            f"{int(plan.tokens[row]):,} of {plan.row_tokens:,} tokens",
            style="bold",
        )
        _print_samples(console, resumed, plan.rows[row].tolist())


def _print_samples(console: Console, resumed: Resume, samples: list[int]) -> None:
    store = resumed.data.train.store
    for index in samples[:SAMPLES_SHOWN]:
        num_tokens = int(store.tokens.lengths[index])
        line = f"  sample {index:<9}{num_tokens:>9,} tokens  {store.source_line(index)}"
        console.print(line, markup=False)
    if len(samples) > SAMPLES_SHOWN:
        console.print(f"  and {len(samples) - SAMPLES_SHOWN:,} more")
