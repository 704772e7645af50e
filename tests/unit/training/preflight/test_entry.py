"""What a user reads of a wrong run through the real entry point, before anything is started."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from megasft import pretrain_sft
from tests.other_writer import other_writer
from tests.unit.training.preflight.conftest import World

pytestmark = pytest.mark.slow  # imports the real Megatron


class StartedError(Exception):
    """Raised where Megatron would start process groups and build the model."""


@pytest.fixture(autouse=True)
def stop_before_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretrain_sft.cpu.prepare()
    import megatron.training

    def start(*_: Any, **__: Any) -> NoReturn:
        raise StartedError

    monkeypatch.setattr(megatron.training, "pretrain", start)
    monkeypatch.setenv("RANK", "0")
    yield
    unset_globals()


def unset_globals() -> None:
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    unset_num_microbatches_calculator()


def said_by(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the entry point with flags that are wrong, and return its message."""
    assert pretrain_sft.main(flags) == 1
    assert not torch.distributed.is_initialized()
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    return errors[0].partition("error: ")[2]


# What is changed of a good run, on how many ranks, and the one message.
WRONG: dict[str, tuple[dict[str, object], int, str]] = {
    "wrong tokenizer": (
        {"megasft_data": "{other}", "megasft_valid_data": None},
        1,
        r"another tokenizer than .*megatron has \(2 of 512 ids differ; id 300 is .*; build the",
    ),
    "another tokenizer for validation": (
        {"megasft_valid_data": "{other}"},
        1,
        r"other was made with another tokenizer than .*megatron has .*so its ids are other tokens",
    ),
    "heads": ({"tensor_model_parallel_size": 4}, 4, "4 does not divide 6 attention heads; use one"),
    "short rows under CP": (
        {"context_parallel_size": 32, "seq_length": 64},
        32,
        "a row of 64 tokens holds one document at most: --context-parallel-size 32 pads each",
    ),
    "missing flag": ({"calculate_per_token_loss": None}, 1, "mean would not be global; add the f"),
    "missing micro-batch": ({"micro_batch_size": None}, 1, "--micro-batch-size N is missing"),
    "missing rate": ({"lr": None}, 1, "--lr is missing; add it"),
    "missing length": ({"train_iters": None}, 1, "--train-iters is missing; an epoch of"),
    "no interval": ({"save_interval": None}, 1, "without --save-interval: Megatron needs both"),
    "global batch": (
        {"global_batch_size": 6},
        4,
        r"--global-batch-size 6 is no multiple of 4 = --micro-batch-size 1 x 4 data-.*; use 8",
    ),
    "unknown flag": (
        {"sequence_length": 96},
        1,
        "--sequence-length is no flag of Megatron or megasft; the nearest is --seq-length",
    ),
    "underscores": ({"x": None, "eval__interval": 3}, 1, "the nearest is --eval-interval"),
    "no number": ({"seq_length": "96k"}, 1, "argument --seq-length: invalid int value: '96k'"),
    "newer store": (
        {"megasft_data": "{newer}"},
        1,
        "built by a newer megasft: format version 99, this one reads 2; update megasft",
    ),
    "half-written store": ({"megasft_data": "{half}"}, 1, "half-written: its build did not finish"),
    "no store": ({"megasft_data": "{folder}/nowhere"}, 1, "is not a token store"),
    "vocabulary": (
        {"tensor_model_parallel_size": 3},
        3,
        "size 3 does not divide the vocabulary of 512",
    ),
    "world size": (
        {"tensor_model_parallel_size": 2},
        3,
        r"world size of 3 ranks is no multiple of 2 = TP 2 x PP 1 x CP 1, .*; start 4 ranks",
    ),
    "row length": (
        {"seq_length": 100},
        1,
        "--seq-length 100 is not a multiple of 8, .*set it to 1",
    ),
    "layers": ({"pipeline_model_parallel_size": 3}, 3, "3 does not divide 4 layers; use one of 1,"),
    "positions": ({"seq_length": 8192}, 1, "8192 is above --max-position-embeddings 4096"),
    "experts": ({"expert_model_parallel_size": 2}, 2, "2, and the model has no experts; drop the"),
    "rate below its end": ({"min_lr": 1}, 1, "--min-lr 1 is above --lr 0.001; swap them"),
    "attention": ({"qk_clip": ""}, 1, "qk-clip"),
    "only Megatron knows": (
        {"save_retain_interval": 15},
        1,
        r"Megatron refuses these flags: AssertionError at .assert args.save_retain_interval %",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_run_ends_in_one_clear_error_before_anything_starts(
    case: str,
    run_world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, world_size, message = WRONG[case]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    paths = vars(run_world)
    named = {k: v.format(**paths) if isinstance(v, str) else v for k, v in changes.items()}

    said = said_by(run_world.flags(**named), capsys)

    assert re.search(message, said), said


def test_a_good_run_starts_and_is_told_nothing(
    run_world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = run_world.flags(tensor_model_parallel_size=2, megasft_valid_data=None)

    with pytest.raises(StartedError):
        pretrain_sft.main(flags)

    lines = capsys.readouterr().err.splitlines()
    assert any("[megasft] train: " in line for line in lines)
    assert not [line for line in lines if "remedy" in line or "error" in line]


def test_all_errors_are_shown_at_once_and_warnings_beside_them(
    run_world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    wrong = {"tensor_model_parallel_size": 4, "megasft_data": run_world.newer, "lr": None}

    assert pretrain_sft.main(run_world.flags(**wrong, hidden_dropout=0.1)) == 1

    said = capsys.readouterr().err
    assert "error: 4 things are wrong with this run:" in said
    for part in ("1. --lr is missing", "world size of 6", "6 attention heads", "newer megasft"):
        assert part in said
    assert said.count("--hidden-dropout 0.1: pretrained models") == 1


def test_resuming_on_another_store_is_refused_before_anything_starts(
    run_world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The checkpoint is what Megatron keeps beside the tensors: the flags it was saved with."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    iteration = tmp_path / "iter_0000010"
    iteration.mkdir()
    plan = (
        "plan version 1, balanced, store another, 9 samples, row_tokens 96, align_tokens 8, seed 1"
    )
    saved = Namespace(megasft_plan=plan, no_save_optim=False, use_distributed_optimizer=False)
    torch.save({"args": saved, "iteration": 10}, iteration / "common.pt")
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(
        json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1})
    )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")

    said = said_by(run_world.flags(load=tmp_path), capsys)

    assert "was trained on other rows (checkpoint: store another, this run: store " in said


def test_a_second_run_with_the_same_save_is_refused_while_the_first_one_writes(
    run_world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = run_world.flags(save=tmp_path / "ckpt", save_interval=5)
    with other_writer(tmp_path / "ckpt") as first:
        said = said_by(flags, capsys)
    assert f"ckpt is being written by process {first.pid} on " in said
    unset_globals()
    with pytest.raises(StartedError):
        pretrain_sft.main(flags)
    assert f"process {first.pid} on " in capsys.readouterr().err, "it is taken over"
