"""Megatron's GPT model with our attention in its layers, through the official layer-spec hook."""

from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megasft.attention.core_attention import PackedCoreAttention
from megasft.errors import FlagError
from megasft.training.arguments import attention_backend
from megasft.training.model_builder import SFTModelConfig
from megasft.training.norm import replace_norms, torch_norm


def model_config(args: Any) -> GPTModelConfig:
    """Build the model's config from Megatron's flags.

    Raises:
        FlagError: A layer spec of the user's own is given, which our attention cannot enter.
    """
    config = gpt_config_from_args(args, model_config_cls=SFTModelConfig)
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
    """Return Megatron's own layer spec with core attention, and torch's norms, replaced."""
    spec = default_layer_spec(config, vp_stage)
    if isinstance(spec, ModuleSpec):
        # One spec for all layers of a dense model; the block also names the norm behind them.
        num_layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules([spec] * num_layers, layer_norm=torch_norm)
    replace_norms(spec)
    for layer in spec.layer_specs:
        replace_norms(layer.submodules)
        attention = layer.submodules.self_attention.submodules
        replace_norms(attention)
        # A spec, not a partial: multi-latent attention builds its parts with build_module.
        params = {"backend": backend}
        attention.core_attention = ModuleSpec(module=PackedCoreAttention, params=params)
    return spec
