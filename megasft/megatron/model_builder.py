"""Builds Megatron's GPT model with our layers in multi-token prediction (MTP), and our scaled rope.

Megatron's builder makes the MTP layers' spec by itself, out of reach of the layer spec: its local
attention there computes no packed rows and no context parallelism. And it makes the rope, whose
scaling it knows for Llama 3.1 alone. A config that names another builder is Megatron's own way to
change that; without MTP, its builder does all the work but the frequencies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.tensor_parallel import layers as local_layers
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megasft.megatron import rope
from megasft.megatron.norm import replace_norms
from megasft.megatron.row_rope import rotate_rows
from megasft.megatron.row_shift import replace_roll


@dataclass(kw_only=True)
class SFTModelConfig(GPTModelConfig):
    """Megatron's config, built by our builder.

    Attributes:
        megasft_rope_scaling: The flag's JSON, which Megatron can write into a checkpoint; None for
            rope that Megatron scales itself or not at all.
        megasft_rotates_rows: Whether the rope of a packed row is one gather; without it Megatron's
            own, which Transformer Engine fuses.
    """

    builder: ClassVar[str] = "megasft.megatron.model_builder.SFTModelBuilder"
    megasft_rope_scaling: str | None = None
    megasft_rotates_rows: bool = False


class SFTModelBuilder(GPTModelBuilder):
    """Megatron's builder; its own code for a model without MTP, or with a layer spec not ours."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one pipeline stage, or one virtual chunk of it."""
        config = self._model_config
        build = super().build_model
        if config.transformer.mtp_num_layers and config.transformer_layer_spec is not None:
            build = self._build_with_mtp
        with _local_layers_unfused(config.transformer) as leave_unfused:
            model = build(pg_collection, pre_process, post_process, vp_stage)
            leave_unfused(model)
        if config.megasft_rope_scaling is not None:
            scaling = rope.parse(config.megasft_rope_scaling)
            rope.scale(model, scaling, base=config.rotary_base)
        if config.megasft_rotates_rows:
            rotate_rows(model)
        return model

    def _build_with_mtp(
        self,
        pg_collection: Any,
        pre_process: bool | None,
        post_process: bool | None,
        vp_stage: int | None,
    ) -> Any:
        """Mirror ``GPTModelBuilder.build_model`` of 0.19.2, with our layers in the MTP block."""
        config = self._model_config
        replace_roll()
        layers = config.transformer_layer_spec(config, vp_stage=vp_stage)
        mtp = get_gpt_mtp_block_spec(
            config.transformer, layers, use_transformer_engine=False, vp_stage=vp_stage
        )
        for layer in [] if mtp is None else mtp.layer_specs:
            replace_norms(layer.submodules)
        vp_size = config.transformer.virtual_pipeline_model_parallel_size
        is_first = is_vp_first_stage(vp_stage=vp_stage, vp_size=vp_size)
        is_last = is_vp_last_stage(vp_stage=vp_stage, vp_size=vp_size)
        if pre_process is None:
            pre_process = is_first and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_last and is_pp_last_stage(pg_collection.pp)
        same = (
            *("fp16_lm_cross_entropy", "parallel_output", "share_embeddings_and_output_weights"),
            *("position_embedding_type", "rotary_percent", "rotary_base", "rope_scaling"),
            *("rope_scaling_factor", "seq_len_interpolation_factor"),
            "scatter_embedding_sequence_parallel",
        )
        return GPTModel(
            config=config.transformer,
            transformer_layer_spec=layers,
            mtp_block_spec=mtp,
            vocab_size=config.vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **{name: getattr(config, name) for name in same},
        )


@contextmanager
def _local_layers_unfused(transformer: Any) -> Iterator[Callable[[Any], None]]:
    """Let local linear layers be built, and compute, without the kernel they would fuse with.

    Transformer Engine's layers add their weights' gradients to the accumulated ones by themselves.
    The output layer is Megatron's own in every model, needs Apex for that, and raises without it:
    it accumulates by an operator more, the others stay fused.

    Yields:
        What a model that was built is given to.
    """
    is_missing = not local_layers._grad_accum_fusion_available
    if not (transformer.gradient_accumulation_fusion and is_missing):
        yield lambda model: None
        return
    linear = (local_layers.ColumnParallelLinear, local_layers.RowParallelLinear)

    def leave_unfused(model: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, linear):
                layer.gradient_accumulation_fusion = False

    local_layers._grad_accum_fusion_available = True
    try:
        yield leave_unfused
    finally:
        local_layers._grad_accum_fusion_available = False
