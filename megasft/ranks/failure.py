"""Which rank failed first, and what it said.

When one rank dies, the others follow with errors of communication, and torchrun adds a page of its
own; what is needed is the one error that began it. torchrun names the rank it saw end first, but it
looks every tenth of a second, and a rank whose neighbour is gone may be quicker. So the logs are
read: a rank that was killed, or whose last error is not about communication, goes before.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

MOST_LINES: Final = 60
LAST_LINES: Final = 5
"""Shown of a rank that ended without an error of its own."""

_SEEN: Final = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: \d+\)")
"""What torch 2.9 to 2.13 log when a rank has ended."""
_HEARD: Final = re.compile(r"Received \S+ death signal, shutting down workers")
"""What torch 2.9 to 2.13 log when a signal ends torchrun itself."""
_PREFIX: Final = re.compile(r"^\[rank\d+\]: ?")
"""torch puts it before an uncaught error once the process group is there."""
_NAMED: Final = "[megasft] error: "
_BEGINNING: Final = re.compile(r"^(Traceback \(most recent call last\):|\[megasft\] error: )")
_NOISE: Final = re.compile(r"^\[[WEI]\d+ |^[WEI]\d{4} |^\S+: UserWarning: ")
_OF_OTHERS: Final = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|gloo/transport|ncclRemoteError|"
    r"ncclSystemError|DistNetworkError|DistBackendError|SIGTERM|TCPStore|process group|"
    r"timed out waiting",
    re.IGNORECASE,
)


class Ended(NamedTuple):
    """A rank that torchrun saw end.

    Attributes:
        rank: On its node.
        exit_code: Negative for a signal.
    """

    rank: int
    exit_code: int


class Failure(NamedTuple):
    """The rank that failed first.

    Attributes:
        rank: On its node.
        exit_code: None when only its log is known.
        text: What it said at its end.
        log: Where all of it is.
    """

    rank: int
    exit_code: int | None
    text: str
    log: Path | None

    @property
    def is_lasting(self) -> bool:
        """Whether it is a fault megasft itself names, which another start would meet again."""
        return self.text.startswith(_NAMED)

    def message(self, *, node: int | None = None) -> str:
        """Say what happened, the rank's own error first and complete.

        Args:
            node: Of a run on several; ranks are numbered on each anew.
        """
        rank = f"rank {self.rank}" if node is None else f"local rank {self.rank} of node {node}"
        log = "" if self.log is None else f"\nall that it printed: {self.log}"
        return f"{self.text}\n{rank} {_how(self.exit_code)}{log}"


def seen_ended(line: str) -> Ended | None:
    """Return the rank a line of torchrun's says has ended."""
    found = _SEEN.search(line)
    return None if found is None else Ended(rank=int(found[2]), exit_code=int(found[1]))


def seen_signal(line: str) -> bool:
    """Say whether a line of torchrun's says that a signal is ending it."""
    return bool(_HEARD.search(line))


def first_failure(logs: Mapping[int, Path], ended: Ended | None) -> Failure | None:
    """Return the failure that began it, None when nothing is known.

    Args:
        logs: Standard error of each rank, by its rank on this node.
        ended: The rank torchrun saw end first.
    """
    said = {rank: _lines(path) for rank, path in logs.items()}
    errors = {rank: text for rank, lines in said.items() if (text := last_error(lines))}
    own = [rank for rank, text in errors.items() if not is_of_another(text)]
    if ended is not None and (was_killed(ended.exit_code) or ended.rank in own or not own):
        text = errors.get(ended.rank) or _last(said.get(ended.rank, []))
        if was_killed(ended.exit_code):
            text = _last(said.get(ended.rank, []))
        return Failure(ended.rank, ended.exit_code, text, logs.get(ended.rank))
    if not own:
        return None
    # The first to fall wrote last the earliest.
    rank = min(own, key=lambda r: logs[r].stat().st_mtime_ns)
    return Failure(rank, None, errors[rank], logs[rank])


def was_killed(exit_code: int) -> bool:
    """Say whether a rank ended by a signal that was not torchrun's own SIGTERM."""
    return exit_code < 0 and -exit_code != signal.SIGTERM


def last_error(lines: Iterable[str]) -> str:
    """Return the last traceback, or megasft's own error, without what was printed after it."""
    block: list[str] = []
    for line in lines:
        if _BEGINNING.match(line):
            # "During handling of the above exception": both belong to one error.
            is_chained = bool(block) and not block[-1] and "exception" in block[-2]
            block = [*block, line] if is_chained else [line]
        elif block and not _NOISE.match(line):
            block.append(line)
    while block and not block[-1].strip():
        block.pop()
    if len(block) > MOST_LINES:
        cut = f"... {len(block) - MOST_LINES:,} lines ..."
        block = [*block[: MOST_LINES // 2], cut, *block[-MOST_LINES // 2 :]]
    return "\n".join(block)


def is_of_another(error: str) -> bool:
    """Say whether an error is that of a rank whose neighbour has gone."""
    return bool(_OF_OTHERS.search(error.rsplit("\n", 1)[-1]))


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "failed first"
    if exit_code >= 0:
        return f"failed first, with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ""
    if -exit_code == signal.SIGKILL:
        hint = "; the system does that when memory runs out (`dmesg` says so), or somebody did"
    return f"was ended first, by signal {-exit_code} ({name}){hint}"


def _last(lines: list[str]) -> str:
    kept = [line for line in lines if line.strip() and not _NOISE.match(line)]
    return "\n".join(kept[-LAST_LINES:]) or "(it printed nothing)"


def _lines(path: Path) -> list[str]:
    try:
        return [_PREFIX.sub("", line) for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
