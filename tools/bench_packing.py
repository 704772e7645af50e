"""Compare the packers, and the deal of global batches to ranks, with what others do; print ratios.

Others: best fit decreasing sample by sample, first fit in the order of the data, and TRL's packer
where it is installed. All run in this process, one after the other; seconds are of CPU.
A step is simulated as its slowest rank: data-parallel ranks train their micro-batches one after
another, rows come in a random order as in training. "undealt" is time over that of ranks which end
together; "dealt" is the same after `megasft.packing.balance.deal`, "window" with the rows of WINDOW
neighbouring global batches sorted by cost before (`--megasft-cost-window`).

Usage: python tools/bench_packing.py --seeds 0 1
       python tools/bench_packing.py --sets chat_1m --packers balanced best_fit trl
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from bench_packing_lengths import LENGTH_SETS, Lengths, cost
from bench_packing_others import TrlPacker, best_fit_one_by_one, first_fit

from megasft.packing.balance import LLAMA_8B, BatchShape, DealtOrder, slowest_over_mean
from megasft.packing.cost_window import CostWindow, WindowedOrder
from megasft.packing.order import RowAtPosition, RowOrder
from megasft.packing.pack import PACKERS
from megasft.packing.rows import Rows

MICRO_BATCHES = 4
WINDOW = 4
OURS = tuple(name for name in PACKERS if name != "none")
OTHERS = ("plain_best_fit", "first_fit", "trl")


class Packed(NamedTuple):
    """What a packer made: the length and the row of each sample, in any order, and the time."""

    lengths: Lengths
    row_of: npt.NDArray[np.int64]
    cpu_seconds: float


class Figures(NamedTuple):
    """One line of the table."""

    rows: int
    over_bound: float
    cpu_seconds: float
    dearest: float
    spread: float
    undealt: float
    dealt: float
    window: float


def main() -> int:
    """Print a table, then what was promised and what was measured; 1 if they differ."""
    args = arguments().parse_args()
    packers = dict(packers_named(args.packers))
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}")
    print("| set | seed | packer | rows | over the bound | CPU s | x time of the first packer "
          "| max / mean cost | spread of samples a row | undealt | dealt | window |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    measured: dict[tuple[str, str], list[Figures]] = {}
    for name in args.sets:
        for seed in args.seeds or [LENGTH_SETS[name].seed]:
            lengths = LENGTH_SETS[name].lengths(seed)
            first = 0.0
            for packer, pack in packers.items():
                figures = measure(pack, lengths, LENGTH_SETS[name].row_tokens, args.dp_size)
                first = first or figures.cpu_seconds
                print(line(name, seed, packer, figures, first), flush=True)
                measured.setdefault((name, packer), []).append(figures)
    missed = list(promises(measured))
    print("\n" + ("\n".join(missed) if missed else "every promise that was measured is kept"))
    return int(any(text.startswith("MISSED") for text in missed))


def measure(
    pack: Callable[[Lengths, int], Packed], lengths: Lengths, row_tokens: int, dp_size: int
) -> Figures:
    """Pack once and describe the rows."""
    packed = pack(lengths, row_tokens)
    num_rows = int(packed.row_of.max()) + 1
    tokens = np.bincount(packed.row_of, packed.lengths)
    assert tokens.max() <= row_tokens and len(packed.row_of) == len(lengths)
    costs = np.bincount(packed.row_of, cost(packed.lengths))
    squares = np.bincount(packed.row_of, packed.lengths.astype(np.float64) ** 2)
    samples = np.bincount(packed.row_of)
    known = LLAMA_8B.of(tokens.astype(np.int64), squares.astype(np.int64))
    undealt, dealt, window = step_times(costs, known, dp_size)
    return Figures(
        rows=num_rows,
        over_bound=num_rows / -(-int(lengths.sum()) // row_tokens) - 1,
        cpu_seconds=packed.cpu_seconds,
        dearest=float(costs.max() / costs.mean()),
        spread=float(samples.std() / samples.mean()),
        undealt=undealt,
        dealt=dealt,
        window=window,
    )


def step_times(
    costs: npt.NDArray[np.float64], known: npt.NDArray[np.float64], dp_size: int
) -> tuple[float, float, float]:
    """Return the time of an epoch over the ideal: undealt, dealt, and dealt with a window.

    Args:
        costs: Of each row, by the model of the length sets.
        known: What the deal goes by.
        dp_size: Data-parallel ranks.
    """
    shape = BatchShape(dp_size * MICRO_BATCHES, dp_size, 1)
    size = shape.global_batch_size
    order = RowOrder(num_rows=len(costs), seed=0)
    window = WindowedOrder(order, known, CostWindow(WINDOW, size))

    def over_ideal(rows: RowAtPosition) -> float:
        slowest, ideal = 0.0, 0.0
        for first in range(0, len(costs) // size * size, size):
            batch = costs[[rows[k] for k in range(first, first + size)]]
            total = float(batch.sum())
            ideal += total
            slowest += total * slowest_over_mean(batch, dp_size=dp_size, micro_batch_size=1)
        return slowest / ideal

    dealt = [DealtOrder(rows, known, shape) for rows in (order, window)]
    return over_ideal(order), over_ideal(dealt[0]), over_ideal(dealt[1])


def packers_named(names: list[str]) -> Iterator[tuple[str, Callable[[Lengths, int], Packed]]]:
    """Yield what can be run, and say what cannot."""
    plain = {"plain_best_fit": best_fit_one_by_one, "first_fit": first_fit}
    for name in names:
        if name in PACKERS:
            yield name, partial(by_ours, name)
        elif name in plain:
            yield name, partial(by_plain, plain[name])
        else:
            try:
                trl = TrlPacker()
            except ModuleNotFoundError as error:
                print(f"{error}; left out")
            else:
                yield trl.name, partial(by_trl, trl)


def by_ours(name: str, lengths: Lengths, row_tokens: int) -> Packed:
    """Pack with a packer of megasft."""
    rows, seconds = timed(lambda: PACKERS[name](lengths, row_tokens=row_tokens))
    assert isinstance(rows, Rows)
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.borders))
    return Packed(lengths[rows.samples], row_of, seconds)


def by_plain(
    pack: Callable[[Lengths, int], npt.NDArray[np.int64]], lengths: Lengths, row_tokens: int
) -> Packed:
    """Pack with one of the plain ways."""
    row_of, seconds = timed(lambda: pack(lengths, row_tokens))
    return Packed(lengths, row_of, seconds)


def by_trl(trl: TrlPacker, lengths: Lengths, row_tokens: int) -> Packed:
    """Pack with TRL."""
    dataset = trl.dataset(lengths)
    packed, seconds = timed(lambda: trl.pack(dataset, row_tokens))
    rows = trl.rows(packed)
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return Packed(np.concatenate([np.array(row) for row in rows]), row_of, seconds)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result and its CPU seconds."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def promises(measured: Mapping[tuple[str, str], list[Figures]]) -> Iterator[str]:
    """Yield a line for each promise measured: the worst seed against its limit."""
    limits = (
        ("chat_1m", "best_fit", "cpu_seconds", 1.0),
        ("chat_1m", "best_fit", "over_bound", 0.001),
        ("chat_1m", "balanced", "cpu_seconds", 1.0),
        ("chat_1m", "balanced", "over_bound", 0.001),
        ("reasoning_110k", "balanced", "over_bound", 0.002),
        ("reasoning_110k", "balanced", "dearest", 1.05),
        ("reasoning_110k", "balanced", "spread", 0.1),
        ("reasoning_110k", "balanced", "dealt", 1.01),
        ("heavy_tail_50k", "balanced", "dealt", 1.10),
        ("long_context_60k", "balanced", "dealt", 1.10),
    )
    for name, packer, figure, limit in limits:
        if (name, packer) in measured:
            worst = max(getattr(one, figure) for one in measured[name, packer])
            verdict = "kept" if worst <= limit else "MISSED"
            yield f"{verdict}: {name}, {packer}: {figure} {worst:.4g} (at most {limit})"
    trl = next((packer for _, packer in measured if packer.startswith("TRL")), None)
    for ours in ("best_fit", "balanced"):
        if {("chat_1m", trl), ("chat_1m", ours)} <= measured.keys():
            pairs = zip(measured["chat_1m", str(trl)], measured["chat_1m", ours], strict=True)
            ratio = min(theirs.cpu_seconds / one.cpu_seconds for theirs, one in pairs)
            verdict = "kept" if ratio >= 20 else "MISSED"
            yield f"{verdict}: chat_1m, {ours}: {ratio:.0f} times faster than {trl} (at least 20)"


def line(name: str, seed: int, packer: str, figures: Figures, first: float) -> str:
    """Return one line of the table."""
    return (
        f"| {name} | {seed} | {packer} | {figures.rows:,} | {100 * figures.over_bound:.3f} % "
        f"| {figures.cpu_seconds:.2f} | {figures.cpu_seconds / first:.1f} | {figures.dearest:.3f} "
        f"| {figures.spread:.3f} | {figures.undealt:.3f} | {figures.dealt:.3f} "
        f"| {figures.window:.3f} |"
    )


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--sets", nargs="+", choices=LENGTH_SETS, default=list(LENGTH_SETS))
    parser.add_argument("--packers", nargs="+", choices=OURS + OTHERS, default=[*OURS, *OTHERS])
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="of the length sets (default: each set's own)"
    )
    parser.add_argument("--dp-size", type=int, default=8, help="data-parallel ranks (default: 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
