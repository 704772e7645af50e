"""How a verification splits Megatron's model over processes: one that cuts everything it can.

A layout is tried because conversion that is right at TP 1 can be wrong at TP 2. What a model's
sizes do not divide by is left whole: the check is of the checkpoint, not of Megatron's limits.
"""

import re
from dataclasses import replace

from checkpoint_convert.config_map import Model
from megasft.errors import ConversionError
from megasft.ranks.layout import Layout


def layout_of(*, tp: int = 1, pp: int = 1, ep: int = 1) -> Layout:
    """Return a layout of these sizes on the fewest ranks: experts use tensor-parallel ones, too."""
    return Layout(pp * max(tp, ep), tp=tp, pp=pp, ep=ep)


def name_of(layout: Layout) -> str:
    """Return a verification's name of a layout, as in ``TP 2 x PP 2``."""
    sizes = (("TP", layout.tp), ("PP", layout.pp), ("EP", layout.ep))
    return " x ".join(f"{n} {size}" for n, size in sizes if size > 1 or n == "TP")


def flags_of(layout: Layout, model: Model) -> tuple[str, ...]:
    """Return Megatron's flags for a model at a layout."""
    if not model.num_experts:
        layout = replace(layout, ep=1)
    else:
        # Whole experts on each rank, so that TP ranks can have different ones. Megatron refuses
        # experts with TP without sequence parallelism.
        layout = replace(layout, etp=int(layout.ep > 1), sp=layout.tp > 1)
    return tuple(layout.flags(num_layers=model.num_layers))


def combined(model: Model) -> Layout:
    """Return the layout of two of everything that the model's sizes allow.

    Example:
        A dense model of 2 layers and 4 heads gives TP 2 x PP 2, DeepSeek-V3 PP 2 x EP 2.
    """
    mlp = (model.hf_config.get("intermediate_size"), model.hf_config.get("moe_intermediate_size"))
    heads = (model.heads.num_heads, model.heads.num_groups)
    # Megatron's local layers cannot do latent attention with TP; model_config refuses it.
    can_cut = "--multi-latent-attention" not in model.flags and all(
        size % 2 == 0 for size in (*heads, model.vocab_size, *(m for m in mlp if m))
    )
    return layout_of(
        tp=2 if can_cut else 1,
        pp=2 if model.num_layers % 2 == 0 else 1,
        ep=2 if model.num_experts and model.num_experts % 2 == 0 else 1,
    )


def parse_layout(text: str) -> Layout:
    """Read a layout as a user writes it.

    Raises:
        ConversionError: It is not one.

    Example:
        >>> parse_layout("tp2,pp2").flags(num_layers=4)[:2]
        ['--tensor-model-parallel-size', '2']
    """
    sizes = {}
    for part in text.lower().split(","):
        match = re.fullmatch(r"(tp|pp|ep)[ =]?([1-9]\d*)", part.strip())
        if match is None or match[1] in sizes:
            raise ConversionError(
                f"--layout {text!r}: {part!r} is no size; write sizes as in tp2,pp2,ep2"
            )
        sizes[match[1]] = int(match[2])
    layout = layout_of(**sizes)
    if max(layout.tp, layout.ep) % min(layout.tp, layout.ep):
        raise ConversionError(
            f"--layout {text!r}: of tp {layout.tp} and ep {layout.ep} one must divide the other"
        )
    return layout
