"""Megatron's GPT model with our attention in its layers, through the official layer-spec hook."""

from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megasft.errors import FlagError
from megasft.megatron import freeze, rope
from megasft.megatron.core_attention import PackedCoreAttention
from megasft.megatron.flags import attention_backend, uses_te_spec
from megasft.megatron.model_builder import SFTModelConfig
from megasft.megatron.norm import replace_norms, torch_norm
from megasft.megatron.row_rope import PackedLatentAttention


def model_config(args: Any) -> GPTModelConfig:
    """Build the model's config from Megatron's flags.

    Raises:
        FlagError: A layer spec of the user's own is given, which our attention cannot enter, or
            the rope is scaled in a way that the other flags rule out.
    """
    config = gpt_config_from_args(args, model_config_cls=SFTModelConfig)
    # Megatron 0.19.2 parses this flag and leaves the config at its default, 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    _scale_rope(config, args)
    freezing = freeze.hook_of(args)
    if freezing is not None:
        config.pre_wrap_hooks.append(freezing)
    backend = attention_backend(args)
    if backend is not None:
        if args.spec is not None:
            raise FlagError(
                f"--spec and --megasft-attention {backend} exclude each other; put your core "
                "attention in the spec and drop --megasft-attention"
            )
        if _splits_latent_attention(args):
            raise FlagError(
                f"--multi-latent-attention with --tensor-model-parallel-size "
                f"{args.tensor_model_parallel_size}: Megatron 0.19's local layers do not sum the "
                "gradient of the shared rotary key over these ranks (29 % of a gradient at TP 2); "
                "use --transformer-impl transformer_engine, or TP 1 with EP, PP, CP and DP"
            )
        config.transformer_layer_spec = partial(_layer_spec, backend=backend)
        config.megasft_rotates_rows = not config.transformer.apply_rope_fusion
    # Rows of a micro-batch are laid end to end, [rows * tokens, 1, hidden], where Megatron's
    # pipeline expects [tokens, rows, hidden]; let the stages tell each other the shape.
    config.transformer.variable_seq_lengths = (
        args.pipeline_model_parallel_size > 1
        and max(args.micro_batch_size, args.eval_micro_batch_size) > 1
    )
    return config


def _scale_rope(config: SFTModelConfig, args: Any) -> None:
    """Hand ``--megasft-rope-scaling`` to what computes it: the builder, or latent attention."""
    scaling = rope.from_flags(args)
    if scaling is None:
        return
    transformer = config.transformer
    if args.multi_latent_attention:
        for name, value in rope.latent_fields(scaling).items():
            setattr(transformer, name, value)
        return
    config.megasft_rope_scaling = args.megasft_rope_scaling
    if scaling.attention_factor != 1.0:
        softmax_scale = transformer.softmax_scale or transformer.kv_channels**-0.5
        transformer.softmax_scale = softmax_scale * scaling.attention_factor**2


def _splits_latent_attention(args: Any) -> bool:
    is_split = args.multi_latent_attention and args.tensor_model_parallel_size > 1
    return is_split and not uses_te_spec(args)


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
        is_latent = layer.submodules.self_attention.module is MLASelfAttention
        if is_latent and not config.transformer.apply_rope_fusion:
            layer.submodules.self_attention.module = PackedLatentAttention
        attention = layer.submodules.self_attention.submodules
        replace_norms(attention)
        # A spec, not a partial: multi-latent attention builds its parts with build_module.
        params = {"backend": backend}
        attention.core_attention = ModuleSpec(module=PackedCoreAttention, params=params)
        if config.transformer.transformer_impl == "local":
            _name_norms_as_transformer_engine(layer.submodules)
    return spec


def _name_norms_as_transformer_engine(layer: Any) -> None:
    """Name the norms of a local layer in checkpoints as Transformer Engine's layers do.

    There a norm is part of the linear layer behind it. Megatron's local spec says so for a plain
    dense layer only: of experts it claims the same, where Transformer Engine's has a norm of its
    own, and of latent attention nothing. A checkpoint of one could not be loaded by the other.
    """
    parts = getattr(layer.mlp, "keywords", {}).get("submodules")
    names = {} if isinstance(parts, MoESubmodules) else {"pre_mlp_layernorm.": "mlp.linear_fc1."}
    if isinstance(layer.self_attention.submodules, MLASelfAttentionSubmodules):
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj."
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj."
    else:
        names["input_layernorm."] = "self_attention.linear_qkv."
    layer.sharded_state_dict_keys_map = {k: f"{v}layer_norm_" for k, v in names.items()}
