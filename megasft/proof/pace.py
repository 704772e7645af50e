"""How long a proof will take, told before its first run and corrected by those that have ended."""

from collections.abc import Iterator, Sequence
from typing import Final

IMPORT_SECONDS: Final = 8.0
START_SECONDS: Final = 3.0
RUN_SECONDS: Final = 1.15
TRUTH_SECONDS: Final = 0.8
"""CPU time of the imports that ranks share, of a rank's start, of its part in a run, and of judging
a run (truths are shared), on the machine of ``docs/proof.md``. Another one is so much faster or
slower at all four."""


def expected_seconds(ranks: Sequence[int], *, cores: int) -> Iterator[float]:
    """Yield how long each run will take; with the first of a size, the start of its ranks.

    Args:
        ranks: Processes of each run, in the order of the runs.
        cores: That they share.

    Example:
        >>> [round(s, 1) for s in expected_seconds([1, 2, 2], cores=2)]
        [13.0, 5.0, 1.9]
    """
    previous, once = 0, IMPORT_SECONDS
    for num in ranks:
        start = START_SECONDS if num != previous else 0.0
        yield once + (start + RUN_SECONDS) * max(1.0, num / cores) + TRUTH_SECONDS
        previous, once = num, 0.0


def announcement(ranks: Sequence[int], *, cores: int) -> str:
    """Return what is to be run, and how long it will take, in a line.

    Example:
        >>> announcement([1, 2, 2], cores=2)
        '3 runs on up to 2 ranks, about 1 minute on 2 cores'
    """
    minutes = max(1, round(sum(expected_seconds(ranks, cores=cores)) / 60))
    runs = "1 run" if len(ranks) == 1 else f"{len(ranks)} runs"
    most = "1 rank" if max(ranks) == 1 else f"up to {max(ranks)} ranks"
    span = "1 minute" if minutes == 1 else f"{minutes} minutes"
    return f"{runs} on {most}, about {span} on {cores} core{'s' if cores > 1 else ''}"
