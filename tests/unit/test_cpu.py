"""Each case in a process of its own: stand-ins last as long as the process."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_nothing_is_patched_where_there_is_a_cuda_device() -> None:
    python(
        """
import torch
torch.cuda.is_available = lambda: True
before = (torch.compile, torch.cuda.synchronize, torch.cuda.current_device, torch.jit.script,
          torch.distributed.all_to_all_single, torch.nn.Module.cuda)
from megasft import cpu
assert cpu.prepare() is False and not cpu.is_needed()
after = (torch.compile, torch.cuda.synchronize, torch.cuda.current_device, torch.jit.script,
         torch.distributed.all_to_all_single, torch.nn.Module.cuda)
assert before == after
assert torch.overrides._get_current_function_mode_stack() == []
"""
    )


def test_cuda_means_cpu_and_one_line_says_so() -> None:
    out = python(
        """
import torch
from megasft import cpu
assert cpu.prepare() and cpu.prepare() and cpu.is_needed()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.full((2,), 0, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.ones(1).cuda().to("cuda:0").to(torch.device("cuda", 0)).device.type == "cpu"
assert torch.ones(1).to(torch.float64).dtype == torch.float64
assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
torch.manual_seed(5); a = torch.rand(1); torch.cuda.manual_seed(5); assert torch.rand(1) == a
state = torch.cuda.get_rng_state(); a = torch.rand(1); torch.cuda.set_rng_state(state)
assert torch.rand(1) == a
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.synchronize()
assert torch.compile(len)("ab") == 2
"""
    )
    assert out.count("no CUDA device: Megatron runs on the CPU with gloo") == 1


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "megasft needs megatron-core, which is not installed; run: pip install"),
        ("0.16.1", "megasft does not work with megatron-core 0.16.1; run: pip install"),
        ("0.20.0", "megasft does not work with megatron-core 0.20.0; run: pip install"),
    ],
)
def test_a_missing_or_wrong_megatron_ends_in_one_line(version: str | None, message: str) -> None:
    code = f"""
from importlib import metadata
def version(name):
    if {version!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {version!r}
metadata.version = version
import megasft
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert result.returncode == 1
    assert message in result.stderr.strip().splitlines()[-1]
