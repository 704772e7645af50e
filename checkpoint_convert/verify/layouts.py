"""How a verification splits Megatron's model over processes: one that cuts everything it can.

A layout is tried because conversion that is right at TP 1 can be wrong at TP 2. What a model's
sizes do not divide by is left whole: the check is of the checkpoint, not of Megatron's limits.
"""

import re
from dataclasses import dataclass

from checkpoint_convert.config_map import Model
from megasft.errors import ConversionError


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel groups.

    Attributes:
        tp: Tensor-parallel ranks; a model with experts has sequence parallelism with it.
        pp: Pipeline stages.
        ep: Expert-parallel ranks, taken from the tensor-parallel ones where these suffice.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """Processes it takes."""
        return self.pp * max(self.tp, self.ep)

    @property
    def name(self) -> str:
        """The layout in words, as in ``TP 2 x PP 2``."""
        sizes = (("TP", self.tp), ("PP", self.pp), ("EP", self.ep))
        return " x ".join(f"{n} {size}" for n, size in sizes if size > 1 or n == "TP")

    def flags(self, *, has_experts: bool) -> list[str]:
        """Return Megatron's flags."""
        flags = ["--tensor-model-parallel-size", str(self.tp)]
        flags += ["--pipeline-model-parallel-size", str(self.pp)]
        if has_experts:
            flags += ["--expert-model-parallel-size", str(self.ep)]
            if self.ep > 1:
                # Whole experts on each rank, so that they can be dealt over the TP ranks, too.
                flags += ["--expert-tensor-parallel-size", "1"]
            if self.tp > 1:  # Megatron refuses experts with TP without it
                flags.append("--sequence-parallel")
        return flags


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
    return Layout(
        tp=2 if can_cut else 1,
        pp=2 if model.num_layers % 2 == 0 else 1,
        ep=2 if model.num_experts and model.num_experts % 2 == 0 else 1,
    )


def parse_layout(text: str) -> Layout:
    """Read a layout as a user writes it.

    Raises:
        ConversionError: It is none.

    Example:
        >>> parse_layout("tp2,pp2")
        Layout(tp=2, pp=2, ep=1)
    """
    sizes = {}
    for part in text.lower().split(","):
        match = re.fullmatch(r"(tp|pp|ep)[ =]?([1-9]\d*)", part.strip())
        if match is None or match[1] in sizes:
            raise ConversionError(
                f"--layout {text!r}: {part!r} is no size; write sizes as in tp2,pp2,ep2"
            )
        sizes[match[1]] = int(match[2])
    layout = Layout(**sizes)
    if max(layout.tp, layout.ep) % min(layout.tp, layout.ep):
        raise ConversionError(
            f"--layout {text!r}: of tp {layout.tp} and ep {layout.ep} one must divide the other"
        )
    return layout
