"""What a run does with the weights of its turns: ``--megasft-turn-weights``.

    use         a turn's loss is multiplied by its weight; divisors stay counts (the default)
    normalize   and the loss by units / sum of their weights, so that it is the weighted mean
    ignore      every turn weighs 1, whatever the stores say

The units and weights of ``normalize`` are those of the global batch, which every rank knows from
the row plan (``global_batch.py``), so it needs no communication and is the same on every layout, in
a batch that straddles the end of an epoch and while batches grow. An evaluation reads a validation
store whole, so the sums are those of the whole store, and of all stores for the loss of them all.

Only what is optimised is weighted: the logged loss, that of DFT, and the losses of validation that
checkpoints are chosen by. Token, sample and turn losses, those of categories, and perplexity stay
plain means, which other runs can be compared with. Side losses (MoE, MTP) know of no weights.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from megasft.errors import FlagError
from megasft.loss.objectives import weight_scale
from megasft.packing.plan import RowPlan
from megasft.store import TokenStore

logger = logging.getLogger(__name__)

EFFECTS: Final = {
    "use": "each multiplies the loss of its turn",
    "normalize": "each multiplies the loss of its turn, and the loss is divided by their mean",
    "ignore": "every turn is trained with a weight of 1",
}
"""``--megasft-turn-weights NAME``, and what that does."""


def add_weight_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag."""
    group.add_argument(
        "--megasft-turn-weights",
        choices=tuple(EFFECTS),
        default="use",
        help="what the weights of turns do, where stores have some (`weight` and its like in the "
        "records). use: each multiplies the loss of its turn, and the divisor stays the number of "
        "units; normalize: the loss is also divided by the mean weight of the global batch; "
        "ignore: every turn weighs 1 (default: use)",
    )


def as_asked(args: Any, store: TokenStore) -> TokenStore:
    """Return the store as the run reads it."""
    return store.without_weights() if args.megasft_turn_weights == "ignore" else store


def require_effect(args: Any, stores: Sequence[TokenStore]) -> None:
    """Refuse a flag that would do nothing.

    Raises:
        FlagError: No store has a weight other than 1.
    """
    if args.megasft_turn_weights != "use" and not any(store.weights for store in stores):
        raise FlagError(
            f"--megasft-turn-weights {args.megasft_turn_weights} has no effect: every turn of "
            f"{' and '.join(store.name for store in stores)} has a weight of 1; drop it"
        )


def announce(args: Any, stores: Mapping[str, TokenStore]) -> None:
    """Say which stores have weights, and what becomes of them.

    Args:
        args: Megatron's flags and ours.
        stores: By the name that the log gives them.
    """
    for name, store in stores.items():
        if store.weights is not None:
            logger.info(
                "%s: %s; %s (--megasft-turn-weights %s)",
                *(name, store.weights, EFFECTS[args.megasft_turn_weights]),
                args.megasft_turn_weights,
            )


class Scales(NamedTuple):
    """What the losses of an evaluation are multiplied by; 1 unless weights are normalized.

    Attributes:
        together: That of all validation stores together.
        each: That of each store.
    """

    together: float
    each: tuple[float, ...]


def evaluation_scales(args: Any, plans: Sequence[RowPlan]) -> Scales:
    """Return the factors of an evaluation, which reads all rows of these plans once."""
    if args.megasft_turn_weights != "normalize":
        return Scales(1.0, (1.0,) * len(plans))
    name = args.megasft_loss
    sums = [(int(p.units[name].sum()), float(p.unit_weights[name].sum())) for p in plans]
    together = weight_scale(sum(n for n, _ in sums), sum(w for _, w in sums))
    return Scales(together, tuple(weight_scale(n, w) for n, w in sums))
