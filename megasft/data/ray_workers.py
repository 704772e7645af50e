"""Workers on a Ray cluster, fed in order, with the same answers as one process gives.

The package `ray` (extra ``megasft[ray]``) is imported here alone. Nodes share no file system with
the build: the records travel, and so do this very megasft and the few files of the tokenizer. What
has to be there already is Python with the packages megasft needs, in the same versions, because
others may mean other bytes; that is checked as each worker starts. A worker or node that dies is
started again by Ray, which repeats what was lost. Chosen over Ray Data, which neither keeps order
for free nor says which record a fault was in. Cost: all bytes pass through this one process.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import re
import socket
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import megasft
from megasft.data.read import Chunk
from megasft.data.tokenize import Recipe, Tokenizer
from megasft.data.tokenizer_folder import TokenizerFacts
from megasft.data.workers import CHUNKS_AHEAD, Answer, Outcomes, Records
from megasft.errors import DataError, MissingPackageError

LOCAL: Final = "local"
"""The address that starts a cluster of this machine alone."""
MAX_RESTARTS: Final = 3
"""Of one worker. A record that kills each worker it meets ends the build after as many."""
_SECONDS_PER_WARNING: Final = 60.0
_SECONDS_TO_LEAVE: Final = 5.0
_SECONDS_TO_ANSWER: Final = 10.0
_HOST_AND_PORT: Final = re.compile(r"(?:ray://)?([^:/]+):(\d+)")
_DECIDING_PACKAGES: Final = (
    *("tokenizers", "gigatoken", "transformers", "sentencepiece", "jinja2", "orjson", "numpy"),
)
_TOKENIZER_SUFFIXES: Final = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_MAX_SHIPPED_BYTES: Final = 512 * 2**20

_log = logging.getLogger(__name__)
Files = dict[str, bytes]
"""Contents by path below a folder."""


class Hello(NamedTuple):
    """What a worker says when it is ready.

    Attributes:
        node: Name of its machine.
        versions: Of all that decides the bytes of a store.
    """

    node: str
    versions: dict[str, str]


class RayWorker:
    """Makes samples on a node; an actor, which Ray may start again anywhere and at any time."""

    def __init__(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the actors are the parallelism
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would complain that there is no torch
        sys.modules["torch"] = None  # type: ignore[assignment]  # 500 MB it can spare
        self._folder = tempfile.TemporaryDirectory(prefix="megasft-")
        self._tokenizer: Tokenizer | None = None
        self._places: dict[str, str] = {}  # errors name paths as they are where the build runs

    def hello(self) -> Hello:
        """Answer as soon as records may come."""
        return Hello(platform.node(), versions())

    def answer(self, records: Records | None, packed: list[Any]) -> bytes:
        """Return the outcomes, or the error that ends the build, as a pickle.

        Arrays that Ray itself carries cannot be written to, and keep its memory taken.

        Args:
            records: Line and bytes of each; None asks for the facts of the tokenizer.
            packed: One reference to a recipe and its files. It comes with every question, because
                a worker that was started again has none.
        """
        answer: Answer
        try:
            if self._tokenizer is None:
                recipe, files = _import_ray().get(packed[0])
                moved = unpack(recipe, files, Path(self._folder.name))
                self._places = {str(getattr(moved, n)): str(getattr(recipe, n)) for n in files}
                self._tokenizer = Tokenizer(moved)
            answer = self._tokenizer.facts() if records is None else self._tokenizer.make(records)
        except DataError as error:
            error.args = tuple(self._as_sent(str(part)) for part in error.args)
            answer = error
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)

    def _as_sent(self, text: str) -> str:
        for here, there in self._places.items():
            text = text.replace(here, there)
        return text

    def leave(self) -> None:
        """Remove what was unpacked here."""
        self._folder.cleanup()


class RayWorkers:
    """Actors on a cluster; a context manager, so that none outlives the build.

    Args:
        recipe: How a record becomes a sample; sent once.
        address: ``auto``, ``local``, ``host:6379`` or ``ray://host:10001``. A program that is
            connected to Ray already stays connected as it is.
        num_workers: Actors of one core each; 0 for one on each core of the cluster.

    Raises:
        DataError: No cluster answers.
        MissingPackageError: Ray is not installed.
    """

    def __init__(self, recipe: Recipe, *, address: str, num_workers: int = 0) -> None:
        self._recipe, self._ray = recipe, _import_ray()
        packed = pack(recipe)
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            connect(self._ray, address)
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        self._num_workers = num_workers or max(cores, 1)
        actor = self._ray.remote(
            num_cpus=1, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )(RayWorker)
        self._packed = [self._ray.put((recipe, packed))]
        self._actors = [actor.remote() for _ in range(self._num_workers)]
        # An actor gets work when it has said hello: a cluster may have room for only some of them.
        self._starting = {each.hello.remote(): n for n, each in enumerate(self._actors)}
        self._working: dict[Any, int] = {}
        self._loads: Counter[int] = Counter()

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer, with the path it has on this machine."""
        facts = self._answer(self._ask(None))
        assert isinstance(facts, TokenizerFacts)
        return replace(facts, meta=facts.meta | {"path": str(self._recipe.tokenizer.resolve())})

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks.

        Raises:
            DataError: A worker died too often, differs from this machine, or refused the recipe.
        """
        waiting: deque[tuple[Chunk, Any]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._ask(chunk.records)))
            if len(waiting) > 2 * CHUNKS_AHEAD * self._num_workers:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: deque[tuple[Chunk, Any]]) -> tuple[Chunk, Outcomes]:
        chunk, asked = waiting.popleft()
        outcomes = self._answer(asked)
        assert isinstance(outcomes, list)
        return chunk, outcomes

    def _ask(self, records: Records | None) -> Any:
        number = self._free_worker()
        asked = self._actors[number].answer.remote(records, self._packed)
        self._working[asked] = number
        self._loads[number] += 1
        return asked

    def _free_worker(self) -> int:
        while True:
            free = min(self._loads, key=lambda n: self._loads[n], default=None)
            if free is not None and self._loads[free] < CHUNKS_AHEAD:
                return free
            asked = [*self._starting, *self._working]
            ready, _ = self._ray.wait(asked, timeout=_SECONDS_PER_WARNING)
            if not ready and not self._loads:
                _log.warning(
                    "Ray has started none of %d workers of one core each; it is waited for "
                    "(`ray status` shows who holds the cores)",
                    self._num_workers,
                )
            for question in ready:
                self._note(question)

    def _note(self, question: Any) -> None:
        if question in self._working:
            self._loads[self._working.pop(question)] -= 1
            return
        number = self._starting.pop(question)
        hello: Hello = self._get(question)
        if hello.versions != (ours := versions()):
            differing = "; ".join(
                f"{name} {hello.versions.get(name)} there, {ours[name]} here"
                for name in ours
                if hello.versions.get(name) != ours[name]
            )
            raise DataError(
                f"the node {hello.node} would make other bytes: {differing}; install the same "
                "versions on all nodes"
            )
        self._loads[number] = 0

    def _answer(self, asked: Any) -> Answer:
        answer: Answer = pickle.loads(self._get(asked))
        if isinstance(answer, DataError):
            raise answer
        return answer

    def _get(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(
                f"a worker on Ray failed ({type(error).__name__}: {last}); one that dies is "
                f"started again {MAX_RESTARTS} times: look at its log with `ray logs`, and at the "
                "memory of its node"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        leaving = [self._actors[number].leave.remote() for number in self._loads]
        if leaving:
            self._ray.wait(leaving, num_returns=len(leaving), timeout=_SECONDS_TO_LEAVE)
        for each in self._actors:
            self._ray.kill(each)
        if self._is_ours:
            self._ray.shutdown()


def versions() -> dict[str, str]:
    """Return the versions of what decides the bytes of a store."""
    found = {"megasft": megasft.__version__, "python": platform.python_version()}
    for package in _DECIDING_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def pack(recipe: Recipe) -> dict[str, Files]:
    """Read the files a recipe points at: all of them, or of a folder what tokenizers are made of.

    Returns:
        Files by the name of the recipe's field that points at them.

    Raises:
        DataError: They cannot be read, or are too many to be those of a tokenizer.
    """
    packed: dict[str, Files] = {}
    for field in fields(recipe):
        path = getattr(recipe, field.name)
        if not isinstance(path, Path):
            continue
        if not path.exists():
            raise DataError(f"{path} is not there; it has to be sent to all workers")
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        kept = [f for f in found if f.is_file() and (f == path or f.suffix in _TOKENIZER_SUFFIXES)]
        num_bytes = sum(file.stat().st_size for file in kept)
        if num_bytes > _MAX_SHIPPED_BYTES:
            raise DataError(
                f"{path} holds {num_bytes:,} bytes in {len(kept)} files, too many to be sent to "
                f"all workers (limit {_MAX_SHIPPED_BYTES:,}); name a folder of the tokenizer alone"
            )
        root = path.parent
        packed[field.name] = {str(f.relative_to(root)): f.read_bytes() for f in kept}
    return packed


def unpack(recipe: Recipe, packed: dict[str, Files], folder: Path) -> Recipe:
    """Write packed files below a folder, and return the recipe that points at them there."""
    moved: dict[str, Any] = {}
    for name, files in packed.items():
        moved[name] = folder / name / getattr(recipe, name).name
        if not files:
            moved[name].mkdir(parents=True)
        for inside, data in files.items():
            file = folder / name / inside
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return replace(recipe, **moved)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingPackageError(
            "--ray needs the Python package ray, which is not installed; "
            "pip install 'megasft[ray]', or build with --workers on this machine"
        ) from None
    return ray


def connect(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one.

    Raises:
        DataError: None answers.
    """
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address == LOCAL:
        options |= {"include_dashboard": False}
    else:  # other machines use this very megasft, whether or not one is installed there
        options |= {"runtime_env": {"py_modules": [str(Path(megasft.__file__).parent)]}}
    remedy = f"start one with `ray start --head`, or pass --ray {LOCAL} to use this machine alone"
    try:
        if found := _HOST_AND_PORT.fullmatch(address):  # Ray would try for minutes
            with socket.create_connection((found[1], int(found[2])), _SECONDS_TO_ANSWER):
                pass
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"no Ray cluster answers at {address}: {error}; {remedy}") from error
