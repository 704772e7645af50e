"""The worker's side of ``ranks/jobs.py``: Megatron runs one job after another in these ranks.

Megatron keeps its state in globals, so each job ends with ``forget``.
"""

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import torch

from megasft import files
from megasft.errors import MegasftError
from megasft.megatron import cpu


def work(run: Callable[[dict[str, Any]], None], *, stays_after: type[Exception] | None) -> None:
    """Run every job of the list that ``sys.argv`` names.

    Args:
        run: Does a job; its last rank to do so, or its only one, writes the job's ``output``.
        stays_after: An error that all ranks raise together, after which they can do the next job.
            After any other one rank alone goes on, and several end: they may wait for each other.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.prepare()  # before anything of Megatron is imported
    cpu.skip_missing_makefile()
    cpu.remember_docstrings()
    for number, job in enumerate(orjson.loads(Path(sys.argv[1]).read_bytes())):
        try:
            run(job)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            write_error(error, Path(job["output"]))
            is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
            if not (is_alone or (stays_after is not None and isinstance(error, stays_after))):
                raise
        forget()
        if number == 0:
            gc.freeze()  # what imports have left need not be looked at after each job
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_whole(content: Any, output: Path) -> None:
    """Save tensors to a file that appears whole."""
    unfinished = output.with_name(f"{output.name}.tmp")
    torch.save(content, unfinished)
    unfinished.replace(output)


def write_error(error: BaseException, output: Path) -> None:
    """Write why a job has no output; of several ranks the first one's reason stays."""
    path = output.with_suffix(".error")
    if not path.exists():
        is_fault = isinstance(error, MegasftError)
        text = str(error) if is_fault else "".join(traceback.format_exception(error))
        files.write_whole(path, text.encode())


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
