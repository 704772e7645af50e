"""``megasft train``: from a run.yaml to running ranks, and a checkpoint or a model at the end."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from megasft.errors import FlagError

logger = logging.getLogger(__name__)


def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="RUN.YAML", help="the run", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE...", help="instead of what the file says"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the resolved run and its command, start nothing"),
    ] = False,
    keys: Annotated[
        str | None,
        typer.Option(metavar="PART", help="list the keys that hold PART (a dot: all), with help"),
    ] = None,
) -> None:
    """Train as a file says: convert the model, start the ranks, export the model.

    A run.yaml has sections with keys. **A key is a flag's own name**, Megatron's or ours:

        launch: {nproc_per_node: 8}

        model: {hf: ./Qwen3-8B, bf16: true}

        data: {store: store, seq_length: 32768, micro_batch_size: 1, global_batch_size: 64}

        loss: {objective: turn}

        parallel: {tensor_model_parallel_size: 4, context_parallel_size: 2, sequence_parallel: true}

        optim: {lr: 1e-5, train_iters: 1000}

        checkpoint: {save: ckpt/run, save_interval: 100, export_hf: true}

    `model.hf` gives all sizes of the model. `true` sets a switch, `false` leaves it out, or sets
    its opposite where there is one. Ours are written without `megasft-`, and `data.store`,
    `data.valid`, `loss.objective` are `--megasft-data`, `--megasft-valid-data`, `--megasft-loss`.
    Paths are relative to the current directory. The same command, given again, goes on from the
    last checkpoint in `checkpoint.save`.

    **see what is wrong with it:** `megasft doctor run.yaml optim.lr=2e-5`; what that finds wrong
    ends this command too, before the model is converted.

    **see what it would do:** `megasft train run.yaml optim.lr=2e-5 --dry-run`

    **find a key:** `megasft train --keys warmup`

    **another launcher:** `launch.backend=local|torchrun|slurm|ray|print`
    """
    environ = dict(os.environ)  # before torch and Megatron, which add to it
    # This process only reads Megatron's flags; what is missing or slow, each rank says for itself.
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    if keys is not None:
        _list(keys)
        return
    if config is None:
        raise FlagError("RUN.YAML is missing; `megasft train --help` shows one")
    # What is printed while Megatron is imported is said by rank 0.
    logging.getLogger("megasft").addHandler(logging.NullHandler())
    from megasft.checks.engine import Severity
    from megasft.launch import backends
    from megasft.launch.examination import examine
    from megasft.launch.run import resolve
    from megasft.pretrain_sft import configure_logging
    from megasft.run.start import require

    run = resolve(config, overrides or ())
    report = examine(run)
    configure_logging(rank=0)
    if dry_run:
        backends.print_run(run, environ)
        for warning in report.of(Severity.WARNING):  # rank 0 says them otherwise
            logger.warning("%s", warning.message)
    require(report)
    raise typer.Exit(0 if dry_run else backends.start(run, environ))


def _list(part: str) -> None:
    from megasft.launch.catalog import Catalog

    num_keys = 0
    for key, kind, text in Catalog().listing("" if part == "." else part):
        num_keys += 1
        print(f"{key}  {kind}\n    {text}" if kind else f"{key}\n    {text}")
    if num_keys == 0:
        print(f"no key holds {part}", file=sys.stderr)
        raise typer.Exit(1)
