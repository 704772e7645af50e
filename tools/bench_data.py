"""Build the same conversations with `megasft build` and with the plain pipeline; print the ratios.

The plain pipeline is what most people write, and what OpenSFT does: `datasets` loads the jsonl and
maps `apply_chat_template` over it, finds each answer as the difference of two rendered prefixes,
and saves input_ids, labels and attention_mask as arrow. `--plain-masks offsets` is a kinder
baseline: it tokenizes each conversation once and finds the answers by character offsets.

Both sides run as fresh processes, start-up included. The plain side runs on a subset; its time but
for the start-up is multiplied to that of all conversations.
Memory is that of the whole process tree: the sum of the proportional set sizes, every 50 ms.

Usage: python tools/bench_data.py --conversations 20000 --processes 1 2
       python tools/bench_data.py --conversations 200000 --skip-plain
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil  # type: ignore[import-untyped]
from bench_data_inputs import conversations_file, texts, trained_bpe
from bench_data_plain import prompt_and_answer

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
PLAIN = REPOSITORY / "tools" / "bench_data_plain.py"
LOG = "log.txt"
POLL_SECONDS = 0.05
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TITLES = {"chatml": "ChatML", "qwen3": "Qwen3-like", "own": "the tokenizer's own template"}


class Run(NamedTuple):
    """One pipeline over some conversations; `seconds` is wall, `cpu` is user and system."""

    seconds: float
    cpu: float
    peak_mib: float


class Row(NamedTuple):
    """One line of the table; of the plain side `seconds` and `cpu` are for all conversations."""

    side: str
    processes: int
    run: Run
    conversations: int
    tokens: int
    label_tokens: int
    disk_bytes: int
    fingerprint: str = ""


def main() -> int:
    """Measure both sides and print the ratios."""
    args = arguments().parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    sizes = [args.conversations]
    if args.skip_plain:
        sizes.insert(0, args.conversations // 10)
    files = {size: conversations_file(args.workdir, size, args.seed) for size in sizes}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"{versions()}")  # fmt: skip
    conclusions = []
    measure(
        ["-c", "import datasets, transformers"], scratch=args.workdir / "cache"
    )  # warms the disk
    for template in args.templates:
        tokenizer = tokenizer_folder(args, template, files[sizes[-1]])
        conclusions += compare(args, template, tokenizer, files)
    print("\n".join(["", *conclusions]))
    print(f"whole run: {time.perf_counter() - began:.0f} s")
    return 0


def compare(
    args: argparse.Namespace, template: str, tokenizer: Path, files: dict[int, Path]
) -> list[str]:
    """Measure every pipeline with one template, print a table, return its conclusions."""
    print(f"\n{TITLES[template]}; x is the plain pipeline's time over this one's")
    print("| pipeline | processes | wall s | x wall | CPU s | x CPU | peak MiB | conversations "
          "| tokens | trained | bytes/token |")  # fmt: skip
    print("|" + "---|" * 11)
    conclusions, fingerprints = [], set()
    for processes in args.processes:
        who = f"{TITLES[template]}, {processes} process{'es' if processes > 1 else ''}"
        plain = None if args.skip_plain else measured_plain(args, tokenizer, files, processes)
        if plain:
            print(line(plain, plain), flush=True)
        for render in args.renders:
            rows = [measured_build(args, tokenizer, f, processes, render) for f in files.values()]
            made = [row for row in rows if row]
            fingerprints |= {row.fingerprint for row in made[-1:]}
            print("\n".join(line(row, plain) for row in made), flush=True)
            conclusions.append(f"{who}, {render}: {conclusion(made, plain)}")
    print(f"different stores made of the same conversations: {len(fingerprints)} (1 is right)")
    if not args.skip_plain:
        print(agreement(args, tokenizer, next(iter(files.values()))))
    return conclusions


def conclusion(rows: list[Row], plain: Row | None) -> str:
    """Return what the runs of one pipeline show."""
    if not rows:
        return "this build has no --render"
    if plain:
        wall, cpu = (a / b for a, b in zip(plain.run[:2], rows[-1].run[:2], strict=True))
        return f"{wall:.1f} x the plain pipeline ({cpu:.1f} x by CPU time)"
    few, many = (row.run.peak_mib for row in rows)
    return (
        f"peak {few:,.0f} MiB at {rows[0].conversations:,} conversations, {many:,.0f} MiB at "
        f"{rows[1].conversations:,}: {many / few:.2f} x"
    )


def line(row: Row, plain: Row | None) -> str:
    """Return one line of the table."""
    wall = f"{plain.run.seconds / row.run.seconds:.1f}" if plain else ""
    cpu = f"{plain.run.cpu / row.run.cpu:.1f}" if plain else ""
    return (
        f"| {row.side} | {row.processes} | {row.run.seconds:.2f} | {wall} | {row.run.cpu:.2f} "
        f"| {cpu} | {row.run.peak_mib:,.0f} | {row.conversations:,} | {row.tokens:,} "
        f"| {row.label_tokens:,} | {row.disk_bytes / row.tokens:.2f} |"
    )


def measured_plain(
    args: argparse.Namespace, tokenizer: Path, files: dict[int, Path], processes: int
) -> Row:
    """Measure the plain pipeline on a subset, and scale its time up."""
    ((total, file),) = files.items()
    subset, output = args.workdir / "subset.jsonl", args.workdir / "plain"
    size = min(args.plain_conversations, total)
    with file.open("rb") as source:
        subset.write_bytes(b"".join(next(source) for _ in range(size)))
    arrow = args.workdir / "cache"
    clear(output, arrow)
    command: list[Any] = [PLAIN, subset, output, tokenizer]
    run = measure([*command, "--processes", processes, "--masks", args.plain_masks], scratch=arrow)
    reports = (x for x in (args.workdir / LOG).read_text().splitlines() if x.startswith("{"))
    startup = orjson.loads(next(reports))
    seconds = startup["seconds"] + (run.seconds - startup["seconds"]) * total / size
    cpu = startup["cpu"] + (run.cpu - startup["cpu"]) * total / size
    tokens, label_tokens = map(
        sum, zip(*((len(i), n) for i, n in plain_masks(output)), strict=True)
    )
    side = f"plain, {args.plain_masks}" + (f"; time x {total / size:g}" if size < total else "")
    run = Run(seconds, cpu, run.peak_mib)
    return Row(side, processes, run, size, tokens, label_tokens, size_of(output))


def measured_build(
    args: argparse.Namespace, tokenizer: Path, file: Path, processes: int, render: str
) -> Row | None:
    """Measure `megasft build`; None when it cannot render that way."""
    from megasft.store import open_store

    output = args.workdir / "store"
    command: list[Any] = ["-m", "megasft.cli.main", "build", "--input", file, "--overwrite"]
    command += ["--tokenizer", tokenizer, "--output", output, "--workers", str(processes)]
    if render != "compiled":
        if not has_render_flag():
            return None
        command += ["--render", render]
    clear(output)
    run = measure(command, scratch=args.workdir / "cache")
    store = open_store(output)
    counts = store.meta["counts"]
    numbers = (counts["conversations"], counts["tokens"], counts["label_tokens"], size_of(output))
    return Row(f"megasft, {render}", processes, run, *numbers, store.fingerprint)


@cache
def has_render_flag() -> bool:
    """Say if `megasft build` can be told how to render."""
    command = [sys.executable, "-m", "megasft.cli.main", "build", "--help"]
    environment = environment_of(None) | {"COLUMNS": "200", "NO_COLOR": "1"}
    return b"--render" in subprocess.run(command, capture_output=True, env=environment).stdout


def measure(command: Sequence[Any], *, scratch: Path) -> Run:
    """Run a Python command and watch its process tree.

    Raises:
        SystemExit: It failed.
    """
    log = scratch.with_name(LOG)
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_of(scratch),
        )
        tree, peak = psutil.Process(process.pid), 0
        while True:
            # Not Popen.poll: only wait4 knows the time of this child and its children alone.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, memory(tree))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-3000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak / MIB)


def memory(tree: psutil.Process) -> int:
    """Return the proportional set size of a process and all below it, in bytes."""
    total = 0
    try:
        for process in (tree, *tree.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one of them just ended
        pass
    return total


def environment_of(scratch: Path | None) -> dict[str, str]:
    """Return the environment of a measured process: as many threads as it has processes."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
    ours |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | ({"HF_DATASETS_CACHE": str(scratch)} if scratch else {})


def plain_masks(output: Path) -> Iterator[tuple[list[int], int]]:
    """Yield ids and the number of labels of each conversation of the plain side."""
    import datasets

    for item in datasets.load_from_disk(str(output)):
        yield item["input_ids"], len(item["labels"]) - item["labels"].count(-100)


def agreement(args: argparse.Namespace, tokenizer: Path, file: Path) -> str:
    """Compare both sides conversation by conversation, and say why masks differ."""
    import datasets
    from transformers import AutoTokenizer

    from megasft.store import open_store

    hf = AutoTokenizer.from_pretrained(tokenizer)
    store = open_store(args.workdir / "store")
    sample_of = {int(number): index for index, (_, number) in enumerate(store.lineage)}
    plain = datasets.load_from_disk(str(args.workdir / "plain"))
    checked, same_ids, same, only_blanks, rewritten = 0, 0, 0, 0, 0
    with file.open("rb") as source:
        for number, record in zip(range(1, args.check + 1), source, strict=False):
            if number not in sample_of or number > len(plain):
                continue
            tokens, turns = store.sample(sample_of[number])
            item, checked = plain[number - 1], checked + 1
            same_ids += tokens.tolist() == item["input_ids"]
            ours = {i for start, count, *_ in turns.tolist() for i in range(start, start + count)}
            theirs = {i for i, label in enumerate(item["labels"]) if label != -100}
            blank = all(not hf.decode([item["input_ids"][i]]).strip() for i in ours ^ theirs)
            same += ours == theirs
            only_blanks += ours != theirs and blank
            rewritten += ours != theirs and not blank and rewrites(hf, orjson.loads(record))
    others = checked - same - only_blanks - rewritten
    return (
        f"ids equal on {same_ids} of {checked} conversations; masks equal on {same}. They differ "
        f"on {only_blanks} only in white space (prefixes train the line end behind the stop), "
        f"on {rewritten} because a prefix renders differently from the whole (the template strips "
        f"thinking, so prefix masks are wrong), on {others} for other reasons"
    )


def rewrites(tokenizer: Any, record: dict[str, Any]) -> bool:
    """Say if a prefix of a conversation renders differently from the whole."""
    messages = record["messages"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ends = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    return not all(
        whole.startswith("".join(prompt_and_answer(tokenizer, messages, i))) for i in ends
    )


def tokenizer_folder(args: argparse.Namespace, template: str, file: Path) -> Path:
    """Return a tokenizer with a chat template, made once."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    base = args.tokenizer or args.workdir / f"bpe-{args.vocab_size}"
    if not base.exists():
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        bpe = trained_bpe(texts(file, count=2500), args.vocab_size, special)
        hf = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=special[2], pad_token=special[0],
            extra_special_tokens=special[1:2],
        )  # fmt: skip
        hf.save_pretrained(base)
    if template == "own":
        return Path(base)
    hf = AutoTokenizer.from_pretrained(base)
    folder = REPOSITORY / "tests" / "unit" / "data" / "chat_templates"
    hf.chat_template = (
        CHATML if template == "chatml" else (folder / f"{template}.jinja").read_text()
    )
    made = args.workdir / f"tokenizer-{template}"
    clear(made)
    hf.save_pretrained(made)
    return Path(made)


def clear(*folders: Path) -> None:
    """Remove what an earlier run left."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def versions() -> str:
    """Return the releases of what is measured."""
    from importlib.metadata import version

    names = ("datasets", "transformers", "tokenizers")
    return ", ".join(f"{name} {version(name)}" for name in names)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--plain-conversations", type=int, default=2_000, help="subset it runs on")
    parser.add_argument("--plain-masks", default="prefixes", choices=["prefixes", "offsets"])
    parser.add_argument("--skip-plain", action="store_true", help="memory at a tenth and at all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--renders", nargs="+", default=["compiled", "jinja"])
    parser.add_argument("--templates", nargs="+", default=["chatml", "qwen3"], choices=TITLES)
    parser.add_argument("--tokenizer", type=Path, help="folder; default: a BPE trained here")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--check", type=int, default=300, help="conversations compared")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workdir", type=Path, help="keeps conversations and tokenizer",
                        default=Path(tempfile.gettempdir()) / "megasft-bench-data")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
