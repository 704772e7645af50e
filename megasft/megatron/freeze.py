"""Which parameters are trained: ``--megasft-freeze`` and ``--megasft-train-only``, by pattern.

Patterns are regular expressions searched in Megatron's parameter names, with the layer numbers of
the whole model on every pipeline stage: ``decoder.layers.31.mlp.linear_fc1.weight``. Megatron's own
hook before models are wrapped applies them, so frozen parameters take neither gradient buffers nor
optimizer states.

A frozen embedding gives outputs that need no gradient; under full recomputation Megatron's
``CheckpointFunction`` then returns none for the layers behind it, silently. So outputs of a frozen
embedding are made to need one.

A frozen router's bias of each expert (``--moe-router-bias-update-rate``) stays, too: it is a buffer
that Megatron moves after each step, and it belongs to the router's weight.

Megatron saves the layers of a tensor as one stacked tensor, moments too, and cannot save those of
some layers only; a run that freezes some layers therefore saves no optimizer (``--no-save-optim``).
"""

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megasft.errors import FlagError

logger = logging.getLogger(__name__)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose what is trained."""
    group.add_argument(
        "--megasft-freeze",
        nargs="+",
        metavar="PATTERN",
        help="leave parameters as they are whose name holds one of these regular expressions, as "
        r"'embedding' 'decoder\.layers\.[0-7]\.' (layers counted from 0 over the whole model)",
    )
    group.add_argument(
        "--megasft-train-only",
        nargs="+",
        metavar="PATTERN",
        help="freeze all parameters but those whose name holds one of these regular expressions",
    )


def check(args: Any) -> None:
    """Refuse patterns that are none, and both flags together.

    Raises:
        FlagError: With the fact and the remedy.
    """
    if args.megasft_freeze and args.megasft_train_only:
        raise FlagError("--megasft-freeze and --megasft-train-only exclude each other; drop one")
    for pattern in [*(args.megasft_freeze or ()), *(args.megasft_train_only or ())]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FlagError(
                f"{pattern!r} is no regular expression ({error}); escape what is meant literally"
            ) from error


def hook_of(args: Any) -> Callable[[list[Any]], list[Any]] | None:
    """Return what Megatron calls with the model of a rank before wrapping it; None to train all."""
    freeze, only = args.megasft_freeze or (), args.megasft_train_only or ()
    if not freeze and not only:
        return None

    def apply(chunks: list[Any]) -> list[Any]:
        ranks = _of_all_ranks(_freeze(chunks, freeze or only, matching=bool(freeze)))
        _require_effect(ranks)
        if args.save and not args.no_save_optim:
            _require_whole_stacks(ranks)
        return chunks

    return apply


class _Frozen(NamedTuple):
    """What was frozen on a rank.

    Attributes:
        found: Parameters that hold each pattern.
        frozen: Names of frozen parameters, without the numbers of their layers.
        trained: The same of those left to train.
        has_moving_bias: Whether a frozen router has a bias that moves all the same.
    """

    found: dict[str, int]
    frozen: set[str]
    trained: set[str]
    has_moving_bias: bool


def _freeze(chunks: Sequence[Any], patterns: Sequence[str], *, matching: bool) -> _Frozen:
    """Freeze parameters that match one of the patterns, or those that do not."""
    done = _Frozen(dict.fromkeys(patterns, 0), set(), set(), has_moving_bias=False)
    num_trained = num_tensors = 0
    for name, parameter in _named_parameters(chunks):
        hits = [pattern for pattern in patterns if re.search(pattern, name)]
        for pattern in hits:
            done.found[pattern] += 1
        is_frozen = bool(hits) == matching
        parameter.requires_grad_(not is_frozen)
        stem = re.sub(r"layers\.\d+", "layers", name)
        (done.frozen if is_frozen else done.trained).add(stem)
        num_tensors, num_trained = num_tensors + 1, num_trained + (not is_frozen)
    logger.info("rank 0 trains %d of its %d parameter tensors", num_trained, num_tensors)
    for chunk in chunks:
        done = done._replace(
            has_moving_bias=_freeze_biases_of_routers(chunk) or done.has_moving_bias
        )
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and not any(p.requires_grad for p in embedding.parameters()):
            embedding.register_forward_hook(_need_gradient)
    return done


def _freeze_biases_of_routers(chunk: Any) -> bool:
    """Keep the bias per expert of each router whose weight is frozen.

    Returns:
        Whether one of them has the bias of quantile balancing, which moves whatever is frozen.
    """
    routers = (module for module in chunk.modules() if hasattr(module, "frozen_expert_bias"))
    frozen = [router for router in routers if not router.weight.requires_grad]
    for router in frozen:
        router.frozen_expert_bias = True
    return any(getattr(router, "qb_beta", None) is not None for router in frozen)


def _named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield a rank's parameters, layers numbered as in the whole model."""
    for chunk in chunks:
        layers = getattr(getattr(chunk, "decoder", None), "layers", ())
        numbers = [layer.layer_number - 1 for layer in layers]  # Megatron counts from 1
        for name, parameter in chunk.named_parameters():
            yield whole_model_name(name, numbers), parameter


def whole_model_name(name: str, numbers: Sequence[int]) -> str:
    """Return a parameter's name with the layer's number in the whole model.

    Args:
        name: As a pipeline stage has it.
        numbers: For each layer of the stage, its number in the whole model.

    Example:
        >>> whole_model_name("decoder.layers.1.mlp.linear_fc1.weight", [4, 5])
        'decoder.layers.5.mlp.linear_fc1.weight'
    """
    return re.sub(
        r"^decoder\.layers\.(\d+)\.",
        lambda match: f"decoder.layers.{numbers[int(match[1])]}.",
        name,
    )


def _of_all_ranks(mine: _Frozen) -> list[_Frozen]:
    """Gather a small object: a pipeline stage has only its own layers."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _require_effect(ranks: Sequence[_Frozen]) -> None:
    """Check patterns over all ranks.

    Raises:
        FlagError: A pattern matches nothing on any rank, nothing is left to train on one, or a
            frozen router would change.
    """
    without = [p for p in ranks[0].found if not any(rank.found[p] for rank in ranks)]
    if without:
        raise FlagError(
            f"no parameter's name holds {', '.join(map(repr, without))}; names are like "
            "'embedding.word_embeddings.weight', 'decoder.layers.0.mlp.linear_fc1.weight', "
            "'decoder.layers.0.self_attention.linear_qkv.weight', 'output_layer.weight'"
        )
    if any(rank.has_moving_bias for rank in ranks):
        raise FlagError(
            "--moe-router-load-balancing-type quantile_balancing moves the routers' bias after "
            "each step, also where --megasft-freeze or --megasft-train-only freezes them; train "
            "the routers ('router'), or choose another type"
        )
    if not all(rank.trained for rank in ranks):
        raise FlagError(
            "a rank would train nothing (a pipeline stage whose parameters are all frozen), and "
            "Megatron's optimizer needs one tensor; freeze less, or use fewer pipeline stages"
        )


def _require_whole_stacks(ranks: Sequence[_Frozen]) -> None:
    """Check that moments can be saved.

    Raises:
        FlagError: A tensor is frozen in some layers only.
    """
    frozen = set().union(*(rank.frozen for rank in ranks))
    trained = set().union(*(rank.trained for rank in ranks))
    partly = sorted(frozen & trained)
    if partly:
        raise FlagError(
            f"{partly[0]} is frozen in some layers only ({len(partly)} tensors are), and Megatron "
            "cannot save an optimizer with moments of some layers; freeze it in all of them, or "
            "add --no-save-optim (a resumed run then starts its moments anew)"
        )


def _need_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    # Not in place: a leaf made here is all that backward must reach.
    return (
        output
        if output.requires_grad or not torch.is_grad_enabled()
        else (output.detach().requires_grad_(True))
    )
