"""`megasft train` teaches, lists, prints a run, and turns a fault into one message."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasft.training import arguments
from tests.unit.cli.conftest import Seen
from tests.unit.launch.conftest import MODEL_FLAGS, RUN_YAML


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / arguments.MODEL_FILE).write_text(
        json.dumps({"flags": list(MODEL_FLAGS)})
    )
    path = tmp_path / "run.yaml"
    path.write_text(RUN_YAML)
    return Path("run.yaml")


def test_a_dry_run_prints_a_command_that_megatron_accepts_and_starts_nothing(
    megasft: Callable[..., Seen], run_yaml: Path
) -> None:
    before = sorted(Path().rglob("*"))

    seen = megasft("train", run_yaml, "optim.lr=2e-3", "--dry-run")

    assert seen.code == 0 and sorted(Path().rglob("*")) == before
    assert "# optim:\n#   train_iters: 4\n#   lr: 0.002\n" in seen.out
    words = shlex.split(seen.out.replace("\\\n", ""), comments=True)
    args: Any = arguments.parse(words[words.index("megasft.pretrain_sft") + 1 :])
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


def test_keys_are_found_by_a_part_of_their_name(megasft: Callable[..., Seen]) -> None:
    seen = megasft("train", "--keys", "warmup-frac")
    assert seen.out.startswith("lr_warmup_fraction  float\n    ")

    assert megasft("train", "--keys", "no-such-key").code == 1


def test_help_shows_a_whole_file(megasft: Callable[..., Seen]) -> None:
    seen = megasft("train", "--help")
    assert "loss: {objective: turn}" in seen.out and "--dry-run" in seen.out
    assert megasft("train").code == 1
