"""Several validation stores: their names, and the loss of each beside that of all together.

Megatron 0.19 has a mechanism of its own (``--multiple-validation-sets``), which does not fit. It
works with ``--full-validation`` alone (``build_train_valid_test_data_loaders`` raises otherwise).
That takes the iterations of a set from the length of its loader, in micro-batches, and then reads
as many global batches: a set is read again for each micro-batch of a step, in rows one by one.

So all sets are evaluated in one pass, and each micro-batch reports a sum and a count for each set
beside the usual ones. Megatron adds them up over micro-batches and ranks, divides once and logs
them, as it does with any name a loss function reports; the layout does not matter, and a set needs
no whole batch of its own. Each store keeps its own numbering of categories: they are never joined
with those of another store.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megasft.errors import FlagError
from megasft.loss.loss_func import LossOutput
from megasft.schema import SFTBatch


class LossOfBatch(Protocol):
    """The run's loss, of whatever batch it is given."""

    def __call__(
        self, losses: torch.Tensor, *, batch: SFTBatch, weight_scale: float = ...
    ) -> LossOutput:
        """Weight and sum the losses of a share."""
        ...


def named_stores(values: Sequence[str] | None) -> dict[str, str]:
    """Return name to folder of what ``--megasft-valid-data`` was given, in that order.

    Raises:
        FlagError: Two have one name, or a name or a folder is missing.

    Example:
        >>> named_stores(["data/maths", "talk=data/chat_v2"])
        {'maths': 'data/maths', 'talk': 'data/chat_v2'}
    """
    stores: dict[str, str] = {}
    for value in values or ():
        name, path = _name_and_path(value)
        if not name or not path:
            raise FlagError(f"--megasft-valid-data {value} is neither STORE nor NAME=STORE")
        if name in stores:
            raise FlagError(
                f"--megasft-valid-data {stores[name]} and {path} are both called {name}, and each "
                f"is logged by its name; give one another: other={path}"
            )
        stores[name] = path
    return stores


def reported_names(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names to report apart: none for a single store that was given no name."""
    stores = named_stores(values)
    is_unnamed = list(stores.values()) == list(values or ())
    return () if len(stores) == 1 and is_unnamed else tuple(stores)


def _name_and_path(value: str) -> tuple[str, str]:
    name, separator, path = value.partition("=")
    # A folder may have "=" in its name, too.
    if not separator or "/" in name or Path(value).exists():
        return Path(value).absolute().name, value
    return name, path


def loss_of_each_set(
    loss: LossOfBatch, batch: SFTBatch, *, set_of_row: torch.Tensor, sets: Mapping[str, float]
) -> Callable[[torch.Tensor], LossOutput]:
    """Return a loss function that also reports what the rows of each validation set lose.

    Args:
        loss: The run's loss.
        batch: One share of a validation micro-batch.
        set_of_row: int64 [rows]. Which set each row of the micro-batch is of; -1 for none.
        sets: The ``weight_scale`` of each set, by name. Every micro-batch reports all sets, also
            those it has no row of, because ranks reduce name by name.

    Returns:
        What Megatron's schedule calls with the losses of the share.
    """

    def each_set(losses: torch.Tensor) -> LossOutput:
        output = loss(losses, batch=batch)
        reported = dict(output.reported)
        # A row gives every rank equally many tokens, and rows keep their order in a share.
        row_tokens = len(batch.tokens) // len(set_of_row)
        set_of_token = set_of_row.to(batch.tokens.device).repeat_interleave(row_tokens)
        for number, (name, scale) in enumerate(sets.items()):
            own = loss(losses, batch=_only(batch, set_of_token == number), weight_scale=scale)
            reported |= {f"{metric} {name}": pair for metric, pair in own.reported.items()}
        return output._replace(reported=reported)

    return each_set


def _only(batch: SFTBatch, chosen: torch.Tensor) -> SFTBatch:
    """Return the batch with labels where chosen, and nowhere else."""
    return batch._replace(
        turn_tokens=batch.turn_tokens * chosen,
        sample_tokens=batch.sample_tokens * chosen,
        ends_turn=batch.ends_turn & chosen,
        ends_sample=batch.ends_sample & chosen,
    )
