"""Rules over flags and rows that need neither Megatron nor stores."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megasft.checks.engine import Finding
from megasft.checks.run import attention, checkpoints, flags, parallel, rows
from megasft.checks.run.machine import GIB
from megasft.checks.run.subject import Gpu, Subject

GOOD: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads"), 8),
    **dict.fromkeys(("tensor_model_parallel_size", "context_parallel_size"), 1),
    **dict.fromkeys(("expert_model_parallel_size", "micro_batch_size"), 1),
    **dict.fromkeys(("fp16", "skip_train", "sequence_parallel", "group_query_attention"), False),
    **dict.fromkeys(("megasft_save_epochs", "loss_scale", "recompute_granularity"), None),
    **dict.fromkeys(("recompute_method", "megasft_hf", "load", "num_experts"), None),
    **dict.fromkeys(("train_samples", "lr_warmup_fraction", "window_size"), None),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "min_lr"), 0.0),
    **dict.fromkeys(("lr_warmup_iters", "lr_warmup_samples"), 0),
    "max_position_embeddings": 4096,
    "position_embedding_type": "rope",
    "seq_length": 4096,
    "global_batch_size": 8,
    "train_iters": 100,
    "lr": 1e-5,
    "save": "run",
    "save_interval": 10,
    "bf16": True,
    "clip_grad": 1.0,
    "initial_loss_scale": 2**32,
    "pretrained_checkpoint": "ckpt",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_dtype": "fp32",
    "moe_aux_loss_coeff": 0.01,
    "moe_router_enable_expert_bias": False,
    "transformer_impl": "local",
    "megasft_attention": "auto",
    "megasft_loss": "token",
    "cp_comm_type": ["p2p"],
    "padded_vocab_size": 32_000,
    "kv_channels": 128,
    "multi_latent_attention": False,
    "num_query_groups": 1,
}
H100 = Gpu("NVIDIA H100", 80 * GIB, (9, 0))


def run_of(**changes: Any) -> Subject:
    args = SimpleNamespace(**(GOOD | changes))
    labels = np.array([1000, 3000])
    counts = {"labels": labels, "turns": labels // 100, "labelled_samples": labels // 500}
    plan = SimpleNamespace(**counts, epoch_rows=400.0)
    data = SimpleNamespace(train=SimpleNamespace(plan=plan))
    machine = SimpleNamespace(gpus=(H100,))
    return cast(Subject, SimpleNamespace(args=args, settled=args, data=data, machine=machine))


RULES = (
    *(flags.missing, flags.contradicting, flags.dropout, flags.loss_scale, flags.random_weights),
    *(flags.no_clipping, parallel.row_over_positions, rows.too_many_units),
    *(rows.too_many_logits, parallel.needs_sequence_parallel, parallel.gathers_everything),
    *(parallel.half_precision_router, parallel.no_balancing, attention.slow_kernel),
    *(parallel.heads_to_exchange, attention.quadratic_memory, checkpoints.not_saved),
    *(rows.many_epochs, parallel.row_of_one, rows.short_shares, rows.whole_rows_together),
)


def fired(subject: Subject) -> list[Finding]:
    return [hit for rule in RULES for hit in rule(subject)]


def test_a_good_run_is_not_remarked_on() -> None:
    assert fired(run_of()) == []
    assert fired(run_of(num_experts=8, expert_model_parallel_size=8)) == []
    whole = {"context_parallel_size": 4, "bf16": False, "fp16": True, "loss_scale": 1024}
    assert fired(run_of(**whole)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None, "hidden_size": None}, "--num-layers, --hidden-size missing"),
        ({"lr": None}, "--lr is missing"),
        ({"save_interval": None}, "--save run without --save-interval"),
        ({"min_lr": 1e-4}, "--min-lr 0.0001 is above --lr 1e-05"),
        ({"fp16": True, "loss_scale": 1.0}, "--bf16 and --fp16 exclude each other"),
        ({"train_samples": 10}, "--train-iters and --train-samples exclude"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, "--lr-warmup-fraction and"),
        ({"lr_warmup_iters": 100}, "--lr-warmup-iters 100 is not below --train-iters 100"),
        ({"recompute_granularity": "full"}, "full without --recompute-method"),
        ({"recompute_method": "uniform"}, "uniform has no effect without"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout 0.1: "),
        ({"loss_scale": 8.0}, "--loss-scale 8 without --fp16"),
        ({"fp16": True, "bf16": False}, r"starts with a loss scale of 4.29497e\+09"),
        ({"pretrained_checkpoint": None}, "random weights: neither --megasft-hf nor"),
        ({"pretrained_checkpoint": None, "load": "/no"}, "weights: --load /no holds no"),
        ({"clip_grad": 0.0}, "gradients are not clipped"),
        ({"max_position_embeddings": 2048}, "4096 is above --max-position-embeddings 2048"),
        ({"global_batch_size": 715_828}, "may hold 2,147,484,000 token units"),
        ({"padded_vocab_size": 524_288}, r"2,147,483,648 logits on a GPU \(4,096 tokens x"),
        (
            {"num_experts": 8, "tensor_model_parallel_size": 2},
            "experts with --tensor-model-parallel-size 2 and without --sequence-parallel",
        ),
        (
            {
                "num_experts": 8,
                "expert_model_parallel_size": 4,
                "moe_token_dispatcher_type": "allgather",
            },
            "allgather sends the tokens of 4 expert-parallel ranks",
        ),
        ({"num_experts": 8, "moe_router_dtype": None}, "the router computes in 16 bits"),
        ({"num_experts": 8, "moe_aux_loss_coeff": [0.0]}, "nothing keeps experts evenly used"),
        ({"kv_channels": 512}, "tiled kernel.*because of heads of 512"),
        ({"window_size": (128, 0), "context_parallel_size": 2}, "a sliding window under context"),
        (
            {
                "transformer_impl": "transformer_engine",
                "context_parallel_size": 4,
                "group_query_attention": True,
                "num_query_groups": 2,
                "cp_comm_type": ["a2a"],
            },
            "a2a deals the 2 key heads of a rank to 4 context-parallel ranks",
        ),
        (
            {"megasft_attention": "reference", "seq_length": 16_384, "padded_vocab_size": 8}
            | {"max_position_embeddings": 16_384},
            "reference keeps 16,384 x 16,384 scores",
        ),
        ({"save": None}, "the run leaves no checkpoint"),
        ({"train_iters": 501}, "the run is 10.0 epochs"),
        ({"context_parallel_size": 1024, "seq_length": 4095}, "holds one document at most"),
        ({"context_parallel_size": 16}, "leaves each rank 256 tokens of a row of 4,096"),
    ],
)
def test_each_of_these_is_remarked_on(changes: dict[str, Any], message: str) -> None:

    hits = fired(run_of(**changes))
    assert any(re.search(message, hit.fact) for hit in hits), hits
    assert len(hits) <= 2, "one fact is one hit"


def test_a_run_over_the_models_positions_says_what_they_are_under_rope() -> None:
    (rope,) = parallel.row_over_positions(run_of(seq_length=8192))
    (learned,) = parallel.row_over_positions(
        run_of(seq_length=8192, position_embedding_type="learned_absolute")
    )
    assert rope.remedy.startswith("add --max-position-embeddings 8192")
    assert learned.remedy == "use --seq-length 4096 or less"


def test_disk_space_is_asked_of_the_nearest_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = run_of(save=str(tmp_path / "new" / "run"), megasft_keep_last=None)
    subject.settled.save_retain_interval = None
    monkeypatch.setattr(checkpoints, "checkpoint_bytes", lambda _: 10e9)
    seen, left = [], [0.0]

    def usage(folder: Path) -> Any:
        seen.append(folder)
        return SimpleNamespace(free=left[0])

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    for left[0], full, filling in ((9e9, 1, 0), (50e9, 0, 1), (101e9, 0, 0)):
        assert len(list(checkpoints.disk_full(subject))) == full
        assert len(list(checkpoints.disk_filling(subject))) == filling
    assert set(seen) == {tmp_path}
    (note,) = checkpoints.checkpoint_size(subject)
    assert note.fact.startswith("a checkpoint takes 10.0 GB, 10 at once take 100.0 GB")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert list(checkpoints.not_writable(run_of(save=str(tmp_path / "run"))))


def test_a_file_where_checkpoints_are_to_be_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for save in (tmp_path / "file", tmp_path / "file" / "run"):
        (hit,) = checkpoints.not_writable(run_of(save=str(save)))
        assert hit.fact == f"--save {save} cannot be a folder: {tmp_path / 'file'} is a file"
    assert not list(checkpoints.not_writable(run_of(save=str(tmp_path / "new" / "run"))))
