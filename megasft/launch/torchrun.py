"""A run on this node: its model is converted, its ranks train, its last checkpoint is exported."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megasft.launch import prepare, saved
from megasft.launch.command import torchrun_command
from megasft.launch.run import Run
from megasft.ranks.torchrun import Torchrun

logger = logging.getLogger(__name__)


def run_here(run: Run, environ: Mapping[str, str]) -> int:
    """Convert, train on this node's ranks, export; return the exit code.

    Args:
        run: Of the backend ``local`` or ``torchrun``.
        environ: Of the ranks and the conversions, without ``launch.env``.
    """
    saved.require_free(run)
    environ = dict(environ) | run.environment
    if run.conversion is not None:
        prepare.convert(run.conversion, environ)
    launch = run.launch
    if launch.this_node == 0:
        saved.save(run)
    torchrun = Torchrun(
        torchrun_command(run),
        environ,
        log_dir=run.log_dir,
        max_restarts=launch.max_restarts,
        node=launch.this_node if launch.nnodes > 1 else None,
    )
    code = torchrun.run()
    if code == 0 and launch.this_node == 0:
        if torchrun.was_stopped:
            logger.warning("stopped by a signal; the same command goes on from the last checkpoint")
        else:
            prepare.export(run.export, environ)
    return code
