"""How much memory a comparison needs, and how much there is."""

import os
from pathlib import Path
from typing import Final

from checkpoint_convert.hf_tensors import HFTensors
from megasft.ranks.layout import Layout

PROCESS_BYTES: Final = 700 * 2**20
"""Of one of Megatron's processes, before there is a model in it."""

CGROUP: Final = Path("/sys/fs/cgroup/memory.max")

MEMINFO: Final = Path("/proc/meminfo")


def float32_bytes(tensors: HFTensors) -> int:
    """Return the size of a model in float32."""
    return sum(4 * tensors.shape(name).numel() for name in tensors.names)


def available_bytes() -> int:
    """Return the memory that can be had, of the machine or of this container."""
    if not MEMINFO.is_file():  # no Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = MEMINFO.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return free if limit == "max" else min(free, int(limit))


def needs_layers(model_bytes: int) -> bool:
    """Say whether a model is too large to be in memory as a whole."""
    return model_bytes > available_bytes() // 2


def fits(layout: Layout, model_bytes: int) -> bool:
    """Say whether a model, cut over processes, is in memory with them."""
    return model_bytes * 3 // 2 + layout.ranks * PROCESS_BYTES < available_bytes()
