"""Whether the stores are whole, of this format, and made with the model's own tokenizer.

An id means a token only with its tokenizer. Another tokenizer of the same vocabulary size trains
without a word and ruins the model, so the tokenizer file that the conversion kept beside the
weights is compared with that of the store: by its hash, and where that differs (a file saved again
by another release of the library) by what decides the ids: vocabulary, merges, added tokens, and
how text is split. Rejected: loading both with transformers, which takes seconds and compares less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from megasft.checks.engine import Finding, Severity, rule, step
from megasft.checks.run.subject import Stage, Subject
from megasft.data.tokenizer_folder import TOKENIZER_FILE
from megasft.errors import FlagError, StoreError
from megasft.files import MODEL_FILE, SIDE_FOLDER
from megasft.store import FORMAT_VERSION, META, TokenStore, open_store
from megasft.training import validation

CONFIG: Final = "config.json"
"""Of a Hugging Face folder."""

_FILES: Final = (TOKENIZER_FILE, "tokenizer.model", "spiece.model")
_DECIDES_IDS: Final = ("normalizer", "pre_tokenizer")


class Tokenizer(NamedTuple):
    """A tokenizer as far as ids go.

    Attributes:
        sha256: Of its file; a build keeps the same one in store.json.
        path: The file; None where it is gone.
    """

    sha256: str | None
    path: Path | None


def store_paths(args: Any) -> list[str]:
    """Return the folders of all stores of a run, each once."""
    with suppress(FlagError):  # open_data says it
        valid = validation.named_stores(args.megasft_valid_data).values()
        return list(dict.fromkeys([*(args.megasft_data or ()), *valid]))
    return list(dict.fromkeys(args.megasft_data or ()))


@rule("store", Severity.ERROR, Stage.FLAGS, theme="data")
def unreadable(subject: Subject) -> Iterator[Finding]:
    """A store is missing, half-written, damaged or of another version."""
    for path in store_paths(subject.args):
        version = _format_version(Path(path))
        if version is not None and version > FORMAT_VERSION:
            yield Finding(
                f"{path} was built by a newer megasft: format version {version}, this one reads "
                f"{FORMAT_VERSION}",
                "update megasft, or build the store again with this one",
                {"format_version": version},
            )
            continue
        try:
            open_store(path)
        except StoreError as error:
            yield Finding(str(error))


ROWS = step("rows", Stage.OPEN, theme="data", meaning="rows cannot be made of the stores")


def _format_version(path: Path) -> int | None:
    try:
        return int(orjson.loads((path / META).read_bytes())["format_version"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None  # open_store says what is wrong


@rule("tokenizer", Severity.ERROR, Stage.DATA, theme="data")
def other_tokenizer(subject: Subject) -> Iterator[Finding]:
    """A store was made with another tokenizer than the model's."""
    folder = model_folder(subject.args)
    model = tokenizer_of_model(folder) if folder else None
    if folder is None or model is None:
        return
    for store in each_store(subject):
        ours = tokenizer_of_store(store)
        if ours.sha256 in (None, model.sha256):
            continue
        difference = _difference(ours.path, model.path)
        if difference:
            yield Finding(
                f"{store.path} was made with another tokenizer than {folder} has ({difference}), "
                "so its ids are other tokens to the model",
                f"build the store again with --tokenizer {hf_files(folder)}",
                {"store_sha256": ours.sha256, "model_sha256": model.sha256},
            )


@rule("tokenizer-moved", Severity.WARNING, Stage.DATA, theme="data")
def uncomparable_tokenizer(subject: Subject) -> Iterator[Finding]:
    """A store's tokenizer file differs and cannot be compared."""
    folder = model_folder(subject.args)
    model = tokenizer_of_model(folder) if folder else None
    if folder is None or model is None:
        return
    for store in each_store(subject):
        ours = tokenizer_of_store(store)
        if ours.sha256 in (None, model.sha256):
            continue
        if _difference(ours.path, model.path) is None:
            yield Finding(
                f"{store.path} was made with a tokenizer file (sha256 {ours.sha256[:12]}) other "
                f"than that in {folder} ({str(model.sha256)[:12]}), and the store's is not where "
                "store.json says, so ids cannot be compared",
                f"make sure that they are the same tokenizer: `megasft lint {store.path} "
                f"--tokenizer {hf_files(folder)}`, or build again",
            )


@rule("tokenizer-unknown", Severity.NOTE, Stage.DATA, theme="data")
def unknown_tokenizer(subject: Subject) -> Iterator[Finding]:
    """A tokenizer is not known."""
    if tokenizer_of_model(model_folder(subject.args)) is None:
        yield Finding(
            "the model's tokenizer is not known, so that of the stores cannot be compared with it",
            "start from --megasft-hf, whose folder keeps the tokenizer",
        )
    for store in each_store(subject):
        if tokenizer_of_store(store).sha256 is None:
            yield Finding(f"{store.path} does not say which tokenizer made it", "build it again")


@rule("validation-tokenizer", Severity.ERROR, Stage.DATA, theme="data")
def unlike_validation(subject: Subject) -> Iterator[Finding]:
    """A validation store was made with another tokenizer."""
    train = subject.data.train.store
    ours = tokenizer_of_store(train)
    if tokenizer_of_model(model_folder(subject.args)) is not None:
        return  # all stores are compared with the model
    for name, planned in subject.data.valid.items():
        theirs = tokenizer_of_store(planned.store)
        if None in (ours.sha256, theirs.sha256) or ours.sha256 == theirs.sha256:
            continue
        if _difference(ours.path, theirs.path) != "":
            yield Finding(
                f"validation store {name} ({planned.store.path}) was made with another tokenizer "
                f"than {train.name}, so its loss means nothing",
                "build both with one tokenizer",
            )


@rule("validation-template", Severity.WARNING, Stage.DATA, theme="data")
def unlike_template(subject: Subject) -> Iterator[Finding]:
    """A validation store was rendered with another chat template."""
    ours = _fact(subject.data.train.store, "chat_template_sha256")
    for name, planned in subject.data.valid.items():
        theirs = _fact(planned.store, "chat_template_sha256")
        if ours and theirs and ours != theirs:
            yield Finding(
                f"validation store {name} was rendered with another chat template (sha256 "
                f"{theirs[:12]}) than the training data ({ours[:12]})",
                "build both with one template, unless the other format is what is tested",
            )


@rule("validation-trained", Severity.WARNING, Stage.DATA, theme="data")
def same_data(subject: Subject) -> Iterator[Finding]:
    """A validation store is trained on."""
    args = subject.args
    train = {Path(path).resolve() for path in args.megasft_data}
    prints = {open_store(path).fingerprint for path in args.megasft_data}
    for name, planned in subject.data.valid.items():
        store = planned.store
        if store.path.resolve() in train or store.fingerprint in prints:
            yield Finding(
                f"validation store {name} ({store.path}) is trained on, so its loss says nothing "
                "about new data",
                "hold some data out",
            )


@rule("stop-token", Severity.WARNING, Stage.DATA, theme="data")
def other_stop(subject: Subject) -> Iterator[Finding]:
    """Turns end where the model's generation does not stop."""
    folder = model_folder(subject.args)
    known = _stops(hf_files(folder)) if folder else []
    trained = subject.data.train.store.meta.get("special_tokens", {}).get("end_of_turn") or []
    if known and trained and not set(known) & set(trained):
        yield Finding(
            f"turns of the training data end in token {_list(trained)}, and the model's "
            f"generation stops at {_list(known)} only",
            "name it in eos_token_id of generation_config.json when the model is exported",
            {"trained": trained, "stops": known},
        )


@rule("document-over-positions", Severity.WARNING, Stage.DATA, theme="data")
def document_over_positions(subject: Subject) -> Iterator[Finding]:
    """Documents are longer than the model was made for."""
    most = model_positions(subject.args)
    plan, lengths = subject.data.train.plan, subject.data.train.store.tokens.lengths
    placed = lengths[plan.rows.samples]
    if most is None or int(placed.max(initial=0)) <= most:
        return
    longer = int((placed > most).sum())
    yield Finding(
        f"{longer:,} documents are longer than the {most:,} positions the model was made for; the "
        f"longest has {int(placed.max()):,} tokens",
        "scale its rope in the Hugging Face config before converting (rope_parameters, yarn for "
        "one), or build with --max-tokens",
        {"documents": longer, "positions": most},
    )


def model_positions(args: Any) -> int | None:
    """Return the longest text the model was made for, scaled rope counted; None if not known."""
    folder = model_folder(args)
    if folder is None:
        return None
    is_converted = (folder / MODEL_FILE).is_file()
    config = orjson.loads((folder / (MODEL_FILE if is_converted else CONFIG)).read_bytes())
    config = config.get("hf_config") or config
    config = config.get("text_config") or config
    found = config.get("max_position_embeddings")
    return None if found is None else int(found)


def model_folder(args: Any) -> Path | None:
    """Return the converted checkpoint that a run starts from, if there is one.

    It is a Hugging Face folder where ``megasft train`` has yet to convert it.
    """
    for folder in (args.megasft_hf, args.pretrained_checkpoint, args.load):
        if folder and any((Path(folder) / name).is_file() for name in (MODEL_FILE, CONFIG)):
            return Path(folder)
    return None


def hf_files(folder: Path) -> Path:
    """Return where the Hugging Face files of a model folder are."""
    return folder / SIDE_FOLDER if (folder / MODEL_FILE).is_file() else folder


def tokenizer_of_model(folder: Path | None) -> Tokenizer | None:
    """Return the tokenizer that a conversion kept; None without one."""
    for name in _FILES if folder else ():
        path = hf_files(Path(str(folder))) / name
        if path.is_file():
            return Tokenizer(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return None


def tokenizer_of_store(store: TokenStore) -> Tokenizer:
    """Return the tokenizer that store.json names; its file only while it is the same one."""
    sha256, folder = _fact(store, "sha256"), _fact(store, "path")
    for name in _FILES if folder else ():
        path = Path(str(folder)) / name
        if path.is_file():
            same = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
            return Tokenizer(sha256, path if same else None)
    return Tokenizer(sha256, None)


def each_store(subject: Subject) -> Iterator[TokenStore]:
    """Yield the stores of a run one by one; several that are read as one are several."""
    for path in store_paths(subject.args):
        yield open_store(path)


def _fact(store: TokenStore, name: str) -> str | None:
    value = store.meta.get("tokenizer", {}).get(name)
    return None if value is None else str(value)


def _difference(ours: Path | None, theirs: Path | None) -> str | None:
    """Return how two tokenizers differ in ids: "" for not at all, None where it cannot be told."""
    if ours is None or theirs is None or TOKENIZER_FILE not in (ours.name, theirs.name):
        return None
    if ours.name != theirs.name:
        return None
    mine, other = (orjson.loads(path.read_bytes()) for path in (ours, theirs))
    ids, other_ids = _ids(mine), _ids(other)
    if ids != other_ids:
        unlike = [
            i for i in sorted(ids.keys() | other_ids.keys()) if ids.get(i) != other_ids.get(i)
        ]
        first = unlike[0]
        return (
            f"{len(unlike):,} of {max(len(ids), len(other_ids)):,} ids differ; id {first} is "
            f"{ids.get(first)!r} in the store, {other_ids.get(first)!r} in the model"
        )
    if _merges(mine) != _merges(other):
        return "the same ids, other merges"
    for part in _DECIDES_IDS:
        if mine.get(part) != other.get(part):
            return f"the same ids, another {part.replace('_', '-')}"
    return ""


def _ids(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score], by id
        ids = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
    else:
        ids = {int(i): str(token) for token, i in vocabulary.items()}
    return ids | {int(t["id"]): str(t["content"]) for t in tokenizer.get("added_tokens") or ()}


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    # Older files write "a b", newer ones ["a", "b"].
    merges = tokenizer.get("model", {}).get("merges") or ()
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]


def _stops(folder: Path) -> list[int]:
    for name in ("generation_config.json", CONFIG):
        try:
            found = orjson.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, orjson.JSONDecodeError):
            continue
        if found is not None:
            return [int(i) for i in (found if isinstance(found, list) else [found])]
    return []


def _list(ids: list[int]) -> str:
    return ", ".join(map(str, ids))
