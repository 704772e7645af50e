"""Count what one micro-batch asks of a GPU: operators, reads of device values, largest temporary.

The real Megatron model and loop run on the CPU, on rows of the same number of tokens in 1, 16 and
256 documents of different lengths, with 2 and with 4 layers; the difference is what a layer costs.
Each aten operator of forward and backward counts as one launch, and the attention kernel as one
(a stand-in for the CUDA varlen kernel, with its arguments on the device). A host read is a value
of a tensor that Python asks for (`item`, `tolist`, `cpu`, a boolean index): on a GPU the host waits
there. Counts are exact: they do not depend on the machine.

Usage: python tools/bench_launches.py [--model dense moe latent mtp] [--cp 1 2] [--callers]
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT: Final = Path(__file__).parents[1]
ROW_TOKENS: Final = 8192
VOCAB: Final = 256
DOCUMENTS: Final = (1, 16, 256)
LAYERS: Final = (2, 4)

SIZES: Final = (
    *("--hidden-size", "32", "--num-attention-heads", "4", "--vocab-size", str(VOCAB)),
    *("--max-position-embeddings", str(ROW_TOKENS), "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--ffn-hidden-size", "64"),
)
GROUPED: Final = ("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm")
EXPERTS: Final = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "none"),
)
LATENT: Final = (
    *("--multi-latent-attention", "--q-lora-rank", "16", "--kv-lora-rank", "8"),
    *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "8"),
)
MODELS: Final = {
    "dense": (*SIZES, *GROUPED),
    "moe": (*SIZES, *GROUPED, *EXPERTS),
    "latent": (*SIZES, *LATENT),
    "mtp": (*SIZES, *GROUPED, "--mtp-num-layers", "1"),
}
RUN: Final = (
    *("--micro-batch-size", "1", "--global-batch-size", "1"),
    *("--megasft-packer", "sequential", "--megasft-loss", "turn", "--calculate-per-token-loss"),
    *("--train-iters", "2", "--lr", "1e-3", "--log-interval", "1000", "--no-save-optim"),
    *("--megasft-spikes", "0"),
)

HOST_READS: Final = (
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__),
    *(torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero, torch.Tensor.masked_select),
)


@dataclass
class Count:
    """What one micro-batch asked, forward and backward.

    Attributes:
        operators: By caller.
        reads: Of device values, by caller and kind.
        largest_bytes: Of one operator's result.
    """

    operators: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    largest_bytes: int = 0


def caller() -> str:
    """Return the innermost line of megasft or Megatron that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("megasft/", "megatron/"):
            if f"/{package}" in path and "/tools/" not in path and "/megatron/cpu" not in path:
                file = path.rpartition(f"/{package}")[2]
                return f"{package}{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class _Operators(TorchDispatchMode):
    """Counts aten operators that compute or copy; views launch nothing."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return result
        self.count.operators[caller()] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * tensor.element_size()
                self.count.largest_bytes = max(self.count.largest_bytes, size)
        return result


class _Reads(TorchFunctionMode):
    """Counts values that Python asks of tensors, but of those that never leave the host."""

    def __init__(self, count: Count, on_host: set[int]) -> None:
        super().__init__()
        self.count, self.on_host = count, on_host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS and args[0].untyped_storage().data_ptr() not in self.on_host:
            self.count.reads[f"{caller()} {func.__name__}"] += 1
        # Filling a masked tensor with one number needs no read, taking or setting others does.
        sets_one = func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and not sets_one:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype is torch.bool for i in index):
                self.count.reads[f"{caller()} boolean index"] += 1
        return func(*args, **(kwargs or {}))


class Counting:
    """A probe (``megasft/megatron/probe.py``) that counts from a batch to its gradients."""

    def __init__(self) -> None:
        self.counts: list[Count] = []
        self.modes: list[Any] = []

    def share(self, batch: Any) -> Any:
        """Begin to count."""
        host = {batch.cu_seqlens.untyped_storage().data_ptr()}
        host |= {batch.cu_seqlens_unpadded.untyped_storage().data_ptr()}
        self.counts.append(Count())
        self.modes = [_Reads(self.counts[-1], host), _Operators(self.counts[-1])]
        for mode in self.modes:
            mode.__enter__()
        return batch

    def loss(self, output: Any, batch: Any) -> Any:
        """Do nothing."""
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        """End counting."""
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def replace_kernel() -> None:
    """Let attention take one operator, as the CUDA kernel does, forward and backward."""
    from megasft.attention.kernels import choice
    from megasft.attention.kernels.kernel import QKV, BlockKernel

    tensor = torch.Tensor

    def attend(q: tensor, k: tensor, v: tensor, cu_q: tensor, cu_k: tensor) -> list[tensor]:
        return [q.new_zeros((*q.shape[:-1], v.shape[-1])), q.new_zeros(q.shape[:-1])]

    def differentiate(
        grad: tensor,
        q: tensor,
        k: tensor,
        v: tensor,
        out: tensor,
        lse: tensor,
        cu_q: tensor,
        cu_k: tensor,
    ) -> list[tensor]:
        return [torch.zeros_like(x) for x in (q, k, v)]

    for function in (attend, differentiate):
        function.__annotations__ = {
            name: (list[torch.Tensor] if name == "return" else torch.Tensor)
            for name in function.__annotations__
        }
    forward = torch.library.custom_op("megasft_bench::attend", attend, mutates_args=())
    backward = torch.library.custom_op(
        "megasft_bench::differentiate", differentiate, mutates_args=()
    )

    def of_block(qkv: Any, block: Any, *, scale: float) -> Any:
        out, lse = forward(*qkv, block.cu_seqlens_q, block.cu_seqlens_k)
        return out, lse

    def gradients_of_block(
        grad: Any, qkv: Any, out: Any, lse: Any, block: Any, *, scale: float
    ) -> Any:
        cu_seqlens = block.cu_seqlens_q, block.cu_seqlens_k
        return QKV(*backward(grad, *qkv, out, lse, *cu_seqlens))

    kernel = BlockKernel(lambda qkv, block: None, of_block, gradients_of_block)
    choice.KERNELS.clear()  # type: ignore[attr-defined]
    choice.KERNELS["stand_in"] = kernel  # type: ignore[index]


def lengths_of(num_documents: int, row_tokens: int) -> list[int]:
    """Return different lengths, multiples of 8, that fill a row; equal where there are too many."""
    if num_documents == 1:
        return [row_tokens]
    rng = np.random.default_rng(num_documents)
    shares = rng.dirichlet(np.ones(num_documents) * 2)
    lengths = np.maximum(1, (shares * (row_tokens // 8 - num_documents)).astype(int)) * 8
    lengths[-1] += row_tokens - lengths.sum()
    return [int(length) for length in lengths]


def write_store(folder: Path, num_documents: int, row_tokens: int) -> Path:
    """Write a store whose samples fill one row."""
    from megasft.schema import Sample, turn_records
    from megasft.store import StoreWriter

    path = folder / f"documents_{num_documents}"
    rng = np.random.default_rng(0)
    with StoreWriter(path, vocab_size=VOCAB) as writer:
        for line, length in enumerate(lengths_of(num_documents, row_tokens), 1):
            tokens = rng.integers(0, VOCAB, length).astype(np.int32)
            turns = turn_records([(1 + length // 2, length - length // 2 - 1, 0, 1)])
            writer.add(Sample(tokens, turns), source=0, line=line)
        content = {"counts": {}, "special_tokens": {}, "categories": {}}
        writer.finish(content | {"sources": [{"path": "made"}]})
    return path


def count_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Count the runs of a list in this process, one of the ranks; rank 0 writes what it counted."""
    from megasft.megatron import cpu

    cpu.prepare()
    cpu.remember_docstrings()
    replace_kernel()
    from megasft.megatron.worker import forget
    from megasft.pretrain_sft import run

    for entry in runs:
        counting = Counting()
        run(entry["flags"], probe=counting)
        if torch.distributed.get_rank() == 0:
            # The first step fills caches that live as long as the run.
            Path(entry["output"]).write_text(json.dumps(vars(counting.counts[-1])))
        forget()
    torch.distributed.destroy_process_group()


def count(
    models: Sequence[str],
    cp_sizes: Sequence[int],
    *,
    documents: Sequence[int] = DOCUMENTS,
    layers: Sequence[int] = LAYERS,
    row_tokens: int = ROW_TOKENS,
) -> dict[tuple[Any, ...], Count]:
    """Return counts by model, CP size, documents and layers."""
    from megasft.ranks.group import start

    found: dict[tuple[Any, ...], Count] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = {n: write_store(folder, n, row_tokens) for n in documents}
        for cp_size in cp_sizes:
            runs = {}
            for key in ((m, cp_size, n, k) for m in models for n in documents for k in layers):
                model, _, num_documents, num_layers = key
                flags = [*MODELS[model], *RUN, "--num-layers", str(num_layers)]
                flags += ["--megasft-data", str(stores[num_documents])]
                flags += ["--seq-length", str(row_tokens)]
                flags += ["--context-parallel-size", str(cp_size)]
                runs[key] = {"flags": flags, "output": str(folder / f"{len(found) + len(runs)}")}
            wanted = folder / "runs.json"
            wanted.write_text(json.dumps(list(runs.values())))
            log = folder / "log"
            with log.open("w") as output:
                status = start(cp_size, "tools.bench_launches", str(wanted), output=output).wait()
            if status:
                raise SystemExit(log.read_text())
            for key, entry in runs.items():
                fields = json.loads(Path(entry["output"]).read_text())
                operators, reads = Counter(fields["operators"]), Counter(fields["reads"])
                found[key] = Count(operators, reads, fields["largest_bytes"])
    return found


def table(found: dict[tuple[Any, ...], Count]) -> Iterator[str]:
    """Yield a line for each model, CP size and number of documents."""
    few, many = LAYERS
    yield "model    CP  documents  operators a layer  the rest  host reads  largest temporary"
    for (model, cp, documents, layers), small in found.items():
        if layers != few:
            continue
        large = found[model, cp, documents, many]
        a_layer = (large.operators.total() - small.operators.total()) / (many - few)
        rest = small.operators.total() - few * a_layer
        yield (
            f"{model:8}{cp:3}{documents:11}{a_layer:19,.0f}{rest:10,.0f}"
            f"{large.reads.total():12}{large.largest_bytes / 1e6:16.1f} MB"
        )


def main() -> int:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--callers", action="store_true", help="say which lines ask, too")
    args = parser.parse_args()
    os.chdir(ROOT)
    found = count(args.model, args.cp)
    print("\n".join(table(found)))
    if args.callers:
        for key, one in found.items():
            if key[2] == max(DOCUMENTS) and key[3] == max(LAYERS):
                print("\n" + ", ".join(map(str, key)))
                for who, times in (*one.operators.most_common(25), *one.reads.most_common()):
                    print(f"{times:8,}  {who}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        count_runs(json.loads(Path(sys.argv[1]).read_text()))
    else:
        sys.exit(main())
