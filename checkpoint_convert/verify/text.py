"""The row of tokens on which two models are compared: documents of several kinds, end to end.

Text of our own, so that nothing is fetched and every release compares the same: prose, code,
numbers and other scripts reach parts of a vocabulary and experts that plain English does not. A
folder whose tokenizer cannot be loaded is compared on pseudo-random ids; a conversion is judged by
its weights, which take any.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from checkpoint_convert.config_map import Model

DOCUMENTS: Final = (
    "A conversion that is wrong rarely looks wrong. The loss starts a little higher than it "
    "should, falls as losses do, and nobody asks why. A table of rotations that is off by a "
    "constant, a bias that was left behind: the model still writes sentences, only worse ones. "
    "So before anything is trained we let both programs read the same page, and compare what "
    "they expect of every next word. If the two agree to the last digits that rounding leaves, "
    "they are the same model. If not, it is better to know it now than after a month.",
    "def running_mean(values: list[float]) -> list[float]:\n"
    '    """Return the mean of every prefix."""\n'
    "    total, means = 0.0, []\n"
    "    for count, value in enumerate(values, start=1):\n"
    "        total += value\n"
    "        means.append(total / count)\n"
    "    return means\n\n"
    "assert running_mean([3, 5, 10]) == [3.0, 4.0, 6.0]\n"
    "SELECT name, COUNT(*) FROM layers WHERE norm > 1e-6 GROUP BY name;\n",
    "3.14159 26535 89793; 2^16 = 65,536; 0x1F600; -273.15 °C; 1/7 = 0.142857...; 10:45 h on "
    "2031-02-28; $1,299.00 + 19 % = $1,545.81; x² − 5x + 6 = 0 → x ∈ {2, 3}; ∑ 1/n² = π²/6.",
    "模型在转换之后必须与原来完全相同。Модель после преобразования должна остаться той же. "
    "変換したモデルは元のモデルと同じでなければなりません。يجب أن يبقى النموذج كما هو. "
    "रूपांतरण के बाद मॉडल वही रहना चाहिए। Το μοντέλο πρέπει να μείνει ίδιο. 🙂🚀 Größe, naïve, señor.",
)
"""Text, a document each."""

LEAST_TOKENS: Final = 128
"""Of a row."""

USUAL_TOKENS: Final = 192
"""Of the longest document, when nothing asks for a longer one."""

OTHER_TOKENS: Final = 64
"""Of the documents behind it, at most: logits of a large vocabulary take a megabyte a token."""

AFFORDABLE_TOKENS: Final = 1024
"""Of a document, at most. Attention costs the square of it on each side."""

ALIGN_TOKENS: Final = 8
"""The row is a multiple of this, which sequence parallelism up to TP 8 needs."""


class Row(NamedTuple):
    """Documents laid end to end.

    Attributes:
        documents: Token ids.
        source: Where they come from, for the report.
    """

    documents: tuple[tuple[int, ...], ...]
    source: str

    @property
    def num_tokens(self) -> int:
        """Of the row."""
        return sum(map(len, self.documents))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(map(len, self.documents))

    def padded(self) -> torch.Tensor:
        """Return int64 [documents, longest], filled with 0 behind a document's end."""
        tokens = torch.zeros(len(self.documents), self.longest, dtype=torch.int64)
        for i, document in enumerate(self.documents):
            tokens[i, : len(document)] = torch.tensor(document)
        return tokens

    def flat(self, padded: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the row's tokens, [tokens, ...], of [documents, longest, ...]."""
        return torch.cat([padded[i, : len(d)] for i, d in enumerate(self.documents)])

    def place(self, token: int) -> str:
        """Say where a token of the row is, for people."""
        for i, document in enumerate(self.documents):
            if token < len(document):
                return f"token {token} of document {i}"
            token -= len(document)
        raise IndexError(token)


def make_row(hf: Path, model: Model, config: Any) -> Row:
    """Make the row for a model.

    Args:
        hf: Folder with the tokenizer.
        model: Vocabulary.
        config: Configuration as transformers understands it.
    """
    longest = min(_longest(config), int(getattr(config, "max_position_embeddings", 1 << 30)))
    documents, source = _tokenize(hf, model.vocab_size)
    if documents is None:
        random = np.random.default_rng(0)
        sizes = (longest, *(len(DOCUMENTS) - 1) * (OTHER_TOKENS,))
        documents = [random.integers(model.vocab_size, size=size).tolist() for size in sizes]
    return Row(_cut(documents, longest), source)


def _longest(config: Any) -> int:
    """Return how long a document should be to reach what a model does differently far away."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    marks = [kind.get("original_max_position_embeddings") for kind in kinds]
    marks.append(getattr(config, "original_max_position_embeddings", None))
    marks.append(getattr(config, "sliding_window", None))
    reachable = [int(m) + 16 for m in marks if m and int(m) + 16 <= AFFORDABLE_TOKENS]
    return max([USUAL_TOKENS, *reachable])


def _tokenize(hf: Path, vocab_size: int) -> tuple[list[list[int]] | None, str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf)
        documents = [list(tokenizer(text)["input_ids"]) for text in DOCUMENTS]
    except Exception as error:  # whatever a tokenizer of any kind raises
        reason = " ".join(str(error).split())[:80] or repr(error)
        return None, f"pseudo-random ids: its tokenizer cannot be loaded ({reason})"
    largest = max(chain(*documents), default=0)
    if not all(documents):
        return None, "pseudo-random ids: its tokenizer makes no tokens of text"
    if largest >= vocab_size:
        return None, (
            f"pseudo-random ids: its tokenizer gives id {largest:,}, and the model has "
            f"{vocab_size:,} rows"
        )
    return documents, "text"


def _cut(documents: Sequence[Sequence[int]], longest: int) -> tuple[tuple[int, ...], ...]:
    """Cut documents to the longest allowed and repeat them until the row is long enough."""
    everything = list(chain(*documents))
    first = (everything * (longest // len(everything) + 1))[:longest]
    others = min(longest, OTHER_TOKENS)
    cut = [tuple(first)]
    for i, document in enumerate(documents[1:], start=1):
        cut.append(tuple(document[: max(1, others - i * others // 8)]))
    while sum(map(len, cut)) < LEAST_TOKENS + ALIGN_TOKENS:
        cut += [document[::-1] for document in cut]
    surplus = sum(map(len, cut)) % ALIGN_TOKENS
    while surplus:
        dropped = min(surplus, len(cut[-1]))
        cut[-1] = cut[-1][: len(cut[-1]) - dropped]
        cut = cut if cut[-1] else cut[:-1]
        surplus -= dropped
    return tuple(cut)
