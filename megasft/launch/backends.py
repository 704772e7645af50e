"""Who starts the ranks: one function for each ``launch.backend``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

from megasft.launch import command
from megasft.launch.run import Run


def start(run: Run, environ: Mapping[str, str]) -> int:
    """Start a run by its backend, and return the exit code.

    Args:
        run: Resolved.
        environ: Of this process, before Megatron was imported.
    """
    return BACKENDS[run.launch.backend](run, environ)


def print_run(run: Run, environ: Mapping[str, str]) -> int:
    """Print what the run resolved to, and the command that starts it; start nothing."""
    resolved = command.as_comment(command.resolved_yaml(run.settings))
    if run.launch.backend == "slurm":
        from megasft.launch.slurm import script

        sys.stdout.write(f"{script(run)}\n{resolved}")
    else:
        sys.stdout.write(f"{resolved}{command.shell(run)}")
    return 0


def _here(run: Run, environ: Mapping[str, str]) -> int:
    from megasft.launch.torchrun import run_here

    return run_here(run, environ)


def _slurm(run: Run, environ: Mapping[str, str]) -> int:
    from megasft.launch.slurm import submit

    return submit(run, environ)


def _ray(run: Run, environ: Mapping[str, str]) -> int:
    from megasft.launch.ray_ranks import run_on_ray

    return run_on_ray(run, environ)


BACKENDS: Final[dict[str, Callable[[Run, Mapping[str, str]], int]]] = {
    "local": _here,
    "torchrun": _here,
    "slurm": _slurm,
    "ray": _ray,
    "print": print_run,
}
