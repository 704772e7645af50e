"""Whether the run can save what it makes.

A checkpoint holds the weights as they are trained and, unless told not to, the optimizer's states:
14 bytes a parameter for bf16 with Adam, whatever the layout.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run import memory, parameters
from megasft.checks.run.memory import text_of_bytes
from megasft.checks.run.subject import Stage, Subject


@rule("not-saved", Severity.WARNING, Stage.FLAGS, theme="checkpoints")
def not_saved(subject: Subject) -> Iterator[Finding]:
    """The run leaves no checkpoint."""
    args = subject.args
    if args.save is None and not args.skip_train:
        yield Finding(
            "without --save the run leaves no checkpoint", "add --save DIR --save-interval N"
        )


@rule("save-not-writable", Severity.ERROR, Stage.FLAGS, theme="checkpoints")
def not_writable(subject: Subject) -> Iterator[Finding]:
    """--save cannot be written to."""
    save = subject.args.save
    if not save:
        return
    there = existing(Path(save))
    if not there.is_dir():
        yield Finding(
            f"--save {save} cannot be a folder: {there} is a file", "choose another folder"
        )
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            f"--save {save} cannot be written to: no permission in {there}",
            "choose another folder, or have it opened",
        )


@rule("disk-full", Severity.ERROR, Stage.MODEL, theme="checkpoints")
def disk_full(subject: Subject) -> Iterator[Finding]:
    """Not even one checkpoint has room."""
    size, free = _size_and_free(subject)
    if size is not None and size > free:
        yield Finding(
            f"a checkpoint takes {text_of_bytes(size)}, and --save {subject.settled.save} has "
            f"{text_of_bytes(free)} free",
            "free space, choose another folder, or pass --no-save-optim for the weights alone "
            "(such a run does not resume)",
            {"checkpoint": size, "free": free},
        )


@rule("disk-filling", Severity.WARNING, Stage.MODEL, theme="checkpoints")
def disk_filling(subject: Subject) -> Iterator[Finding]:
    """The disk fills up during the run."""
    args = subject.settled
    size, free = _size_and_free(subject)
    num = num_kept(args)
    if size is not None and size <= free < num * size:
        yield Finding(
            f"{num:,} checkpoints of {text_of_bytes(size)} take {text_of_bytes(num * size)}, and "
            f"--save {args.save} has {text_of_bytes(free)} free",
            "pass --megasft-keep-last 2 (one more is there while it is written), or raise "
            "--save-interval",
            {"checkpoints": num, "checkpoint": size, "free": free},
        )


@rule("checkpoint-size", Severity.NOTE, Stage.MODEL, theme="checkpoints")
def checkpoint_size(subject: Subject) -> Iterator[Finding]:
    """How large checkpoints are."""
    args = subject.settled
    size, free = _size_and_free(subject)
    if size is not None:
        yield Finding(
            f"a checkpoint takes {text_of_bytes(size)}, {num_kept(args):,} at once take "
            f"{text_of_bytes(num_kept(args) * size)}, {text_of_bytes(free)} are free",
            "",
            {"checkpoint": size, "checkpoints": num_kept(args), "free": free},
        )


def num_kept(args: Any) -> int:
    """Return how many checkpoints lie on the disk at once, at most.

    Args:
        args: Validated flags.
    """
    iterations = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    saves = max(1, math.ceil(iterations / args.save_interval)) if args.save_interval else 1
    if args.megasft_keep_last:
        return int(min(saves, args.megasft_keep_last + 1))
    if args.save_retain_interval:
        return int(min(saves, iterations // args.save_retain_interval + 2))
    return saves


def checkpoint_bytes(args: Any) -> float:
    """Return the size of one checkpoint.

    Args:
        args: Validated flags.
    """
    per_parameter = memory.bytes_per_parameter(args)
    saved = per_parameter["weights"][0]
    if not args.no_save_optim:
        saved += per_parameter["optimizer"][0]
    return saved * parameters.of_model(args).total


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size_and_free(subject: Subject) -> tuple[float | None, int]:
    args = subject.settled
    if not args.save:
        return None, 0
    return checkpoint_bytes(args), shutil.disk_usage(existing(Path(args.save))).free
