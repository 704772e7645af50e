"""What one stage hands to the next: a sample, its turns, and a batch of packed rows.

Legend of the shape letters used in names and docstrings all over the project:

    T  tokens of a flat micro-batch (its rows laid end to end); after the cut, of one share of it
    D  documents in a micro-batch, the tail pads counted
    S  samples of a store          N  turns of a sample          R  rows of a plan
    H  query heads on this rank    G  key/value heads on this rank
    E  size of a query/key head    F  size of a value head       V  vocabulary

A turn travels as five int32 numbers, ``TURN_FIELDS``. Its start counts *unshifted* tokens: token
``start`` is the first one trained, so the logits at ``start - 1`` predict it. A turn never starts
at 0, because nothing predicts the first token of a document. Its weight in the loss is a float32,
whose bits stand in an int32 column: so the weight goes wherever the record goes, and the records
stay one array of one type, which Megatron's index can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

TURN_FIELDS: Final = ("start", "num_tokens", "category_id", "message", "weight")
"""Columns of a turn record: first trained token, trained tokens, category, index of its message,
bits of its float32 weight."""

UNIT_WEIGHT: Final = 0x3F80_0000
"""A weight of 1 as it stands in a turn record."""

NO_CATEGORY: Final = 0
"""Category id of a sample that names none; it is not reported on its own."""


class Sample(NamedTuple):
    """A tokenized conversation.

    Attributes:
        tokens: int32 [L]. Token ids, unshifted, without padding.
        turns: int32 [N, 5]. One record per supervised turn, see ``TURN_FIELDS``; ascending and
            not overlapping; ``1 <= start`` and ``start + num_tokens <= L``.
    """

    tokens: npt.NDArray[np.int32]
    turns: npt.NDArray[np.int32]


def turn_records(
    turns: Sequence[tuple[int, ...]], weights: Sequence[float] | None = None
) -> npt.NDArray[np.int32]:
    """Return turn records.

    Args:
        turns: First trained token, trained tokens, category and message of each.
        weights: Of each; 1 when not given.

    Example:
        >>> turn_records([(2, 3, 0, 1)]).tolist()
        [[2, 3, 0, 1, 1065353216]]
    """
    records = np.full((len(turns), len(TURN_FIELDS)), UNIT_WEIGHT, np.int32)
    records[:, :-1] = np.array(turns, np.int32).reshape(-1, len(TURN_FIELDS) - 1)
    if weights is not None:
        turn_weights_of(records)[:] = weights
    return records


def turn_weights_of(turns: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """Return float32 [N]: the weights of turn records, as a view that can be written to.

    Args:
        turns: int32 [N, 5]. Turn records.

    Example:
        >>> turn_weights_of(turn_records([(2, 3, 0, 1)], [0.25])).tolist()
        [0.25]
    """
    return turns[:, TURN_FIELDS.index("weight")].view(np.float32)


class SFTBatch(NamedTuple):
    """A flat micro-batch of packed rows: aligned, and shifted before it was cut.

    The label at position ``t`` is the token the model must predict there. A turn's facts travel
    with each of its labels, so that the loss needs no communication, on any share.

    Attributes:
        tokens: int64 [T]. Inputs; pad id between and behind documents.
        labels: int64 [T]. Targets; 0 where nothing is trained (read ``turn_tokens`` first).
        position_ids: int64 [T]. Position in the document, 0 at each border.
        turn_tokens: int32 [T]. Labels of the turn this label belongs to, in the whole row;
            0 where there is no label. This is also the loss mask.
        sample_tokens: int32 [T]. Labels of the whole sample; 0 where there is no label.
        ends_turn: bool [T]. This label is the last of its turn.
        ends_sample: bool [T]. This label is the last of its sample.
        category_ids: int32 [T]. Category of the turn; 0 where there is none or no label.
        turn_numbers: int32 [T]. Which supervised turn of its sample this label is of, from 1; 0
            where there is no label.
        turn_weights: float32 [T]. Weight of the turn this label belongs to; 0 where there is no
            label.
        cu_seqlens: int32 [D + 1]. Aligned document borders of the whole micro-batch (global over
            the context-parallel ranks); starts at 0.
        cu_seqlens_unpadded: int32 [D + 1]. Running sums of the true document lengths (tail pads
            count 0), for honest FLOP counts.
        row_ids: int64 [rows]. Number of each row in the plan, the rows of several validation sets
            numbered through; -1 for a row of padding. The same on every context-parallel rank.
        set_ids: int64 [rows]. Validation set of each row, 0 in training; -1 for a row of padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    turn_tokens: torch.Tensor
    sample_tokens: torch.Tensor
    ends_turn: torch.Tensor
    ends_sample: torch.Tensor
    category_ids: torch.Tensor
    turn_numbers: torch.Tensor
    turn_weights: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_unpadded: torch.Tensor
    row_ids: torch.Tensor
    set_ids: torch.Tensor


PER_TOKEN_FIELDS: Final = SFTBatch._fields[: SFTBatch._fields.index("cu_seqlens")]
"""The fields of a batch that have one entry per token, and are cut for context parallelism."""
