"""Entry point: ``torchrun -m megasft.pretrain_sft <any Megatron flag> --megasft-data STORE ...``.

Megatron's own ``pretrain()`` does the training; this file starts the run (``run/start.py``) and
hands it over.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megasft.errors import MegasftError, SaveError
from megasft.megatron import cpu

if TYPE_CHECKING:
    from megasft.megatron.probe import Probe

logger = logging.getLogger("megasft")


def run(argv: Sequence[str], *, probe: Probe | None = None) -> None:
    """Train with Megatron's flags and ours.

    Args:
        argv: Command-line flags, without the program's name.
        probe: Looks into the run; see ``megasft.megatron.probe``.

    Raises:
        MegasftError: Flags, data or model do not fit; nothing has been started then.
    """
    cpu.prepare()
    cpu.skip_missing_makefile()
    # Megatron is imported after the stand-ins are in place.
    from megasft.megatron import checkpoint, flags, hooks
    from megasft.megatron.forward_step import forward_step_func
    from megasft.megatron.global_batch import GlobalBatches
    from megasft.megatron.pretrain import loop_config, pretrain
    from megasft.run import start
    from megasft.training import arguments, datasets, saving
    from megasft.training.report import Report

    begun = start.begin(arguments.parse(argv))
    if begun.is_over:
        saving.end_again(begun.args)
        return
    args, data, model = begun.settled, begun.data, begun.config
    datasets.announce(args, data)
    with saving.only_writer(args):
        flags.publish(args)
        batches = GlobalBatches(
            data.train.plan,
            seed=args.seed,
            objective=args.megasft_loss,
            window=begun.window,
            normalizes=args.megasft_turn_weights == "normalize",
        )
        keeper = saving.Keeper(args, rank=args.rank)
        report = Report(args, data, batches, keeper)
        hooks.install(model.transformer, args, batches, report, probe)
        config = loop_config(args, model)
        keeper.spare_last_save(config.checkpoint)
        if args.save and not args.async_save:
            cpu.collect_writes_here()
        rates = checkpoint.loads_other_rates(args, begun.saved)
        with saving.ends_by_signal(args), saving.explains_failed_saves(args), rates, keeper, report:
            pretrain(
                config,
                datasets=datasets.datasets_provider(args, data),
                forward_step=forward_step_func(
                    *(args, batches, report, probe), valid_weight_scale=report.scales.together
                ),
                evaluated=report.evaluated,
            )


def configure_logging(*, rank: int) -> None:
    """Print megasft's own lines on rank 0, and warnings of other ranks not at all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[megasft] %(message)s"))
    logger.handlers[:] = [handler] if rank == 0 else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn a user's fault into one message on rank 0 and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank=rank)
    if {"-h", "--help"} & set(argv):
        cpu.prepare()
        from megasft.training.arguments import help_text

        sys.stdout.write(help_text())
        return 0
    try:
        run(argv)
    except MegasftError as error:
        if rank == 0:
            logger.error("error: %s", error)
        elif isinstance(error, SaveError):  # a disk may be full on this rank's machine alone
            sys.stderr.write(f"[megasft] error: rank {rank}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    # Checkpoint writers are spawned and import this module again: the guard is what stops them
    # from training twice.
    sys.exit(main())
