"""The pieces a checkpoint is written and read in: one tensor of one layer and one expert each.

A piece is the smallest part both sides know by itself, so a conversion holds one in memory, not the
model; Megatron's own checkpoints are chunked no finer. Where layers are alike a piece is a place on
the layer axis of a global tensor, and a routed expert is a place on the expert axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint_convert.config_map import Model
from checkpoint_convert.rules import Rule


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of Megatron's without its leading axes, and what it is made of.

    Attributes:
        rule: Names and join.
        hf: Hugging Face names, in the order the rule's join takes them.
        place: Its index on each leading axis (layer, expert) of the global tensor.
        axes: The sizes of these axes.
        layer: The decoder layer it belongs to; None for embedding, final norm and output.
    """

    rule: Rule
    hf: tuple[str, ...]
    place: tuple[int, ...]
    axes: tuple[int, ...]
    layer: int | None

    @property
    def key(self) -> str:
        """Name of the global tensor in the checkpoint."""
        return self.rule.megatron

    @property
    def name(self) -> str:
        """Key and place, for people.

        Example:
            ``decoder.layers.mlp.linear_fc1.weight[3]``
        """
        return self.key + (f"[{', '.join(map(str, self.place))}]" if self.place else "")


def pieces(model: Model) -> list[Piece]:
    """Return every piece of a model: embedding and final norm, layer after layer, output."""
    found = [piece for rule in model.rules for piece in _of_rule(rule, model)]
    last = model.num_layers
    order = {"output_layer.weight": last + 1, "decoder.final_layernorm.weight": last}
    return sorted(found, key=lambda p: order.get(p.key, -1 if p.layer is None else p.layer))


def _of_rule(rule: Rule, model: Model) -> Iterator[Piece]:
    experts = range(model.num_experts) if rule.is_per_expert else [None]
    for layer in range(model.num_layers) if rule.is_per_layer else [None]:
        for expert in experts:
            leading = [
                (i, size)
                for i, size in ((layer, model.num_layers), (expert, model.num_experts))
                if i is not None
            ]
            yield Piece(
                rule=rule,
                hf=rule.hf_names(layer=layer or 0, expert=expert or 0),
                place=tuple(i for i, _ in leading),
                axes=tuple(size for _, size in leading),
                layer=rule.layer if layer is None else layer,
            )
