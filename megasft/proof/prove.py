"""Runs layouts through the real training entry point and judges each against the truth.

All runs of one world size share a process group; when one of them takes the processes down, it is
reported and the rest is started again (``ranks/jobs.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch

from megasft.errors import FlagError
from megasft.megatron import cpu
from megasft.proof.defects import DEFECTS
from megasft.proof.families import FAMILIES
from megasft.proof.layouts import select
from megasft.proof.oracle import Truth, saved_names
from megasft.proof.verdict import Verdict, compare
from megasft.proof.world import OBJECTIVES, MicroBatches, Objective, World, make_world
from megasft.ranks import jobs
from megasft.ranks.group import warm_up
from megasft.ranks.layout import Layout

WORKER: Final = "megasft.proof.worker"
TRAINING: Final = (
    "megasft.pretrain_sft",
    "megasft.proof.defects",
    "megasft.training.arguments",
    "megasft.training.datasets",
    "megasft.megatron.forward_step",
    "megasft.megatron.global_batch",
    "megasft.megatron.hooks",
    "megasft.megatron.model",
    "megasft.megatron.model_builder",
    "megasft.training.resume",
)
"""Modules that a rank imports to train, imported once before ranks are forked."""

SILENT_SECONDS: Final = 300
"""A run that shows nothing for so long hangs; it is stopped and reported."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to prove.

    Attributes:
        families: Names of ``FAMILIES``.
        objectives: Names of ``OBJECTIVES``.
        layouts: Parts of layout names; none means all.
        device: ``cpu`` or ``cuda``.
        defect: A name of ``DEFECTS``, to see the proof fail.
        folder: For the store, the models and the records.
    """

    families: tuple[str, ...]
    objectives: tuple[str, ...]
    layouts: tuple[str, ...]
    max_ranks: int
    device: str
    defect: str | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Run:
    """One layout and objective of a family, and where it is recorded."""

    world: World
    layout: Layout
    objective: Objective
    record: Path

    def job(self, settings: Settings) -> dict[str, Any]:
        """Return what the worker reads."""
        flags = self.world.flags(self.layout, self.objective)
        if settings.defect:
            # The audit would stop a wrong count at once; here its effect is to be seen.
            flags.append("--megasft-no-audit")
        return {"flags": flags, "output": str(self.record), "defect": settings.defect}


def prove(
    settings: Settings,
    *,
    announce: Callable[[Sequence[int]], None],
    done: Callable[[Verdict], None],
) -> list[Verdict]:
    """Run everything and judge it.

    Args:
        settings: What to prove.
        announce: Called before the first run with the ranks of each, in order.
        done: Called with each verdict, as soon as there is one.

    Raises:
        FlagError: No layout fits, or none can show the defect.
    """
    # Threads of a tiny model only wait for each other, and take cores from the ranks.
    torch.set_num_threads(1)
    planned = _plan(settings)
    announce([layout.ranks for _, layout, _ in planned])
    if settings.device == "cpu":
        warm_up()  # its imports take as long as the models
    settings.folder.mkdir(parents=True, exist_ok=True)
    worlds = {f: make_world(settings.folder, f) for f in dict.fromkeys(f for f, _, _ in planned)}
    runs = [
        Run(worlds[family], layout, OBJECTIVES[name], settings.folder / f"run{i}.pt")
        for i, (family, layout, name) in enumerate(planned)
    ]
    judge = _judge(worlds)
    verdicts = []
    for ranks, group in groupby(runs, key=lambda run: run.layout.ranks):
        of_size = list(group)
        failures = jobs.run(
            [run.job(settings) for run in of_size],
            world_size=ranks,
            module=WORKER,
            folder=settings.folder,
            silent_seconds=SILENT_SECONDS,
            imports=TRAINING,
            device=settings.device,
        )
        for run, failure in zip(of_size, failures, strict=True):
            verdicts.append(judge(run, failure))
            done(verdicts[-1])
    return sorted(verdicts, key=lambda v: (settings.families.index(v.family), v.ranks))


def _plan(settings: Settings) -> list[tuple[str, Layout, str]]:
    """Choose family, layout and objective of each run, few ranks first.

    Raises:
        FlagError: Nothing is left to run, or it would prove nothing.
    """
    max_ranks = settings.max_ranks
    if settings.device == "cuda":
        if cpu.is_needed():
            raise FlagError("--device cuda, and there is no CUDA device here; use --device cpu")
        max_ranks = min(max_ranks, torch.cuda.device_count())
    planned = [
        (family, layout)
        for family in settings.families
        for layout in select(
            FAMILIES[family].layouts, max_ranks=max_ranks, names=list(settings.layouts)
        )
    ]
    if not planned:
        raise FlagError(
            f"no layout of {', '.join(settings.families)} fits {max_ranks} ranks"
            + (f" and is called {' or '.join(settings.layouts)}" if settings.layouts else "")
            + "; raise --max-ranks, or leave --layouts out"
        )
    if settings.defect:
        defect = DEFECTS[settings.defect]
        planned = [(f, layout) for f, layout in planned if defect.shows_on(layout)]
        if not planned:
            raise FlagError(
                f"--break {settings.defect} shows only where a row is cut over ranks, and none of "
                "the chosen layouts has context parallelism; raise --max-ranks to 2 or more"
            )
    planned.sort(key=lambda chosen: chosen[1].ranks)
    return [
        (family, layout, name)
        for family, layout in planned
        for name in FAMILIES[family].objectives(settings.objectives)
    ]


def _judge(worlds: dict[str, World]) -> Callable[[Run, str], Verdict]:
    """Return what compares a run with its truth; truths are computed once each."""
    truths: dict[tuple[str, str, MicroBatches | None], Truth] = {}
    starts = {f: saved_names(w.hf, {p: p for p in w.hf.parameters()}) for f, w in worlds.items()}

    def judge(run: Run, failure: str) -> Verdict:
        family, layout, objective = run.world.family, run.layout, run.objective
        facts = (family, layout.name, layout.ranks, objective.label)
        if failure:
            return Verdict(*facts, failure=failure)
        together = None
        if objective.has_side_losses:  # nothing else depends on what a micro-batch is
            together = run.world.micro_batches(dp_size=layout.dp, mbs=layout.mbs)
        key = (family, objective.label, together)
        if key not in truths:
            truths[key] = run.world.truth(objective, together)
        errors = compare(run.record, truths[key], run.world.model, starts[family])
        run.record.unlink()
        return Verdict(*facts, **errors)

    return judge
