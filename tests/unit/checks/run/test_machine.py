import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from megasft.checks.engine import Finding
from megasft.checks.run import machine
from megasft.checks.run.machine import GIB
from megasft.checks.run.subject import Gpu, Machine, Subject

H100: Final = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))
B200: Final = Gpu("NVIDIA B200", 180 * GIB, (10, 0))
V100: Final = Gpu("Tesla V100", 32 * GIB, (7, 0))

CLUSTER: Final = Machine(
    versions={"megatron-core": "0.19.2", "Transformer Engine": "2.4", "flash-attn": "2.8"},
    gpus=(H100,) * 8,
    num_cpus=96,
    shm=64 * GIB,
    open_files=65_536,
    locked_memory=-1,
    has_infiniband=True,
    environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "LOCAL_WORLD_SIZE": "8"},
)


def run_on(where: Machine, **changes: Any) -> Subject:
    flags = {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 1,
        "use_torch_fsdp2": False,
        "use_megatron_fsdp": False,
        "overlap_moe_expert_parallel_comm": False,
        "bf16": True,
        "fp16": False,
    }
    args = SimpleNamespace(**(flags | changes))
    return cast(Subject, SimpleNamespace(machine=where, args=args))


RULES = (
    *(machine.untested_megatron, machine.packages, machine.slow_environment),
    *(machine.small_shared_memory, machine.few_open_files, machine.locked_memory),
    *(machine.cuda_connections, machine.too_many_ranks, machine.half_precision),
)


def fired(subject: Subject) -> list[Finding]:
    return [hit for rule in RULES for hit in rule(subject)]


def test_a_machine_set_up_well_is_not_remarked_on() -> None:
    assert fired(run_on(CLUSTER)) == []


def test_a_laptop_lacks_nothing_that_only_gpus_need() -> None:
    laptop = replace(CLUSTER, gpus=(), versions={}, shm=64 * 2**20, environment={})
    laptop = replace(laptop, has_infiniband=False)
    assert fired(run_on(laptop, bf16=False)) == []
    (hit,) = machine.devices(run_on(laptop))
    assert hit.fact.startswith("no CUDA device, 96 CPU cores")


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (replace(CLUSTER, environment={}), {}, "CUDA_DEVICE_MAX_CONNECTIONS is not set"),
        (
            replace(CLUSTER, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
            {"tensor_model_parallel_size": 1, "context_parallel_size": 2},
            "CUDA_DEVICE_MAX_CONNECTIONS is 8",
        ),
        (replace(CLUSTER, shm=64 * 2**20), {}, "/dev/shm has 64 MiB"),
        (replace(CLUSTER, open_files=1024), {}, "may open 1,024 files"),
        (replace(CLUSTER, locked_memory=2**20), {}, "may lock 1 MiB"),
        (replace(CLUSTER, gpus=(H100,) * 4), {}, "8 ranks are started .* 4 GPUs"),
        (CLUSTER, {"bf16": False}, "neither --bf16 nor --fp16"),
        (replace(CLUSTER, gpus=(V100,) * 8), {}, "--bf16 on Tesla V100"),
        (
            replace(CLUSTER, versions={**CLUSTER.versions, "Transformer Engine": None}),
            {},
            "Transformer Engine is not installed: .*no FP8",
        ),
        (
            replace(CLUSTER, versions={**CLUSTER.versions, "megatron-core": "0.19.4"}),
            {},
            "megatron-core 0.19.4 is installed, and megasft is tested on 0.19.2",
        ),
        (
            replace(CLUSTER, environment={**CLUSTER.environment, "NCCL_P2P_DISABLE": "1"}),
            {},
            "NCCL_P2P_DISABLE=1 sends between GPUs of a machine through host memory",
        ),
        (
            replace(CLUSTER, environment={**CLUSTER.environment, "NCCL_DEBUG": "info"}),
            {},
            "NCCL_DEBUG=info prints",
        ),
    ],
)
def test_what_hurts_is_one_hit_with_a_remedy(
    where: Machine, changes: dict[str, Any], message: str
) -> None:
    (hit,) = fired(run_on(where, **changes))

    assert hit.remedy and hit.remedy not in hit.fact
    assert re.search(message, hit.fact), hit.fact


def test_one_queue_is_not_asked_for_where_megatron_does_not() -> None:
    unset = replace(CLUSTER, environment={})
    assert fired(run_on(replace(unset, gpus=(B200,) * 8))) == []
    assert fired(run_on(unset, tensor_model_parallel_size=1)) == []
    assert fired(run_on(unset, use_megatron_fsdp=True)) == []


def test_variables_that_are_off_do_not_hurt() -> None:
    off = {"NCCL_P2P_DISABLE": "0", "CUDA_LAUNCH_BLOCKING": "", "NCCL_DEBUG": "WARN"}
    assert fired(run_on(replace(CLUSTER, environment={**CLUSTER.environment, **off}))) == []


def test_this_machine_can_be_looked_at() -> None:
    seen = machine.look()
    assert seen.num_cpus >= 1
    assert seen.versions["torch"] and seen.versions["megatron-core"]
    assert set(seen.as_json()) >= {"versions", "gpus", "shared_memory"}
