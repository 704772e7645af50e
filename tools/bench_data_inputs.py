"""Conversations and a tokenizer for `bench_data.py`: made here, the same for the same seed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FREQUENT = """the of and to a in is you that it he was for on are with as his they be at one have
this from or had by not but what some we can out other were all there when up use your how said an
each she which do their time if will way about many then them write would like so these her long
make thing see him two has look more day could go come did number sound no most people my over"""
CODE = """```python
def {0}({1}, {2}=0):
    for i, {2} in enumerate({1}):
        if {2} > {3}:
            return {{"{0}": {2} * {4}, "index": i}}
    return None
```"""


def trained_bpe(sample: Iterable[str], vocab_size: int, special: list[str]) -> Any:
    """Train a byte-level BPE that splits text as Qwen2's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bpe.add_tokens(["<think>", "</think>"])
    return bpe


def texts(file: Path, *, count: int) -> Iterator[str]:
    """Yield the contents of the first conversations of a file."""
    with file.open("rb") as source:
        for _, record in zip(range(count), source, strict=False):
            yield from (message["content"] for message in orjson.loads(record)["messages"])


def conversations_file(workdir: Path, count: int, seed: int) -> Path:
    """Write conversations of about 1,100 tokens each, unless the file is there."""
    path = workdir / f"conversations-{count}-seed{seed}.jsonl"
    if not path.exists():
        partial_file = path.with_suffix(".partial")
        writer = Writer(seed)
        with partial_file.open("wb") as output:
            output.writelines(orjson.dumps(writer.conversation()) + b"\n" for _ in range(count))
        partial_file.replace(path)
    return path


class Writer:
    """Writes conversations: words of a Zipf vocabulary, some Chinese, code, numbers and emoji."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])
        self._words = vocabulary(self._rng, count=60_000)
        weights = 1 / (np.arange(len(self._words)) + 2.7) ** 1.07
        self._steps = np.cumsum(weights) / weights.sum()
        self._pool: list[str] = []
        self._used = 0

    def conversation(self) -> dict[str, Any]:
        """Return one record."""
        rng, messages = self._rng, []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": self._prose(20)})
        thinks = rng.random() < 0.3
        for _ in range(int(rng.integers(2, 7))):
            question, answer = self._prose(int(rng.integers(8, 70))), self._answer()
            if thinks:
                answer = f"<think>\n{self._prose(40)}\n</think>\n\n{answer}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}

    def _answer(self) -> str:
        rng = self._rng
        parts = [self._prose(int(rng.integers(40, 220)))]
        kind = rng.random()
        if kind < 0.12:
            names = [word.strip(".,\n") for word in self._draw(3)]
            parts.append(CODE.format(*names, *rng.integers(0, 1000, 2)))
        elif kind < 0.24:
            common = 0x4E00 + (rng.pareto(0.9, int(rng.integers(20, 120))) * 40).astype(int) % 3500
            parts.append("".join(map(chr, common)) + "。")
        elif kind < 0.36:
            parts.append(" + ".join(f"{n:,}" for n in rng.integers(0, 10**6, 6)))
        elif kind < 0.42:
            parts.append("".join(chr(0x1F600 + int(n)) for n in rng.integers(0, 60, 4)))
        return "\n\n".join(parts)

    def _prose(self, num_words: int) -> str:
        return " ".join(self._draw(num_words)).strip().capitalize()

    def _draw(self, count: int) -> list[str]:
        if self._used + count > len(self._pool):
            ranks = np.searchsorted(self._steps, self._rng.random(200_000))
            marks = np.array(["", ",", ".", ".\n\n"], dtype=object)
            chosen = np.searchsorted([0.86, 0.94, 0.99], self._rng.random(200_000))
            self._pool, self._used = (self._words[ranks] + marks[chosen]).tolist(), 0
        self._used += count
        return self._pool[self._used - count : self._used]


def vocabulary(rng: np.random.Generator, *, count: int) -> Any:
    """Return distinct words, frequent ones first."""
    syllables = [a + b + c for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "ea")
                 for c in ("", "n", "r", "st", "ll", "m")]  # fmt: skip
    words = dict.fromkeys(FREQUENT.split())
    while len(words) < count:
        picks = rng.integers(0, len(syllables), (count, 4))
        lengths = 1 + np.minimum(rng.poisson(1.2, count), 3)
        made = zip(picks, lengths, strict=True)
        words |= dict.fromkeys("".join(syllables[i] for i in p[:n]) for p, n in made)
    return np.array(list(words)[:count], dtype=object)
