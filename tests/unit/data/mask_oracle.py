"""Token ids and masks as the Hugging Face tokenizer and a family's oracle say they must be.

The one way into the engine is ``build_samples``; one test holds it against ``megasft build``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from megasft.cli.main import app
from megasft.data.formats import FieldMap
from megasft.data.render import RenderOptions
from megasft.data.tokenize import Made, Recipe, Tokenizer
from megasft.store import open_store
from tests.unit.data.families import (
    FAMILIES,
    Family,
    Piece,
    Record,
    is_trained,
    template_of,
    texts_of,
)

_QWEN2_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT: Final = """
You are a helpful assistant. The user asks, the assistant answers; a tool returns what it found.
def add(first, second):\n    return first + second\n\nprint(add(1, 2))  # 3\nfor i in range(10):
{"name": "weather", "arguments": {"city": "Paris", "unit": "celsius"}} <tool_call> </tool_call>
What is the capital of France? It is Paris. Let us think step by step: 17 * 24 = 408, said 12345.
你好，世界。今天天气怎么样？法国的首都是巴黎。我们一步一步来想。こんにちは、世界。안녕하세요 세계
Привет, мир! Как дела? Ça va très bien, merci. Größe, naïve, café, Zürich. Hello there, hello world
I do not know yet. Yes. No. Maybe the answer is forty-two, and the question is what we asked for.\n
First line.\n\n\nSecond line.  Two blanks.\n\n        deep indent\n\n\n\n\tTabs\t\tand ends.\r\n
"""


class Expected(NamedTuple):
    """What a record must become.

    Attributes:
        tokens: Ids of the whole render.
        mask: True where a token is trained.
        turns: Messages with a trained turn, ascending.
        num_border_tokens: Tokens that lie half in an answer.
    """

    tokens: list[int]
    mask: list[bool]
    turns: list[int]
    num_border_tokens: int


class Built(NamedTuple):
    """What the engine made of a record: a sample, or the reason why not.

    Attributes:
        tokens: Ids of the whole render.
        turns: First trained token, trained tokens and message of each turn.
        num_border_tokens: Tokens that lie half in an answer.
        reason: Empty for a sample.
    """

    tokens: list[int]
    turns: list[tuple[int, int, int]]
    num_border_tokens: int
    reason: str = ""

    @property
    def mask(self) -> list[bool]:
        """True where a token is trained."""
        mask = [False] * len(self.tokens)
        for start, num_tokens, _ in self.turns:
            mask[start : start + num_tokens] = [True] * num_tokens
        return mask


def build_samples(records: list[Record], tokenizer_folder: Path, **options: Any) -> list[Built]:
    """Return what each record becomes; the only place that knows the engine.

    Args:
        records: Conversations of the format ``messages``.
        tokenizer_folder: What ``--tokenizer`` names.
        options: Flags of ``megasft build``: ``train_on``, ``special_tokens_in_text``,
            ``stripped_thinking``; and ``encoder``, ``check_all`` for the slow roads.
    """
    lines = enumerate(map(orjson.dumps, records), start=1)
    outcomes = _engine(tokenizer_folder, **options).make(list(lines))
    return [_built(outcome) for outcome in outcomes]


@cache
def _engine(
    folder: Path,
    *,
    train_on: str = "all-turns",
    special_tokens_in_text: str = "escape",
    stripped_thinking: str = "mask",
    encoder: str = "auto",
    check_all: bool = False,
) -> Tokenizer:
    recipe = Recipe(
        folder,
        fields=FieldMap(train_on=train_on),
        special_tokens_in_text=special_tokens_in_text,
        rendering=RenderOptions(stripped_thinking=stripped_thinking, check_all=check_all),
        encoder=encoder,
    )
    return Tokenizer(recipe)


def _built(outcome: Any) -> Built:
    if not isinstance(outcome, Made):
        return Built([], [], 0, getattr(outcome, "reason", "dropped"))
    tokens, turns = outcome.sample
    rows = [(start, length, message) for start, length, _, message, _ in turns.tolist()]
    return Built(tokens.tolist(), rows, outcome.num_border_tokens)


def build_by_command(records: list[Record], tokenizer_folder: Path, *flags: str) -> list[Built]:
    """Return what ``megasft build --skip-bad`` makes of each record; border tokens not told."""
    source, store = (tokenizer_folder.with_name(name) for name in ("chats.jsonl", "store"))
    source.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    command = ["build", "--input", source, "--tokenizer", tokenizer_folder, "--output", store]
    result = CliRunner().invoke(app, [*map(str, command), "--skip-bad", "--overwrite", *flags])
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    built: dict[int, Built] = {}
    rejected = store.with_name("store.rejected.jsonl")
    for line in rejected.read_bytes().splitlines() if rejected.exists() else ():
        entry = orjson.loads(line)
        built[entry["line"]] = Built([], [], 0, entry["reason"])
    made = open_store(store)
    for index in range(len(made)):
        tokens, turns = made.sample(index)
        rows = [(start, length, message) for start, length, _, message, _ in turns.tolist()]
        built[int(made.lineage[index, 1])] = Built(tokens.tolist(), rows, 0)
    return [built[line] for line in range(1, len(records) + 1)]


def expected_sample(
    record: Record, family: Family, hf: Any, *, escapes: bool, trains_stripped: bool = False
) -> Expected:
    """Return what a record must become.

    Args:
        record: The conversation.
        family: Whose oracle is asked.
        hf: The Hugging Face tokenizer of the family.
        escapes: Special tokens in the author's texts stay text; else they become tokens.
        trains_stripped: Train turns whose thinking the template drops.
    """
    pieces = family.oracle(record, trains_stripped)
    ids, bounds = _encode(pieces, family, hf.backend_tokenizer, escapes=escapes)
    mask, borders = [False] * len(ids), 0
    spans = _spans(pieces)
    for begin, end in spans.values():
        for index, (left, right) in enumerate(bounds):
            mask[index] |= index > 0 and begin <= left and right <= end
            borders += left < begin < right or left < end < right
    return Expected(ids, mask, list(spans), borders)


def _spans(pieces: list[Piece]) -> dict[int, tuple[int, int]]:
    spans: dict[int, tuple[int, int]] = {}
    place = 0
    for text, turn, _ in pieces:
        if turn is not None:
            begin = spans[turn][0] if turn in spans else place
            spans[turn] = (begin, place + len(text))
        place += len(text)
    return spans


def _encode(
    pieces: list[Piece], family: Family, backend: Backend, *, escapes: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if not escapes:
        whole = backend.encode(texts_of(pieces), add_special_tokens=False)
        return whole.ids, whole.offsets
    ids: list[int] = []
    bounds: list[tuple[int, int]] = []
    place = 0
    for text, is_control in _between_controls(pieces, family):
        backend.encode_special_tokens = not is_control
        part = backend.encode(text, add_special_tokens=False)
        ids += part.ids
        bounds += [(place + left, place + right) for left, right in part.offsets]
        place += len(text)
    backend.encode_special_tokens = False
    return ids, bounds


def _between_controls(pieces: list[Piece], family: Family) -> list[tuple[str, bool]]:
    """Cut a render at the special tokens the template wrote; the author's are text."""
    controls = re.compile(f"({'|'.join(map(re.escape, family.special))})")
    parts, text = [], ""
    for piece in pieces:
        if piece.written:
            text += piece.text
            continue
        first, *others = controls.split(piece.text)
        text += first
        for control, behind in zip(others[::2], others[1::2], strict=True):
            parts += [(text, False), (control, True)]
            text = behind
    return [part for part in [*parts, (text, False)] if part[0]]


def wants_training(record: Record) -> bool:
    """Say if any message of a record is to be trained."""
    return any(is_trained(record, index) for index in range(len(record["messages"])))


@cache
def _byte_level_bpe() -> str:
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = _words(_QWEN2_WORDS)
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return bpe.to_str()


@cache
def _sentencepiece_bpe() -> str:
    """Return what SentencePiece models are converted to: no words, bytes for unknown characters."""
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    _train(learner, [])
    learned = orjson.loads(learner.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [(left, right) for left, right in learned["merges"]]
    bpe = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    blanks = decoders.Replace("▁", " ")
    bpe.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])
    return bpe.to_str()


def _train(bpe: Backend, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator([_TEXT], trainer)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


def make_family_tokenizer(name: str, folder: Path, template: str = "") -> Path:
    """Save the tokenizer of a family, of the kind the published one is."""
    family = FAMILIES[name]
    bpe = Backend.from_str(_sentencepiece_bpe() if name == "gemma" else _byte_level_bpe())
    if name in ("chatml", "qwen3"):
        bpe.normalizer = normalizers.NFC()
    elif name in ("mistral", "plain"):
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.added])
    named = {"bos_token": family.bos} if family.bos else {}
    hf = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=family.eos,
        pad_token=family.special[0],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[t for t in family.special[1:] if t not in (family.bos, family.eos)],
        **named,
    )
    hf.chat_template = template or template_of(name)
    hf.save_pretrained(folder)
    return folder


@cache
def load_hf(folder: Path) -> Any:
    """Load a saved tokenizer once."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
