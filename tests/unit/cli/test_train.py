"""`megasft train` teaches, lists, prints a run, and turns a fault into one message."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasft.files import MODEL_FILE
from megasft.training import arguments
from tests.unit.checks.run.conftest import World
from tests.unit.cli.conftest import Seen
from tests.unit.launch.conftest import RUN_YAML, write_hf


@pytest.fixture
def run_yaml(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a run that starts, with stores and a Hugging Face folder beside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("store", "other", "newer"):
        (tmp_path / name).symlink_to(getattr(world, name))
    write_hf(tmp_path / "hf", world.tokenizer)
    (tmp_path / "file").touch()
    path = Path("run.yaml")
    path.write_text(RUN_YAML.replace("hf: converted", "hf: hf"))
    return path


def beside() -> list[Path]:
    """Return all there is in the current directory; rows that were planned are the store's."""
    return sorted(Path().rglob("*"))


def test_a_dry_run_prints_a_command_that_megatron_accepts_and_starts_nothing(
    megasft: Callable[..., Seen], run_yaml: Path
) -> None:
    before = beside()

    seen = megasft("train", run_yaml, "optim.lr=2e-3", "--dry-run")

    assert seen.code == 0 and beside() == before
    assert "# optim:\n#   train_iters: 4\n#   lr: 0.002\n" in seen.out
    words = shlex.split(seen.out.replace("\\\n", ""), comments=True)
    argv = words[words.index("megasft.pretrain_sft") + 1 :]
    model = Path(argv[argv.index("--megasft-hf") + 1])
    model.mkdir(parents=True)
    (model / MODEL_FILE).write_text(json.dumps({"flags": ["--hidden-size", "64"]}))
    args: Any = arguments.parse(argv)
    assert (args.lr, args.seq_length, args.hidden_size) == (2e-3, 96, 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr_decay_stile=cosine", "did you mean optim.lr_decay_style?"),
        ("optim.lr=fast", "override optim.lr=fast: optim.lr: invalid float value: 'fast' (--lr)"),
        ("launch.backend=cloud", "there are: local, torchrun, slurm, ray, print"),
    ],
)
def test_a_fault_is_one_message_and_exit_code_1(
    megasft: Callable[..., Seen], run_yaml: Path, override: str, message: str
) -> None:
    seen = megasft("train", run_yaml, override, "--dry-run")

    assert seen.code == 1 and message in seen.err and "Traceback" not in seen.err
    assert seen.out == ""


WRONG = {
    "store": ("store: [store]", "newer", "newer was built by a newer megasft: format version 99"),
    "no store": ("store: [store]", "[absent]", "absent is not a token store (no store.json)"),
    "tokenizer": ("store: [store]", "[other]", "other was made with another tokenizer than hf has"),
    "heads": ("tensor_model_parallel_size: 1", "8", "size 8 does not divide 4 attention heads"),
    "world size": ("nproc_per_node: 2", "3", "the world size of 3 ranks is no multiple of 2 = TP"),
    "batch": ("micro-batch-size: 1", "3", "--global-batch-size 8 is no multiple of 3 = --micro"),
    "no batch": ("global_batch_size: 8", "0", "--global-batch-size is 0"),
    "steps": ("train_iters: 4", "0", "--train-iters is 0"),
    "fewer": ("train_iters: 4", "-1", "--train-iters is -1"),
    "row length": ("seq_length: 96", "1024", "--seq-length 1024 is above --max-position-embedd"),
    "save folder": ("save: ckpt/run", "file/run", "--save file/run cannot be a folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_run_is_refused_by_all_commands_alike_before_it_is_converted(
    megasft: Callable[..., Seen], run_yaml: Path, case: str
) -> None:
    line, value, fact = WRONG[case]
    key = line.partition(":")[0]
    section = "parallel: {tensor_model_parallel_size: 1, context_parallel_size: 2}\n"
    text = run_yaml.read_text() + section
    assert text.count(line) == 1
    run_yaml.write_text(text.replace(line, f"{key}: {value}"))
    number = next(n for n, of in enumerate(text.splitlines(), 1) if line in of)
    before = beside()

    words = [
        " ".join((seen.out if command == "doctor" else seen.err).split())
        for command, *options in (["doctor"], ["train", "--dry-run"], ["train"])
        if (seen := megasft(command, run_yaml, *options)).code == 1
    ]

    assert len(words) == 3 and beside() == before
    place = rf"run\.yaml:{number} \w+\.{key.replace('-', '_')}\b"
    for said in words:
        assert re.search(rf"{re.escape(fact)}.*? \([^()]*{place}", said), said


def test_keys_are_found_by_a_part_of_their_name(megasft: Callable[..., Seen]) -> None:
    seen = megasft("train", "--keys", "warmup-frac")
    assert seen.out.startswith("lr_warmup_fraction  float\n    ")

    assert megasft("train", "--keys", "no-such-key").code == 1


def test_help_shows_a_whole_file(megasft: Callable[..., Seen]) -> None:
    seen = megasft("train", "--help")
    assert "loss: {objective: turn}" in seen.out and "--dry-run" in seen.out
    assert megasft("train").code == 1
