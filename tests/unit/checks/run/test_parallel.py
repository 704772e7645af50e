"""Divisibility, asked of flags as parsed; what Megatron itself refuses is in ``test_entry``."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.checks.run import flags, parallel
from megasft.checks.run.subject import Subject


def run_of(**changes: Any) -> Subject:
    sizes = dict.fromkeys(("tensor_model", "pipeline_model", "context", "expert_model"), 1)
    good = {f"{name}_parallel_size": size for name, size in sizes.items()} | {
        "expert_tensor_parallel_size": None,
        "world_size": 8,
        "num_layers": 12,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": None,
        "ffn_hidden_size": 256,
        "num_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_shared_expert_intermediate_size": None,
        "sequence_parallel": False,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "hybrid_layer_pattern": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "eval_micro_batch_size": None,
        "eval_global_batch_size": None,
        "rampup_batch_size": None,
        "decrease_batch_size_if_needed": False,
        "seq_length": 64,
        "megasft_align_tokens": 8,
        "skip_train": False,
        **dict.fromkeys(("train_iters", "train_samples", "log_interval", "eval_interval"), 4),
    }
    return cast(Subject, SimpleNamespace(args=SimpleNamespace(**(good | changes))))


RULES = (
    *(flags.not_positive, parallel.world_size, parallel.expert_world_size, parallel.experts),
    *(parallel.heads, parallel.head_groups, parallel.widths, parallel.layers),
    parallel.global_batch,
)


def said(subject: Subject) -> list[str]:
    return [f"{hit.fact}; {hit.remedy}" for rule in RULES for hit in rule(subject)]


def test_a_layout_that_divides_everything_is_not_remarked_on() -> None:
    assert said(run_of()) == []
    wide = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert said(run_of(**wide, context_parallel_size=2, sequence_parallel=True)) == []
    experts = {"num_experts": 8, "moe_ffn_hidden_size": 32, "expert_model_parallel_size": 4}
    assert said(run_of(**experts, tensor_model_parallel_size=2)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel_size": 3}, "no multiple of 3 = TP 1 x PP 1 x CP 3, .*start 9 ranks"),
        (
            {"num_attention_heads": 6, "kv_channels": 16, "tensor_model_parallel_size": 4},
            "4 does not divide 6 attention heads; use one of 1, 2, 3, 6",
        ),
        (
            {
                "tensor_model_parallel_size": 4,
                "group_query_attention": True,
                "num_query_groups": 6,
                "num_attention_heads": 12,
                "hidden_size": 96,
            },
            "4 neither divides 6 query groups nor is a multiple of them; .* 1, 2, 3, 6, 12$",
        ),
        (
            {"group_query_attention": True, "num_query_groups": 3},
            "3 query groups do not divide 8 attention heads",
        ),
        ({"hidden_size": 60}, "8 attention heads do not divide --hidden-size 60"),
        ({"ffn_hidden_size": 101, "tensor_model_parallel_size": 2}, "--ffn-hidden-size 101"),
        (
            {
                "num_experts": 4,
                "moe_ffn_hidden_size": 30,
                "tensor_model_parallel_size": 4,
                "expert_tensor_parallel_size": 4,
            },
            "expert tensor parallelism of 4 does not divide --moe-ffn-hidden-size 30",
        ),
        ({"num_experts": 6, "expert_model_parallel_size": 4}, "4 does not divide 6 experts"),
        ({"expert_model_parallel_size": 2}, "the model has no experts; drop the flag"),
        (
            {"num_experts": 8, "expert_model_parallel_size": 8, "tensor_model_parallel_size": 2},
            "no multiple of 16 = EP 8 x ETP 2 x PP 1.*--expert-tensor-parallel-size 1",
        ),
        ({"pipeline_model_parallel_size": 8}, "8 does not divide 12 layers; use one of 1, 2, 3"),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4},
            "stage 4 does not divide the 6 layers of a pipeline stage; use one of 1, 2, 3, 6",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4},
            "rank 4 does not divide the 6 layers",
        ),
        ({"global_batch_size": 12}, "12 is no multiple of 8 = --micro-batch-size 1 x 8 .*use 16"),
        ({"eval_global_batch_size": 12}, "--eval-global-batch-size 12 is no multiple of 8"),
        ({"micro_batch_size": 0}, "--micro-batch-size is 0; the least is 1"),
        ({"train_iters": 0}, "--train-iters is 0; the least is 1"),
        ({"train_samples": -4}, "--train-samples is -4; the least is 1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_one_message_with_the_sizes_that_do(
    changes: dict[str, Any], message: str
) -> None:
    subject = run_of(**changes)
    rules = RULES if flags.sizes_are_positive(subject.args) else RULES[:1]
    found = [f"{hit.fact}; {hit.remedy}" for rule in rules for hit in rule(subject)]

    assert len(found) == 1
    assert re.search(message, found[0]), found[0]


def test_a_run_that_does_not_train_may_have_no_steps() -> None:
    assert not list(flags.not_positive(run_of(train_iters=0, skip_train=True)))


def test_layers_at_the_ends_may_be_fewer_where_that_is_said() -> None:
    uneven = {"pipeline_model_parallel_size": 8, "decoder_first_pipeline_num_layers": 5}
    assert said(run_of(**uneven)) == []
    counted = {
        "pipeline_model_parallel_size": 2,
        "num_layers": 11,
        "account_for_embedding_in_pipeline_split": True,
    }
    assert said(run_of(**counted)) == []
    assert "12 layers and 1 counted besides" in said(run_of(**(counted | {"num_layers": 12})))[0]


@given(
    tp=st.integers(1, 16),
    heads=st.integers(1, 32),
    groups=st.integers(1, 32),
    size=st.integers(1, 99),
)
def test_the_remedies_are_sizes_that_pass(tp: int, heads: int, groups: int, size: int) -> None:
    groups = min(groups, heads)
    changes: dict[str, Any] = {
        "world_size": tp,
        "global_batch_size": size,
        "micro_batch_size": 3,
        "tensor_model_parallel_size": tp,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
    }
    (hit,) = [*parallel.heads(run_of(**changes)), None][:1]
    passes = heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
    assert (hit is None) == passes
    if hit is not None:
        for good in hit.remedy.removeprefix("use one of ").split(", "):
            mended = changes | {"tensor_model_parallel_size": int(good)}
            assert not list(parallel.heads(run_of(**mended)))
    for hit in parallel.global_batch(run_of(**changes)):
        mended = changes | {"global_batch_size": int(hit.remedy.removeprefix("use "))}
        assert not list(parallel.global_batch(run_of(**mended)))
