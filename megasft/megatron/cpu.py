"""Lets Megatron, which hard-codes CUDA, run on CPUs with gloo. The only file that patches anything.

Why it exists: a wrong loss in a parallel run is found by running the *same* code on two layouts
and comparing; nobody should need eight GPUs for that. With these stand-ins the real training loop,
schedules, optimizer and checkpoints run on a laptop: TP, PP, CP, DP and EP over gloo.

What it cannot tell you: anything about speed, memory, kernels (Transformer Engine, flash attention,
fused ops) or the rounding of bf16 on a GPU. It proves arithmetic and communication.

``prepare()`` must run before Megatron is imported. It turns requests for a CUDA device into the CPU
(a ``TorchFunctionMode``), gives ``torch.cuda`` the stand-ins Megatron asks for, and leaves
``torch.compile`` and ``jit.script`` out, because both ask for the accelerator. On a machine with
CUDA it patches nothing. ``skip_missing_makefile()`` is the one repair a GPU machine needs too, and
``remember_docstrings()`` is for processes that train hundreds of tiny models, and
``collect_writes_here()`` for ranks that save, wherever they run.
Patching beats a fork of Megatron: users run the wheel they train with. Monkey patches anywhere else
are refused in review.
"""

import logging
import os
import queue
import sys
from collections.abc import Callable, Collection
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

CPU_FLAGS: Final = (
    *("--distributed-backend", "gloo", "--num-workers", "0"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"),
)
"""Megatron flags a machine without CUDA needs beside those of the local layer spec."""

CUDA_ONLY: Final = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
"""Packages that Megatron uses wherever it finds them (a router's gate, a fused Adam) and that
compute on a GPU alone. Hidden, so that a GPU machine without its GPUs is a laptop."""

_prepared = False


def is_needed() -> bool:
    """Say whether this process has no CUDA device, or runs with the stand-ins already."""
    return _prepared or not torch.cuda.is_available()


def prepare(*, hide: Collection[str] = CUDA_ONLY) -> bool:
    """Install the stand-ins when there is no CUDA device; once, and before Megatron is imported.

    Args:
        hide: Packages that are not to be found, though they may be installed.

    Returns:
        Whether Megatron will run on the CPU.
    """
    global _prepared
    if not is_needed() or _prepared:
        return _prepared
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in hide:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the import system's "no"
    _redirect_devices()
    _stand_in_for_cuda()
    leave_out_compilers()
    _accept_tensor_splits()
    _accept_uneven_parts()
    _prepared = True
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "no CUDA device: Megatron runs on the CPU with gloo; losses and gradients are real, "
            "speed and memory say nothing about GPUs"
        )
    return True


def _on_cpu(value: Any) -> Any:
    """Turn any way to say CUDA into the CPU; leave everything else alone."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call.

    An int is a device only where it is passed as ``device=``: ``torch.full((2,), 0)`` has ints too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if kwargs and "device" in kwargs:
            device = kwargs["device"]
            is_index = isinstance(device, int) and not isinstance(device, bool)
            kwargs = kwargs | {"device": "cpu" if is_index else _on_cpu(device)}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if func in _REWRITTEN:
            return self._rewritten(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _rewritten(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # clip_grads asserts this very name.
            name = func(args[0])
            return name.replace("torch.", "torch.cuda.", 1) if "cuda" not in name else name
        if func is torch.autograd.backward:
            # A mode is off while it handles a call, but this call runs more of Megatron's code:
            # activation recomputation inside a backward pass.
            with self:
                return _backward(*args, **kwargs)
        return func(args[0], *map(_on_cpu, args[1:]), **kwargs)


_REWRITTEN: Final = frozenset(
    {
        *(torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.type, torch.Tensor.to),
        torch.autograd.backward,
    }
)
"""Calls of which more than a keyword is changed; all others pass in the fewest steps."""


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Do what ``torch.autograd.backward`` does once no mode wants to handle it."""
    roots = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    given = (grad_tensors,) if isinstance(grad_tensors, torch.Tensor) else grad_tensors
    gradients = (None,) * len(roots) if given is None else tuple(given)
    ones = (
        torch.ones_like(root) if gradient is None and root.requires_grad else gradient
        for root, gradient in zip(roots, gradients, strict=True)
    )
    torch.autograd.Variable._execution_engine.run_backward(
        roots,
        tuple(ones),
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        tuple(inputs or ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _redirect_devices() -> None:
    # Entered for the life of the process: there is no moment at which Megatron should see CUDA.
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


class _Instant:
    """A CUDA event or stream on a machine where everything has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> "_Instant":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def record_event(self, event: object = None) -> object:
        return event or _Instant()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = synchronize = wait_stream = wait_event = _nothing


def _returning(value: Any) -> Callable[..., Any]:
    """Return a new function with a constant result; dynamo wants one function per torch name."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return value

    return stand_in


@contextmanager
def _no_stream(stream: object = None) -> Any:
    yield


def _stand_in_for_cuda() -> None:
    stream = _Instant()
    properties = SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=1, warp_size=32
    )
    replaced: dict[str, Any] = {
        "is_available": _returning(True),
        "is_initialized": _returning(True),
        "current_device": _returning(0),
        "device_count": _returning(1),
        "set_device": _returning(None),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "ipc_collect": _returning(None),
        "Event": _Instant,
        "Stream": _Instant,
        "current_stream": _returning(stream),
        "default_stream": _returning(stream),
        "set_stream": _returning(None),
        "stream": _no_stream,
        "device": _returning(nullcontext()),
        "get_device_properties": _returning(properties),
        "get_device_capability": _returning((0, 0)),
        "get_device_name": _returning("CPU"),
        "mem_get_info": _returning((0, 0)),
        "memory_stats": _returning({}),
        "reset_peak_memory_stats": _returning(None),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "default_generators": (torch.default_generator,),
        "_lazy_call": lambda callback, **k: callback(),
        "_lazy_init": _returning(None),
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "DoubleTensor": torch.DoubleTensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
        "ByteTensor": torch.ByteTensor,
    }
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        replaced[name] = _returning(0)
    replaced["max_memory_reserved"] = _returning(0)
    for name, stand_in in replaced.items():
        setattr(torch.cuda, name, stand_in)
        if name.endswith("rng_state"):
            setattr(torch.cuda.random, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _returning(None))
    # DataLoader would pin memory, and fail, if this said True.
    torch.accelerator.is_available = _returning(False)


def leave_out_compilers() -> None:
    """Let functions be as they are written: torch's compilers ask for the accelerator."""

    def as_it_is(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function if callable(function) else (lambda wrapped: wrapped)

    torch.compile = as_it_is  # type: ignore[assignment]
    torch.jit.script = as_it_is  # type: ignore[assignment]


def _accept_tensor_splits() -> None:
    """Let ``all_to_all_single`` take split sizes as tensors, which gloo's does not."""
    original = torch.distributed.all_to_all_single

    def with_lists(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        out_splits, in_splits = (
            s.tolist() if isinstance(s, torch.Tensor) else s
            for s in (output_split_sizes, input_split_sizes)
        )
        return original(output, input, out_splits, in_splits, *args, **kwargs)

    torch.distributed.all_to_all_single = with_lists


def _accept_uneven_parts() -> None:
    """Let ``all_gather`` and ``reduce_scatter`` take parts of different length, as NCCL does.

    Experts under tensor parallelism exchange as many rows as each rank happens to have.
    """
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def gather(parts: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return all_gather(parts, tensor, *args, **kwargs)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        filled = [torch.empty_like(padded) for _ in parts]
        all_gather(filled, padded, *args, **kwargs)
        for part, full in zip(parts, filled, strict=True):
            part.copy_(full[: len(part)])
        return None

    def scatter(output: torch.Tensor, parts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = [len(part) for part in parts]
        if len(set(sizes)) == 1:
            return reduce_scatter(output, parts, *args, **kwargs)
        whole = torch.cat(tuple(parts))
        torch.distributed.all_reduce(whole, *args, **kwargs)
        mine = torch.distributed.get_rank(kwargs.get("group"))
        output.copy_(torch.split(whole, sizes)[mine])
        return None

    torch.distributed.all_gather = gather  # type: ignore[assignment]
    torch.distributed.reduce_scatter = scatter  # type: ignore[assignment]


def skip_missing_makefile() -> None:
    """Keep Megatron from running ``make`` where its wheel ships helpers_cpp built, but no Makefile.

    ``pretrain()`` runs ``make`` in the package unconditionally and exits when that fails, so a run
    from the PyPI wheel would end here on any machine. A source tree, which has the Makefile, is
    left alone. Deletable with the first wheel that ships it (0.19.2 does not).
    """
    from megatron.core.datasets import utils

    has_makefile = (Path(utils.__file__).parent / "Makefile").exists()
    if not has_makefile and find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = _returning(None)


def collect_writes_here() -> None:
    """Let the threads that write a checkpoint leave what they wrote in a queue of this process.

    Megatron 0.19 makes the queue a process of its own, as writers that are processes need
    (``--async-save``). Each rank starts one at its first save, which imports the program again.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def remember_docstrings() -> None:
    """Read a class's field docstrings once in a process, for processes of many runs.

    Megatron's parser takes the help of its flags from the sources of fourteen dataclasses, and each
    run builds the parser three times: 0.4 s of the 1 s of CPU that a run of a tiny model takes.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, found = ArgumentGroupFactory._get_field_docstrings, dict[type, dict[str, str]]()

    def read_once(self: Any, of: type) -> dict[str, str]:
        if of not in found:
            found[of] = read(self, of)
        return found[of]

    ArgumentGroupFactory._get_field_docstrings = read_once
