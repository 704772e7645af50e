"""Worker processes that make samples, fed in order through pipes.

Each worker is ``python -m megasft.data.workers``, started with Popen; one thread speaks to it in
pickles. Chosen over multiprocessing, because its start methods each have a flaw here: spawn and
forkserver import the caller's script again (a script without ``if __name__`` guard would start
itself anew), fork copies threads and locks of whatever the caller has loaded, and a Pool waits
forever for a worker the kernel killed. Here a dead worker is an error, and when the build dies,
however it dies, its workers read end-of-file and leave. Cost: this small protocol.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, NoReturn, Protocol, Self

import megasft
from megasft.data.read import Chunk
from megasft.data.tokenize import Outcome, Recipe, Tokenizer
from megasft.data.tokenizer_folder import TokenizerFacts
from megasft.errors import DataError

Outcomes = list[Outcome]
Records = list[tuple[int, bytes]]
Answer = Outcomes | TokenizerFacts | DataError
RETIRED_AFTER: Final = 2**30
"""Bytes after which a worker is replaced: gigatoken remembers every word it has met, some hundred
bytes each, and does not forget."""
_PIPE_BYTES: Final = 2**20
"""A pipe that holds a chunk or its answer, so that neither end waits for the other."""
CHUNKS_AHEAD: Final = 2
"""Chunks in flight for each worker; more would only hold memory."""


class MakesSamples(Protocol):
    """Whoever makes samples for a build: this process, worker processes, or a cluster."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer."""
        ...

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        ...


class ThisProcess:
    """Makes the samples here, one chunk after the other: no process to start, for small things."""

    def __init__(self, recipe: Recipe) -> None:
        self._tokenizer = Tokenizer(recipe)

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer."""
        return self._tokenizer.facts()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        for chunk in chunks:
            yield chunk, self._tokenizer.make(chunk.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Worker:
    """One process, and the questions it has not answered yet; answers come in their order."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.num_waiting, self.num_bytes = process, 0, 0
        self._asking, self._answered = threading.Lock(), threading.Condition()
        self._num_asked = self._num_answered = 0

    def ask(self, records: Records | None) -> Answer:
        """Send a question, while others may wait for their answers, and return its own."""
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        with self._asking:
            number = self._num_asked
            self._num_asked += 1
            _send(records, asked)
        with self._answered:
            self._answered.wait_for(lambda: self._num_answered == number)
            try:
                answer: Answer = _receive(answers)
            finally:
                self._num_answered += 1
                self._answered.notify_all()
        return answer


class Workers:
    """A fixed number of processes; a context manager, so that none outlives the build.

    Each has its next chunk in the pipe before it has answered the one before, so that it never
    waits for this process.
    """

    def __init__(self, recipe: Recipe, *, num_workers: int) -> None:
        self._recipe, self._num_workers = recipe, num_workers
        self._workers: list[_Worker] = []
        self._retired: list[_Worker] = []
        self._choosing = threading.Lock()

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer; starts all workers."""
        answer = self._ask(None)
        assert isinstance(answer, TokenizerFacts)
        return answer

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        waiting: deque[tuple[Chunk, Future[Outcomes]]] = deque()
        with ThreadPoolExecutor(CHUNKS_AHEAD * self._num_workers) as threads:
            try:
                for chunk in chunks:
                    waiting.append((chunk, threads.submit(self._make, chunk)))
                    if len(waiting) > CHUNKS_AHEAD * self._num_workers:
                        done, future = waiting.popleft()
                        yield done, future.result()
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()
                if waiting:  # the threads of a build that ends early wait for answers
                    self._kill()

    def _make(self, chunk: Chunk) -> Outcomes:
        answer = self._ask(chunk.records)
        assert isinstance(answer, list)
        return answer

    def _ask(self, records: Records | None) -> Answer:
        worker = self._choose(sum(len(data) for _, data in records or ()))
        try:
            answer = worker.ask(records)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DataError(
                f"a worker process died with code {worker.process.wait()} (negative: killed by "
                "that signal, -9 often means out of memory); try fewer --workers"
            ) from None
        finally:
            with self._choosing:
                worker.num_waiting -= 1
                if worker in self._retired and not worker.num_waiting:
                    worker.process.kill()
        if isinstance(answer, DataError):
            raise answer
        return answer

    def _choose(self, num_bytes: int) -> _Worker:
        with self._choosing:
            while len(self._workers) < self._num_workers:  # all at once: none shall be awaited
                self._workers.append(_Worker(self._start()))
            free = min(self._workers, key=lambda worker: worker.num_waiting)
            if free.num_bytes > RETIRED_AFTER:
                self._workers.remove(free)
                self._retired.append(free)
                free = _Worker(self._start())
                self._workers.append(free)
            free.num_waiting += 1
            free.num_bytes += num_bytes
            return free

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(megasft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "TRANSFORMERS_VERBOSITY": "error",  # it would complain that there is no torch
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "megasft.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # Linux alone can, up to a limit
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        _send(self._recipe, process.stdin)
        return process

    def _kill(self) -> None:
        for worker in (*self._workers, *self._retired):
            worker.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        for worker in (*self._workers, *self._retired):
            worker.process.wait()
            for pipe in (worker.process.stdin, worker.process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _send(message: object, pipe: IO[bytes]) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """Read one message, in as few system calls as can be: behind each, a thread queues up anew."""
    head = pipe.read(8)
    data = pipe.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
    return pickle.loads(data) if data else _end()


def _end() -> NoReturn:
    raise EOFError


def serve() -> None:
    """Answer chunks of records on stdin with outcomes on stdout, until the build closes stdin.

    None instead of records asks for the facts of the tokenizer.
    """
    asked = sys.stdin.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the pickles
    sys.modules["torch"] = None  # type: ignore[assignment]  # 500 MB that transformers can spare
    tokenizer = _load(_receive(asked))  # at once: the others are loading, too
    while True:
        try:
            records: Records | None = _receive(asked)
        except EOFError:
            return
        _send(_answer(tokenizer, records), answers)


def _load(recipe: Recipe) -> Tokenizer | DataError:
    try:
        return Tokenizer(recipe)
    except DataError as error:
        return error


def _answer(tokenizer: Tokenizer | DataError, records: Records | None) -> Answer:
    if isinstance(tokenizer, DataError):
        return tokenizer
    try:
        return tokenizer.facts() if records is None else tokenizer.make(records)
    except DataError as error:
        return error


if __name__ == "__main__":
    serve()
