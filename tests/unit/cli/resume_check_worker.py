"""Saves checkpoints without tensors, as Megatron would, and runs ``megasft resume-check`` on them.

In a process of its own, because Megatron is imported after ``megatron/cpu.py`` has patched torch.

Usage: python -m tests.unit.cli.resume_check_worker CASES.json RESULTS.json. A case has ``save``,
the arguments of ``save`` below; ``check``, those of the command; and ``defect``, a name of
``DEFECTS`` or null. Its result is ``code``, ``out`` and ``err``.
"""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megasft.megatron import cpu

DEFECTS: dict[str, Callable[[int], int]] = {
    "a row late": lambda k: k + 1 if k >= 24 else k,
    "two steps swapped": lambda k: {24: 32, 32: 24}.get(k, k),
}
"""Which position's row is trained at a position, in a run of steps of 8 rows resumed at 24."""


class BrokenOrder:
    """An order that a mistake has got into."""

    def __init__(self, order: Any, defect: Callable[[int], int]) -> None:
        self.order, self.defect = order, defect

    def __getitem__(self, position: int) -> int:
        return int(self.order[self.defect(position)])


def broken(defect: Callable[[int], int]) -> Callable[..., BrokenOrder]:
    """Return what training orders its rows with, and a mistake in it."""
    from megasft.training.row_order import training_order

    def order(*arguments: Any) -> BrokenOrder:
        plain = training_order(*arguments)
        return BrokenOrder(getattr(plain, "order", plain), defect)

    return order


def main() -> None:
    cpu.prepare()
    cpu.skip_missing_makefile()
    from megasft.training import replay
    from megasft.training.row_order import training_order

    cases = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for case in cases:
        save(**case["save"])
        replay.training_order = (
            broken(DEFECTS[case["defect"]]) if case["defect"] else training_order
        )
        results.append(command(case["check"]))
    Path(sys.argv[2]).write_text(json.dumps(results))


def save(*, folder: str, flags: list[str], world_size: int, iteration: int, consumed: int) -> None:
    """Write what Megatron keeps beside tensors; flags go the way of ``pretrain_sft.run``."""
    import torch
    from megatron.training import global_vars
    from megatron.training.training import get_optimizer_param_scheduler

    from megasft.run import start
    from megasft.training import arguments, resume
    from megasft.training.replay import batch_sizes

    os.environ["WORLD_SIZE"] = str(world_size)
    with redirect_stdout(io.StringIO()):
        args = arguments.parse(flags)
        start.settle(args)
        global_vars.set_args(args)
        with batch_sizes(args):
            scheduler = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
        global_vars.set_args(None)
    scheduler.step(consumed)
    args.finetune = True  # Megatron sets it where a run starts from --pretrained-checkpoint
    args.consumed_train_samples = consumed
    state: dict[str, Any] = {"args": args, "iteration": iteration, "checkpoint_version": 3.0}
    state["opt_param_scheduler"] = scheduler.state_dict()
    place = Path(folder) / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    torch.save(state, place / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    formats |= {"common_backend": "torch", "common_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(formats))
    (Path(folder) / resume.TRACKER).write_text(str(iteration))


def command(arguments: list[str]) -> dict[str, Any]:
    """Run the command as a user does."""
    from megasft.cli.main import main as megasft

    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            megasft(["resume-check", *arguments])
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    main()
