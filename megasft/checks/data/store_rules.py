"""Rules about a store as a whole: duplicates, lengths, and what store.json itself counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from megasft.checks.data.subject import MAX_EXAMPLES, Needs, Subject, blocks, flags
from megasft.checks.engine import Finding, Severity, rule, step
from megasft.data import unread_keys

VERY_LONG: Final = 16
"""A sample is very long from this many medians on, ..."""
VERY_LONG_TOKENS: Final = 4096
"""... and never below this."""

_LEFT_OUT: Final = {
    "dropped": "dropped as too long",
    "truncated": "truncated as too long",
    "stripped_turns": "turn not trained, as the template leaves out its thinking",
}
"""Counts of store.json to what they mean."""


RECORD_REJECTED: Final = step(
    "record-rejected",
    Needs.BUILD,
    unit="records",
    meaning="the record cannot become a sample",
    remedy="mend the record, or build with --skip-bad to go on without it",
)


@rule("never-stops", Severity.ERROR, Needs.STORE, unit="turns")
def never_stops(subject: Subject) -> Iterator[Finding]:
    """No turn of the whole store trains a stop token: the model will never end an answer.

    Remedy: use a chat template that ends a turn with the eos token (--chat-template FILE)
    """
    num_turns = 0
    samples: list[int] = []
    for block in blocks(subject.store):
        stop = flags(subject.vocabulary.is_stop, block.tokens)
        if (block.count_in_turns(stop) > 0).any():
            return
        num_turns += len(block.starts)
        samples += (block.first + block.sample[:5]).tolist()[: 5 - len(samples)]
    population = subject.counts["turns"]
    yield Finding(count=num_turns, population=population, examples=subject.places(samples))


@rule("unread-meaning", Severity.ERROR, Needs.STORE, unit="records")
def unread_meaning(subject: Subject) -> Iterator[Finding]:
    """A key that sounds like a label, a prompt or a picture is not read.

    Remedy: rename it to a key that is read (megasft/data/README.md lists them), or remove it; if it
    means something else, --ignore unread-meaning
    """
    yield from _unread(subject, meant=True)


@rule("border-token", Severity.WARNING, Needs.STORE, unit="tokens")
def border_token(subject: Subject) -> Iterator[Finding]:
    """Tokens lie half in an answer and are not trained: the first word of it is lost.

    Remedy: end the template's assistant header with a special token or a line end, not a blank
    """
    count = int(subject.store.meta.get("counts", {}).get("border_tokens", 0))
    yield Finding(count=count, population=subject.counts["turns"])


@rule("duplicate-conversation", Severity.WARNING, Needs.STORE, unit="samples")
def duplicate_conversation(subject: Subject) -> Iterator[Finding]:
    """The conversation is there before: it is trained several times an epoch.

    Remedy: remove the repeats; to repeat on purpose, weight the source in a mixture
    """
    _, first, group = np.unique(subject.keys, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[group] != np.arange(len(subject.keys)))
    if not len(repeats):
        return
    one = int(repeats[0])
    places = subject.store.source_line(one), subject.store.source_line(int(first[group[one]]))
    most = int(np.bincount(group).max())
    detail = f"{places[0]} repeats {places[1]}; the most frequent one is there {most:,} times"
    yield Finding(
        count=len(repeats),
        population=len(subject.store),
        examples=subject.places(repeats[:100].tolist()),
        detail=detail,
    )


@rule("longer-than-model", Severity.WARNING, Needs.STORE, Needs.TOKENIZER, unit="samples")
def longer_than_model(subject: Subject) -> Iterator[Finding]:
    """The sample is longer than the tokenizer's model_max_length.

    Remedy: build with --max-tokens N
    """
    limit = getattr(subject.vocabulary.hf, "model_max_length", None)
    if limit is None or limit > 2**31:  # transformers' way to say that it does not know
        return
    yield from _longer_than(subject, int(limit))


@rule("stop-not-eos", Severity.NOTE, Needs.STORE, unit="tokens")
def stop_not_eos(subject: Subject) -> Iterator[Finding]:
    """Turns end in a token that is not the tokenizer's eos: generation may not stop there.

    Remedy: name it in eos_token_id of generation_config.json
    """
    special = subject.store.meta.get("special_tokens", {})
    others = sorted(set(special.get("end_of_turn", ())) - {special.get("eos")})
    if not others:
        return
    hf = subject.vocabulary.hf
    names = ", ".join(f"{i} {hf.convert_ids_to_tokens(i)}" if hf else str(i) for i in others)
    detail = f"ends of turns: {names}; eos: {special.get('eos')}"
    yield Finding(count=len(others), population=len(others), detail=detail)


@rule("pad-is-eos", Severity.NOTE, Needs.STORE, unit="stores")
def pad_is_eos(subject: Subject) -> Iterator[Finding]:
    """Pad and eos are the same id; megasft masks by position, so the eos is trained.

    Remedy: nothing to do here; trainers that mask the pad id would never train the eos
    """
    special = subject.vocabulary.special
    if "pad" in special and special["pad"] == special.get("eos"):
        yield Finding(count=1, population=1, detail=f"both are id {special['pad']}")


@rule("very-long", Severity.NOTE, Needs.STORE, unit="samples")
def very_long(subject: Subject) -> Iterator[Finding]:
    """The sample is at least 16 times as long as the median one.

    Remedy: look at it with `megasft inspect STORE --sample N`; build with --max-tokens N
    """
    lengths = subject.store.tokens.lengths
    limit = max(VERY_LONG_TOKENS, VERY_LONG * int(np.median(lengths))) if len(lengths) else 0
    yield from _longer_than(subject, limit)


@rule("unread-key", Severity.NOTE, Needs.STORE, unit="records")
def unread_key(subject: Subject) -> Iterator[Finding]:
    """A key is not read by megasft, nor by the chat template.

    Remedy: nothing, if it is an id or a score; else rename it to a key that is read
    """
    yield from _unread(subject, meant=False)


@rule("left-out", Severity.NOTE, Needs.STORE, unit="records")
def left_out(subject: Subject) -> Iterator[Finding]:
    """The build left records out, or changed them, and counted why in store.json.

    Remedy: see the list beside the store, STORE.rejected.jsonl
    """
    counts = subject.store.meta.get("counts", {})
    reasons = {f"rejected: {reason}": int(n) for reason, n in counts.get("rejected", {}).items()}
    reasons |= {name: int(counts.get(key, 0)) for key, name in _LEFT_OUT.items()}
    detail = "; ".join(f"{num:,} x {reason}" for reason, num in reasons.items() if num)
    population = int(counts.get("conversations", 0))
    yield Finding(count=sum(reasons.values()), population=population, detail=detail)


def _unread(subject: Subject, *, meant: bool) -> Iterator[Finding]:
    meta = subject.store.meta
    found = [
        key for key in meta.get("unread_keys", []) if unread_keys.sounds_meant(key["key"]) is meant
    ]
    detail = "; ".join(unread_keys.lines_of(found))
    num_records = max((key["num_records"] for key in found), default=0)
    population = int(meta.get("counts", {}).get("conversations", 0))
    yield Finding(count=num_records, population=population, detail=detail)


def _longer_than(subject: Subject, limit: int) -> Iterator[Finding]:
    lengths = subject.store.tokens.lengths
    found = np.flatnonzero(lengths > limit)
    if not len(found):
        return
    longest = found[np.argsort(-lengths[found], kind="stable")]
    yield Finding(
        count=len(found),
        population=len(lengths),
        examples=subject.places(longest[:MAX_EXAMPLES].tolist()),
        detail=f"longer than {limit:,} tokens; the longest has {int(lengths.max()):,}",
    )
