"""Rules about the text of answers, decoded from the store; they see a sample of the samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from megasft.checks.data.vocabulary import Vocabulary, special_texts
from megasft.store import TokenStore

_OPENS: Final = re.compile(r"<think(?:ing)?>|\[THINK\]")
_CLOSES: Final = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_EMPTY: Final = re.compile(r"<think(?:ing)?>\s*</think(?:ing)?>|\[THINK\]\s*\[/THINK\]")
_SPEAKER: Final = re.compile(
    r"^(?:Human|User|USER|ASSISTANT|### (?:Instruction|Human|Response|Input))\s*:", re.M
)


class Texts(NamedTuple):
    """The text of one sample.

    Attributes:
        answers: Each turn, its stop token included.
        whole: The sample.
        special_counts: Special tokens of the vocabulary and how often their id is in the sample.
    """

    answers: tuple[str, ...]
    whole: str
    special_counts: dict[str, int]


def text_reader(store: TokenStore, vocabulary: Vocabulary) -> Callable[[int], Texts]:
    """Return what decodes one sample of a store."""
    decode = vocabulary.hf.backend_tokenizer.decode
    special = special_texts(vocabulary.hf)

    def texts_of(index: int) -> Texts:
        tokens, turns = store.sample(index)
        ids = tokens.tolist()
        answers = (decode(ids[a : a + n], False) for a, n, *_ in turns.tolist())
        whole = decode(ids, False)
        counts = {text: ids.count(i) for text, i in special.items() if text and text in whole}
        return Texts(tuple(answers), whole, counts)

    return texts_of


def thinking_kept(texts: Texts) -> int:
    """Count answers that train thinking."""
    return sum(bool(_OPENS.search(_EMPTY.sub("", answer))) for answer in texts.answers)


def empty_thinking_trained(texts: Texts) -> int:
    """Count answers that train an empty think block."""
    return sum(bool(_EMPTY.search(answer)) for answer in texts.answers)


def thinking_not_closed(texts: Texts) -> int:
    """Count answers that begin to think and do not end it."""
    return sum(
        len(_OPENS.findall(answer)) > len(_CLOSES.findall(answer)) for answer in texts.answers
    )


def special_token_as_text(texts: Texts) -> int:
    """Count samples that spell a special token in ordinary tokens."""
    return int(any(texts.whole.count(text) > n for text, n in texts.special_counts.items()))


def broken_text(texts: Texts) -> int:
    """Count answers that hold the sign for bytes nobody could read."""
    return sum("\N{REPLACEMENT CHARACTER}" in answer for answer in texts.answers)


def speaker_in_answer(texts: Texts) -> int:
    """Count answers in which the next speaker begins a line."""
    return sum(bool(_SPEAKER.search(answer)) for answer in texts.answers)
