"""Which context-parallel rank owns which token. Pure index arithmetic, no communication.

The batch stage cuts rows with this module and the attention stage computes on the pieces with it;
both stay correct only because there is one definition. The cut is the one of Transformer Engine
(``thd_get_partitioned_indices``) and of Megatron's rotary embedding, so all three agree.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.errors import AlignmentError, FlagError


class Span(NamedTuple):
    """A run of queries and the keys they may see, under a causal mask aligned at the end.

    The last query sees all keys of the span, the one before it all but the last, and so on.

    Attributes:
        q_start: First query, in the share's own order.
        q_end: One past the last query.
        k_start: First key, in row order.
        k_end: One past the last key.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def alignment(*, cp_size: int, tp_size: int, sequence_parallel: bool) -> tuple[int, int]:
    """Return what document and row lengths must be multiples of.

    Args:
        cp_size: Ranks that share one row. Zigzag cuts each document into ``2 * cp_size`` slices.
        tp_size: Tensor-parallel ranks.
        sequence_parallel: Whether activations are cut over the tensor-parallel ranks as well.

    Returns:
        ``(document, row)`` multiples, in tokens.

    Example:
        >>> alignment(cp_size=2, tp_size=2, sequence_parallel=True)
        (4, 4)
        >>> alignment(cp_size=1, tp_size=8, sequence_parallel=True)
        (1, 8)
    """
    document = 2 * cp_size if cp_size > 1 else 1
    row = int(np.lcm(document, tp_size * cp_size)) if sequence_parallel else document
    return document, row


def require_alignment(
    seq_length: int, *, cp_size: int, tp_size: int, sequence_parallel: bool, asked: int
) -> int:
    """Return what document lengths are multiples of in a run, rows being divisible on its layout.

    Args:
        seq_length: Tokens of a row.
        cp_size: Ranks that share one row.
        tp_size: Tensor-parallel ranks.
        sequence_parallel: Whether activations are cut over the tensor-parallel ranks as well.
        asked: What the run asks for, the layout not counted.

    Raises:
        FlagError: Rows cannot be cut for the layout.
    """
    document, row = alignment(cp_size=cp_size, tp_size=tp_size, sequence_parallel=sequence_parallel)
    align_tokens = math.lcm(document, asked)
    row = math.lcm(row, align_tokens)
    if seq_length % row:
        raise FlagError(
            f"--seq-length {seq_length} is not a multiple of {row}, which TP {tp_size} x CP "
            f"{cp_size} and documents aligned to {asked} tokens need; set it to "
            f"{-(-seq_length // row) * row}"
        )
    return align_tokens


def zigzag_positions(
    cu_seqlens: npt.NDArray[np.integer[Any]], *, cp_rank: int, cp_size: int
) -> npt.NDArray[np.int64]:
    """Return the row positions one rank owns when documents are split zigzag.

    Each document is cut into ``2 * cp_size`` equal slices and rank ``r`` takes slices ``r`` and
    ``2 * cp_size - 1 - r``. Under a causal mask an early slice is cheap and a late one dear, so the
    pair costs the same on every rank.

    Args:
        cu_seqlens: int [D + 1]. Aligned document borders; starts at 0.
        cp_rank: This rank, in ``[0, cp_size)``.
        cp_size: Ranks that share one row.

    Returns:
        int64 [T / cp_size], ascending.

    Raises:
        AlignmentError: A document's length is not a multiple of ``2 * cp_size``.

    Example:
        >>> zigzag_positions(np.array([0, 8]), cp_rank=0, cp_size=2)
        array([0, 1, 6, 7])
    """
    borders = np.asarray(cu_seqlens, dtype=np.int64)
    if cp_size == 1:
        return np.arange(borders[-1], dtype=np.int64)
    lengths = _check_aligned(borders, cp_size)
    slices = lengths // (2 * cp_size)
    # One row per slice: document 0's front and back, document 1's front and back, ...
    front = borders[:-1] + cp_rank * slices
    back = borders[:-1] + (2 * cp_size - 1 - cp_rank) * slices
    starts = np.stack([front, back], axis=1).reshape(-1)
    sizes = np.repeat(slices, 2)
    ends = np.cumsum(sizes)
    offset_in_slice = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)
    return np.repeat(starts, sizes) + offset_in_slice


def attention_spans(
    cu_seqlens: npt.NDArray[np.integer[Any]], *, cp_rank: int, cp_size: int
) -> list[Span]:
    """Return what each run of this rank's queries attends to, keys being in row order.

    Args:
        cu_seqlens: int [D + 1]. Aligned document borders; starts at 0.
        cp_rank: This rank, in ``[0, cp_size)``.
        cp_size: Ranks that share one row.

    Returns:
        One span per document without context parallelism, two with it; empty slices left out.

    Raises:
        AlignmentError: A document's length is not a multiple of ``2 * cp_size``.

    Example:
        >>> attention_spans(np.array([0, 8]), cp_rank=0, cp_size=2)
        [Span(q_start=0, q_end=2, k_start=0, k_end=2), Span(q_start=2, q_end=4, k_start=0, k_end=8)]
    """
    borders = np.asarray(cu_seqlens, dtype=np.int64)
    lengths = _check_aligned(borders, cp_size) if cp_size > 1 else np.diff(borders)
    spans, q_start = [], 0
    for start, length in zip(borders[:-1].tolist(), lengths.tolist(), strict=True):
        if cp_size == 1:
            seen = [(length, start + length)]
        else:
            piece = length // (2 * cp_size)
            late = 2 * cp_size - 1 - cp_rank
            seen = [(piece, start + (n + 1) * piece) for n in (cp_rank, late)]
        for size, k_end in seen:
            if size:
                spans.append(Span(q_start, q_start + size, start, k_end))
            q_start += size
    return spans


def _check_aligned(borders: npt.NDArray[np.int64], cp_size: int) -> npt.NDArray[np.int64]:
    lengths = np.diff(borders)
    crooked = np.flatnonzero(lengths % (2 * cp_size))
    if len(crooked):
        i = int(crooked[0])
        raise AlignmentError(
            f"document {i} has {int(lengths[i])} tokens, which {2 * cp_size} "
            "(= 2 * context-parallel size) does not divide; pad it when assembling the row"
        )
    return lengths
