"""Trains one step with a learning rate of 0 and writes the logits it saw; started by torchrun.

Usage: torchrun --nproc-per-node N -m tests.megatron.logits_worker RUNS.json, a list of
{flags, logits}; every rank with an output layer writes ``logits`` with its rank appended.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megasft.loss.loss_func import LossOutput
from megasft.megatron import cpu
from megasft.megatron.worker import forget
from megasft.pretrain_sft import configure_logging, run
from megasft.schema import SFTBatch


class Recorder:
    """Keeps every micro-batch's tokens and this rank's part of its logits; see ``Probe``."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.logits: list[torch.Tensor] = []

    def share(self, batch: SFTBatch) -> SFTBatch:
        return batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        from megatron.core import mpu

        rank = mpu.get_tensor_model_parallel_rank()
        self.parts.append(
            {
                "tokens": batch.tokens.clone(),
                "cu_seqlens": batch.cu_seqlens.clone(),
                "logits": self.logits.pop(),
                "tp_rank": rank,
            }
        )
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        pass


def watch_output_layers(recorder: Recorder) -> Any:
    """Hook the output layer of every model built from now on, before its first forward."""
    from megatron.core.models.gpt import GPTModel

    watched = set()

    def keep(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        recorder.logits.append(output[0].detach().float().flatten(0, 1).clone())

    def watch(module: torch.nn.Module, args: object) -> None:
        if isinstance(module, GPTModel) and module.post_process and id(module) not in watched:
            watched.add(id(module))
            module.output_layer.register_forward_hook(keep)

    return torch.nn.modules.module.register_module_forward_pre_hook(watch)


def main() -> None:
    configure_logging(rank=0)
    cpu.prepare()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        recorder = Recorder()
        handle = watch_output_layers(recorder)
        run(each["flags"], probe=recorder)
        handle.remove()
        if recorder.parts:
            torch.save(recorder.parts, f"{each['logits']}.{torch.distributed.get_rank()}")
        torch.distributed.barrier()
        forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
