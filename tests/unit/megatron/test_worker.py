"""What a run of the proof leaves to the next one in the same processes: nothing."""

import subprocess
import sys

import pytest


@pytest.mark.slow  # imports the real Megatron in a process of its own
def test_no_metric_keeps_a_group_of_the_run_before() -> None:
    """Seen with NCCL: the run after one with router losses used the group of the former."""
    code = """
import torch
from megasft.megatron import cpu
cpu.prepare()
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megasft.megatron.worker import forget
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
group = torch.distributed.new_group([0])
kept = get_moe_metrics_tracker()
kept.record("z_loss", torch.ones(()), layer_number=1, num_layers=1, reduce_group=group)
forget()
assert not get_moe_metrics_tracker().metrics and kept.metrics
assert len(torch.distributed.distributed_c10d._world.pg_map) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)
