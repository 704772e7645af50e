"""What lint knows of each token id: does it stop a turn, is it blank, does it begin a line.

Tables over the vocabulary turn questions about text into look-ups in an array, so they are asked of
every token of a store and not of a few decoded samples. Without the tokenizer only the ids that
store.json names are known; rules that need more then say that they did not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megasft.checks.data.blocks import Bools
from megasft.store import TokenStore

_MEANT_IN_ANSWERS: Final = re.compile(r"tool|call|python|think|reason|channel|message", re.I)
"""Special tokens that answers do hold: marks of tool calls and of thinking."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Facts about token ids; a table is bool [V].

    Attributes:
        special: bos, eos and pad as store.json names them; an id may be missing.
        stops: Ids that end a turn.
        is_stop: Table of ``stops``.
        is_control: Special tokens that have no place inside an answer, the stops among them.
        is_blank: White space alone; all False without the tokenizer.
        is_newline: Begins with a line end; all False without the tokenizer.
        hf: The Hugging Face tokenizer, or None.
    """

    special: dict[str, int]
    stops: frozenset[int]
    is_stop: Bools
    is_control: Bools
    is_blank: Bools
    is_newline: Bools
    hf: Any = None


def vocabulary_of(store: TokenStore, hf: Any = None) -> Vocabulary:
    """Read the special ids of store.json, and the texts of all ids where there is a tokenizer."""
    named = store.meta.get("special_tokens", {})
    special = {k: int(named[k]) for k in ("bos", "eos", "pad") if named.get(k) is not None}
    stops = frozenset(int(i) for i in named.get("end_of_turn", ()))
    stops |= {special["eos"]} if "eos" in special else frozenset()
    texts = _texts(hf)
    size = max([int(store.meta["vocab_size"]), len(texts), *(i + 1 for i in stops)])
    control = {*stops, *special.values(), *_control_ids(hf)}
    return Vocabulary(
        special,
        stops,
        is_stop=_table(size, stops),
        is_control=_table(size, control),
        is_blank=_table(size, (i for i, text in enumerate(texts) if text.isspace())),
        is_newline=_table(size, (i for i, t in enumerate(texts) if t.startswith(("\n", "\r")))),
        hf=hf,
    )


def flags(table: Bools, tokens: npt.NDArray[np.integer[Any]]) -> Bools:
    """Look tokens up; an id outside the table counts as its last entry."""
    return np.take(table, tokens, mode="clip")


def special_texts(hf: Any) -> dict[str, int]:
    """Return the special tokens of a tokenizer and their ids; marks that are mere text are out."""
    found = {str(t): int(i) for i, t in hf.added_tokens_decoder.items() if t.special}
    return found | {t: int(hf.convert_tokens_to_ids(t)) for t in hf.all_special_tokens}


def _control_ids(hf: Any) -> Iterable[int]:
    if hf is None:
        return ()
    return (i for text, i in special_texts(hf).items() if not _MEANT_IN_ANSWERS.search(text))


def _texts(hf: Any) -> list[str]:
    if hf is None:
        return []
    return list(hf.backend_tokenizer.decode_batch([[i] for i in range(len(hf))], False))


def _table(size: int, ids: Iterable[int]) -> Bools:
    table = np.zeros(size, bool)
    table[list(ids)] = True
    return table
