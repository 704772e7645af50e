"""An export is replaced by that of a later step of its run, and by nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron, megatron_to_hf, output_folder
from checkpoint_convert.origin import foreign
from megasft.errors import ConversionError
from tests.unit.checkpoint_convert.test_round_trip import rewrite, weights
from tests.unit.checkpoint_convert.tiny_models import save

NAME = "model.norm.weight"


@pytest.fixture
def train(tmp_path: Path) -> Callable[[float], None]:
    """Make ``run`` a checkpoint whose last norm is a number, as another step would."""
    hf = save("llama", tmp_path / "hf")
    tensors = weights(hf)

    def step(value: float) -> None:
        rewrite(hf, tensors | {NAME: torch.full_like(tensors[NAME], value)})
        hf_to_megatron.convert(hf, tmp_path / "run", overwrite=True)

    return step


def export(folder: Path, *more: str) -> int:
    words = ["--checkpoint", str(folder / "run"), "--output", str(folder / "out"), "--update"]
    return megatron_to_hf.main([*words, *(more or ["--no-verify"])], worker=None)


def facts(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: ((s := p.stat()).st_ino, s.st_mtime_ns) for p in folder.iterdir()}


def test_the_same_step_again_leaves_the_export_and_a_later_one_replaces_it(
    tmp_path: Path, train: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    train(1)
    assert export(tmp_path) == 0
    before = facts(tmp_path / "out")
    assert "exported already" not in capsys.readouterr().out

    assert export(tmp_path) == 0
    assert facts(tmp_path / "out") == before
    assert f"exported already: {tmp_path / 'out'}" in capsys.readouterr().out

    train(2)
    assert export(tmp_path) == 0
    assert weights(tmp_path / "out")[NAME][0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "run"]
    assert str(tmp_path) not in (tmp_path / "out" / ".export.json").read_text()


def test_a_later_step_that_is_not_verified_leaves_the_earlier_export(
    tmp_path: Path,
    train: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(1)
    assert export(tmp_path, "--max-shard-size", "1") == 0
    before = facts(tmp_path / "out")
    train(2)
    copy = megatron_to_hf.hf_folder.copy_side_files

    def lose(source: Path, target: Path) -> list[str]:
        names = copy(source, target)
        (target / "tokenizer.json").unlink()
        return names

    with monkeypatch.context() as patch:
        patch.setattr(megatron_to_hf.hf_folder, "copy_side_files", lose)
        assert export(tmp_path, "--max-shard-size", "1") == 1
    assert facts(tmp_path / "out") == before
    assert f"{tmp_path / 'out'} is as it was" in capsys.readouterr().err
    assert export(tmp_path, "--max-shard-size", "1") == 0
    assert weights(tmp_path / "out")[NAME][0] == 2


@pytest.mark.parametrize("died", ["between the renames", "before the old one was removed"])
def test_a_process_that_died_while_replacing_leaves_one_export_and_nothing_else(
    tmp_path: Path,
    train: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    died: str,
) -> None:
    train(1)
    assert export(tmp_path) == 0
    train(2)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    def put_in_place(partial: Path, output: Path) -> None:
        output.rename(output.with_name(f".{output.name}.replaced-{os.getpid()}"))
        if died != "between the renames":
            partial.rename(output)
        dies()

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_put_in_place", put_in_place)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path)
    assert (tmp_path / f".out.replaced-{os.getpid()}").is_dir()

    train(3)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_prepare", dies)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path)
    # Whole again before anything new is written.
    assert weights(tmp_path / "out")[NAME][0] == (1 if died == "between the renames" else 2)
    assert export(tmp_path) == 0
    assert weights(tmp_path / "out")[NAME][0] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / ".export.json").unlink(), "was not exported from a checkpoint"),
        (lambda out: (out / "README.md").touch(), r"added, removed or changed since: README\.md"),
        (lambda out: (out / "config.json").write_text("{}"), r"changed since: config\.json"),
    ],
)
def test_what_is_the_users_own_is_not_replaced(
    tmp_path: Path, train: Callable[[float], None], change: Callable[[Path], None], message: str
) -> None:
    train(1)
    assert export(tmp_path) == 0
    change(tmp_path / "out")
    train(2)

    with pytest.raises(ConversionError, match=message):
        megatron_to_hf.convert(tmp_path / "run", tmp_path / "out", update=True)

    reason = foreign(tmp_path / "out", tmp_path / "run")
    assert reason is not None and weights(tmp_path / "out")[NAME][0] == 1


def test_an_export_of_another_run_is_not_replaced(
    tmp_path: Path, train: Callable[[float], None]
) -> None:
    train(1)
    assert export(tmp_path) == 0
    assert foreign(tmp_path / "out", tmp_path / "run") is None
    (tmp_path / "out" / "verification.json").touch()  # of `megasft convert verify`
    assert foreign(tmp_path / "out", tmp_path / "run") is None
    assert foreign(tmp_path / "out", tmp_path / "other") == (
        "was exported from another checkpoint, run beside it"
    )
    (tmp_path / "moved").mkdir()
    for name in ("out", "run"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert foreign(tmp_path / "moved" / "out", tmp_path / "moved" / "run") is None
