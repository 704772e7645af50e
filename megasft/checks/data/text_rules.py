"""Rules about the text of answers, decoded from the store; they see a sample of the samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from megasft.checks.data.subject import Needs, Vocabulary, special_texts
from megasft.checks.engine import Severity, rule
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


@rule("empty-thinking-trained", Severity.WARNING, Needs.TEXT, unit="turns")
def empty_thinking_trained(texts: Texts) -> int:
    """An empty think block is trained: the model learns to think nothing.

    Remedy: remove it from the answers; what the template inserts is not trained by megasft build
    """
    return sum(bool(_EMPTY.search(answer)) for answer in texts.answers)


@rule("thinking-not-closed", Severity.WARNING, Needs.TEXT, unit="turns")
def thinking_not_closed(texts: Texts) -> int:
    """The answer begins to think and never ends it.

    Remedy: remove the record: its answer was probably cut off
    """
    return sum(
        len(_OPENS.findall(answer)) > len(_CLOSES.findall(answer)) for answer in texts.answers
    )


@rule("broken-text", Severity.WARNING, Needs.TEXT, unit="turns")
def broken_text(texts: Texts) -> int:
    """The answer holds U+FFFD, the sign for bytes that could not be read.

    Remedy: read the original file again with its true encoding
    """
    return sum("\N{REPLACEMENT CHARACTER}" in answer for answer in texts.answers)


@rule("speaker-in-answer", Severity.NOTE, Needs.TEXT, unit="turns")
def speaker_in_answer(texts: Texts) -> int:
    """A line of the answer begins with the name of a speaker, as where two turns ran together.

    Remedy: split the message into turns
    """
    return sum(bool(_SPEAKER.search(answer)) for answer in texts.answers)


@rule("special-token-as-text", Severity.NOTE, Needs.TEXT, unit="samples")
def special_token_as_text(texts: Texts) -> int:
    """The text spells a special token, in ordinary tokens, as it should be.

    Remedy: nothing to do
    """
    return int(any(texts.whole.count(text) > n for text, n in texts.special_counts.items()))


@rule("thinking-kept", Severity.NOTE, Needs.TEXT, unit="turns")
def thinking_kept(texts: Texts) -> int:
    """The answer trains thinking.

    Remedy: nothing to do if a reasoning model is meant
    """
    return sum(bool(_OPENS.search(_EMPTY.sub("", answer))) for answer in texts.answers)
