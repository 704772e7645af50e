"""A model is converted once for the bytes it has, and exported when training is complete."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.errors import ConversionError
from megasft.files import MODEL_FILE
from megasft.launch import prepare
from megasft.launch.prepare import Conversion, cache_name, fingerprint
from megasft.launch.run import Run
from megasft.training.saving import COMPLETE


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / ".lock").write_text("")
    return folder


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2"}')  # as long as before


def change_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [change_config, change_weights, add_tokenizer])
def test_a_changed_folder_has_another_name_in_the_cache(
    hf: Path, change: Callable[[Path], None]
) -> None:
    before = cache_name(hf)
    change(hf)
    assert before.startswith("Qwen3-megatron-") and cache_name(hf) != before


def test_what_is_not_the_model_does_not_count(hf: Path, tmp_path: Path) -> None:
    before = fingerprint(hf)
    (hf / ".lock").write_text("other")
    (hf / "verification.json").write_text("{}")
    hf.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before


def slow_conversion(started: list[str]) -> Callable[..., None]:
    """Stand for the command: takes a while, and leaves a checkpoint."""

    def run(command: list[str], environ: object, *, what: str) -> None:
        started.append(command[-1])
        time.sleep(0.3)
        output = Path(command[-1])
        output.mkdir()
        (output / MODEL_FILE).write_text('{"flags": []}')

    return run


def test_two_launches_convert_once(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Threads stand for processes: flock tells open files apart, not who opened them."""
    caplog.set_level("INFO")
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LOOKS", 0.05)
    started: list[str] = []
    monkeypatch.setattr(prepare, "_run", slow_conversion(started))
    conversion = Conversion(source=hf, output=tmp_path / "cache" / cache_name(hf))

    launches = [threading.Thread(target=prepare.convert, args=(conversion, {})) for _ in range(3)]
    for launch in launches:
        launch.start()
    for launch in launches:
        launch.join()

    assert started == [str(conversion.output)]
    assert caplog.text.count("waiting for it") == 2


def test_a_changed_folder_is_converted_anew_and_the_old_result_named(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[str] = []
    monkeypatch.setattr(prepare, "_run", slow_conversion(started))
    old = cache_name(hf)
    for _ in range(2):
        prepare.convert(Conversion(source=hf, output=tmp_path / cache_name(hf)), {})
    change_config(hf)
    prepare.convert(Conversion(source=hf, output=tmp_path / cache_name(hf)), {})

    assert len(started) == 2
    assert f"has changed since it was converted to {old}" in caplog.text


def test_a_conversion_that_fails_ends_the_run(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(prepare, "convert_command", lambda conversion: failing)
    conversion = Conversion(source=hf, output=tmp_path / "out")

    with pytest.raises(ConversionError, match=r"Qwen3 was not converted \(exit code 3\)"):
        prepare.convert(conversion, {})


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_model_is_exported_when_training_is_complete(
    resolved: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    is_complete: bool,
) -> None:
    run = resolved("checkpoint.export_hf=out", "optim.train_iters=4")
    assert run.save is not None and run.export is not None
    run.save.mkdir(parents=True)
    if is_complete:
        (run.save / COMPLETE).write_text("{}")
    commands: list[list[str]] = []
    monkeypatch.setattr(prepare, "_run", lambda words, *a, **k: commands.append(words))

    prepare.export(run.export, {})
    prepare.export(None, {})

    assert run.export.is_verified
    words = ["--checkpoint", "ckpt/run", "--like", "converted", "--output", "out", "--update"]
    assert [c[3:] for c in commands] == ([words] if is_complete else [])
