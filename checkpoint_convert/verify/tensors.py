"""Every tensor of a checkpoint against the Hugging Face folder, bit for bit, a piece at a time.

A conversion checks its own arithmetic; this reads what was written. It is still the same table of
rules that both ways go by, so a rule that is wrong on both ways passes here. What the tensors mean
is the business of the logits.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from checkpoint_convert.config_map import Model
from checkpoint_convert.families import DERIVED_TENSORS
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.megatron_checkpoint import PieceReader
from checkpoint_convert.pieces import Piece, pieces
from checkpoint_convert.rules import same_bits
from checkpoint_convert.tensor_map import (
    OUTPUT,
    merge_piece,
    require_hf_names,
    require_keys,
    split_piece,
)
from checkpoint_convert.verify.verification import failed, passed
from megasft.checks.engine import Finding
from megasft.errors import ConversionError

SHOWN: Final = 3
"""Tensors that a report names, of those that are wrong."""


class Fingerprint(NamedTuple):
    """What the manifest keeps of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def count(model: Model) -> int:
    """Return how many steps ``check_checkpoint`` takes."""
    return len(pieces(model))


def check_checkpoint(
    hf: HFTensors,
    iteration: Path,
    model: Model,
    *,
    is_conversion: bool,
    done: Callable[[], None],
) -> tuple[Finding, dict[str, Fingerprint]]:
    """Compare every piece with what the folder's tensors make, and the way back.

    Args:
        hf: The folder's tensors.
        iteration: Folder of the checkpoint.
        model: Names, sizes and joins.
        is_conversion: Whether the checkpoint was made of the folder. Else the folder was made of
            it: the vocabulary may be padded in it, and its tensors are rounded as the folder's are.
        done: Called after every piece.

    Returns:
        The check, and fingerprints of the folder's tensors.

    Raises:
        ConversionError: Tensors are missing, left over or of another size.
    """
    require_hf_names(hf.names, model)
    reader = PieceReader(iteration)
    require_keys(reader.keys, model)
    wrong, rounded, num_bytes = [], 0, 0
    prints: dict[str, Fingerprint] = {}
    for piece in pieces(model):
        parts = [hf[name] for name in piece.hf]
        stored = reader.read(piece)
        whole = stored if is_conversion else _as_exported(stored, piece, model, parts[0].dtype)
        rounded += whole.dtype != stored.dtype
        wanted = merge_piece(piece, parts, model, verify=False)
        if same_bits(whole, wanted):
            back = split_piece(piece, whole, model, verify=False)
            if not all(same_bits(back[n], p) for n, p in zip(piece.hf, parts, strict=True)):
                wrong.append(f"{piece.name} does not split into {', '.join(piece.hf)}")
        else:
            wrong.append(f"{piece.name} {difference(whole, wanted)}")
        for name, part in zip(piece.hf, parts, strict=True):
            prints[name] = fingerprint(part)
            num_bytes += part.nbytes
        done()
    total = len(pieces(model))
    figures = {"pieces": total, "bytes": num_bytes, "wrong": len(wrong), "rounded": rounded}
    if wrong:
        return _wrong("tensors", wrong, total), prints
    how = f", {rounded:,} of them rounded to the folder's dtype first" if rounded else ""
    detail = f"{total:,} pieces equal bit for bit{how}, both ways ({num_bytes:,} bytes)"
    return passed("tensors", detail, figures), prints


def _as_exported(stored: torch.Tensor, piece: Piece, model: Model, dtype: Any) -> torch.Tensor:
    """Return a trained tensor as it is written to a folder: without padding, and rounded."""
    rows = model.vocab_size if piece.rule.has_vocabulary_rows else len(stored)
    return stored[:rows].to(dtype)


def check_returned(
    hf: HFTensors, returned: HFTensors, model: Model, *, done: Callable[[], None]
) -> Finding:
    """Compare a folder with the one it should be equal to, names and dtypes included."""
    names, others = (_own_names(tensors, model) for tensors in (hf, returned))
    missing = [name for name in names if name not in set(others)]
    extra = [name for name in others if name not in set(names)]
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} is not in {hf.folder}" for name in extra]
    for name in names:
        if name not in set(missing):
            wanted, found = hf[name], returned[name]
            if not same_bits(found, wanted):
                wrong.append(f"{name} {difference(found, wanted)}")
            done()
    if wrong:
        return _wrong("returned tensors", wrong, len(names))
    detail = f"{len(names):,} tensors equal bit for bit, 0 missing, 0 extra"
    return passed("returned tensors", detail, {"tensors": len(names), "wrong": 0})


def _own_names(tensors: HFTensors, model: Model) -> list[str]:
    """Return names without what is computed from the configuration, or written twice."""
    twice = {OUTPUT} if model.is_tied else set()
    names = (name for name in tensors.names if not name.endswith(DERIVED_TENSORS))
    return [name for name in names if name not in twice]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Say how two tensors differ.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        'differs in 1 of 2 elements, by up to 5.0e-01'
    """
    for what, a, b in (
        ("shape", tuple(found.shape), tuple(wanted.shape)),
        ("dtype", found.dtype, wanted.dtype),
    ):
        if a != b:
            return f"has the {what} {a} and not {b}"
    num_wrong = int((found != wanted).sum())
    if not num_wrong:
        return "differs in bits that compare as equal (-0.0, or nan)"
    largest = float((found.double() - wanted.double()).abs().max())
    return f"differs in {num_wrong:,} of {found.numel():,} elements, by up to {largest:.1e}"


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Return dtype, shape and SHA-256 of a tensor's bytes, little-endian and row-major."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return Fingerprint(
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        hashlib.sha256(data).hexdigest(),
    )


def _wrong(name: str, wrong: Iterable[str], total: int) -> Finding:
    found = list(wrong)
    shown = "; ".join(found[:SHOWN])
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    detail = f"{len(found):,} of {total:,} are wrong: {shown}{more}"
    return failed(name, detail, {"wrong": len(found), "total": total})


def require_tensors(folder: Path) -> HFTensors:
    """Open a folder's tensors.

    Raises:
        ConversionError: There is no such folder, or there are none in it.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not there; give a Hugging Face model folder")
    return HFTensors(folder)
