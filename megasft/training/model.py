"""Megatron's GPT model with our attention in its layers, through the official layer-spec hook."""

from functools import partial
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megasft.attention.core_attention import PackedCoreAttention
from megasft.errors import FlagError
from megasft.training.arguments import attention_backend


def model_config(args: Any) -> GPTModelConfig:
    """Build the model's config from Megatron's flags.

    Raises:
        FlagError: A layer spec of the user's own is given, which our attention cannot enter.
    """
    config = gpt_config_from_args(args)
    backend = attention_backend(args)
    if backend is not None:
        if args.spec is not None:
            raise FlagError(
                f"--spec and --megasft-attention {backend} exclude each other; put your core "
                "attention in the spec and drop --megasft-attention"
            )
        config.transformer_layer_spec = partial(_layer_spec, backend=backend)
    # Rows of a micro-batch are laid end to end, [rows * tokens, 1, hidden], where Megatron's
    # pipeline expects [tokens, rows, hidden]; let the stages tell each other the shape.
    config.transformer.variable_seq_lengths = (
        args.pipeline_model_parallel_size > 1
        and max(args.micro_batch_size, args.eval_micro_batch_size) > 1
    )
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, backend: str) -> Any:
    """Return Megatron's own layer spec with core attention replaced."""
    spec = default_layer_spec(config, vp_stage)
    # Mixture-of-experts models get one spec per layer, dense ones a single spec for all.
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = partial(PackedCoreAttention, backend=backend)
    return spec
