"""Measure what our loss and reports cost in a training step, beside Megatron's plain loss.

One training run on CPU ranks takes turns: a step as megasft makes it (its loss function with all
metrics, the table by category, position and length, its all-reduce, the audit, the record printed
and written), then one with the loss of Megatron 0.19's ``pretrain_gpt`` and none of these. Both
train the same model on rows that cost alike, and both numbers come from one process group.

A step is timed from its first micro-batch to that of the next step. Beside the ratio, which holds
the noise of the machine, stands the time spent in the loss functions, sums and records alone.

Usage: python tools/bench_step.py [--ranks 2] [--steps 80]
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch

from megasft import pretrain_sft
from megasft.loss.loss_func import LossOutput
from megasft.schema import Sample, SFTBatch, turn_records
from megasft.store import StoreWriter

VOCAB: Final = 2048
SAMPLE_TOKENS, TURNS, CATEGORIES = 256, 4, 6
WARM_UP: Final = 6
"""Steps at the start that are not counted."""


def main() -> int:
    """Start the ranks, or be one of them."""
    args = arguments().parse_args()
    if "RANK" in os.environ:
        return measure(args)
    with TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        flags = ["--made", str(store), "--report", str(Path(folder) / "log")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ranks = ["--nproc-per-node", str(args.ranks)]
        return subprocess.run(
            [*launcher, *ranks, __file__, *sys.argv[1:], *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        ).returncode


def arguments() -> argparse.ArgumentParser:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="half of them of each kind")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step, on each rank")
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser


def make_store(path: Path) -> Path:
    """Write samples of one length, each of several turns and categories."""
    rng = np.random.default_rng(0)
    turn = SAMPLE_TOKENS // TURNS
    with StoreWriter(path, vocab_size=VOCAB) as writer:
        for i in range(2000):
            tokens = rng.integers(0, VOCAB, SAMPLE_TOKENS).astype(np.int32)
            records = [
                (n * turn + 16, turn - 16, 1 + (i + n) % CATEGORIES, n) for n in range(TURNS)
            ]
            writer.add(Sample(tokens, turn_records(records)), source=0, line=i + 1)
        names = {str(i): f"category {i}" for i in range(1, CATEGORIES + 1)}
        meta = {"counts": {}, "categories": names, "sources": [{"path": "made"}]}
        writer.finish({**meta, "special_tokens": {"pad": 0}})
    return path


class Turns:
    """Whose step it is, and when steps began."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.micro_batches = 0
        self.own: list[float] = []

    @property
    def is_ours(self) -> bool:
        """Whether the step in progress is one of ours."""
        return len(self.began) % 2 == 0

    def micro_batch(self, per_step: int) -> None:
        """Count a micro-batch that begins."""
        if self.micro_batches % per_step == 0:
            self.began.append(time.perf_counter())
            self.own.append(0.0)
        self.micro_batches += 1

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, its time counted as what a loss and a report take."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.own[-1] += time.perf_counter() - start
            return result

        return run

    def only_ours(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, timed in our steps and left out in plain ones."""
        timed = self.timed(call)

        def run(*args: Any, **kwargs: Any) -> None:
            if self.is_ours:
                timed(*args, **kwargs)

        return run


def plain_loss(batch: SFTBatch, losses: torch.Tensor) -> LossOutput:
    """Return what ``loss_func`` of Megatron 0.19's ``pretrain_gpt`` returns.

    It has one mask, which the data set made; here it is taken from the batch.
    """
    mask = (batch.turn_tokens > 0).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    reporting = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return LossOutput(loss, num_tokens, {"lm loss": reporting})


def take_turns(turns: Turns, per_step: int) -> None:
    """Have every other step of the run computed and reported as Megatron's own would be.

    The entry point builds both sides from these names when it runs, and this tool runs nothing
    else, so they are exchanged here rather than made configurable there.
    """
    from megasft.megatron import forward_step
    from megasft.training import report

    full_loss, full = forward_step.sft_loss, report.Report

    def loss_of_turn(losses: torch.Tensor, *, batch: SFTBatch, **facts: Any) -> LossOutput:
        return (
            full_loss(losses, batch=batch, **facts) if turns.is_ours else plain_loss(batch, losses)
        )

    class Alternating(full):  # type: ignore[misc, valid-type]
        def begin_step(self) -> None:
            turns.micro_batch(per_step)
            super().begin_step()

        add = turns.only_ours(full.add)
        finalize = turns.only_ours(full.finalize)
        _stepped_in_turn = turns.only_ours(full._stepped)

        def _stepped(self, optimizer: Any) -> None:
            self._stepped_in_turn(optimizer)
            self._began = None

    forward_step.sft_loss = turns.timed(loss_of_turn)
    report.Report = Alternating  # type: ignore[misc]


def measure(args: argparse.Namespace) -> int:
    """Train, and print the medians of both kinds of steps on rank 0."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    pretrain_sft.configure_logging(rank=rank)
    pretrain_sft.cpu.prepare()
    turns = Turns()
    take_turns(turns, args.micro_batches)
    pretrain_sft.run(run_flags(args, ranks=ranks))
    torch.distributed.destroy_process_group()
    if rank:
        return 0
    seconds = np.diff(turns.began)
    own = np.array(turns.own[:-1])
    # The first step began in turn 1: odd ones are plain.
    ours, plain = seconds[1::2][WARM_UP // 2 :], seconds[0::2][WARM_UP // 2 :]
    spent, plainly = own[1::2][WARM_UP // 2 :], own[0::2][WARM_UP // 2 :]
    pairs = min(len(ours), len(plain))
    ratios = ours[:pairs] / plain[:pairs]
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, {ranks} ranks, "
        f"torch {torch.__version__}\n"
        f"hidden {args.hidden_size}, {args.layers} layers, {args.micro_batches} micro-batches of "
        f"{args.seq_length} tokens a rank, {CATEGORIES} categories, {pairs} pairs of steps"
    )
    for name, times in (("plain", plain), ("megasft", ours)):
        low, middle, high = np.percentile(times, [25, 50, 75]) * 1e3
        print(f"{name:8s} {middle:9.2f} ms a step (quartiles {low:.2f} to {high:.2f})")
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    ratio = float(np.median(ours) / np.median(plain))
    print(f"ratio of medians {ratio:.4f}; neighbours {middle:.4f} ({low:.4f} to {high:.4f})")
    more = float(np.median(spent) - np.median(plainly))
    print(
        f"loss function, sums, record: {1e3 * np.median(spent):.2f} ms a step, Megatron's plain "
        f"loss {1e3 * np.median(plainly):.2f} ms; the difference is "
        f"{100 * more / np.median(plain):.2f} % of a plain step"
    )
    return 0


def run_flags(args: argparse.Namespace, *, ranks: int) -> list[str]:
    """Return the flags of the run."""
    sizes = {
        "--num-layers": args.layers,
        "--hidden-size": args.hidden_size,
        "--ffn-hidden-size": 3 * args.hidden_size,
        "--num-attention-heads": args.hidden_size // 64,
        "--max-position-embeddings": args.seq_length,
        "--seq-length": args.seq_length,
        "--micro-batch-size": 1,
        "--global-batch-size": args.micro_batches * ranks,
        "--train-iters": args.steps + WARM_UP + 1,
        "--lr": 1e-4,
        "--log-interval": 10**6,
        "--position-embedding-type": "rope",
        "--normalization": "RMSNorm",
        "--megasft-data": args.made,
        "--megasft-log-dir": args.report,
        "--megasft-loss": "turn",
    }
    switches = ("--swiglu", "--disable-bias-linear", "--calculate-per-token-loss")
    return [*switches, *(str(x) for pair in sizes.items() for x in pair)]


if __name__ == "__main__":
    sys.exit(main())
