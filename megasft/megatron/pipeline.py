"""Which layers a pipeline stage holds, as Megatron distributes them."""

from typing import Any


def layers_of_stage(config: Any, stage: int, *, vp_size: int | None) -> list[int]:
    """Return the layers of one pipeline stage, all its virtual chunks together.

    Args:
        config: Megatron's ``TransformerConfig``.
        stage: From 0.
        vp_size: Virtual chunks of a stage; None without interleaving.
    """
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layers: list[int] = []
    for chunk in range(vp_size or 1):
        vp_stage = chunk if (vp_size or 1) > 1 else None
        first = get_transformer_layer_offset(config, vp_stage, stage)
        layers += range(first, first + get_num_layers_to_build(config, vp_stage, stage))
    return layers
