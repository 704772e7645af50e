"""Runs lists of flags in one process group, recording loss, gradients and parameters of each."""

from collections.abc import Sequence
from pathlib import Path

from megasft.proof.prove import TRAINING, WORKER
from megasft.ranks import jobs


def record_all(ranks: int, runs: Sequence[Sequence[str]], folder: Path) -> list[Path]:
    """Return the file each run was recorded in."""
    failures = run_all(ranks, runs, folder)
    assert not any(failures.values()), failures
    return list(failures)


def run_all(
    ranks: int, runs: Sequence[Sequence[str]], folder: Path, *, defect: str | None = None
) -> dict[Path, str]:
    """Return why each run failed, or "", by the file that it is recorded in."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [folder / f"{i}.pt" for i in range(len(runs))]
    listed = [
        {"flags": list(flags), "output": str(record), "defect": defect}
        for flags, record in zip(runs, records, strict=True)
    ]
    failures = jobs.run(
        listed, world_size=ranks, module=WORKER, folder=folder, silent_seconds=300, imports=TRAINING
    )
    return dict(zip(records, failures, strict=True))
