"""How many parameters the model has, and how many of them each pipeline stage of a rank holds.

Counted from Megatron's flags as its modules are built. Megatron's own count
(``theoretical_memory_usage.py``) is for the whole model of a plain family, and leaves out biases,
norms of queries and keys, multi-token prediction's own weights and the embedding that a last stage
repeats; so it is off by up to a percent, and here a test demands equality with the built model.
Rejected: building the model on the meta device, which needs process groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megasft.megatron.pipeline import layers_of_stage


class Split(NamedTuple):
    """How one copy of the model is cut; all ones for the whole model.

    Attributes:
        tp: Ranks that share dense weights.
        ep: Ranks that share the experts.
        etp: Ranks that share one expert's weights.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1


class Counts(NamedTuple):
    """Parameters, by the ranks over which their optimizer states can be spread.

    Attributes:
        dense: Of everything but experts.
        expert: Of routed experts.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Dense and expert together."""
        return self.dense + self.expert

    def plus(self, other: Counts) -> Counts:
        """Add two counts."""
        return Counts(self.dense + other.dense, self.expert + other.expert)


class StageCounts(NamedTuple):
    """What a rank of one pipeline stage holds.

    Attributes:
        counts: Its parameters.
        num_dense_layers: Layers with a plain MLP.
        num_moe_layers: Layers with experts.
    """

    counts: Counts
    num_dense_layers: int
    num_moe_layers: int


def split_of(args: Any) -> Split:
    """Return how validated flags cut the model."""
    return Split(
        args.tensor_model_parallel_size,
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
    )


def of_model(args: Any) -> Counts:
    """Count the whole model's parameters, tied embeddings once.

    Args:
        args: Validated flags.
    """
    whole = Split()
    total = _embedding(args, whole).plus(_final_norm(args))
    if args.untie_embeddings_and_output_weights:
        total = total.plus(_output(args, whole))
    for is_moe in moe_layers(args):
        total = total.plus(layer(args, whole, is_moe=is_moe))
    return total.plus(_mtp(args, whole))


def of_stages(args: Any, config: Any) -> list[StageCounts]:
    """Count the parameters a rank of each pipeline stage holds.

    Args:
        args: Validated flags.
        config: Megatron's ``TransformerConfig``, which knows the layers of a stage.
    """
    split, is_moe = split_of(args), moe_layers(args)
    pp = args.pipeline_model_parallel_size
    stages = []
    for stage in range(pp):
        vp_size = args.virtual_pipeline_model_parallel_size
        mine = [is_moe[number] for number in layers_of_stage(config, stage, vp_size=vp_size)]
        counts = Counts(0, 0)
        for has_experts in mine:
            counts = counts.plus(layer(args, split, is_moe=has_experts))
        counts = counts.plus(_ends(args, split, is_first=stage == 0, is_last=stage == pp - 1))
        stages.append(StageCounts(counts, len(mine) - sum(mine), sum(mine)))
    return stages


def moe_layers(args: Any) -> list[bool]:
    """Return for each layer whether it has experts."""
    if not args.num_experts:
        return [False] * args.num_layers
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(args.num_layers)]
    return [bool(x) for x in frequency]


def layer(args: Any, split: Split, *, is_moe: bool) -> Counts:
    """Count a transformer layer's parameters on one rank."""
    dense = _attention(args, split) + 2 * _norm(args, args.hidden_size)
    if not is_moe:
        return Counts(dense + _mlp(args, args.ffn_hidden_size, split.tp), 0)
    hidden, num_experts = args.hidden_size, args.num_experts
    dense += num_experts * hidden + (num_experts if args.add_bias_linear else 0)
    shared = args.moe_shared_expert_intermediate_size
    if shared:
        dense += _mlp(args, shared, split.tp) + (hidden if args.moe_shared_expert_gate else 0)
    latent = args.moe_latent_size
    if latent:
        dense += 2 * hidden * latent
    one = _mlp(args, args.moe_ffn_hidden_size, split.etp, width=latent or hidden)
    return Counts(dense, num_experts // split.ep * one)


def attention_sizes(args: Any) -> tuple[int, int, int]:
    """Return the widths of all queries, keys and values of a layer, over all TP ranks.

    Heads of latent attention have queries and keys of one size and values of another, and share
    none.
    """
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        query = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
        return query, query, heads * args.v_head_dim
    groups = args.num_query_groups if args.group_query_attention else heads
    key = groups * args.kv_channels
    return heads * args.kv_channels, key, key


def _attention(args: Any, split: Split) -> int:
    hidden, tp = args.hidden_size, split.tp
    query, key, value = attention_sizes(args)
    output = (value if args.multi_latent_attention else query) * hidden // tp
    output += hidden if args.add_bias_linear else 0
    if args.multi_latent_attention:
        return int(output) + _latent_projections(args, tp, query=query)
    if args.attention_output_gate:
        query *= 2
    weights = hidden * (query + key + value) // tp
    if args.add_qkv_bias or args.add_bias_linear:
        weights += (query + key + value) // tp
    if args.qk_layernorm:
        weights += 2 * _norm(args, args.kv_channels)
    return int(output + weights)


def _latent_projections(args: Any, tp: int, *, query: int) -> int:
    """Count what leads from the residual stream to queries, keys and values of latent attention."""
    hidden, q_rank, kv_rank = args.hidden_size, args.q_lora_rank, args.kv_lora_rank
    keys_and_values = args.num_attention_heads * (args.qk_head_dim + args.v_head_dim)
    weights = hidden * (kv_rank + args.qk_pos_emb_head_dim) + kv_rank * keys_and_values // tp
    if q_rank is None:
        weights += hidden * query // tp
    else:
        weights += hidden * q_rank + q_rank * query // tp
    if args.qk_layernorm:
        weights += _norm(args, kv_rank) + (_norm(args, q_rank) if q_rank is not None else 0)
    return int(weights)


def _mlp(args: Any, ffn: int, tp: int, *, width: int | None = None) -> int:
    inner = (2 if args.swiglu else 1) * ffn // tp
    width = width or args.hidden_size
    bias = inner + width if args.add_bias_linear else 0
    return int(width * inner + ffn // tp * width + bias)


def _norm(args: Any, width: int) -> int:
    return width if args.normalization == "RMSNorm" else 2 * width


def _final_norm(args: Any) -> Counts:
    return Counts(_norm(args, args.hidden_size), 0)


def _output(args: Any, split: Split) -> Counts:
    return Counts(args.padded_vocab_size * args.hidden_size // split.tp, 0)


def _embedding(args: Any, split: Split) -> Counts:
    positions = (
        args.max_position_embeddings * args.hidden_size
        if args.position_embedding_type == "learned_absolute" and args.add_position_embedding
        else 0
    )
    return Counts(_output(args, split).dense + positions, 0)


def _ends(args: Any, split: Split, *, is_first: bool, is_last: bool) -> Counts:
    """Count embedding and output of a stage, with what the last one repeats of the first."""
    counts = _embedding(args, split) if is_first else Counts(0, 0)
    if not is_last:
        return counts
    counts = counts.plus(_final_norm(args)).plus(_mtp(args, split))
    repeats = not is_first and bool(args.mtp_num_layers)
    if repeats:
        counts = counts.plus(_embedding(args, split))
    shares = not args.untie_embeddings_and_output_weights and (is_first or repeats)
    return counts if shares else counts.plus(_output(args, split))


def _mtp(args: Any, split: Split) -> Counts:
    """Count the layers of multi-token prediction: norms, the joint projection, a layer each."""
    counts = Counts(0, 0)
    hidden = args.hidden_size
    for _ in range(args.mtp_num_layers or 0):
        own = 3 * _norm(args, hidden) + 2 * hidden * hidden // split.tp
        counts = counts.plus(Counts(own, 0))
        counts = counts.plus(layer(args, split, is_moe=moe_layers(args)[-1]))
    return counts


def text_of_count(number: float) -> str:
    """Return a number of parameters.

    Example:
        >>> text_of_count(8.19e9), text_of_count(1.31e6)
        ('8.19 B', '1.31 M')
    """
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"
