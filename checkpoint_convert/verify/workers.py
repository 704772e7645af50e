"""Runs Megatron's side of a comparison in processes of its own.

Conversion does not import training, and Megatron on a CPU changes torch for the life of a process;
so the worker is named as a module and told its cases in a file (``megasft.proof.forward.Case``).
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import orjson

from megasft.ranks.group import Ranks, start

WORKER: Final = "megasft.proof.forward"

SILENT_SECONDS: Final = 1800
"""Processes that show nothing for so long hang: a layer takes seconds, a whole model minutes."""

NOISE: Final = ("Traceback", "ChildFailedError", "warnings.warn", "=====", "-----", "^^^", "~~~")
"""Lines that say nothing of a reason."""

NUM_LINES: Final = 3
NUM_CHARACTERS: Final = 400
"""Of a reason, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint and layout.

    Attributes:
        model_flags: Of the model, when ``checkpoint`` has no flags file.
        flags: Of the layout.
        checkpoint: What ``--save`` named, or a converted checkpoint.
        iteration: Name of the folder in it, ``release`` for a conversion.
        documents: Token ids, laid end to end in one row.
        output: File of the logits, float32 [tokens, vocabulary]. Beside it ``.error`` says why
            there are none, and ``.layers`` holds what was found layer by layer.
        rounded_to: dtype that parameters are rounded to before they are used.
        hidden: Folder with Hugging Face's hidden states, to go layer by layer; else the whole
            model is in memory.
    """

    model_flags: tuple[str, ...]
    flags: tuple[str, ...]
    checkpoint: str
    iteration: str
    documents: tuple[tuple[int, ...], ...]
    output: str
    hidden: str | None = None
    rounded_to: str | None = None

    @property
    def failure(self) -> str | None:
        """Why there is no output, once the worker has said so."""
        path = Path(self.output).with_suffix(".error")
        return reason(path.read_text()) if path.is_file() else None

    @property
    def num_layers_done(self) -> int:
        """Layers finished so far, of a case that goes layer by layer."""
        path = Path(self.output).with_suffix(".progress")
        return len(path.read_bytes()) if path.is_file() else 0


def run(
    cases: Sequence[Case], *, ranks: int, folder: Path, watch: Callable[[], None]
) -> dict[str, str]:
    """Run cases that take the same number of processes; one that ends them does not end the rest.

    Args:
        cases: What to run; their outputs are files afterwards.
        ranks: Processes.
        folder: For the list of cases and the log.
        watch: Called a few times a second.

    Returns:
        Why there is no output, by the path of the output.
    """
    left, failures = list(cases), {}
    while left:
        listing, log = folder / f"cases{ranks}.json", folder / f"worker{ranks}.log"
        listing.write_bytes(orjson.dumps([asdict(case) for case in left]))
        with log.open("w") as output:
            started = start(ranks, WORKER, str(listing), output=output, imports=(WORKER,))
            ended = _wait(started, left, watch)
        for case in _finished(left):
            left.remove(case)
            if case.failure is not None:
                failures[case.output] = case.failure
        if left and not Path(left[0].output).exists():
            first = left.pop(0)
            failures[first.output] = ended or reason(log.read_text(errors="replace"))
    return failures


def _wait(process: Ranks, cases: Sequence[Case], watch: Callable[[], None]) -> str | None:
    """Wait for the end; return why the processes were stopped, if they were."""
    last_sign, signs = time.monotonic(), -1
    try:
        while process.poll() is None:
            watch()
            seen = sum(case.num_layers_done for case in cases) + len(list(_finished(cases)))
            if seen != signs:
                last_sign, signs = time.monotonic(), seen
            if time.monotonic() - last_sign > SILENT_SECONDS:
                return f"Megatron's processes gave no sign of life in {SILENT_SECONDS} s"
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return None


def _finished(cases: Sequence[Case]) -> Iterator[Case]:
    for case in list(cases):
        if Path(case.output).exists() or case.failure is not None:
            yield case


def reason(text: str) -> str:
    """Return what a log or traceback ends with, before what the launcher adds."""
    signal = re.search(r"Signal \d+ \((\w+)\)", text)
    if signal is not None:
        return f"a process was ended by {signal[1]}, as when memory runs out; try --by-layer"
    own, *_ = re.split(r"^E\d{4} .*elastic", text, maxsplit=1, flags=re.MULTILINE)
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in own.splitlines()]
    lines = [line for line in lines if line and not any(word in line for word in NOISE)]
    # A traceback's own end is the reason; what stands above it is the way there.
    starts = [i for i, line in enumerate(lines) if line.startswith('File "')]
    tail = lines[starts[-1] + 2 :] if starts and lines[starts[-1] + 2 :] else lines
    told = " ".join(tail[-NUM_LINES:]) or "Megatron's processes ended without a word"
    return told if len(told) <= NUM_CHARACTERS else told[:NUM_CHARACTERS] + " ..."
