"""A micro-batch token by token, as one would fill it in by hand; slow on purpose."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megasft.batch.dataset import RowShape
from megasft.schema import PER_TOKEN_FIELDS, Sample

DTYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("tokens", "labels", "position_ids"), np.dtype(np.int64)),
    **dict.fromkeys(("turn_tokens", "sample_tokens"), np.dtype(np.int32)),
    **dict.fromkeys(("category_ids", "turn_numbers"), np.dtype(np.int32)),
    "turn_weights": np.dtype(np.float32),
    **dict.fromkeys(("ends_turn", "ends_sample"), np.dtype(np.bool_)),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_unpadded"), np.dtype(np.int32)),
    **dict.fromkeys(("row_ids", "set_ids"), np.dtype(np.int64)),
}


def micro_batch(rows: Sequence[Sequence[Sample]], shape: RowShape) -> dict[str, npt.NDArray[Any]]:
    """Return one rank's share of these rows, laid end to end; their ids are the dataset's."""
    columns: dict[str, list[Any]] = {name: [] for name in PER_TOKEN_FIELDS}
    borders, true_lengths = [0], []
    for samples in rows:
        used = 0
        for sample in samples:
            size = -(-len(sample.tokens) // shape.align_tokens) * shape.align_tokens
            _document(columns, sample, size, shape.pad_token)
            borders.append(borders[-1] + size)
            true_lengths.append(len(sample.tokens))
            used += size
        if used < shape.row_tokens:
            tail = shape.row_tokens - used
            _document(columns, None, tail, shape.pad_token)
            borders.append(borders[-1] + tail)
            true_lengths.append(0)
    mine = _mine(borders, shape)
    batch: dict[str, npt.NDArray[Any]] = {
        name: np.array([columns[name][t] for t in mine], DTYPES[name]) for name in columns
    }
    batch["cu_seqlens"] = np.array(borders, np.int32)
    unpadded = [sum(true_lengths[:n]) for n in range(len(true_lengths) + 1)]
    return batch | {"cu_seqlens_unpadded": np.array(unpadded, np.int32)}


def _document(columns: dict[str, list[Any]], sample: Sample | None, size: int, pad: int) -> None:
    tokens = [] if sample is None else sample.tokens.tolist()
    turns = [] if sample is None else sample.turns.tolist()
    of_sample = sum(turn[1] for turn in turns)
    for t in range(size):
        facts = {name: 0 for name in PER_TOKEN_FIELDS}
        facts |= {"tokens": tokens[t] if t < len(tokens) else pad, "position_ids": t}
        for number, (start, num_tokens, category, _, weight) in enumerate(turns, start=1):
            if start <= t + 1 < start + num_tokens:
                is_last = t + 2 == start + num_tokens
                facts |= {"labels": tokens[t + 1], "turn_tokens": num_tokens}
                facts |= {"sample_tokens": of_sample, "category_ids": category}
                facts |= {"turn_numbers": number, "turn_weights": float_of(weight)}
                facts |= {"ends_turn": is_last, "ends_sample": is_last and start == turns[-1][0]}
        for name, value in facts.items():
            columns[name].append(value)


def float_of(bits: int) -> float:
    """Return the float32 of these bits."""
    (value,) = struct.unpack("<f", struct.pack("<i", bits))
    return float(value)


def _mine(borders: Sequence[int], shape: RowShape) -> list[int]:
    """Return the positions of this rank: slice r from the front and slice r from the back."""
    mine: list[int] = []
    for n in range(len(borders) - 1):
        piece = (borders[n + 1] - borders[n]) // (2 * shape.cp_size)
        for place in (shape.cp_rank, 2 * shape.cp_size - 1 - shape.cp_rank):
            start = borders[n] + place * piece
            mine += range(start, start + piece)
    return mine if shape.cp_size > 1 else list(range(borders[-1]))
