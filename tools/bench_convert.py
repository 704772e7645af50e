"""Convert a synthetic sharded model there and back: peak memory, speed, and a kill -9 on the way.

Every conversion is a fresh process, so that its own peak is the measure; what Python and its
libraries take without a model is printed beside it. Speed is a ratio to copying the same bytes on
the same disk. Each direction is killed when its first part is whole, and run again: the run goes on
from there, and the result must equal the source bit by bit.

Usage: python tools/bench_convert.py --gigabytes 2 --processes 1 2
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint_convert.hf_shards import shard_names
from checkpoint_convert.hf_tensors import INDEX, HFTensors
from checkpoint_convert.rules import same_bits

MIB = 1024 * 1024
HIDDEN, FFN, VOCAB, HEADS, GROUPS = 2048, 5632, 32_000, 32, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One conversion: MiB of its largest process, seconds, and what an earlier one had left.

    Attributes:
        kept: Parts that a killed conversion had finished, and this one took over.
    """

    label: str
    processes: int
    peak_mib: float
    seconds: float
    kept: int = 0


def shapes(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a Llama's tensors."""
    narrow = HIDDEN * GROUPS // HEADS
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", narrow), ("v", narrow), ("o", HIDDEN)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, HIDDEN)
        for name, shape in (
            ("gate", (FFN, HIDDEN)),
            ("up", (FFN, HIDDEN)),
            ("down", (HIDDEN, FFN)),
        ):
            yield f"{prefix}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_model(folder: Path, gigabytes: float, shard_bytes: float = 3e8) -> int:
    """Write a random bfloat16 Llama of about a size as a sharded folder; return its bytes."""
    layer_bytes = 2 * sum(torch.Size(shape).numel() for _, shape in list(shapes(1))[1:-2])
    ends_bytes = 4 * VOCAB * HIDDEN
    num_layers = max(2, round((gigabytes * 1e9 - ends_bytes) / layer_bytes))
    config = CONFIG | {"num_hidden_layers": num_layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in shapes(num_layers):
        if sum(2 * torch.Size(s).numel() for _, s in shards[-1]) > shard_bytes:
            shards.append([])
        shards[-1].append((name, shape))
    weight_map: dict[str, str] = {}
    total = 0
    for file, entries in zip(shard_names(len(shards)), shards, strict=True):
        bits = {n: torch.randint(-(2**15), 2**15, s, dtype=torch.int16) for n, s in entries}
        save_file({n: t.view(torch.bfloat16) for n, t in bits.items()}, folder / file)
        weight_map |= dict.fromkeys(bits, file)
        total += sum(t.nbytes for t in bits.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def work(folder: Path, command: str, *arguments: str) -> int:
    """Run one conversion in this process, and leave its peak in the folder."""
    from checkpoint_convert import hf_to_megatron, megatron_checkpoint, megatron_to_hf

    megatron_checkpoint.import_megatron()
    commands = {"hf_to_megatron": hf_to_megatron.main, "megatron_to_hf": megatron_to_hf.main}
    code = commands[command](arguments, worker=None) if command in commands else 0
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    (folder / f"peak-{os.getpid()}").write_text(kib)
    return code


def start(processes: int, *command: str) -> subprocess.Popen[bytes]:
    """Start this file as the worker of a conversion."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, __file__, "--worker", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def measured(label: str, processes: int, *command: str, kept: int = 0) -> Point:
    """Run to the end, and return the largest resident set of any of its processes."""
    peaks = Path(command[0])
    began = time.perf_counter()
    status = start(processes, *command).wait()
    seconds = time.perf_counter() - began
    if status != 0:
        raise SystemExit(f"{label} failed with status {status}")
    found = [*peaks.glob("peak-*")]
    peak = max(int(path.read_text()) for path in found) / 1024
    for path in found:
        path.unlink()
    return Point(label, processes, peak, seconds, kept)


def killed(command: Sequence[str], count: Callable[[], int]) -> int:
    """Kill -9 a conversion when its first part is whole; return how many parts then are."""
    process = start(1, *command)
    while count() == 0:
        if process.poll() is not None:
            raise SystemExit("the conversion ended before it could be killed; give more gigabytes")
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return count()


def run(folder: Path, gigabytes: float, processes: list[int]) -> tuple[list[Point], int, bool]:
    """Return every point, the model's bytes, and whether what came back is what went."""
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    num_bytes = write_model(hf, gigabytes)
    there = ["hf_to_megatron", "--hf", str(hf), "--output", str(megatron)]
    again = ["megatron_to_hf", "--checkpoint", str(megatron), "--output", str(back)]
    points = [measured("imports alone", 1, str(folder), "nothing")]
    for output, direction, parts in (
        (megatron, there, "receipts/[0-9]*[0-9]"),
        (back, [*again, "--max-shard-size", "0.2"], "*.safetensors"),
    ):
        command = [str(folder), *direction, "--no-verify"]
        partial = output.with_name(f".{output.name}.partial")
        for number in processes:
            points.append(measured(direction[0], number, *command))
            shutil.rmtree(output)
        kept = killed(command, lambda: len([*partial.glob(parts)]))  # noqa: B023
        if output.exists():
            raise SystemExit(f"{output} exists after a kill")
        points.append(measured(f"{direction[0]}, gone on", 1, *command, kept=kept))
    began = time.perf_counter()
    for path in hf.glob("*.safetensors"):
        shutil.copyfile(path, folder / "copy")
        os.sync()
    points.append(Point("copy", 1, 0.0, time.perf_counter() - began))
    source, result = HFTensors(hf), HFTensors(back)
    is_same = set(source) == set(result) and all(same_bits(source[n], result[n]) for n in source)
    return points, num_bytes, is_same


def main() -> int:
    """Measure and print a table, or JSON."""
    if sys.argv[1:2] == ["--worker"]:
        return work(Path(sys.argv[2]), *sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the model (default: 2)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1], metavar="N")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_convert.") as folder:
        points, num_bytes, is_same = run(Path(folder), args.gigabytes, args.processes)
    if args.json:
        figures = {"points": [asdict(p) for p in points], "bytes": num_bytes, "is_same": is_same}
        print(json.dumps(figures))
        return 0
    copying = points[-1].seconds
    print(f"{num_bytes / 1e9:.2f} GB of bfloat16; came back bitwise equal: {is_same}\n")
    print("| conversion | processes | peak MiB of one | time / copying | parts kept |")
    print("|---|---|---|---|---|")
    for p in points:
        ratio = f"{p.seconds / copying:.1f}"
        print(f"| {p.label} | {p.processes} | {p.peak_mib:,.0f} | {ratio} | {p.kept or ''} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
