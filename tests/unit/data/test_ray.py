"""Building on Ray: the same answers in the same order, whoever dies on the way."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megasft.data import ray_workers, read
from megasft.data.build import BuildOptions, build
from megasft.data.ray_workers import RayWorkers, connect, pack, unpack
from megasft.data.read import Chunk, open_sources, read_chunks
from megasft.data.tokenize import Made, Recipe
from megasft.data.workers import Outcomes, ThisProcess
from megasft.errors import DataError


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def chunks(
    write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Iterator[Chunk]]:
    records = [
        b"{"
        if i % 50 == 7
        else {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "a" * (i % 13 + 1)},
            ]
        }
        for i in range(2000)
    ]
    path = write_jsonl(*records)
    monkeypatch.setattr(read, "CHUNK_BYTES", 4000)
    return lambda: read_chunks(open_sources([path]))


def flat(made: Iterator[tuple[Chunk, Outcomes]]) -> list[Any]:
    """What a store would be written from, as values that compare."""
    return [
        (outcome.line, outcome.sample.tokens.tolist(), outcome.sample.turns.tolist())
        if isinstance(outcome, Made)
        else outcome
        for _, outcomes in made
        for outcome in outcomes
    ]


def ray_workers_of_this_test() -> list[int]:
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end while it is looked at
            if "ray::RayWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_the_answers_are_those_of_one_process_and_survive_a_killed_worker(
    cluster: Any, tokenizer_dir: Path, chunks: Callable[[], Iterator[Chunk]]
) -> None:
    alone = ThisProcess(Recipe(tokenizer_dir))
    wanted = flat(alone.map(chunks()))
    assert len(wanted) == 2000
    killed = []

    def killing() -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks()):
            if number == 20:
                killed.append(ray_workers_of_this_test()[0])
                os.kill(killed[0], signal.SIGKILL)
            yield chunk

    with RayWorkers(Recipe(tokenizer_dir), address="local", num_workers=2) as workers:
        assert workers.facts() == alone.facts()
        assert flat(workers.map(killing())) == wanted
        assert len(killed) == 1
        assert killed[0] not in ray_workers_of_this_test()
    assert cluster.is_initialized()  # it was there before, and stays


@pytest.mark.slow
def test_a_store_made_on_ray_has_the_bytes_of_any_other(
    cluster: Any, tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    names = ("maths", "code", None)
    path = write_jsonl(*({"messages": chat, "meta": {"category_name": n}} for n in names * 50))
    stores = []
    for address in ("", "local"):
        options = BuildOptions(
            (path,), tmp_path / "store", Recipe(tokenizer_dir), overwrite=True, ray=address
        )
        build(options, on_bytes=lambda n: None, on_rejected=lambda place, why: pytest.fail(why))
        stores.append({file.name: file.read_bytes() for file in options.output.iterdir()})
    assert stores[0] == stores[1]


@pytest.mark.slow
def test_nodes_that_would_make_other_bytes_are_refused(
    cluster: Any,
    tokenizer_dir: Path,
    chunks: Callable[[], Iterator[Chunk]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ray_workers.versions() | {"tokenizers": "0.1"}
    monkeypatch.setattr(ray_workers, "versions", lambda: ours)
    with (
        RayWorkers(Recipe(tokenizer_dir), address="local", num_workers=1) as workers,
        pytest.raises(DataError, match=r"other bytes: tokenizers 0\.\d+\.\d+ there, 0\.1 here"),
    ):
        list(workers.map(chunks()))


@pytest.mark.slow
def test_an_error_inside_a_worker_ends_the_build(
    cluster: Any, tmp_path: Path, chunks: Callable[[], Iterator[Chunk]]
) -> None:
    (tmp_path / "empty").mkdir()
    with (
        RayWorkers(Recipe(tmp_path / "empty"), address="local", num_workers=1) as workers,
        pytest.raises(DataError, match=rf"^{tmp_path}/empty holds no tokenizer"),
    ):
        list(workers.map(chunks()))


def test_no_cluster_is_said_at_once() -> None:
    ray = pytest.importorskip("ray")
    remedy = r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused; start one with `ray start"
    with pytest.raises(DataError, match=remedy):
        connect(ray, "127.0.0.1:1")


def test_a_recipe_travels_with_the_files_of_its_tokenizer_and_no_others(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "additional_chat_templates" / "tool.jinja").write_bytes(b"x")
    (folder / "model.safetensors").write_bytes(b"weights")
    packed = pack(Recipe(folder))
    there = unpack(Recipe(folder), packed, tmp_path / "there").tokenizer
    assert there.name == "model"
    files = {f.relative_to(there).as_posix(): f.read_bytes() for f in there.rglob("*.*")}
    assert files == {"tokenizer.json": b"{}", "additional_chat_templates/tool.jinja": b"x"}


def test_a_missing_package_is_named_with_its_remedy(tokenizer_dir: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from pathlib import Path\n"
        "from megasft.data.tokenize import Recipe\n"
        "from megasft.data.ray_workers import RayWorkers\n"
        f"RayWorkers(Recipe(Path({str(tokenizer_dir)!r})), address='local')"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--ray needs the Python package ray" in seen.stderr
    assert "pip install 'megasft[ray]'" in seen.stderr
