"""The way back from what a training run saves: iterations, optimizer state, padded vocabulary."""

import shutil
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.megatron_checkpoint import PieceReader, find_iteration
from checkpoint_convert.pieces import pieces
from checkpoint_convert.rules import same_bits
from checkpoint_convert.tensor_map import to_hf
from checkpoint_convert.verify import verify
from megasft.errors import ConversionError
from megasft.ranks.layout import Layout
from megasft.run import forward_worker
from tests.megatron.runs import train
from tests.stores import random_samples, write_store
from tests.unit.checkpoint_convert.tiny_models import save


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder as training leaves it: iterations 5 and 10, no configuration."""
    hf_to_megatron.convert(save("qwen3", tmp_path / "hf"), tmp_path / "megatron")
    folder = tmp_path / "run"
    for iteration in (5, 10):
        shutil.copytree(tmp_path / "megatron" / "release", folder / f"iter_{iteration:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def test_the_latest_iteration_is_taken_unless_one_is_named(trained: Path) -> None:
    assert find_iteration(trained, iteration=None).name == "iter_0000010"
    assert find_iteration(trained, iteration=5).name == "iter_0000005"
    with pytest.raises(ConversionError, match="there are: iter_0000005, iter_0000010"):
        find_iteration(trained, iteration=7)
    with pytest.raises(ConversionError, match="give the folder that --save named"):
        find_iteration(trained / "iter_0000005", iteration=None)


@pytest.mark.parametrize("absent", [".metadata", "metadata.json"])
def test_a_half_written_iteration_is_refused_and_a_whole_one_named(
    trained: Path, absent: str
) -> None:
    (trained / "iter_0000010" / absent).unlink()
    with pytest.raises(ConversionError) as error:
        find_iteration(trained, iteration=None)
    assert f"has no {absent}" in str(error.value)
    assert str(error.value).endswith("take another --iteration of: iter_0000005")


def test_configuration_comes_from_the_converted_checkpoint_or_the_hf_folder(
    trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"give with --like the converted checkpoint"):
        megatron_to_hf.convert(trained, tmp_path / "back")
    for like in ("megatron", "hf"):
        megatron_to_hf.convert(trained, tmp_path / f"from_{like}", like=tmp_path / like)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("from_hf", "hf")]
    assert same[0] == same[1]


def test_another_models_configuration_is_refused(trained: Path, tmp_path: Path) -> None:
    for name, message in (("llama", "no rule takes"), ("qwen3", "has 2 layers and the config")):
        like = save(name, tmp_path / f"like_{name}")
        config = orjson.loads((like / "config.json").read_bytes())
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        config = {k: v for k, v in config.items() if name == "qwen3" or k != "layer_types"}
        (like / "config.json").write_bytes(orjson.dumps(config))
        with pytest.raises(ConversionError, match=message):
            megatron_to_hf.convert(trained, tmp_path / "back", like=like)


def whole_tensors(folder: Path, model: Model) -> dict[str, torch.Tensor]:
    reader = PieceReader(folder)
    tensors = {key: torch.empty(reader.shape(key), dtype=reader.dtype(key)) for key in reader.keys}
    for piece in pieces(model):
        tensors[piece.key][piece.place] = reader.read(piece)
    return tensors


def test_padded_vocabulary_rows_are_cut_off(trained: Path, tmp_path: Path) -> None:
    model = read_model(tmp_path / "hf")
    tensors = whole_tensors(trained / "iter_0000010", model)
    wanted = to_hf(tensors, model, verify=True)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.ones(30, 32)])
    assert tensors["output_layer.weight"].shape == (128, 32)
    found = to_hf(tensors, model, verify=True)
    assert found["lm_head.weight"].shape == (98, 32)
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


TP = ("--tensor-model-parallel-size", 2)
PP = ("--pipeline-model-parallel-size", 2)
EP = ("--expert-model-parallel-size", 2)
LAYOUTS: dict[str, tuple[object, ...]] = {
    "qwen2": TP,
    "qwen3": TP,
    "qwen2_moe": EP,
    "deepseek_v3_dense_first": EP,
    "qwen3_moe": (*TP, *EP, "--expert-tensor-parallel-size", 1, "--sequence-parallel"),
}


def run_flags(folder: Path, name: str, *more: object) -> list[str]:
    """Return the flags of a run that starts from ``name`` and saves beside it."""
    return [
        str(flag)
        for flag in (
            *("--megasft-data", folder / "store", "--megasft-hf", folder / name),
            *("--save", folder / f"{name}_run", "--calculate-per-token-loss"),
            *("--seq-length", 64, "--micro-batch-size", 1, "--global-batch-size", 2),
            *("--eval-interval", 1, *more),
        )
    ]


@pytest.mark.slow
def test_a_run_that_changes_nothing_gives_back_the_model_it_started_from(tmp_path: Path) -> None:
    """What users do: convert, train in parallel with a distributed optimizer, convert back.

    Mirrors ``save_checkpoint`` (Megatron 0.19.2) with optimizer state in the same files. A learning
    rate of 0 leaves every bit alone, the bias of a router included; ``test_converted_families``
    covers that weights matter.
    """
    write_store(tmp_path / "store", random_samples(20, seed=1, vocab=98), vocab_size=98)
    for name in LAYOUTS:
        hf_to_megatron.convert(save(name, tmp_path / f"{name}_hf"), tmp_path / name)
    still = ("--train-iters", 1, "--lr", 0, "--save-interval", 1, "--use-distributed-optimizer")
    runs = [run_flags(tmp_path, name, *still, *layout) for name, layout in LAYOUTS.items()]
    train(2, runs, tmp_path / "logs")
    for name in LAYOUTS:
        run, hf, back = (tmp_path / f"{name}_{part}" for part in ("run", "hf", "back"))
        entries = FileSystemReader(run / "iter_0000001").read_metadata()
        assert sum("optimizer" in key for key in entries.state_dict_metadata) > 10
        report = megatron_to_hf.convert(run, back, like=tmp_path / name)
        before, after = (load_file(d / "model.safetensors") for d in (hf, back))
        assert after.keys() == before.keys() and report.num_hf_tensors == len(before)
        assert all(same_bits(after[key], before[key]) for key in before), name


@pytest.mark.slow
def test_what_was_trained_in_parallel_and_exported_computes_what_megatron_computes(
    tmp_path: Path,
) -> None:
    """Five steps at TP 2 x PP 2, exported at once; transformers against Megatron at TP 1."""
    write_store(tmp_path / "store", random_samples(40, seed=2, vocab=98), vocab_size=98)
    hf_to_megatron.convert(save("qwen3", tmp_path / "hf"), tmp_path / "qwen3")
    steps = ("--train-iters", 5, "--lr", 1e-3, "--save-interval", 5, *TP, *PP)
    train(4, [run_flags(tmp_path, "qwen3", *steps)], tmp_path / "logs")
    run, back = tmp_path / "qwen3_run", tmp_path / "back"
    megatron_to_hf.convert(run, back, like=tmp_path / "qwen3")
    found = verify(back, run, worker=forward_worker.__name__, layouts=[Layout()])
    assert found.is_ok, found.failures
    logits = found.check("logits TP 1").numbers
    assert logits["max_difference"] <= logits["allowed"] / 2 and logits["tokens"] > 100
    before, after = (load_file(d / "model.safetensors") for d in (tmp_path / "hf", back))
    assert all((after[key] - before[key]).abs().max() > 1e-3 for key in before)
