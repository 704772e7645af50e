"""All rules of lint by name: what each finds, how bad that is, and what to do about it.

A rule is one small function over one of four things: the store, blocks of token ids, the text of a
sample, or a sample beside its conversation. The first two see everything, the last two a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from megasft.checks.data import id_rules, record_rules, store_rules, text_rules
from megasft.checks.data.blocks import Block, Ints
from megasft.checks.data.store_rules import Hits, Subject
from megasft.checks.data.text_rules import Texts
from megasft.checks.data.vocabulary import Vocabulary
from megasft.checks.data.witness import Witness
from megasft.severity import Severity


class OnStore(NamedTuple):
    """Asked once."""

    check: Callable[[Subject], Hits]
    needs_tokenizer: bool = False


class OnIds(NamedTuple):
    """Asked of each block; returns the sample of each hit."""

    check: Callable[[Block, Vocabulary], Ints]
    needs_tokenizer: bool = False


class OnText(NamedTuple):
    """Asked of the text of some samples; returns the number of hits."""

    check: Callable[[Texts], int]


class OnRecord(NamedTuple):
    """Asked of some samples beside their conversations; returns the number of hits."""

    check: Callable[[Witness], int]
    needs_same_tokens: bool = False


class OnBuild(NamedTuple):
    """Answered by the build itself; only where files are linted."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        severity: How bad it is.
        unit: What a hit is: "turns", "samples", "records", "tokens" or "stores".
        meaning: What it finds, in a sentence.
        remedy: What to do, a flag or an edit.
        on: What it looks at, and its function.
    """

    severity: Severity
    unit: str
    meaning: str
    remedy: str
    on: OnStore | OnIds | OnText | OnRecord | OnBuild


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

RULES: Final[dict[str, Rule]] = {
    "stop-not-trained": Rule(
        _E, "turns",
        "a control token ends the answer but is not trained: the model does not learn to stop",
        "build the store again with megasft build, which trains it; or, in a template of your "
        "own, put the stop token inside {% generation %}",
        OnIds(id_rules.stop_not_trained),
    ),
    "never-stops": Rule(
        _E, "turns",
        "no turn of the whole store trains a stop token: the model will never end an answer",
        "use a chat template that ends a turn with the eos token (--chat-template FILE)",
        OnStore(store_rules.never_stops),
    ),
    "prompt-trained": Rule(
        _E, "turns",
        "tokens of the prompt, or of what follows the message, are trained as if they were answer",
        "build the store again; if it stays, report the chat template",
        OnRecord(record_rules.prompt_trained, needs_same_tokens=True),
    ),
    "answer-start-untrained": Rule(
        _E, "turns",
        "the first token the model has to generate after its prompt is not trained",
        "build the store again; if it stays, report the chat template",
        OnRecord(record_rules.answer_start_untrained, needs_same_tokens=True),
    ),
    "not-assistant": Rule(
        _E, "turns",
        "the turn trains a message of the user, the system or a tool",
        "build the store again, with the same --format and --*-key flags given to lint",
        OnRecord(record_rules.not_assistant, needs_same_tokens=True),
    ),
    "render-differs": Rule(
        _E, "samples",
        "the tokens are not those of transformers' apply_chat_template of the same conversation",
        "build the store again with this tokenizer; give lint the --*-key flags of the build",
        OnRecord(record_rules.render_differs, needs_same_tokens=True),
    ),
    "mask-all-zero": Rule(
        _E, "samples",
        "nothing of the sample is trained: it costs time and teaches nothing",
        "label at least one assistant message 1, or leave the record out",
        OnIds(id_rules.mask_all_zero),
    ),
    "mask-all-one": Rule(
        _E, "samples",
        "everything is trained, the prompt too",
        "build with --train-on all-turns; if everything is meant, --ignore mask-all-one",
        OnIds(id_rules.mask_all_one),
    ),
    "turn-out-of-range": Rule(
        _E, "turns",
        "a turn record is empty, overlaps the one before, or leaves its sample",
        "the program that wrote the store is wrong; build it with megasft build",
        OnIds(id_rules.turn_out_of_range),
    ),
    "token-out-of-range": Rule(
        _E, "samples",
        "a token id is negative or not in the vocabulary",
        "build the store with the tokenizer of the model",
        OnIds(id_rules.token_out_of_range),
    ),
    "stop-inside-turn": Rule(
        _E, "turns",
        "a control token stands inside the answer: the model learns to stop and go on",
        "build with --special-tokens-in-text escape, or edit the text",
        OnIds(id_rules.stop_inside_turn),
    ),
    "special-token-in-text": Rule(
        _E, "samples",
        "a special token that an author wrote as text became a control token",
        "build with --special-tokens-in-text escape, or reject",
        OnRecord(record_rules.special_token_in_text),
    ),
    "tool-calls": Rule(
        _E, "turns",
        "a tool call of a trained message is not in what is trained",
        "use a chat template that renders tool_calls (--chat-template FILE)",
        OnRecord(record_rules.tool_calls, needs_same_tokens=True),
    ),
    "tool-arguments-untrained": Rule(
        _E, "turns",
        "an argument of a tool call of a trained message is not in what is trained",
        "build the store again; if it stays, report the chat template",
        OnRecord(record_rules.tool_arguments_untrained, needs_same_tokens=True),
    ),
    "record-rejected": Rule(
        _E, "records",
        "the record cannot become a sample",
        "mend the record, or build with --skip-bad to go on without it",
        OnBuild(),
    ),
    "unread-meaning": Rule(
        _E, "records",
        "a key that sounds like a label, a prompt or a picture is not read",
        "rename it to a key that is read (megasft/data/README.md lists them), or remove it; if it "
        "means something else, --ignore unread-meaning",
        OnStore(store_rules.unread_meaning),
    ),
    "empty-answer": Rule(
        _W, "turns",
        "the answer is nothing but white space and a stop token: the model learns to say nothing",
        "remove the record, or label the message 0",
        OnIds(id_rules.empty_answer),
    ),
    "answer-cut": Rule(
        _W, "turns",
        "the sample ends inside the answer, without a stop token",
        "build with --too-long truncate-turns and a larger --max-tokens; if the template ends its "
        "last turn without a stop token, use another (--chat-template FILE)",
        OnIds(id_rules.answer_cut),
    ),
    "turn-without-stop": Rule(
        _W, "turns",
        "the answer ends without a stop token and ordinary text follows",
        "use a chat template that ends each turn with a special token (--chat-template FILE)",
        OnIds(id_rules.turn_without_stop),
    ),
    "prefix-unstable": Rule(
        _W, "turns",
        "the prompt at inference (messages before the answer, with generation prompt) is not how "
        "the whole render begins: the answer is trained behind a prompt the model never gets",
        "see which part differs with `megasft trace --sample`; train such records with "
        "--train-on last-turn, or use a template that renders history as it was generated",
        OnRecord(record_rules.prefix_unstable, needs_same_tokens=True),
    ),
    "glued-prompt": Rule(
        _W, "turns",
        "the last tokens of the prompt glue to the answer: at inference they are other tokens",
        "end the template's assistant header with a special token or a line end, not a blank",
        OnRecord(record_rules.glued_prompt, needs_same_tokens=True),
    ),
    "border-token": Rule(
        _W, "tokens",
        "tokens lie half in an answer and are not trained: the first word of it is lost",
        "end the template's assistant header with a special token or a line end, not a blank",
        OnStore(store_rules.border_token),
    ),
    "duplicate-conversation": Rule(
        _W, "samples",
        "the conversation is there before: it is trained several times an epoch",
        "remove the repeats; to repeat on purpose, weight the source in a mixture",
        OnStore(store_rules.duplicate_conversation),
    ),
    "thinking-lost": Rule(
        _W, "turns",
        "the message has thinking which the chat template leaves out of the render",
        "cut the conversation behind that answer, so that it is the last turn; or choose with "
        "--stripped-thinking mask, train or reject",
        OnRecord(record_rules.thinking_lost),
    ),
    "empty-thinking-trained": Rule(
        _W, "turns",
        "an empty think block is trained: the model learns to think nothing",
        "remove it from the answers; what the template inserts is not trained by megasft build",
        OnText(text_rules.empty_thinking_trained),
    ),
    "thinking-not-closed": Rule(
        _W, "turns",
        "the answer begins to think and never ends it",
        "remove the record: its answer was probably cut off",
        OnText(text_rules.thinking_not_closed),
    ),
    "leading-newline": Rule(
        _W, "turns",
        "the answer begins with a line end: the model learns to print one first",
        "strip the answers",
        OnIds(id_rules.leading_newline, needs_tokenizer=True),
    ),
    "bos-twice": Rule(
        _W, "samples",
        "the sample begins with two bos tokens: both the template and something else added one",
        "remove bos_token from the chat template or from the text",
        OnIds(id_rules.bos_twice),
    ),
    "unknown-token": Rule(
        _W, "samples",
        "the vocabulary cannot spell part of the text: the unknown token stands for it",
        "remove the characters, or use a tokenizer with byte fallback",
        OnIds(id_rules.unknown_token, needs_tokenizer=True),
    ),
    "broken-text": Rule(
        _W, "turns",
        "the answer holds U+FFFD, the sign for bytes that could not be read",
        "read the original file again with its true encoding",
        OnText(text_rules.broken_text),
    ),
    "tool-arguments-twice": Rule(
        _W, "samples",
        "the arguments of a tool call are rendered as JSON inside a JSON string",
        "store `arguments` as an object, not as a string",
        OnRecord(record_rules.tool_arguments_twice),
    ),
    "longer-than-model": Rule(
        _W, "samples",
        "the sample is longer than the tokenizer's model_max_length",
        "build with --max-tokens N",
        OnStore(store_rules.longer_than_model, needs_tokenizer=True),
    ),
    "speaker-in-answer": Rule(
        _N, "turns",
        "a line of the answer begins with the name of a speaker, as where two turns ran together",
        "split the message into turns",
        OnText(text_rules.speaker_in_answer),
    ),
    "special-token-as-text": Rule(
        _N, "samples",
        "the text spells a special token, in ordinary tokens, as it should be",
        "nothing to do",
        OnText(text_rules.special_token_as_text),
    ),
    "thinking-kept": Rule(
        _N, "turns",
        "the answer trains thinking",
        "nothing to do if a reasoning model is meant",
        OnText(text_rules.thinking_kept),
    ),
    "tools-not-declared": Rule(
        _N, "samples",
        "tools are called which the conversation does not declare in `tools`",
        "add `tools`, so that the model sees what it may call",
        OnRecord(record_rules.tools_not_declared),
    ),
    "nulls-padded": Rule(
        _W, "samples",
        "tools or arguments hold nulls that a table put there: each has the fields of all others",
        "give the parquet or Arrow file itself to --input, where nulls are left out; or write the "
        "JSON from the records it was made of, not through a table",
        OnRecord(record_rules.nulls_padded),
    ),
    "stop-not-eos": Rule(
        _N, "tokens",
        "turns end in a token that is not the tokenizer's eos: generation may not stop there",
        "name it in eos_token_id of generation_config.json",
        OnStore(store_rules.stop_not_eos),
    ),
    "pad-is-eos": Rule(
        _N, "stores",
        "pad and eos are the same id; megasft masks by position, so the eos is trained",
        "nothing to do here; trainers that mask the pad id would never train the eos",
        OnStore(store_rules.pad_is_eos),
    ),
    "very-long": Rule(
        _N, "samples",
        "the sample is at least 16 times as long as the median one",
        "look at it with `megasft inspect STORE --sample N`; build with --max-tokens N",
        OnStore(store_rules.very_long),
    ),
    "unread-key": Rule(
        _N, "records",
        "a key is not read by megasft, nor by the chat template",
        "nothing, if it is an id or a score; else rename it to a key that is read",
        OnStore(store_rules.unread_key),
    ),
    "left-out": Rule(
        _N, "records",
        "the build left records out, or changed them, and counted why in store.json",
        "see the list beside the store, STORE.rejected.jsonl",
        OnStore(store_rules.left_out),
    ),
}  # fmt: skip
