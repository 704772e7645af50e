"""Measure how fast one process reads packed rows, how fast a store opens, what memory both take.

Everything is made, read and timed in one run on one machine: full micro-batches through
``PackedRows`` (memory map to shifted batch to this rank's share), the same rows packed beforehand
and read through Megatron's IndexedDataset (tokens alone, a fifth of the bytes of our batch; and
with the labels, mask and positions its GPT dataset adds), and a loop over samples and turns as one
would write it first. The loop's result is compared with ours, field by field, before anything is
timed.

Usage: python tools/bench_rows.py --workdir bench_rows_stores
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from megasft.batch.context_parallel import shard
from megasft.batch.dataset import PackedRows, RowShape, SamplesOfRow
from megasft.packing.plan import plan_rows
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, token_dtype
from megasft.store_group import open_stores

BATCH_TOKENS: Final = 131_072
ALIGN_TOKENS: Final = 8
VOCAB: Final = 151_936
TARGET_RATE, TARGET_OPEN_MS, TARGET_GROWTH_MB = 400, 50, 100

Columns = dict[str, npt.NDArray[Any]]
Rows = Sequence[npt.NDArray[np.int64]]


class Case(NamedTuple):
    """Lengths of a store, log-normal, and the rows they are read in; sizes in tokens."""

    name: str
    median: int
    sigma: float
    longest: int
    row_tokens: int


CASES: Final = (
    Case("reasoning", 1500, 0.75, 20_000, BATCH_TOKENS),
    Case("chat", 350, 0.9, 4096, BATCH_TOKENS),
    Case("chat", 350, 0.9, 4096, 4096),
)


class EveryRow:
    """The order 0, 1, 2, ... of rows."""

    def __getitem__(self, position: int) -> int:
        return position


def main() -> int:
    """Measure everything and print one table each."""
    args = arguments().parse_args()
    if args.memory:
        print(json.dumps(memory_here([Path(path) for path in args.memory])))
        return 0
    torch.set_num_threads(1)  # as in a loader's worker
    args.workdir.mkdir(parents=True, exist_ok=True)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}, torch {torch.__version__}; one process, one thread, pages cached"
    )
    met = [measure_case(case, args) for case in CASES]
    met += measure_stores(args)
    print("all targets met" if all(met) else "a target was missed")
    return 0 if all(met) else 1


def measure_case(case: Case, args: argparse.Namespace) -> bool:
    """Print micro-batches a second of every reader over one store; say whether ours is fast."""
    num_samples = round(args.batches * BATCH_TOKENS / (case.median * np.exp(case.sigma**2 / 2)))
    path = args.workdir / f"{case.name}-{num_samples}-{args.seed}"
    store = open_stores([made(path, case, num_samples=num_samples, seed=args.seed)])
    rows = rows_in_order(store, row_tokens=case.row_tokens)
    in_batch = BATCH_TOKENS // case.row_tokens
    batches = [list(range(k, k + in_batch)) for k in range(0, len(rows) - in_batch + 1, in_batch)]
    documents = sum(len(rows[p]) for batch in batches for p in batch) / len(batches)
    print(
        f"\n{case.name}: {len(batches)} micro-batches of {in_batch} x {case.row_tokens:,} "
        f"tokens, {documents:.0f} samples each\n"
        "| reader | micro-batches a second | ours, CP 1, over it |\n|---|---|---|"
    )
    found = rates(readers_of(store, rows, batches), batches, repeats=args.repeats)
    ours_alone = found["PackedRows, CP 1"]
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} | {ours_alone / value:.2f} |", flush=True)
    slowest = min(value for name, value in found.items() if name.startswith("PackedRows"))
    return report(f"the slowest PackedRows, {case.name}", slowest, at_least=TARGET_RATE)


def readers_of(
    store: TokenStore, rows: Rows, batches: Sequence[list[int]]
) -> dict[str, Callable[[list[int]], object]]:
    """Return everything that is timed over these rows, each by its name."""
    in_batch = len(batches[0])
    row_tokens = BATCH_TOKENS // in_batch
    one, two = (reader(store, rows, row_tokens=row_tokens, cp_size=cp) for cp in (1, 2))

    def loop(positions: list[int], *, cp_size: int = 1) -> Columns:
        whole = in_a_loop(store, [rows[p] for p in positions], row_tokens=row_tokens)
        return shard(whole, cp_rank=0, cp_size=cp_size)

    compare(one.__getitems__(batches[0])[0], loop(batches[0]))
    packed = pre_packed(store.path, one, batches)
    return {
        "PackedRows, CP 1": one.__getitems__,
        "PackedRows, CP 2": two.__getitems__,
        "PackedRows, CP 1, and torch's collate": lambda p: default_collate(one.__getitems__(p)),
        "loop in Python, CP 1": loop,
        "loop in Python, CP 2": lambda p: loop(p, cp_size=2),
        "pre-packed, tokens alone": lambda p: row_of(packed, p[0] // in_batch),
        "pre-packed, as GPT data": lambda p: as_gpt_data(packed, p[0] // in_batch),
    }


def report(
    what: str, value: float, *, at_least: float | None = None, below: float | None = None
) -> bool:
    """Print whether a target is met, and return it."""
    is_met = value >= at_least if at_least is not None else value < (below or 0)
    target = f">= {at_least}" if at_least is not None else f"< {below}"
    print(f"{what}: {value:,.1f}, target {target}: {'met' if is_met else 'MISSED'}")
    return is_met


def rates(
    readers: Mapping[str, Callable[[list[int]], object]],
    batches: Sequence[list[int]],
    *,
    repeats: int,
) -> dict[str, float]:
    """Return micro-batches a second of each reader, other work on the machine left out.

    Readers take turns at each micro-batch, and its fastest pass counts, for every reader alike.
    """
    best = {name: np.full(len(batches), np.inf) for name in readers}
    for _ in range(repeats + 1):
        for k, batch in enumerate(batches):
            for name, read in readers.items():
                start = time.perf_counter()
                read(batch)
                best[name][k] = min(best[name][k], time.perf_counter() - start)
    return {name: float(len(batches) / seconds.sum()) for name, seconds in best.items()}


def reader(store: TokenStore, rows: SamplesOfRow, *, row_tokens: int, cp_size: int) -> PackedRows:
    """Return what training reads, on the first context-parallel rank."""
    shape = RowShape(row_tokens, ALIGN_TOKENS, pad_token=0, cp_rank=0, cp_size=cp_size)
    return PackedRows([(store, rows)], EveryRow(), length=sys.maxsize, shape=shape)


def made(path: Path, case: Case, *, num_samples: int, seed: int) -> Path:
    """Write a store of random tokens, one to four turns a sample, unless it is there already."""
    if path.exists():
        return path
    rng = np.random.default_rng([seed, case.median])
    drawn = np.exp(rng.normal(np.log(case.median), case.sigma, num_samples))
    lengths = np.clip(drawn.astype(np.int64), 16, case.longest)
    with StoreWriter(path, vocab_size=VOCAB) as writer:
        for i, length in enumerate(lengths.tolist()):
            tokens = rng.integers(0, VOCAB, length, dtype=np.int32)
            edges = np.linspace(1, length, 2 * (1 + i % 4) + 1).astype(np.int32)
            turns = [(a, b - a, 1 + i % 3, n) for n, (a, b) in enumerate(pairwise(edges.tolist()))]
            writer.add(Sample(tokens, turn_records(turns[1::2])), source=0, line=i + 1)
        names = {str(n): f"{path.name} {n}" for n in (1, 2, 3)}
        writer.finish({"counts": {}, "special_tokens": {}, "categories": names,
                       "sources": [{"path": "made"}]})  # fmt: skip
    return path


def rows_in_order(store: TokenStore, *, row_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Deal the samples into full rows; they were drawn at random, so any order will do."""
    padded = -(-store.tokens.lengths // ALIGN_TOKENS) * ALIGN_TOKENS
    rows, start, used = [], 0, 0
    for i, size in enumerate(padded.tolist()):
        if used + size > row_tokens:
            rows.append(np.arange(start, i))
            start, used = i, 0
        used += size
    return rows


def in_a_loop(store: TokenStore, rows: Rows, *, row_tokens: int) -> Columns:
    """Fill a micro-batch sample by sample and turn by turn."""
    total = len(rows) * row_tokens
    ints: Columns = {
        name: np.zeros(total, np.int64) for name in ("tokens", "labels", "position_ids")
    }
    of_label = ("turn_tokens", "sample_tokens", "category_ids", "turn_numbers")
    facts: Columns = {name: np.zeros(total, np.int32) for name in of_label}
    ends: Columns = {name: np.zeros(total, np.bool_) for name in ("ends_turn", "ends_sample")}
    row, borders, unpadded = ints | facts | ends, [0], [0]
    for number, samples in enumerate(rows):
        for index in samples:
            at, (tokens, turns) = borders[-1], store.sample(int(index))
            size = -(-len(tokens) // ALIGN_TOKENS) * ALIGN_TOKENS
            row["tokens"][at : at + len(tokens)] = tokens
            row["position_ids"][at : at + size] = np.arange(size)
            for nth, (start, num_tokens, category, *_) in enumerate(turns.tolist(), start=1):
                label = slice(at + start - 1, at + start - 1 + num_tokens)
                row["labels"][label] = tokens[start : start + num_tokens]
                row["turn_tokens"][label] = num_tokens
                row["sample_tokens"][label] = turns[:, 1].sum()
                row["category_ids"][label] = category
                row["turn_numbers"][label] = nth
                row["ends_turn"][label.stop - 1] = True
            row["ends_sample"][label.stop - 1] = True
            borders.append(at + size)
            unpadded.append(unpadded[-1] + len(tokens))
        end = (number + 1) * row_tokens
        if borders[-1] < end:
            row["position_ids"][borders[-1] : end] = np.arange(end - borders[-1])
            borders.append(end)
            unpadded.append(unpadded[-1])
    row["cu_seqlens"] = np.array(borders, np.int32)
    return row | {"cu_seqlens_unpadded": np.array(unpadded, np.int32)}


def compare(ours: dict[str, torch.Tensor], loop: Columns) -> None:
    """Stop unless both hold the same."""
    for name, column in loop.items():
        if not np.array_equal(ours[name].numpy(), column):
            raise SystemExit(f"{name} differs between PackedRows and the loop; nothing is timed")


def pre_packed(path: Path, ours: PackedRows, batches: Sequence[list[int]]) -> Any:
    """Write the same micro-batches with Megatron's own writer, and open them with its reader."""
    from megatron.core.datasets.indexed_dataset import (
        IndexedDataset,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    prefix = str(path.with_name(f"{path.name}-{len(batches)}-packed"))
    if not Path(get_idx_path(prefix)).exists():
        builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=token_dtype(VOCAB).type)
        for batch in batches:
            builder.add_document(ours.__getitems__(batch)[0]["tokens"], [BATCH_TOKENS])
        builder.finalize(get_idx_path(prefix))
    return IndexedDataset(prefix)


def row_of(packed: Any, index: int) -> torch.Tensor:
    """Return the ids of a pre-packed row, as the model takes them."""
    return torch.from_numpy(packed[index].astype(np.int64))


def as_gpt_data(packed: Any, index: int) -> dict[str, torch.Tensor]:
    """Return what Megatron's GPT dataset makes of a row: everything trained, no document known."""
    tokens = row_of(packed, index)
    return {
        "tokens": tokens,
        "labels": torch.roll(tokens, shifts=-1, dims=0),
        "loss_mask": torch.ones(len(tokens), dtype=torch.float32),
        "position_ids": torch.arange(len(tokens)),
    }


def measure_stores(args: argparse.Namespace) -> list[bool]:
    """Print how long stores take to open and what memory a process takes that reads them whole."""
    many = Case("many", 48, 0.5, 512, BATCH_TOKENS)
    num_stores = 4

    def store(num_samples: int, seed: int) -> Path:
        path = args.workdir / f"{many.name}-{num_samples}-{seed}"
        return made(path, many, num_samples=num_samples, seed=seed)

    one = store(args.samples, args.seed)
    group = [store(args.samples // num_stores, args.seed + n) for n in range(num_stores)]
    met = []
    for name, paths in (("one store", [one]), (f"{num_stores} stores as one", group)):
        command = [sys.executable, __file__, "--memory", *map(str, paths)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        print(
            f"\n{name}: {found['samples']:,} samples, {found['store_mb']:,.0f} MB on disk; opened "
            f"in {found['first_open_ms']:.1f} ms, again in {found['open_ms']:.1f} ms; "
            f"{found['batches']} micro-batches read, resident {found['before_mb']:,.0f} MB before, "
            f"{found['after_mb']:,.0f} MB after; without the store's pages {found['own_mb']:,.0f} "
            f"MB of growth, of which {found['plan_mb']:,.0f} MB are there once rows are planned"
        )
        met.append(report(f"open, ms, {name}", found["first_open_ms"], below=TARGET_OPEN_MS))
        over = found["after_mb"] - found["before_mb"] - found["store_mb"]
        worst = max(over, found["own_mb"])
        met.append(report(f"growth over the store, MB, {name}", worst, below=TARGET_GROWTH_MB))
    return met


def memory_here(paths: Sequence[Path]) -> dict[str, float]:
    """Open these stores, plan their rows and read them all, in a process that did nothing else."""
    torch.from_numpy(np.zeros(8)).sum()  # libraries allocate at their first use
    before, own = resident_mb("VmRSS"), resident_mb("RssAnon")
    times = []
    for _ in range(6):
        start = time.perf_counter()
        store = open_stores(paths)
        times.append(1000 * (time.perf_counter() - start))
    with TemporaryDirectory() as cache:  # the plan is made here, as on the first run of a rank
        tokens, align = BATCH_TOKENS, ALIGN_TOKENS
        plan = plan_rows(store, row_tokens=tokens, align_tokens=align, seed=0, cache=Path(cache))
    with_plan = resident_mb("RssAnon") - own
    dataset = reader(store, plan.rows, row_tokens=BATCH_TOKENS, cp_size=1)
    for k in range(len(plan)):
        dataset.__getitems__([k])
    on_disk = [file.stat().st_size for path in paths for file in path.iterdir() if file.is_file()]
    return {
        "samples": len(store),
        "batches": len(plan),
        "store_mb": sum(on_disk) / 1e6,
        "first_open_ms": times[0],
        "open_ms": float(np.median(times[1:])),
        "before_mb": before,
        "after_mb": resident_mb("VmRSS"),
        "plan_mb": with_plan,
        "own_mb": resident_mb("RssAnon") - own,
    }


def resident_mb(field: str) -> float:
    """Return a figure of /proc/self/status: VmRSS is all that is resident, RssAnon our own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {field}; memory is measured on Linux only")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("bench_rows_stores"),
                        help="where stores are made, and kept for the next run")  # fmt: skip
    parser.add_argument("--batches", type=int, default=150, help="micro-batches of a store, about")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the store to be opened")
    parser.add_argument("--repeats", type=int, default=5, help="passes; the best counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
