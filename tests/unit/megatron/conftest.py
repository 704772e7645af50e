"""Before Megatron is imported here: its decorators would import torch's compilers, 2 s of CPU."""

from megasft.megatron import cpu

cpu.leave_out_compilers()
