"""What of Megatron's flags our configuration of the model changes."""

from typing import Any

import pytest

from tests.one_rank import one_rank, validated


def config_of(*flags: str, world_size: int = 1) -> Any:
    args = validated(*flags, world_size=world_size)
    from megasft.megatron.model import model_config

    return model_config(args)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_factor_of_llama_3s_rope_reaches_the_model(factor: float) -> None:
    """Megatron 0.19.2 parses the flag and leaves its configuration at 8."""
    config = config_of("--use-rope-scaling", "--rope-scaling-factor", str(factor))
    assert config.rope_scaling and config.rope_scaling_factor == factor


def test_yarn_multiplies_scores_by_the_square_of_its_factor() -> None:
    """The factor is that of cos and sin, of queries and of keys."""
    yarn = '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, %s}'
    config = config_of("--megasft-rope-scaling", yarn % '"attention_factor": 1.5')
    assert config.transformer.softmax_scale == 16**-0.5 * 1.5**2
    assert config_of().transformer.softmax_scale is None


@pytest.mark.parametrize(
    ("stages", "rows", "rows_of_evaluation", "tell"),
    [(1, 2, 2, False), (2, 1, 1, False), (2, 2, 1, True), (2, 1, 2, True)],
)
def test_stages_tell_each_other_shapes_where_any_micro_batch_has_several_rows(
    stages: int, rows: int, rows_of_evaluation: int, tell: bool
) -> None:
    """Rows lie end to end, in a shape other than the one Megatron's pipeline expects."""
    config = config_of(
        *("--pipeline-model-parallel-size", str(stages), "--micro-batch-size", str(rows)),
        *("--eval-micro-batch-size", str(rows_of_evaluation), "--global-batch-size", "2"),
        world_size=stages,
    )
    assert config.transformer.variable_seq_lengths is tell


def test_a_model_that_fuses_is_built_without_apex_and_its_local_layers_do_not() -> None:
    """Megatron's own output layer raises without Apex; Transformer Engine's layers fuse."""
    args = validated()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megasft.megatron.model import model_config

    config = model_config(args)
    config.transformer.gradient_accumulation_fusion = True
    with one_rank(args):
        model_parallel_cuda_manual_seed(1)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = config.get_builder_cls()(config).build_model(groups, True, True)
        local = [x for x in model.modules() if isinstance(x, layers.ColumnParallelLinear)]
        assert model.output_layer in local and len(local) == 5
        assert not any(layer.gradient_accumulation_fusion for layer in local)
        assert config.transformer.gradient_accumulation_fusion
    assert not layers._grad_accum_fusion_available
