from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasft.checks.run import checkpoints, memory, parameters
from megasft.checks.run.memory import Estimate, Part
from megasft.checks.run.parameters import Counts, StageCounts
from megasft.checks.run.subject import Subject

HIDDEN = 64


def settled(**changes: Any) -> Any:
    """Validated flags of a plain GPT of 4 layers in bf16, on one rank."""
    sizes = dict.fromkeys(("tensor_model", "pipeline_model", "context", "expert_model"), 1)
    flags = {f"{name}_parallel_size": size for name, size in sizes.items()} | {
        "expert_tensor_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_size": 1,
        "world_size": 1,
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 4 * HIDDEN,
        "num_attention_heads": 4,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": 16,
        "multi_latent_attention": False,
        "attention_output_gate": False,
        "qk_layernorm": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "swiglu": False,
        "bias_swiglu_fusion": True,
        "normalization": "LayerNorm",
        "num_experts": None,
        "moe_layer_freq": 1,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "moe_latent_size": None,
        "mtp_num_layers": None,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "max_position_embeddings": 4096,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 1000,
        "seq_length": 128,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "sequence_parallel": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": None,
        "bf16": True,
        "fp16": False,
        "optimizer": "adam",
        "sgd_momentum": 0.9,
        "use_distributed_optimizer": False,
        "num_distributed_optimizer_instances": 1,
        "use_precision_aware_optimizer": False,
        "main_params_dtype": torch.float32,
        "exp_avg_dtype": torch.float32,
        "exp_avg_sq_dtype": torch.float32,
        "optimizer_cpu_offload": False,
        "optimizer_offload_fraction": 1.0,
        "accumulate_allreduce_grads_in_fp32": True,
        "transformer_impl": "local",
        "megasft_attention": "ring",
        "use_torch_fsdp2": False,
        "use_megatron_fsdp": False,
    }
    return SimpleNamespace(**(flags | changes))


PLAIN = SimpleNamespace(recompute_granularity=None, recompute_modules=None)


def parts_of(args: Any, stage: int = 0, config: Any = PLAIN) -> dict[str, float]:
    layers = args.num_layers // args.pipeline_model_parallel_size
    held = (
        StageCounts(Counts(1000, 0), layers, 0)
        if not args.num_experts
        else StageCounts(Counts(1000, 0), 0, layers)
    )
    found = memory.of_stage(args, config, held, stage)
    return {part.name: part.num_bytes for part in found.parts}


def test_a_plain_layer_keeps_what_korthikanti_counts() -> None:
    """34 s b h with the two bytes of dropout's masks; s b h of 16-bit numbers otherwise."""
    per_token = 2 * sum(memory.kept_per_token(settled(), PLAIN, is_moe=False).values())
    assert per_token == 32 * HIDDEN


def test_tensor_and_sequence_parallelism_divide_all_of_it() -> None:
    split = settled(tensor_model_parallel_size=4, sequence_parallel=True)
    per_token = 2 * sum(memory.kept_per_token(split, PLAIN, is_moe=False).values())
    assert per_token == 32 * HIDDEN / 4
    # Without sequence parallelism the stream stays whole: 4 of 16 numbers a hidden unit.
    split = settled(tensor_model_parallel_size=4)
    per_token = 2 * sum(memory.kept_per_token(split, PLAIN, is_moe=False).values())
    assert per_token == (8 + 24 / 4) * HIDDEN


@given(cp=st.sampled_from([1, 2, 4]), rows=st.integers(1, 3))
def test_context_parallelism_divides_activations_and_logits(cp: int, rows: int) -> None:
    whole = parts_of(settled(micro_batch_size=rows))
    split = parts_of(settled(micro_batch_size=rows, context_parallel_size=cp))
    for name in ("activations", "working layer", "logits"):
        assert split[name] * cp == whole[name] > 0
    assert split["weights"] == whole["weights"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2, 4, 12)),
        ({"bf16": False}, (4, 4, 8)),
        ({"bf16": False, "fp16": True}, (2, 4, 12)),
        ({"accumulate_allreduce_grads_in_fp32": False}, (2, 2, 12)),
        ({"optimizer": "sgd"}, (2, 4, 8)),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}, (2, 4, 10)),
        ({"optimizer_cpu_offload": True}, (2, 4, 0)),
    ],
)
def test_bytes_per_parameter_follow_precision_and_optimizer(
    changes: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    found = memory.bytes_per_parameter(settled(**changes))
    assert tuple(size for size, _ in found.values()) == expected


def test_the_distributed_optimizer_spreads_over_data_and_context_parallel_ranks() -> None:
    layout = {"data_parallel_size": 4, "context_parallel_size": 2, "world_size": 8}
    alone, spread = (
        parts_of(settled(**layout, use_distributed_optimizer=is_spread))
        for is_spread in (False, True)
    )
    assert alone["optimizer"] == 8 * spread["optimizer"] == 12 * 1000
    assert alone["gradients"] == spread["gradients"]


def test_experts_states_spread_over_fewer_ranks() -> None:
    args = settled(num_experts=8, expert_model_parallel_size=4, data_parallel_size=8, world_size=8)
    assert memory.sharing_ranks(args) == (8, 2)


def test_pipeline_stages_hold_as_many_micro_batches_as_are_in_flight() -> None:
    args = settled(pipeline_model_parallel_size=4)
    assert [memory.chunks_in_flight(args, stage) for stage in range(4)] == [4, 3, 2, 1]
    args.global_batch_size = 2
    assert [memory.chunks_in_flight(args, stage) for stage in range(4)] == [2, 2, 2, 1]
    # Interleaved, the first stage holds PP x VP + PP - 1 chunks (Narayanan et al. 2021).
    args = settled(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, global_batch_size=64
    )
    assert memory.chunks_in_flight(args, 0) == 4 * 2 + 4 - 1
    assert [*parts_of(args, 3)][-2] == "logits" and "logits" not in parts_of(args, 0)


def test_recomputation_leaves_the_input_of_each_layer() -> None:
    full = settled(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    stream = 2 * 128 * HIDDEN
    assert parts_of(full)["activations"] == 4 * stream + stream  # and the embedding's output
    full.recompute_num_layers = 4
    assert parts_of(full)["activations"] == stream + stream
    half = settled(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    kept = parts_of(settled())["activations"] - stream
    assert parts_of(half)["activations"] == 2 * stream + kept / 2 + stream


def test_selected_modules_are_dropped() -> None:
    def per_token(*modules: str, is_moe: bool = False) -> float:
        config = SimpleNamespace(recompute_granularity="selective", recompute_modules=modules)
        args = settled(num_experts=4, moe_ffn_hidden_size=32) if is_moe else settled()
        return sum(memory.kept_per_token(args, config, is_moe=is_moe).values())

    whole = per_token()
    assert per_token("core_attn") == whole == 16 * HIDDEN
    assert per_token("mlp") == whole - 8 * HIDDEN
    assert per_token("layernorm") == whole - 2 * HIDDEN
    assert per_token("moe_act", is_moe=True) < per_token(is_moe=True)


def test_tokens_of_experts_are_counted_as_often_as_they_are_sent() -> None:
    def kept(**changes: Any) -> float:
        args = settled(num_experts=8, moe_ffn_hidden_size=32, **changes)
        return memory.kept_per_token(args, PLAIN, is_moe=True)["experts' inputs"]

    assert kept() == 2 * HIDDEN
    assert kept(moe_router_topk=4) == 4 * HIDDEN
    assert kept(expert_model_parallel_size=4) == 2 * HIDDEN  # as many come as go
    assert kept(tensor_model_parallel_size=2) == HIDDEN
    assert kept(tensor_model_parallel_size=2, expert_tensor_parallel_size=2) == 2 * HIDDEN


def test_a_checkpoint_holds_weights_masters_and_moments() -> None:
    args = settled(no_save_optim=None)
    total = parameters.of_model(args).total
    assert checkpoints.checkpoint_bytes(args) == 14 * total
    args.no_save_optim = True
    assert checkpoints.checkpoint_bytes(args) == 2 * total


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 10),
        ({"megasft_keep_last": 2}, 3),
        ({"megasft_keep_last": 50}, 10),
        ({"save_interval": 1000}, 1),
        ({"save_retain_interval": 50}, 4),
        ({"train_iters": None, "train_samples": 400}, 5),
    ],
)
def test_checkpoints_on_the_disk_at_once(changes: dict[str, Any], expected: int) -> None:
    flags = {"train_iters": 100, "train_samples": None, "save_interval": 10, "global_batch_size": 8}
    kept: dict[str, Any] = {"megasft_keep_last": None, "save_retain_interval": None}
    assert checkpoints.num_kept(SimpleNamespace(**(flags | kept | changes))) == expected


def test_too_little_memory_names_the_largest_part_and_what_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = settled(context_parallel_size=2, data_parallel_size=4)
    parts = (Part("weights", 10e9, "10"), Part("optimizer", 60e9, "60"), Part("reserve", 3e9, "3"))
    monkeypatch.setattr(memory, "estimate", lambda *_: Estimate(0, parts))

    def hits(gigabytes: float) -> list[Any]:
        wishes = SimpleNamespace(gpu_memory_gb=gigabytes)
        config = SimpleNamespace(transformer=PLAIN)
        subject = SimpleNamespace(settled=args, config=config, wishes=wishes)
        return list(memory.too_little(cast(Subject, subject)))

    assert hits(80) == []
    (hit,) = hits(70)
    assert "needs about 73.0 GB of 70.0 GB (estimated), 60.0 GB of it optimizer: 60" in hit.fact
    assert hit.remedy.startswith("add --use-distributed-optimizer")
