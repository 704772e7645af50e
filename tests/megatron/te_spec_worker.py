"""Loads converted checkpoints into Transformer Engine's layers, on the CPU; started by torchrun.

Their modules can be built and filled without a GPU, only not run.

Usage: torchrun --nproc-per-node 1 -m tests.megatron.te_spec_worker CASES.json, a list of
{checkpoint, output}; writes what the model asks of a checkpoint, and what it got.
"""

import json
import sys
from pathlib import Path

import torch

from megasft.megatron import cpu
from megasft.megatron.worker import forget


def main() -> None:
    cpu.prepare(hide=())
    cpu.skip_missing_makefile()
    from megasft.megatron.forward import Case, build, stored_tensors
    from megasft.run.forward_worker import start

    for case in json.loads(Path(sys.argv[1]).read_text()):
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import (
            ShardedObject,
            ShardedTensor,
            ShardedTensorFactory,
        )

        fields = {"model_flags": (), "iteration": "release", "documents": ((1,) * 16,)}
        flags = ("--transformer-impl", "transformer_engine", "--use-cpu-initialization")
        _, config = start(
            Case(**fields, flags=flags, checkpoint=case["checkpoint"], output=case["output"])
        )
        model = build(config)
        asked = model.sharded_state_dict(metadata=case["metadata"])
        keys = {
            value.unique_key if isinstance(value, ShardedObject) else value.key
            for value in nested_values(asked)
            if isinstance(value, ShardedObject | ShardedTensor | ShardedTensorFactory)
        }
        for tensor in stored_tensors(model).values():
            tensor.data.fill_(torch.nan)
        from megatron.training.checkpointing import load_checkpoint

        load_checkpoint([model], None, None)
        state = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        torch.save({"keys": sorted(keys), "state": state}, case["output"])
        forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
