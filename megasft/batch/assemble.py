"""Samples to packed rows: aligned, with the tail pad as its own document, labels shifted.

Labels are shifted here, on whole rows, before anything is cut: cutting first loses a label at every
seam. The tail pad is a document of its own, because attention costs the square of a document and
padding must not lengthen the last one. Everything a loss can ask about a label (length of its turn
and sample, whether it ends them) is written beside it, so that any share of the row knows it
without communication.

All rows of a micro-batch are laid out at once. What is constant over a document or a turn is
repeated over its tokens, so that Python steps over samples and numpy over tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.schema import TURN_FIELDS, Sample, turn_weights_of
from megasft.store import Samples

Columns = dict[str, npt.NDArray[Any]]
"""Fields of an ``SFTBatch`` as numpy arrays."""

Ints = npt.NDArray[np.int64]


class _Layout(NamedTuple):
    """Where documents lie in a micro-batch.

    Attributes:
        starts: int64 [S]. First position of each sample.
        lengths: int64 [S]. True length of each sample.
        borders: int64 [D + 1]. Aligned borders of all documents, tail pads among them.
        true_lengths: int64 [D]. True lengths of all documents; that of a tail pad is 0.
    """

    starts: Ints
    lengths: Ints
    borders: Ints
    true_lengths: Ints


def assemble(
    samples: Samples | Sequence[Sample],
    *,
    row_tokens: int,
    align_tokens: int,
    pad_token: int,
    samples_per_row: Sequence[int] | None = None,
) -> Columns:
    """Lay samples end to end in rows, the rows end to end, and derive every per-token fact.

    Args:
        samples: Those of a row have at most ``row_tokens`` tokens together, each rounded up to
            ``align_tokens``. A row of none is padding, which weighs nothing.
        row_tokens: Tokens of a row; a multiple of ``align_tokens``.
        align_tokens: Multiple of every document's length.
        pad_token: Id to fill gaps with. Masks go by position, so it may equal any token.
        samples_per_row: Samples of each row, in order; all in one row when not given.

    Returns:
        The fields of ``SFTBatch`` but the ids of rows and sets; whole rows, shifted.

    Example:
        >>> turns = turn_records([(2, 2, 0, 1)])                       # tokens 2 and 3 are trained
        >>> row = assemble([Sample(np.array([7, 8, 9, 5]), turns)], row_tokens=6, align_tokens=2,
        ...                pad_token=0)
        >>> row["tokens"].tolist(), row["labels"].tolist(), row["cu_seqlens"].tolist()
        ([7, 8, 9, 5, 0, 0], [0, 9, 5, 0, 0, 0], [0, 4, 6])
        >>> row["turn_tokens"].tolist()
        [0, 2, 2, 0, 0, 0]
    """
    if not isinstance(samples, Samples):
        samples = _together(samples)
    if samples_per_row is None:
        samples_per_row = [len(samples.tokens)]
    layout = _layout(
        np.array([len(tokens) for tokens in samples.tokens], np.int64),
        np.array(samples_per_row, np.int64),
        row_tokens=row_tokens,
        align_tokens=align_tokens,
    )
    sizes = np.diff(layout.borders)
    longest = np.arange(sizes.max())
    row: Columns = {
        "tokens": _tokens(samples.tokens, layout, pad_token=pad_token),
        "position_ids": np.concatenate([longest[:size] for size in sizes.tolist()]),
        "cu_seqlens": layout.borders.astype(np.int32),
        "cu_seqlens_unpadded": np.append(0, np.cumsum(layout.true_lengths)).astype(np.int32),
    }
    return row | _turn_facts(row["tokens"], samples, layout.starts)


def _together(samples: Sequence[Sample]) -> Samples:
    no_turns = np.zeros((0, len(TURN_FIELDS)), np.int32)
    return Samples(
        [sample.tokens for sample in samples],
        np.concatenate(
            [no_turns, *(s.turns for s in samples)], dtype=np.int32, casting="same_kind"
        ),
        np.array([len(sample.turns) for sample in samples], np.int64),
    )


def _layout(lengths: Ints, samples_per_row: Ints, *, row_tokens: int, align_tokens: int) -> _Layout:
    padded = -(-lengths // align_tokens) * align_tokens
    row_of = np.repeat(np.arange(len(samples_per_row)), samples_per_row)
    used = np.bincount(row_of, weights=padded, minlength=len(samples_per_row)).astype(np.int64)
    assert (used <= row_tokens).all(), "the row plan filled a row beyond its capacity"
    # Behind all samples before it, and the tail pads of the rows before its own.
    tails = row_tokens - used
    starts = np.cumsum(padded) - padded + (np.cumsum(tails) - tails)[row_of]
    has_tail = tails > 0
    behind = np.cumsum(samples_per_row)[has_tail]
    tail_starts = (np.arange(len(used)) * row_tokens + used)[has_tail]
    borders = np.append(np.insert(starts, behind, tail_starts), len(used) * row_tokens)
    return _Layout(starts, lengths, borders, np.insert(lengths, behind, 0))


def _tokens(views: Sequence[npt.NDArray[Any]], layout: _Layout, *, pad_token: int) -> Ints:
    """Copy the samples into place, one after the other, with padding in the gaps."""
    row = np.empty(layout.borders[-1], np.int64)
    ends = layout.starts + layout.lengths
    gaps = np.append(layout.starts, len(row)) - np.append(0, ends)
    padding = np.full(gaps.max(), pad_token, np.int64)
    parts: list[npt.NDArray[Any]] = []
    for gap, view in zip(gaps.tolist(), (*views, None), strict=True):
        if gap:
            parts.append(padding[:gap])
        if view is not None:
            parts.append(view)
    np.concatenate(parts, out=row)
    return row


def _turn_facts(tokens: Ints, samples: Samples, starts: Ints) -> Columns:
    """Return what each label needs to know, all turns of the micro-batch at once."""
    num_tokens, num_samples = len(tokens), len(samples.tokens)
    column = dict(zip(TURN_FIELDS, samples.turns.astype(np.int64).T, strict=True))
    sizes = column["num_tokens"]
    document = np.repeat(np.arange(num_samples), samples.num_turns)
    # The label of token t sits at position t - 1.
    first = column["start"] - 1 + starts[document]
    last = first + sizes - 1
    of_sample = np.bincount(document, weights=sizes, minlength=num_samples).astype(np.int64)

    # Runs of positions: before the first turn, the turn, up to the second turn, the turn, ...
    edges = np.zeros(2 * len(sizes) + 2, np.int64)
    edges[1:-1:2], edges[2:-1:2], edges[-1] = first, last + 1, num_tokens
    turns_so_far = np.cumsum(samples.num_turns)
    number = np.arange(1, len(sizes) + 1) - (turns_so_far - samples.num_turns)[document]
    of_run = np.zeros((4, len(edges) - 1), np.int32)
    of_run[:, 1::2] = sizes, of_sample[document], column["category_id"], number
    weight_of_run = np.zeros(len(edges) - 1, np.float32)
    weight_of_run[1::2] = turn_weights_of(samples.turns)
    run_tokens = edges[1:] - edges[:-1]
    turn_tokens, sample_tokens, category_ids, turn_numbers = np.repeat(of_run, run_tokens, axis=1)

    labels = np.zeros(num_tokens, np.int64)
    np.copyto(labels[:-1], tokens[1:], where=turn_tokens[:-1] > 0)
    ends_turn, ends_sample = np.zeros((2, num_tokens), np.bool_)
    ends_turn[last] = True
    ends_sample[last[turns_so_far[samples.num_turns > 0] - 1]] = True
    return {
        "labels": labels,
        "turn_tokens": turn_tokens,
        "sample_tokens": sample_tokens,
        "ends_turn": ends_turn,
        "ends_sample": ends_sample,
        "category_ids": category_ids,
        "turn_numbers": turn_numbers,
        "turn_weights": np.repeat(weight_of_run, run_tokens),
    }
