"""Builds Megatron's GPT model with our layers in its multi-token prediction (MTP) as well.

Megatron's builder makes the MTP layers' spec by itself, out of reach of the layer spec: its local
attention there computes no packed rows and no context parallelism. A config that names another
builder is Megatron's own way to change that; without MTP, its builder does all the work.
"""

from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megasft.training.norm import replace_norms


class SFTModelConfig(GPTModelConfig):
    """Megatron's config, built by our builder."""

    builder: ClassVar[str] = "megasft.training.model_builder.SFTModelBuilder"


class SFTModelBuilder(GPTModelBuilder):
    """Megatron's builder; its own code for a model without MTP, or with a layer spec not ours."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one pipeline stage; mirrors ``GPTModelBuilder.build_model`` of 0.19.2."""
        config = self._model_config
        if not config.transformer.mtp_num_layers or config.transformer_layer_spec is None:
            return super().build_model(pg_collection, pre_process, post_process, vp_stage)
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
