"""What a run finds on its machine: versions, GPUs, limits and environment, and what hurts in them.

Everything is asked of the operating system, of torch and of package metadata; no optional package
is imported.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from megasft import compat
from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run.subject import Gpu, Machine, Stage, Subject
from megasft.errors import MissingPackageError
from megasft.megatron import cpu

GIB: Final = 2**30
TESTED_MEGATRON: Final = "0.19.2"
"""What the test suite and the proof run on."""

_PACKAGES: Final = {
    "megasft": "megasft",
    "torch": "torch",
    "megatron-core": "megatron-core",
    "Transformer Engine": "transformer-engine",
    "flash-attn": "flash-attn",
    "Apex": "apex",
}
COSTS: Final = {
    "Transformer Engine": (
        "plain layers and Megatron's torch Adam instead of fused ones, no FP8, and "
        "--use-distributed-optimizer cannot resume",
        "te",
    ),
    "flash-attn": ("blocks of the ring take torch's kernel instead of flash-attn's", "flash"),
}
"""What a GPU run lacks without a package, and the extra that brings it."""

LEAST_SHM: Final = GIB
LEAST_FILES: Final = 4096


def look() -> Machine:
    """Look at this machine."""
    shm = Path("/dev/shm")
    return Machine(
        versions=_versions(),
        gpus=_gpus(),
        num_cpus=len(os.sched_getaffinity(0)),
        shm=shutil.disk_usage(shm).total if shm.is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_infiniband=Path("/dev/infiniband").is_dir(),
        environment=dict(os.environ),
    )


def _versions() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"Python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["CUDA"] = torch.version.cuda
    has_nccl = not cpu.is_needed() and torch.distributed.is_nccl_available()
    found["NCCL"] = ".".join(map(str, _nccl_version())) if has_nccl else None
    return found


def _nccl_version() -> tuple[int, ...]:
    import torch

    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return version


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if cpu.is_needed():
        return ()
    seen = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in seen)


@rule("versions", Severity.NOTE, Stage.MACHINE, theme="machine")
def versions(subject: Subject) -> Iterator[Finding]:
    """Versions of everything that takes part."""
    known = {name: v for name, v in subject.machine.versions.items() if v is not None}
    yield Finding(", ".join(f"{name} {version}" for name, version in known.items()), "", known)


@rule("devices", Severity.NOTE, Stage.MACHINE, theme="machine")
def devices(subject: Subject) -> Iterator[Finding]:
    """The GPUs, or that there are none."""
    gpus = subject.machine.gpus
    if not gpus:
        yield Finding(
            f"no CUDA device, {subject.machine.num_cpus} CPU cores: a run takes CPU ranks with "
            "gloo; its losses and gradients are real, its speed and memory say nothing about GPUs",
            "",
            {"cpus": subject.machine.num_cpus},
        )
    for name, memory, capability in sorted(set(gpus)):
        yield Finding(
            f"{gpus.count(Gpu(name, memory, capability))} x {name}, {memory / GIB:,.0f} GiB, "
            f"compute capability {capability[0]}.{capability[1]}",
            "",
            {"memory": memory},
        )


@rule("megatron-version", Severity.ERROR, Stage.MACHINE, theme="machine")
def wrong_megatron(subject: Subject) -> Iterator[Finding]:
    """Megatron-core is missing, too old or too new."""
    try:
        compat.require_megatron()
    except MissingPackageError as error:
        yield Finding(str(error))


@rule("megatron-untested", Severity.NOTE, Stage.MACHINE, theme="machine")
def untested_megatron(subject: Subject) -> Iterator[Finding]:
    """Another megatron-core than the tested one."""
    version = subject.machine.versions.get("megatron-core")
    if version not in (None, TESTED_MEGATRON):
        yield Finding(
            f"megatron-core {version} is installed, and megasft is tested on {TESTED_MEGATRON}",
            f"pip install megatron-core=={TESTED_MEGATRON}, or run `megasft prove` on this one",
        )


@rule("packages", Severity.WARNING, Stage.MACHINE, theme="machine")
def packages(subject: Subject) -> Iterator[Finding]:
    """An optional package that a GPU run lacks, and what that costs."""
    if not subject.machine.gpus:
        return
    for name, (cost, extra) in COSTS.items():
        if subject.machine.versions.get(name) is None:
            yield Finding(f"{name} is not installed: {cost}", f"pip install megasft[{extra}]")


@rule("slow-environment", Severity.WARNING, Stage.MACHINE, theme="machine")
def slow_environment(subject: Subject) -> Iterator[Finding]:
    """Environment variables that debug, or switch a transport off."""
    for name, (values, effect) in _HURTS.items():
        value = subject.machine.environment.get(name, "")
        if value.upper() in values:
            yield Finding(f"{name}={value} {effect}", f"unset {name}, unless it is meant")


_ON: Final = ("1", "TRUE", "ON", "YES")
_HURTS: Final = {
    "CUDA_LAUNCH_BLOCKING": (_ON, "waits for each kernel: runs become several times slower"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "checks each collective with another one"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "prints thousands of lines from each rank"),
    "NCCL_P2P_DISABLE": (_ON, "sends between GPUs of a machine through host memory"),
    "NCCL_SHM_DISABLE": (_ON, "sends between GPUs of a machine over the network"),
    "NCCL_IB_DISABLE": (_ON, "keeps NCCL from InfiniBand and RoCE"),
    "TORCH_NCCL_BLOCKING_WAIT": (_ON, "makes the host wait for each collective"),
    "NCCL_BLOCKING_WAIT": (_ON, "makes the host wait for each collective"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_ON, "asks the driver for each tensor"),
    "PYTORCH_NO_HIP_MEMORY_CACHING": (_ON, "asks the driver for each tensor"),
}


@rule("shared-memory", Severity.WARNING, Stage.MACHINE, theme="machine")
def small_shared_memory(subject: Subject) -> Iterator[Finding]:
    """/dev/shm is too small for NCCL and data loading."""
    machine = subject.machine
    if machine.gpus and machine.shm < LEAST_SHM:
        yield Finding(
            f"/dev/shm has {machine.shm / 2**20:,.0f} MiB, and NCCL and data loading share memory "
            "there between processes",
            "start the container with --ipc=host or --shm-size=16g",
        )


@rule("open-files", Severity.NOTE, Stage.MACHINE, theme="machine")
def few_open_files(subject: Subject) -> Iterator[Finding]:
    """Few files may be open at once."""
    limit = subject.machine.open_files
    if 0 <= limit < LEAST_FILES:
        yield Finding(
            f"a process may open {limit:,} files; sockets and checkpoint shards of many ranks "
            "take more",
            "ulimit -n 65536",
        )


@rule("locked-memory", Severity.WARNING, Stage.MACHINE, theme="machine")
def locked_memory(subject: Subject) -> Iterator[Finding]:
    """InfiniBand may not lock its buffers."""
    machine = subject.machine
    if machine.has_infiniband and machine.locked_memory >= 0:
        yield Finding(
            f"a process may lock {machine.locked_memory / 2**20:,.0f} MiB, and InfiniBand needs to "
            "lock its buffers",
            "ulimit -l unlimited (in a container: --ulimit memlock=-1)",
        )


@rule("cuda-connections", Severity.ERROR, Stage.FLAGS, theme="machine")
def cuda_connections(subject: Subject) -> Iterator[Finding]:
    """CUDA_DEVICE_MAX_CONNECTIONS is not what Megatron asserts.

    Before Blackwell it asks for one queue, so that overlaps keep their order.
    """
    args, machine = subject.args, subject.machine
    is_split = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    is_fsdp = args.use_torch_fsdp2 or args.use_megatron_fsdp
    value = machine.environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    is_old = any(gpu.capability < (10, 0) for gpu in machine.gpus)
    if is_old and is_split and not (is_fsdp or args.overlap_moe_expert_parallel_comm):
        if value == "1":
            return
        yield Finding(
            f"CUDA_DEVICE_MAX_CONNECTIONS is {value or 'not set'}, and Megatron needs 1 for tensor "
            "or context parallelism on GPUs before Blackwell",
            "export CUDA_DEVICE_MAX_CONNECTIONS=1 on each machine",
        )


@rule("too-many-ranks", Severity.ERROR, Stage.FLAGS, theme="machine")
def too_many_ranks(subject: Subject) -> Iterator[Finding]:
    """More ranks than GPUs on this machine."""
    num_gpus = len(subject.machine.gpus)
    local = int(subject.machine.environment.get("LOCAL_WORLD_SIZE", "0"))
    if num_gpus > 1 and local > num_gpus:
        yield Finding(
            f"{local} ranks are started on this machine, which has {num_gpus} GPUs",
            f"torchrun --nproc-per-node {num_gpus}",
        )


@rule("precision", Severity.WARNING, Stage.FLAGS, theme="machine")
def half_precision(subject: Subject) -> Iterator[Finding]:
    """A precision this GPU lacks, or none chosen."""
    args, gpus = subject.args, subject.machine.gpus
    if args.bf16 and any(gpu.capability < (8, 0) for gpu in gpus):
        yield Finding(
            f"--bf16 on {gpus[0].name}, which emulates bfloat16 (compute capability 8.0 has it)",
            "use --fp16, or a newer GPU",
        )
    if gpus and not (args.bf16 or args.fp16):
        yield Finding(
            "neither --bf16 nor --fp16: weights, activations and matrix products are float32, at "
            "a fraction of the GPU's speed and twice the memory",
            "add --bf16",
        )
