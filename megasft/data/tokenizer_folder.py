"""A tokenizer folder as a build needs it: its tokenizer.json, special tokens and chat templates.

transformers reads the folder, because it knows every way a tokenizer has been saved (SentencePiece
models, named templates, classes with habits of their own). Importing torch along with it would cost
500 MB in each worker, and nothing here needs it: worker processes shut it out (``workers.py``).
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megasft.data.chat_template import TEMPLATE_DATE, ChatTemplate
from megasft.data.conversation import BadRecordError
from megasft.data.specials import special_texts
from megasft.errors import DataError

TOKENIZER_FILE: Final = "tokenizer.json"
_THINKING: Final = {"<think>", "</think>"}  # an author who writes them means them
_PLAIN: Final = re.compile(r"[\w\s\u2581]*[^\w]?")
"""An added token of words or blanks, with one sign at the end at most: no control token."""
_TEXT_MODELS: Final = ("tokenizer.model", "spiece.model")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the store keeps of a tokenizer; small, and sent from a worker to the build.

    Attributes:
        vocab_size: Ids, the added ones counted.
        special_ids: Ids of ``bos``, ``eos`` and ``pad``; None where there is none.
        meta: What store.json says of tokenizer and chat template.
    """

    vocab_size: int
    special_ids: dict[str, int | None]
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """A loaded tokenizer folder.

    Attributes:
        path: The folder.
        hf: What transformers made of it.
        chat_template: Given template that replaces the folder's; empty for the folder's own.
    """

    path: Path
    hf: Any
    chat_template: str = ""

    def template(self, *, has_tools: bool) -> str:
        """Return the chat template for conversations with or without tools."""
        if self.chat_template:
            return self.chat_template
        source: str = self.hf.get_chat_template(tools=[{}] if has_tools else None)
        return source

    @property
    def special_tokens(self) -> set[str]:
        """Every special token, as text."""
        return special_texts(self.hf.added_tokens_decoder.values(), self.hf.special_tokens_map)

    def control_tokens(self) -> set[str]:
        """Return the special tokens, and others the template writes around plain messages.

        DeepSeek's ``<｜User｜>`` is an added token like any other, and yet it begins a turn. Words
        and blanks are none, though Gemma 3 has its line ends among the added tokens.
        """
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        template = ChatTemplate(self.template(has_tools=False), self.hf.special_tokens_map)
        written = ""
        with suppress(BadRecordError):
            written = template.run(messages, None)
        added = {str(token) for token in self.hf.added_tokens_decoder.values()}
        marks = {token for token in added - _THINKING if _PLAIN.fullmatch(token) is None}
        return self.special_tokens | {token for token in marks if token in written}

    @property
    def stops(self) -> set[str]:
        """Special tokens that can end a turn."""
        bos, eos = self.hf.bos_token, self.hf.eos_token
        return self.special_tokens - ({bos} if bos != eos else set())

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps."""
        names = (TOKENIZER_FILE, *_TEXT_MODELS)
        file = next((self.path / n for n in names if (self.path / n).is_file()), None)
        data = file.read_bytes() if file else self.hf.backend_tokenizer.to_str().encode()
        template = self.template(has_tools=False)
        meta = {
            "path": str(self.path.resolve()),
            "class": type(self.hf).__name__,
            "sha256": hashlib.sha256(data).hexdigest(),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        }
        if self.chat_template:
            meta["chat_template"] = self.chat_template
        if "strftime_now" in template:
            meta["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
        ids = {name: getattr(self.hf, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return TokenizerFacts(len(self.hf), ids, meta)


def open_folder(path: Path, *, chat_template: str = "") -> TokenizerFolder:
    """Open a tokenizer folder to render and encode with.

    Raises:
        DataError: It is missing, not a fast tokenizer, or there is no chat template.
    """
    hf = load_tokenizer(path, needs_template=not chat_template)
    return TokenizerFolder(path, hf, chat_template)


def _hint(folder: Path) -> str:
    """Return what a folder lacks, where that can be seen."""
    names = (TOKENIZER_FILE, *_TEXT_MODELS)
    if any((folder / name).is_file() for name in names):
        return ""
    if (folder / "tekken.json").is_file():
        return (
            f": it has Mistral's tekken.json alone, and {TOKENIZER_FILE} is needed; take a "
            "repository that has it, or convert it"
        )
    return f": none of {', '.join(names)} is there"


def load_tokenizer(folder: Path, *, needs_template: bool = True) -> Any:
    """Load a tokenizer folder, offline.

    Raises:
        DataError: It is missing, not a fast tokenizer, or has no chat template.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --tokenizer takes a downloaded model folder")
    from transformers import AutoTokenizer  # seconds to import: only when a tokenizer is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it raises whatever its libraries do
        cause = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{folder} holds no tokenizer that can be loaded{_hint(folder)} ({cause})"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: {type(tokenizer).__name__} knows no character offsets, which a fast "
            f"tokenizer ({TOKENIZER_FILE}) does; convert it first"
        )
    if needs_template and not tokenizer.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; put one into chat_template.jinja "
            "there, or name one with --chat-template"
        )
    return tokenizer
