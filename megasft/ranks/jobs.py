"""Runs a list of jobs on ranks of this machine, all in one process group as long as that lives.

Starting processes is what costs, so one start serves every job of a number of ranks. A job is what
the worker's module reads of it (JSON), with ``output``: the file that appears whole when the job is
done, or with the suffix ``.error`` when it failed. When a job ends the ranks, it is reported and
the rest is started again. ``megatron/worker.py`` is the worker's side.
"""

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.ranks.group import Ranks, end, start

NOISE: Final = ("Traceback", "ChildFailedError", "warnings.warn", "=====", "-----", "^^^", "~~~")
"""Lines that say nothing of a reason."""

LAUNCHER: Final = r"^E\d{4} .*elastic|^rank \d+ ended first"
"""What begins the page of a launcher, torchrun or ours."""

NUM_LINES: Final = 3
NUM_CHARACTERS: Final = 400
"""Of a reason, at most."""


def run(
    jobs: Sequence[Mapping[str, Any]],
    *,
    world_size: int,
    module: str,
    folder: Path,
    silent_seconds: float,
    imports: Sequence[str] = (),
    device: str = "cpu",
    is_warm: bool = True,
    num_steps: Callable[[], int] = int,
    advice: str = "",
) -> Iterator[str]:
    """Run jobs, and yield of each in order, as it ends, why it failed, or "".

    Args:
        jobs: With ``output``; what an earlier run left there is removed.
        world_size: Ranks of each.
        module: Of the worker.
        folder: For the list of jobs and what the ranks print.
        silent_seconds: Ranks that end no job and make no step for so long hang; they are ended.
        imports: Modules that the worker will import.
        device: ``cpu`` or ``cuda``.
        is_warm: Whether ranks are forked where that can be done, or started by torchrun.
        num_steps: Called a few times a second: steps of all jobs made so far.
        advice: Said of ranks that were killed, as when memory runs out.
    """
    left = [Path(job["output"]) for job in jobs]
    for output in left:
        output.unlink(missing_ok=True)
        output.with_suffix(".error").unlink(missing_ok=True)
    listing, log = folder / f"jobs{world_size}.json", folder / f"ranks{world_size}.log"
    while left:
        listing.write_bytes(orjson.dumps([dict(job) for job in jobs[-len(left) :]]))
        with log.open("w") as file:
            ranks = start(
                *(world_size, module, str(listing)),
                output=file,
                imports=imports,
                device=device,
                is_warm=is_warm,
            )
        try:
            why = yield from _follow(ranks, left, silent_seconds, num_steps)
        finally:
            end(ranks)
        if left:
            left.pop(0)
            yield why or reason(log.read_text(errors="replace"), advice=advice)


def _follow(
    ranks: Ranks, left: list[Path], silent_seconds: float, num_steps: Callable[[], int]
) -> Generator[str, None, str]:
    """Take jobs that end from the list and yield why they failed; return why ranks are given up."""
    last_sign, signs, is_over = time.monotonic(), (-1, -1), False
    while not is_over:
        is_over = ranks.poll() is not None
        while left and (failure := _failure(left[0])) is not None:
            left.pop(0)
            yield failure
        if signs != (signs := (len(left), num_steps())):
            last_sign = time.monotonic()
        if time.monotonic() - last_sign > silent_seconds:
            return f"the processes gave no sign of life in {silent_seconds:.0f} s"
        time.sleep(0.1 * (not is_over))
    return ""


def _failure(output: Path) -> str | None:
    """Return why a job that has ended has no output, or "" when it has; None before its end."""
    error = output.with_suffix(".error")
    if error.exists():
        return reason(error.read_text())
    return "" if output.exists() else None


def reason(text: str, *, advice: str = "") -> str:
    """Return what a log or traceback ends with, before what the launcher adds.

    Args:
        text: The log.
        advice: Said of a process that was killed.
    """
    signal = re.search(r"Signal \d+ \((\w+)\)", text)
    if signal is not None:
        return f"a process was ended by {signal[1]}, as when memory runs out{advice}"
    own, *_ = re.split(LAUNCHER, text, maxsplit=1, flags=re.MULTILINE)
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in own.splitlines()]
    lines = [line for line in lines if line and not any(word in line for word in NOISE)]
    # A traceback's own end is the reason; what stands above it is the way there.
    starts = [i for i, line in enumerate(lines) if line.startswith('File "')]
    tail = lines[starts[-1] + 2 :] if starts and lines[starts[-1] + 2 :] else lines
    said = " ".join(tail[-NUM_LINES:]) or "the processes ended without an error message"
    return said if len(said) <= NUM_CHARACTERS else said[:NUM_CHARACTERS] + " ..."
