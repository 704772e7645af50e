"""Samples to one packed row: aligned, with the tail pad as its own document, labels shifted.

Labels are shifted here, on whole rows, before anything is cut: cutting first loses a label at every
seam. The tail pad is a document of its own, because attention costs the square of a document and
padding must not lengthen the last one. Everything a loss can ask about a label (length of its turn
and sample, whether it ends them) is written beside it, so that any share of the row knows it
without communication.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megasft.schema import TURN_FIELDS, Sample

Columns = dict[str, npt.NDArray[Any]]
"""The fields of an ``SFTBatch`` as numpy arrays."""


def assemble(
    samples: list[Sample], *, row_tokens: int, align_tokens: int, pad_token: int
) -> Columns:
    """Lay samples end to end in a row and derive every per-token fact.

    Args:
        samples: At most ``row_tokens`` tokens together, each rounded up to ``align_tokens``. None
            gives a row of padding, which weighs nothing.
        row_tokens: Tokens of the row; a multiple of ``align_tokens``.
        align_tokens: Multiple of every document's length.
        pad_token: Id to fill gaps with. Masks go by position, so it may equal any token.

    Returns:
        The fields of ``SFTBatch``, whole row, shifted.

    Example:
        >>> turns = np.array([[2, 2, 0, 1]])                          # tokens 2 and 3 are trained
        >>> row = assemble([Sample(np.array([7, 8, 9, 5]), turns)], row_tokens=6, align_tokens=2,
        ...                pad_token=0)
        >>> row["tokens"].tolist(), row["labels"].tolist(), row["cu_seqlens"].tolist()
        ([7, 8, 9, 5, 0, 0], [0, 9, 5, 0, 0, 0], [0, 4, 6])
        >>> row["turn_tokens"].tolist()
        [0, 2, 2, 0, 0, 0]
    """
    lengths = np.array([len(s.tokens) for s in samples], dtype=np.int64)
    padded = -(-lengths // align_tokens) * align_tokens
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(padded)])
    assert borders[-1] <= row_tokens, "the row plan filled a row beyond its capacity"

    row = _empty_row(row_tokens, pad_token)
    for border, sample in zip(borders[:-1].tolist(), samples, strict=True):
        row["tokens"][border : border + len(sample.tokens)] = sample.tokens
    has_tail = borders[-1] < row_tokens
    cu_seqlens = np.append(borders, row_tokens) if has_tail else borders
    row["position_ids"] = np.arange(row_tokens) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    row["cu_seqlens"] = cu_seqlens.astype(np.int32)
    true_lengths = np.append(lengths, 0) if has_tail else lengths
    row["cu_seqlens_unpadded"] = np.concatenate([[0], np.cumsum(true_lengths)]).astype(np.int32)
    if samples:
        _write_turns(row, samples, borders[:-1])
    return row


def _empty_row(row_tokens: int, pad_token: int) -> Columns:
    row: Columns = {
        name: np.zeros(row_tokens, dtype)
        for name, dtype in (
            *(("labels", np.int64), ("turn_tokens", np.int32), ("sample_tokens", np.int32)),
            *(("ends_turn", np.bool_), ("ends_sample", np.bool_), ("category_ids", np.int32)),
        )
    }
    row["tokens"] = np.full(row_tokens, pad_token, np.int64)
    return row


def _write_turns(row: Columns, samples: list[Sample], starts: npt.NDArray[np.int64]) -> None:
    """Write what each label needs to know, all turns of the row at once."""
    records = np.concatenate([s.turns for s in samples]).astype(np.int64)
    document = np.repeat(np.arange(len(samples)), [len(s.turns) for s in samples])
    column = dict(zip(TURN_FIELDS, records.T, strict=True))
    sizes = column["num_tokens"]
    # The label of token t sits at position t - 1.
    first = column["start"] - 1 + starts[document]
    ends = np.cumsum(sizes)
    offset_in_turn = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)
    where = np.repeat(first, sizes) + offset_in_turn

    labels_of_sample = np.bincount(document, weights=sizes, minlength=len(samples)).astype(np.int64)
    row["labels"][where] = row["tokens"][where + 1]
    row["turn_tokens"][where] = np.repeat(sizes, sizes)
    row["sample_tokens"][where] = np.repeat(labels_of_sample[document], sizes)
    row["category_ids"][where] = np.repeat(column["category_id"], sizes)
    row["ends_turn"][first + sizes - 1] = True
    is_last_turn = np.append(document[1:] != document[:-1], True)[: len(document)]
    row["ends_sample"][(first + sizes - 1)[is_last_turn]] = True


def join(rows: list[Columns]) -> Columns:
    """Lay rows end to end into one flat micro-batch.

    Example:
        >>> a = assemble([], row_tokens=2, align_tokens=1, pad_token=0)
        >>> join([a, a])["cu_seqlens"].tolist()
        [0, 2, 4]
    """
    if len(rows) == 1:
        return rows[0]
    joined = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    for name in ("cu_seqlens", "cu_seqlens_unpadded"):
        joined[name] = _join_borders([r[name] for r in rows])
    return joined


def _join_borders(parts: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
