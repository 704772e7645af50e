"""Examines the run of a run.yaml before anything is converted or started, by the ranks' own start.

It is done in the process that starts the ranks, with their environment, number and flags: that
process imports Megatron already, to know the keys, and asks GPUs for their properties alone.
Rejected: a process of its own, which imports Megatron again (5 to 8 s). Ranks do the same on their
own machines, so nothing is passed on to them. A model that is still to be converted is read from
its Hugging Face folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from megasft.checks.engine import Finding, Report, Severity, in_order
from megasft.checks.run import machine
from megasft.checks.run.subject import Subject, Wishes
from megasft.launch.run import Run
from megasft.launch.settings import HERE
from megasft.launch.written import Setting
from megasft.run import start

OF_THE_MACHINE: Final = ("refused-flag", "resume", "megatron-refuses", "attention-refuses")
"""Rules that may refuse a GPU run where GPUs or their packages are missing."""

_MENTION: Final = re.compile(r"(?<![\w-])(?:--[a-z][a-z0-9-]*|TP|PP|CP|EP|ETP|world size)(?![\w-])")
_SHORT: Final = {
    "TP": ("--tensor-model-parallel-size",),
    "PP": ("--pipeline-model-parallel-size",),
    "CP": ("--context-parallel-size",),
    "EP": ("--expert-model-parallel-size",),
    "ETP": ("--expert-tensor-parallel-size",),
    "world size": ("launch.nnodes", "launch.nproc_per_node"),
}
"""What findings call flags and keys besides their names."""
_STORES: Final = ("--megasft-data", "--megasft-valid-data")
"""Flags that findings call by their values."""


def examine(run: Run, wishes: Wishes | None = None, *, world_size: int | None = None) -> Report:
    """Return what is wrong with a run, each finding with the lines of the file it is about.

    Args:
        run: Resolved.
        wishes: What neither the file nor the machine says.
        world_size: Ranks, where not as many as the file says.
    """
    launch = run.launch
    is_here = launch.backend in HERE
    local = {"LOCAL_WORLD_SIZE": str(launch.nproc_per_node)} if is_here else {}
    run.args.world_size = world_size or launch.num_ranks
    with _environment(run.environment | local):
        seen = machine.look()
        report = start.examine(Subject(seen, wishes or Wishes(), run.args))
    found = [_placed(run, each) for each in report.findings]
    if not (is_here or launch.cpu or seen.gpus):
        found = [_left_to_ranks(each) for each in found]
    return replace(report, findings=in_order(found))


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _left_to_ranks(finding: Finding) -> Finding:
    """Make a warning of an error that may be about this machine alone."""
    if finding.severity is not Severity.ERROR or finding.rule not in OF_THE_MACHINE:
        return finding
    fact = f"here, where there is no GPU: {finding.fact}"
    return replace(finding, severity=Severity.WARNING, fact=fact)


def _placed(run: Run, finding: Finding) -> Finding:
    """Name the lines that set what a finding is about; secrets are left out."""
    settings = () if finding.severity is Severity.NOTE else _settings(run, finding.fact)
    places = ", ".join(dict.fromkeys(setting.source for setting in settings))
    fact = f"{finding.fact} ({places})" if places else finding.fact
    return replace(
        finding, fact=run.hidden.message(fact), remedy=run.hidden.message(finding.remedy)
    )


def _settings(run: Run, fact: str) -> Iterator[Setting]:
    """Yield the settings that a fact mentions, in its order; stores are known by their paths."""
    for flag in _STORES:
        if flag in run.given and _names_one_of(run.given[flag], fact):
            yield run.given[flag]
    for mention in _MENTION.findall(fact):
        for name in _SHORT.get(mention, (mention,)):
            if name in run.given:
                yield run.given[name]


def _names_one_of(stores: Setting, fact: str) -> bool:
    values = stores.value if isinstance(stores.value, list) else [stores.value]
    paths = [str(value).rpartition("=")[2] for value in values]
    names = {*paths, *(Path(path).name for path in paths)}
    return any(re.search(rf"(?:^|\(){re.escape(name)}(?=[ /)])", fact) for name in names)
