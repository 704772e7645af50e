"""Saves the checkpoint of a run without its tensors, as Megatron would."""

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megasft.checks.engine import Severity
from megasft.checks.run import machine
from megasft.checks.run.subject import Subject, Wishes
from megasft.megatron import checkpoint, cpu
from megasft.training import arguments, resume


def save_run(
    folder: Path, flags: Sequence[object], *, ranks: int = 1, iteration: int, consumed: int
) -> Path:
    """Write what Megatron keeps beside tensors, its flags and its schedule among it.

    Args:
        folder: The ``--save`` folder.
        flags: The run was started with.
        ranks: Of the run.
        iteration: Steps it has trained.
        consumed: Rows it has trained.
    """
    cpu.prepare()
    from megatron.training import training

    from megasft.run import start

    args = arguments.parse([str(flag) for flag in flags])
    args.world_size = ranks
    run = Subject(machine.look(), Wishes(), args)
    assert not start.examine(run).of(Severity.ERROR), flags
    args = run.settled
    with checkpoint._globals(args), redirect_stdout(StringIO()):
        scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
        scheduler.step(consumed)
    args.finetune = True  # Megatron sets it where a run starts from --pretrained-checkpoint
    args.consumed_train_samples = consumed
    state: dict[str, Any] = {"args": args, "iteration": iteration, "checkpoint_version": 3.0}
    state["opt_param_scheduler"] = scheduler.state_dict()
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    torch.save(state, place / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    formats |= {"common_backend": "torch", "common_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(formats))
    (folder / resume.TRACKER).write_text(str(iteration))
    return folder
