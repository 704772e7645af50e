"""Measure speed and peak memory of the attention backends, forward and backward, over row lengths.

One fresh process per point and rank, so that the process's own peak is the measure: the growth of
the largest resident set over what was resident before the first attention. One document fills the
row, the dearest case.

Usage: python tools/bench_attention.py --tokens 1024 2048 4096 8192 --cp-sizes 1 2
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megasft.attention.backend import BACKENDS
from megasft.attention.blocks import RowLayout

MIB = 1024 * 1024
SMALLEST_TOKENS = 256


class Point(NamedTuple):
    """One measurement: seconds of the slowest rank, MiB of the largest."""

    backend: str
    cp_size: int
    tokens: int
    seconds: float
    peak_mib: float


def main() -> int:
    """Measure every point and print one table."""
    args = arguments().parse_args()
    if args.point:
        measure_here(*args.point[:1], *map(int, args.point[1:]), args)
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.dtype}")
    print(f"one document, {args.heads} query heads, {args.groups} key heads of {args.head_size}")
    print("| CP | tokens | backend | seconds | speed over sdpa | peak MiB | growth |")
    print("|---|---|---|---|---|---|---|")
    for cp_size in args.cp_sizes:
        before: dict[str, Point] = {}
        for tokens in args.tokens:
            points = {b: measure(b, cp_size, tokens, args) for b in args.backends
                      if b != "reference" or tokens <= args.reference_tokens}  # fmt: skip
            for point in points.values():
                print(line(point, points.get("sdpa"), before.get(point.backend)), flush=True)
            before = points
    return 0


def line(point: Point, sdpa: Point | None, shorter: Point | None) -> str:
    """Return one line of the table."""
    speed = f"{sdpa.seconds / point.seconds:.2f}" if sdpa else ""
    growth = f"x {point.peak_mib / shorter.peak_mib:.2f}" if shorter else ""
    return (
        f"| {point.cp_size} | {point.tokens:,} | {point.backend} | {point.seconds:.3f} | {speed} "
        f"| {point.peak_mib:,.0f} | {growth} |"
    )


def measure(backend: str, cp_size: int, tokens: int, args: argparse.Namespace) -> Point:
    """Measure one point in fresh processes, one per rank."""
    point = ("--point", backend, str(cp_size), str(tokens))
    sizes = (args.heads, args.groups, args.head_size, args.repeats)
    flags = ("--heads", "--groups", "--head-size", "--repeats")
    settings = [str(x) for pair in zip(flags, sizes, strict=True) for x in pair]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp_size))
    launcher = (sys.executable, *torchrun, __file__)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [*launcher, *point, *settings, "--dtype", args.dtype]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    # Ranks write to one pipe: their lines may follow each other without a break.
    ranks = [json.loads("{" + part) for part in run.stdout.split("{")[1:]]
    seconds, peak = (max(rank[what] for rank in ranks) for what in ("seconds", "peak_mib"))
    return Point(backend, cp_size, tokens, seconds, peak)


def measure_here(backend: str, cp_size: int, tokens: int, args: argparse.Namespace) -> None:
    """Measure one point in this rank's process and print it."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None and group.size() == cp_size
    torch.manual_seed(group.rank())

    def step(row_tokens: int) -> float:
        row = RowLayout(borders=(0, row_tokens), cp_rank=group.rank(), cp_size=cp_size,
                        device=torch.device("cpu"))  # fmt: skip
        shapes = [(row_tokens // cp_size, n, args.head_size)
                  for n in (args.heads, args.groups, args.groups)]  # fmt: skip
        dtype = getattr(torch, args.dtype)
        leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        dist.barrier()
        start = time.perf_counter()
        settings: dict[str, Any] = {"scale": args.head_size**-0.5, "window": None, "group": group}
        out = BACKENDS[backend](*leaves, row=row, **settings)
        out.backward(torch.ones_like(out))
        return time.perf_counter() - start

    step(SMALLEST_TOKENS)  # libraries, threads and connections, before the memory is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = min(step(tokens) for _ in range(args.repeats))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mib": peak * 1024 / MIB}) + "\n")
    dist.destroy_process_group()


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--reference-tokens", type=int, default=8192, help="longest row for it")
    parser.add_argument("--cp-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
