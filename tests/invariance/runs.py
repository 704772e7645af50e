"""Runs lists of flags in one process group, recording loss, gradients and parameters of each."""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.megatron.runs import torchrun


def record_all(
    ranks: int, runs: Sequence[Sequence[str]], folder: Path, *, defect: str | None = None
) -> list[Path]:
    """Return the file each run was recorded in (``.pt``), or refused in (``.error``)."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [folder / f"{i}.pt" for i in range(len(runs))]
    entries = [
        {"flags": list(flags), "record": str(record), "defect": defect}
        for flags, record in zip(runs, records, strict=True)
    ]
    listing = folder / "runs.json"
    listing.write_text(json.dumps(entries))
    torchrun(ranks, "-m", "megasft.proof.worker", str(listing))
    return [r if r.exists() else r.with_suffix(".error") for r in records]
