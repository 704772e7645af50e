"""What a user reads of a wrong run through the real entry point, before anything is started."""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from megasft import compat, pretrain_sft
from megasft.checks.engine import Severity
from megasft.checks.run import machine, rows
from megasft.checks.run.run import RULES
from megasft.checks.run.subject import Gpu, Subject, Wishes
from megasft.errors import FlagError
from megasft.run import start
from megasft.training import arguments
from tests.other_writer import other_writer
from tests.unit.checks.run.conftest import MODEL_FLAGS, World
from tests.unit.saved_run import save_run

pytestmark = pytest.mark.slow  # imports the real Megatron


@pytest.fixture(scope="module", autouse=True)
def trained(run_world: World) -> None:
    """Add checkpoints of other rows and of the same: what Megatron keeps beside tensors."""
    run_world.resumable = save_run(
        run_world.folder / "resumable", run_world.flags(), iteration=10, consumed=40
    )
    run_world.trained = run_world.folder / "trained"
    iteration = run_world.trained / "iter_0000010"
    iteration.mkdir(parents=True)
    plan = (
        "plan version 1, balanced, store another, 9 samples, row_tokens 96, align_tokens 8, seed 1"
    )
    saved = Namespace(megasft_plan=plan, no_save_optim=False, use_distributed_optimizer=False)
    torch.save({"args": saved, "iteration": 10}, iteration / "common.pt")
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(
        json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1})
    )
    (run_world.trained / "latest_checkpointed_iteration.txt").write_text("10")


class StartedError(Exception):
    """Raised where Megatron would start process groups and build the model."""


@pytest.fixture(autouse=True)
def stop_before_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretrain_sft.cpu.prepare()
    import megatron.training

    def begin_training(*_: Any, **__: Any) -> NoReturn:
        raise StartedError

    monkeypatch.setattr(megatron.training, "pretrain", begin_training)
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
    said = capsys.readouterr().err
    assert said.count("error: ") == 1, said
    return said.partition("error: ")[2].removesuffix("\n")


class Wrong(NamedTuple):
    """A run that does not start.

    Attributes:
        changes: Of the flags of one that does.
        message: The one message, a regular expression.
        rules: What finds it; none where flags cannot be parsed.
        world_size: Ranks.
        machine: What is changed of the machine.
    """

    changes: dict[str, object]
    message: str
    rules: tuple[str, ...] = ()
    world_size: int = 1
    machine: dict[str, Any] = {}  # noqa: RUF012


EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 64}
HOPPERS = {"gpus": (Gpu("H200", 141 * 10**9, (9, 0)),) * 2}

WRONG: dict[str, Wrong] = {
    "wrong tokenizer": Wrong(
        {"megasft_data": "{other}", "megasft_valid_data": None},
        r"another tokenizer than .*megatron has \(2 of 512 ids differ; id 300 is .*; build the",
        ("tokenizer",),
    ),
    "another tokenizer for validation": Wrong(
        {"megasft_valid_data": "{other}"},
        r"other was made with another tokenizer than .*megatron has .*so its ids are other tokens",
        ("tokenizer",),
    ),
    "another tokenizer for validation, and no model": Wrong(
        {
            "megasft_hf": None,
            "megasft_valid_data": "{other}",
            **{flag[2:].replace("-", "_"): value for flag, value in MODEL_FLAGS.items()},
        },
        r"validation store other .* was made with another tokenizer than .*store, so its loss",
        ("validation-tokenizer",),
    ),
    "heads": Wrong(
        {"tensor_model_parallel_size": 4},
        "4 does not divide 6 attention heads; use one",
        ("heads",),
        world_size=4,
    ),
    "head groups": Wrong(
        {"group_query_attention": "", "num_query_groups": 4},
        "4 query groups do not divide 6 attention heads; mend --num-query-groups",
        ("head-groups",),
    ),
    "widths": Wrong(
        {"tensor_model_parallel_size": 2, "ffn_hidden_size": 191},
        "tensor parallelism of 2 does not divide --ffn-hidden-size 191; use one of 1",
        ("widths",),
        world_size=2,
    ),
    "short rows under CP": Wrong(
        {"context_parallel_size": 32, "seq_length": 64},
        "a row of 64 tokens holds one document at most: --context-parallel-size 32 pads each",
        ("row-of-one",),
        world_size=32,
    ),
    "missing flag": Wrong(
        {"calculate_per_token_loss": None}, "mean would not be global; add the f", ("refused-flag",)
    ),
    "best without validation": Wrong(
        {"megasft_valid_data": None, "megasft_best": "all"},
        "--megasft-best goes by a validation loss; add --megasft-valid-data STORE",
        ("refused-flag",),
    ),
    "saving beside CPU ranks": Wrong(
        {"async_save": ""}, "--async-save: Megatron 0.19's writer process asks", ("refused-flag",)
    ),
    "missing micro-batch": Wrong(
        {"micro_batch_size": None}, "--micro-batch-size N is missing", ("missing-flag",)
    ),
    "missing rate": Wrong({"lr": None}, "--lr is missing; add it", ("missing-flag",)),
    "missing length": Wrong(
        {"train_iters": None}, "--train-iters is missing; an epoch of", ("megatron-refuses",)
    ),
    "two lengths": Wrong(
        {"megasft_epochs": 2}, "--megasft-epochs and --train-iters exclude each other", ("length",)
    ),
    "no interval": Wrong(
        {"save_interval": None}, "without --save-interval: Megatron needs both", ("missing-flag",)
    ),
    "size below one": Wrong(
        {"global_batch_size": 0}, "--global-batch-size is 0; the least is 1", ("size-not-positive",)
    ),
    "global batch": Wrong(
        {"global_batch_size": 6},
        r"--global-batch-size 6 is no multiple of 4 = --micro-batch-size 1 x 4 data-.*; use 8",
        ("global-batch",),
        world_size=4,
    ),
    "unknown flag": Wrong(
        {"sequence_length": 96},
        "--sequence-length is no flag of Megatron or megasft; the nearest is --seq-length",
    ),
    "underscores": Wrong({"x": None, "eval__interval": 3}, "the nearest is --eval-interval"),
    "no number": Wrong({"seq_length": "96k"}, "argument --seq-length: invalid int value: '96k'"),
    "newer store": Wrong(
        {"megasft_data": "{newer}"},
        "built by a newer megasft: format version 99, this one reads 2; update megasft",
        ("store",),
    ),
    "half-written store": Wrong(
        {"megasft_data": "{half}"}, "half-written: its build did not finish", ("store",)
    ),
    "no store": Wrong({"megasft_data": "{folder}/nowhere"}, "is not a token store", ("store",)),
    "vocabulary": Wrong(
        {"tensor_model_parallel_size": 3},
        "size 3 does not divide the vocabulary of 512",
        ("rows",),
        world_size=3,
    ),
    "world size": Wrong(
        {"tensor_model_parallel_size": 2},
        r"world size of 3 ranks is no multiple of 2 = TP 2 x PP 1 x CP 1, .*; start 4 ranks",
        ("world-size",),
        world_size=3,
    ),
    "row length": Wrong(
        {"seq_length": 100}, "--seq-length 100 is not a multiple of 8, .*set it to 1", ("rows",)
    ),
    "layers": Wrong(
        {"pipeline_model_parallel_size": 3},
        "3 does not divide 4 layers; use one of 1,",
        ("layers",),
        world_size=3,
    ),
    "positions": Wrong(
        {"seq_length": 8192},
        "8192 is above --max-position-embeddings 4096",
        ("row-over-positions",),
    ),
    "experts": Wrong(
        {"expert_model_parallel_size": 2},
        "2, and the model has no experts; drop the",
        ("experts",),
        world_size=2,
    ),
    "ranks of the experts": Wrong(
        {**EXPERTS, "expert_model_parallel_size": 2, "global_batch_size": 6},
        "world size of 3 ranks is no multiple of 2 = EP 2 x ETP 1 x PP 1, the ranks of one copy",
        ("expert-world-size",),
        world_size=3,
    ),
    "experts under TP": Wrong(
        {**EXPERTS, "tensor_model_parallel_size": 2},
        "experts with --tensor-model-parallel-size 2 and without --sequence-parallel, which Megat",
        ("moe-sequence-parallel",),
        world_size=2,
    ),
    "rate below its end": Wrong(
        {"min_lr": 1}, "--min-lr 1 is above --lr 0.001; swap them", ("contradicting-flags",)
    ),
    "attention": Wrong(
        {"attention_dropout": 0.1},
        "megasft attention does not compute --attention-dropout above 0; drop the flag, or use",
        ("attention-refuses",),
    ),
    "heads to exchange": Wrong(
        {
            "transformer_impl": "transformer_engine",
            "cp_comm_type": "a2a",
            "context_parallel_size": 4,
        },
        "deals the 6 key heads of a rank to 4 context-parallel ranks, which does not come out even",
        ("refused-flag", "heads-to-exchange"),
        world_size=4,
    ),
    "only Megatron knows": Wrong(
        {"save_retain_interval": 15},
        r"Megatron refuses these flags: AssertionError at .assert args.save_retain_interval %",
        ("megatron-refuses",),
    ),
    "other rows": Wrong(
        {"load": "{trained}"},
        r"was trained on other rows \(checkpoint: store another, this run: store ",
        ("resume",),
    ),
    "another rate on resume": Wrong(
        {"load": "{resumable}", "lr": 2e-3},
        r"refuse the learning-rate schedule: .*0.002 and checkpointvalue 0.001 .*; "
        "--use-checkpoint-opt-param-scheduler keeps the schedule of the checkpoint, "
        "--override-opt-param-scheduler takes that of the flags",
        ("resume-refused",),
    ),
    "nowhere to save": Wrong(
        {"save": "{store}/store.json/run"},
        r"store.json/run cannot be a folder: .*store.json is a file; choose another folder",
        ("save-not-writable",),
    ),
    "full disk": Wrong(
        {},
        "a checkpoint takes .* free space, choose another folder",
        ("disk-full",),
        machine={"free": 5},
    ),
    "32 bits": Wrong(
        {},
        "and Megatron counts them in 32 bits",
        ("units-int32",),
        machine={"int32": 8},
    ),
    "one queue": Wrong(
        {"tensor_model_parallel_size": 2},
        "CUDA_DEVICE_MAX_CONNECTIONS is not set, and Megatron needs 1",
        ("cuda-connections",),
        world_size=2,
        machine=HOPPERS,
    ),
    "more ranks than GPUs": Wrong(
        {}, "4 ranks are started on this machine, which has 2 GPUs", ("too-many-ranks",), 4, HOPPERS
    ),
    "another Megatron": Wrong(
        {},
        "does not work with megatron-core 0.17.1; run: pip",
        ("megatron-version",),
        machine={"megatron": "0.17.1"},
    ),
}


def change_machine(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what the machine says of itself."""
    monkeypatch.setenv("WORLD_SIZE", str(wrong.world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(wrong.world_size))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if "gpus" in wrong.machine:
        seen = replace(machine.look(), gpus=wrong.machine["gpus"])
        monkeypatch.setattr(machine, "look", lambda: seen)
    if "free" in wrong.machine:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 4, 5))
    if "int32" in wrong.machine:
        monkeypatch.setattr(rows, "INT32", wrong.machine["int32"])
    if "megatron" in wrong.machine:
        monkeypatch.setattr(compat.metadata, "version", lambda _: wrong.machine["megatron"])


@pytest.mark.parametrize("case", WRONG)
def test_doctor_and_training_refuse_a_wrong_run_in_the_same_words_before_anything_starts(
    case: str,
    run_world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = WRONG[case]
    change_machine(wrong, monkeypatch)
    paths = vars(run_world)
    named = {k: v.format(**paths) if isinstance(v, str) else v for k, v in wrong.changes.items()}
    flags = run_world.flags(**named)

    said = said_by(flags, capsys)

    assert re.search(wrong.message, said), said
    if not wrong.rules:
        with pytest.raises(FlagError) as refused:
            arguments.parse(flags)
        assert str(refused.value) == said.strip()
        return
    doctor = start.examine(Subject(machine.look(), Wishes(), arguments.parse(flags)))
    errors = doctor.of(Severity.ERROR)
    assert tuple(error.rule for error in errors) == wrong.rules
    listed = [re.sub(r"^  \d+\. ", "", line) for line in said.splitlines()]
    assert [error.message for error in errors] == listed[len(errors) > 1 :]


def test_every_rule_that_stops_a_run_has_a_run_that_it_stops() -> None:
    stopping = {name for name, rule in RULES.items() if rule.severity is Severity.ERROR}
    assert {rule for wrong in WRONG.values() for rule in wrong.rules} == stopping


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
