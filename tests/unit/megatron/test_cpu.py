"""Each case in a process of its own: stand-ins last as long as the process."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, output = json.loads(line)
    child = os.fork()
    if not child:
        printed = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1), os.dup2(printed, 2)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException as error:
            traceback.print_exc()
            ended_well = isinstance(error, SystemExit) and not error.code
        else:
            ended_well = True
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(not ended_well)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Run code in a fork of a process that has imported torch, which takes 4 s, and no more."""
    output = tmp_path_factory.mktemp("printed") / "output"
    torch_is_there = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert torch_is_there.stdin and torch_is_there.stdout

    def run(code: str) -> str:
        output.unlink(missing_ok=True)
        print(json.dumps([code, str(output)]), file=torch_is_there.stdin, flush=True)
        exit_code = torch_is_there.stdout.readline()
        printed = output.read_text()
        assert exit_code == "0\n", printed
        return printed

    yield run
    torch_is_there.stdin.close()
    torch_is_there.wait()


def test_nothing_is_patched_where_there_is_a_cuda_device(python: Callable[[str], str]) -> None:
    python(
        """
import torch
torch.cuda.is_available = lambda: True
before = (torch.compile, torch.cuda.synchronize, torch.cuda.current_device, torch.jit.script,
          torch.distributed.all_to_all_single, torch.nn.Module.cuda)
from megasft.megatron import cpu
assert cpu.prepare() is False and not cpu.is_needed()
after = (torch.compile, torch.cuda.synchronize, torch.cuda.current_device, torch.jit.script,
         torch.distributed.all_to_all_single, torch.nn.Module.cuda)
assert before == after
assert torch.overrides._get_current_function_mode_stack() == []
"""
    )


def test_cuda_means_cpu_and_one_line_says_so(python: Callable[[str], str]) -> None:
    out = python(
        """
import torch
from megasft.megatron import cpu
assert cpu.prepare() and cpu.prepare() and cpu.is_needed()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.full((2,), 0, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.zeros(2).to(device=torch.cuda.current_device()).device.type == "cpu"
assert not torch.tensor([1], device="cpu", pin_memory=True).cuda(non_blocking=True).is_pinned()
assert torch.zeros(2).to(device="cuda:0", dtype=torch.int8).dtype == torch.int8
assert torch.zeros(2).to(torch.device("cuda"), torch.int8).dtype == torch.int8
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


def test_packages_that_need_a_gpu_are_not_found(
    tmp_path: Path, python: Callable[[str], str]
) -> None:
    """Megatron's router hands its gate to Transformer Engine wherever that is installed."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    python(
        f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path)!r})
assert importlib.util.find_spec("transformer_engine")
from megasft import compat
from megasft.megatron import cpu
assert cpu.prepare() and not compat.has("transformer_engine")
try:
    import transformer_engine
except ImportError:
    sys.exit(0)
sys.exit("found")
"""
    )


def test_a_backward_pass_inside_a_backward_pass_still_means_the_cpu(
    python: Callable[[str], str],
) -> None:
    """What activation recomputation does; its layers may ask for CUDA in their own backward."""
    python(
        """
import torch
from megasft.megatron import cpu
cpu.prepare()
class AsksForCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full((1,), 3.0, device=torch.cuda.current_device())
class Recomputes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 3
    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = AsksForCuda.apply(x)
        torch.autograd.backward((y,), (grad,))
        return x.grad
w = torch.tensor([2.0], requires_grad=True)
torch.autograd.backward(Recomputes.apply(w).sum())
assert w.grad.item() == 3.0
v = torch.tensor([2.0], requires_grad=True)
torch.autograd.backward([v * 2, v * 5], [torch.ones(1), torch.tensor([10.0])])
assert v.grad.item() == 52.0
"""
    )


def test_parts_of_different_length_are_gathered_and_summed(python: Callable[[str], str]) -> None:
    python(
        """
import os, tempfile
import torch, torch.distributed as dist
from megasft.megatron import cpu
cpu.prepare()
path = tempfile.mktemp()
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
mine = torch.full((3 - rank, 2), float(rank + 1))
parts = [torch.empty(3, 2), torch.empty(2, 2)]
dist.all_gather(parts, mine, group=dist.group.WORLD)
assert parts[0].eq(1).all() and parts[1].eq(2).all()
total = torch.empty_like(mine)
dist.reduce_scatter(total, [p * (rank + 1) for p in parts], group=dist.group.WORLD)
assert total.eq(3 * (rank + 1)).all()
even = [torch.empty(2), torch.empty(2)]
dist.all_gather(even, torch.full((2,), float(rank)))
assert even[0].eq(0).all() and even[1].eq(1).all()
dist.destroy_process_group()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


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


@pytest.mark.slow  # imports the real Megatron in a process of its own
def test_flags_keep_their_help_when_it_is_read_once(python: Callable[[str], str]) -> None:
    python(
        """
import argparse, ast
from megasft.megatron import cpu
cpu.prepare()
from megatron.training.arguments import add_megatron_arguments
helps = lambda: [a.help for a in add_megatron_arguments(argparse.ArgumentParser())._actions]
before = helps()
cpu.remember_docstrings()
parsed, parse = [], ast.parse
ast.parse = lambda source: parsed.append(source) or parse(source)
assert helps() == before and len(before) > 500
num_parsed = len(parsed)
assert helps() == before and len(parsed) == num_parsed > 10
"""
    )
