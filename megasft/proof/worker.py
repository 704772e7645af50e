"""Runs the real training entry point once per layout in one process group, and records what it did.

Starting processes is what costs on a CPU, so one start serves every layout of a world size. The
first step gives the loss and all gradients. The parameters are those its update has left: seen when
a second step's gradients are ready, or after a run of one step.

Usage: torchrun --nproc-per-node N -m megasft.proof.worker RUNS.json
"""

import gc
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch

from megasft.errors import MegasftError
from megasft.loss.loss_func import LossOutput
from megasft.megatron import cpu
from megasft.pretrain_sft import run
from megasft.proof.defects import DEFECTS, Defect
from megasft.schema import SFTBatch


class Recorder:
    """Writes loss and gradients of the first step and the parameters after it; see ``Probe``.

    Args:
        path: File that rank 0 writes.
        defect: What to break, if anything.
    """

    def __init__(self, path: Path, defect: Defect | None = None) -> None:
        self.path, self.defect = path, defect
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.step = 0
        self.model: list[Any] = []
        self.record: dict[str, Any] = {}

    def share(self, batch: SFTBatch) -> SFTBatch:
        """Break the share, when the defect is one of data."""
        return self.defect.share(batch) if self.defect else batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        """Break the loss, when the defect is one of counting; and sum it up."""
        if self.defect:
            output = self.defect.loss(output, batch)
        self.loss_sum += output.loss_sum.detach().double().cpu()
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        """Record a step."""
        from megatron.core import mpu

        from megasft.proof.capture import gather_gradient_shards, whole_tensors

        self.step += 1
        loss = self.loss_sum.clone()
        self.loss_sum.zero_()
        if mpu.get_tensor_model_parallel_rank() != 0:
            loss.zero_()  # tensor-parallel ranks have the same loss; it counts once
        loss = loss.to(torch.device("cuda", torch.cuda.current_device()))
        torch.distributed.all_reduce(loss)
        if self.step == 1:
            gather_gradient_shards(model)
            gradients = whole_tensors(model, lambda p: p.main_grad)  # type: ignore[attr-defined]
            self.record = {"loss": float(loss) / max(units, 1), "units": units}
            self.record["gradients"] = gradients
            self.model = model
        elif self.step == 2:
            self.finish()

    def finish(self) -> None:
        """Record the parameters after the first step, unless that is done; and write the file."""
        from megasft.proof.capture import whole_tensors

        if not self.model:
            return
        self.record["parameters"] = whole_tensors(self.model, lambda p: p)
        self.record["threads"] = psutil.Process().num_threads()
        self.model = []
        if torch.distributed.get_rank() == 0:
            unfinished = self.path.with_suffix(".tmp")
            torch.save(self.record, unfinished)
            unfinished.replace(self.path)


def main() -> None:
    """Run every entry of the list; what one of them raises is recorded and the next one runs."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.prepare()  # before anything of Megatron is imported
    cpu.remember_docstrings()
    for number, entry in enumerate(orjson.loads(Path(sys.argv[1]).read_bytes())):
        path, defect = Path(entry["record"]), DEFECTS.get(entry.get("defect"))
        recorder = Recorder(path, defect)
        try:
            run(entry["flags"], probe=recorder)
            recorder.finish()
        except MegasftError as error:
            path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        except Exception:
            path.with_suffix(".error").write_text(traceback.format_exc())
            raise
        forget()
        if number == 0:
            gc.freeze()  # what imports have left need not be looked at after each run
    torch.distributed.destroy_process_group()


def forget() -> None:
    """Forget Megatron's global state, for the next run in this process group.

    Megatron forgets its process groups without closing them. Each holds three threads and sockets,
    and a run of one rank makes twenty, so the groups of a run are closed here. Gloo joins a group's
    threads when the last reference to it goes, which ``_release_groups`` sees to.
    """
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training.training import destroy_global_state
    from torch.distributed.distributed_c10d import _world

    if not torch.distributed.is_initialized():
        return  # a finished run, which starts nothing
    torch.distributed.barrier()
    destroy_global_state()
    destroy_moe_metrics_tracker()  # left by the former, and used by the next run
    _release_groups()
    for group in list(_world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()
    torch.distributed.barrier()


def _release_groups() -> None:
    """Cut what refers to a finished run's process groups and no collector can see.

    Megatron 0.19.2 wraps a model in hooks on autograd's nodes, and the nodes are reached from the
    model again through graphs that outlive the step: a distributed optimizer's views of parameters,
    a token dispatcher's probabilities. Python does not follow such a cycle, so it is cut where
    the hooks hold the wrapper. Caches of rotary embeddings and two globals hold groups as well.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common import embeddings

    for wrapper in gc.get_referrers(DistributedDataParallel):
        if type(wrapper) is DistributedDataParallel:
            vars(wrapper).clear()
    embeddings.RotaryEmbedding.forward.cache_clear()
    embeddings.YarnRotaryEmbedding.forward.cache_clear()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)


if __name__ == "__main__":
    main()
