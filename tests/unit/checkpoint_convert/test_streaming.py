"""Conversions of large models: in parts, gone on with, and never half there under their name."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from checkpoint_convert import hf_to_megatron, megatron_to_hf, megatron_writer
from checkpoint_convert.config_map import read_model
from checkpoint_convert.hf_shards import ShardWriter, plan_shards
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.megatron_checkpoint import PieceReader, find_iteration
from checkpoint_convert.pieces import pieces
from checkpoint_convert.rules import same_bits
from checkpoint_convert.tensor_map import merge_piece, to_hf, to_megatron
from megasft.errors import ConversionError
from tests.full_disk import files_end_at
from tests.megatron.runs import CPU_ENV, ROOT, torchrun
from tests.unit.checkpoint_convert.tiny_models import save as save_model


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_writer, "UNIT_BYTES", 4096)


def files(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Return what tells a file that was written again from one that was left alone."""
    found = folder.glob(pattern)
    return {path.name: ((s := path.stat()).st_ino, s.st_mtime_ns) for path in found}


def stop_at(name: str) -> Callable[..., torch.Tensor]:
    def stop(piece: object, *args: object, **more: object) -> torch.Tensor:
        if getattr(piece, "name", "") == name and more["verify"] is not False:
            raise KeyboardInterrupt
        return merge_piece(piece, *args, **more)  # type: ignore[arg-type]

    return stop


@pytest.mark.usefixtures("small_units")
def test_an_interrupted_conversion_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, output = save_model("qwen3_moe", tmp_path / "hf"), tmp_path / "megatron"
    partial = tmp_path / ".megatron.partial"
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight[1, 3]"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_to_megatron, "merge_piece", stop_at(name))
        hf_to_megatron.convert(hf, output)
    before = files(partial, "release/*.distcp")
    receipts = files(partial, "receipts/*")
    assert not output.exists() and len(before) > len(receipts) > 5
    hf_to_megatron.convert(hf, output)
    after = files(output, "release/*.distcp")
    kept = {name for name in before if after[name] == before[name]}
    assert len(kept) == len(receipts) and len(after) > len(before)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}
    assert not (output / "receipts").exists()

    model, wanted = read_model(hf), load_file(hf / "model.safetensors")
    reader = PieceReader(find_iteration(output, iteration=None))
    for piece in pieces(model):
        parts = [wanted[name] for name in piece.hf]
        assert same_bits(reader.read(piece), merge_piece(piece, parts, model, verify=False))


@pytest.mark.usefixtures("small_units")
def test_another_source_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, output = save_model("llama", tmp_path / "hf"), tmp_path / "megatron"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_to_megatron, "merge_piece", stop_at("output_layer.weight"))
        hf_to_megatron.convert(hf, output)
    before = files(tmp_path / ".megatron.partial", "release/*.distcp")
    tensors = {name: tensor + 1 for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, hf / "model.safetensors")
    hf_to_megatron.convert(hf, output)
    after = files(output, "release/*.distcp")
    assert len(before) > 5 and not any(after[name][1] == before[name][1] for name in before)
    megatron_to_hf.convert(output, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_an_interrupted_export_keeps_the_shards_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, megatron = save_model("deepseek_v3", tmp_path / "hf"), tmp_path / "megatron"
    hf_to_megatron.convert(hf, megatron)
    read = PieceReader.read

    def stop(self: PieceReader, piece: object) -> torch.Tensor:
        if getattr(piece, "name", "") == "decoder.layers.self_attention.linear_proj.weight[1]":
            raise OSError(28, "No space left on device", "/somewhere")
        return read(self, piece)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(ConversionError) as error:
        patch.setattr(PieceReader, "read", stop)
        megatron_to_hf.convert(megatron, tmp_path / "back", max_shard_bytes=30_000)
    assert str(error.value).startswith("/somewhere: No space left on device; nothing is at")
    before = files(tmp_path / ".back.partial", "*.safetensors")
    assert len(before) > 2 and not (tmp_path / "back").exists()
    megatron_to_hf.convert(megatron, tmp_path / "back", max_shard_bytes=30_000)
    after = files(tmp_path / "back", "*.safetensors")
    assert all(after[name] == before[name] for name in before) and len(after) > len(before)
    assert max(path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")) < 60_000

    source, result = HFTensors(hf), HFTensors(tmp_path / "back")
    assert set(source) == set(result) and all(same_bits(source[n], result[n]) for n in source)
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (hf, tmp_path / "back")
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # A changed limit is another plan of shards.
    megatron_to_hf.convert(megatron, tmp_path / "one", max_shard_bytes=10**9)
    assert [p.name for p in (tmp_path / "one").glob("*.safe*")] == ["model.safetensors"]


def test_shards_are_the_librarys_files(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a.bias": torch.tensor([1.5], dtype=torch.float16),
        "c": torch.tensor(2.0),
        "é": torch.arange(5, dtype=torch.float64),
    }
    with ShardWriter(tmp_path / "a.safetensors", tensors) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks"), ShardWriter(tmp_path / "b", tensors):
        pass
    with (
        pytest.raises(ValueError, match=r"c: torch\.float64"),
        ShardWriter(tmp_path / "b", tensors) as file,
    ):
        file.write("c", torch.tensor(2.0, dtype=torch.float64))
    assert not (tmp_path / "b").exists()


def test_shards_hold_whole_groups_up_to_their_limit() -> None:
    groups = [[("a", 3)], [("b", 3), ("c", 3)], [("d", 9)], [("e", 1)], [("f", 7)], [("g", 1)]]
    assert plan_shards(groups, max_bytes=8) == [[0], [1], [2], [3, 4], [5]]
    assert plan_shards(groups, max_bytes=10) == [[0, 1], [2, 3], [4, 5]]


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    hf = save_model("llama", tmp_path / "hf")
    (tmp_path / ".megatron.partial").mkdir()
    descriptor = os.open(tmp_path / ".megatron.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConversionError, match="another conversion is writing"):
        hf_to_megatron.convert(hf, tmp_path / "megatron")
    os.close(descriptor)
    hf_to_megatron.convert(hf, tmp_path / "megatron")


def test_disk_space_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, megatron = save_model("llama", tmp_path / "hf"), tmp_path / "megatron"
    hf_to_megatron.convert(hf, megatron)
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match=r"takes 0\.00 GB more, and the disk has 0\.00 GB"):
        hf_to_megatron.convert(hf, tmp_path / "again")
    with pytest.raises(ConversionError, match="free some, or choose another --output"):
        megatron_to_hf.convert(megatron, tmp_path / "back")
    assert not (tmp_path / "again").exists() and not (tmp_path / "back").exists()


def test_a_write_that_fails_is_named_and_leaves_nothing_under_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real error of the file system, through torch's writer and ours."""
    hf, megatron = save_model("llama", tmp_path / "hf"), tmp_path / "megatron"
    hf_to_megatron.convert(hf, megatron)
    out = ["--output", str(tmp_path / "out")]
    with files_end_at(20_000):
        assert hf_to_megatron.main(["--hf", str(hf), *out], worker=None) == 1
        assert megatron_to_hf.main(["--checkpoint", str(megatron), *out], worker=None) == 1
    assert capsys.readouterr().err.count("File too large; nothing is at") == 2
    assert not (tmp_path / "out").exists()


def sharded(tmp_path: Path) -> Path:
    hf = save_model("qwen3", tmp_path / "whole")
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=20_000)
    return tmp_path / "hf"


def test_a_missing_and_a_cut_off_shard_are_named(tmp_path: Path) -> None:
    hf = sharded(tmp_path)
    shards = sorted(hf.glob("*.safetensors"))
    assert len(shards) > 2
    hf_to_megatron.convert(hf, tmp_path / "again")
    content = shards[1].read_bytes()
    for cut in (content[:-1], content[:100], b""):
        shards[1].write_bytes(cut)
        with pytest.raises(
            ConversionError, match=rf"{shards[1].name} \({len(cut):,} bytes\) cannot"
        ):
            hf_to_megatron.convert(hf, tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(ConversionError, match=rf"lacks {shards[1].name}, which model\.saf.*index"):
        hf_to_megatron.convert(hf, tmp_path / "out")
    index = hf / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ConversionError, match="is not an index of shards"):
        hf_to_megatron.convert(hf, tmp_path / "out")
    index.unlink()
    with pytest.raises(ConversionError, match=rf"lacks {shards[1].name}, which model-00001-of"):
        hf_to_megatron.convert(hf, tmp_path / "out")
    for path in shards[:1] + shards[2:]:
        path.unlink()
    with pytest.raises(ConversionError, match=r"has no \*\.safetensors"):
        hf_to_megatron.convert(hf, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_two_shards_with_one_name_are_refused(tmp_path: Path) -> None:
    hf = save_model("llama", tmp_path / "hf")
    save_file({"model.norm.weight": torch.ones(32)}, hf / "more.safetensors")
    with pytest.raises(ConversionError, match=r"more\.safetensors repeats model\.norm\.weight of"):
        hf_to_megatron.convert(hf, tmp_path / "out")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    hf_to_megatron.convert(save_model("llama", tmp_path / "hf"), tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    path = release / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ConversionError, match=r"__0_0\.distcp has [\d,]+ of [\d,]+ bytes"):
        megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    path.unlink()
    with pytest.raises(ConversionError, match=r"__0_0\.distcp is missing"):
        megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    (release / ".metadata").write_bytes(b"x")
    with pytest.raises(ConversionError, match="cannot be read"):
        megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def test_sizes_that_do_not_fit_are_found_before_anything_is_written(tmp_path: Path) -> None:
    hf = save_model("qwen3", tmp_path / "hf")
    config = orjson.loads((hf / "config.json").read_bytes()) | {"num_key_value_heads": 3}
    (hf / "config.json").write_bytes(orjson.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(ConversionError, match=r"q_proj\.weight \(64, 32\).*do not make decoder"):
        hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert list(tmp_path.iterdir()) == [hf]


def test_another_number_of_experts_is_named(tmp_path: Path) -> None:
    hf = save_model("qwen3_moe", tmp_path / "hf")
    model = read_model(hf)
    stacked: dict[str, torch.Tensor] = {}
    for piece, data in to_megatron(load_file(hf / "model.safetensors"), model, verify=False):
        whole = stacked.setdefault(piece.key, torch.zeros(*piece.axes, *data.shape))
        whole[piece.place] = data
    stacked["decoder.layers.mlp.experts.experts.linear_fc2.weight"] = torch.zeros(2, 5, 32, 24)
    with pytest.raises(ConversionError, match="has 2 layers and 5 experts and the configuration"):
        to_hf(stacked, model, verify=False)


@pytest.mark.slow
@pytest.mark.long
def test_large_models_take_little_memory_and_survive_kill_9() -> None:
    """0.6 GB both ways; ``tools/bench_convert.py`` alone does 2 GB, see the README's figures."""
    result = subprocess.run(
        [sys.executable, "tools/bench_convert.py", "--gigabytes", "0.6", "--processes", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | CPU_ENV,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    assert figures["is_same"] and figures["bytes"] > 500e6
    imports, *conversions, _ = figures["points"]
    assert len(conversions) == 2
    for point in conversions:
        assert point["peak_mib"] - imports["peak_mib"] < 450, point
        assert point["kept"] > 0, point


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_write_what_one_does(tmp_path: Path, small_units: None) -> None:
    """Several units and shards for each, and every file bit by bit the same.

    Started by torchrun itself: conversion runs on torch as it comes.
    """
    hf = save_model("deepseek_v3_dense_first", tmp_path / "hf")
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    worker = "tests.unit.checkpoint_convert.small_units_worker"
    there = ("there", "--hf", str(hf), "--output", str(tmp_path / "megatron2"), "--no-verify")
    printed = torchrun(2, "-m", worker, *there, is_warm=False)
    assert printed.count("round trip") == 1
    one, two = tmp_path / "megatron" / "release", tmp_path / "megatron2" / "release"
    names = sorted(path.name for path in one.glob("*.distcp"))
    assert len(names) > 20 and names == sorted(path.name for path in two.glob("*.distcp"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    back = ("back", "--checkpoint", str(tmp_path / "megatron2"), "--output", str(tmp_path / "back"))
    back += ("--max-shard-size", "0.00002", "--no-verify")
    torchrun(2, "-m", worker, *back, is_warm=False)
    source, result = HFTensors(hf), HFTensors(tmp_path / "back")
    assert len(result.files) > 5
    assert set(source) == set(result) and all(same_bits(source[n], result[n]) for n in source)
