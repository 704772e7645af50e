"""Hugging Face -> Megatron -> Hugging Face, through the disk, bit by bit."""

import json
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from typer.testing import CliRunner

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.config_map import read_model
from checkpoint_convert.rules import same_bits
from checkpoint_convert.tensor_map import to_hf, to_megatron
from megasft.cli.convert import convert_app
from megasft.errors import ConversionError
from tests.unit.checkpoint_convert.tiny_models import MODELS, make, save


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def entries(checkpoint: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shapes of a checkpoint's tensors, and the names of its objects."""
    found = FileSystemReader(checkpoint / "release").read_metadata().state_dict_metadata
    sizes = {key: tuple(entry.size) for key, entry in found.items() if hasattr(entry, "size")}
    return sizes, found.keys() - sizes.keys()


BOTH_WAYS = [
    *((name, torch.bfloat16) for name in MODELS),
    *((name, torch.float32) for name in ("llama_gqa_tied", "qwen2_moe", "deepseek_v3")),
]
"""Rules move bits and do not read them, so one model of each kind is enough in float32."""


@pytest.mark.parametrize(("name", "dtype"), BOTH_WAYS)
def test_every_bit_comes_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    hf = save(name, tmp_path / "hf", dtype=dtype)
    before = weights(hf)
    # A nan with a payload and a minus zero: values survive `==` tests that bits do not.
    norm = before["model.norm.weight"]
    norm[:2] = torch.tensor([torch.nan, -0.0])
    rewrite(hf, before)

    there = hf_to_megatron.convert(hf, tmp_path / "megatron")
    back = megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")

    after = weights(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(same_bits(after[key], before[key]) for key in before)
    assert there.num_hf_tensors == back.num_hf_tensors == len(before) >= 20
    assert there.num_parameters == back.num_parameters == sum(t.numel() for t in before.values())
    assert there.dtypes == str(dtype).removeprefix("torch.")
    assert (tmp_path / "back" / "config.json").read_text() == (hf / "config.json").read_text()
    assert (tmp_path / "back" / "chat_template.jinja").is_file()


def test_the_checkpoint_has_the_tensors_and_objects_that_both_layer_specs_ask_for(
    tmp_path: Path,
) -> None:
    hf_to_megatron.convert(save("qwen3", tmp_path / "hf"), tmp_path / "megatron")
    sizes, objects = entries(tmp_path / "megatron")
    assert sizes == {
        "embedding.word_embeddings.weight": (98, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 128, 32),
        "decoder.layers.self_attention.linear_proj.weight": (2, 32, 64),
        "decoder.layers.self_attention.q_layernorm.weight": (2, 16),
        "decoder.layers.self_attention.k_layernorm.weight": (2, 16),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 32),
        "decoder.layers.mlp.linear_fc1.weight": (2, 96, 32),
        "decoder.layers.mlp.linear_fc2.weight": (2, 32, 48),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (98, 32),
    }
    assert "common_state/shard_0_1" in objects
    assert "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2" in objects
    assert len(objects) == 1 + 1 + 6 * 2


def test_experts_have_the_names_that_both_layer_specs_ask_for(tmp_path: Path) -> None:
    """A norm of its own before the router, and experts as an axis behind the layers'."""
    hf_to_megatron.convert(save("qwen2_moe", tmp_path / "hf"), tmp_path / "megatron")
    sizes, objects = entries(tmp_path / "megatron")
    experts = {key: size for key, size in sizes.items() if "linear_qkv" not in key}
    assert experts == {
        "embedding.word_embeddings.weight": (98, 32),
        "decoder.layers.self_attention.linear_proj.weight": (2, 32, 32),
        "decoder.layers.pre_mlp_layernorm.weight": (2, 32),
        "decoder.layers.mlp.router.weight": (2, 6, 32),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 6, 48, 32),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 6, 32, 24),
        "decoder.layers.mlp.shared_experts.linear_fc1.weight": (2, 80, 32),
        "decoder.layers.mlp.shared_experts.linear_fc2.weight": (2, 32, 40),
        "decoder.layers.mlp.shared_experts.gate_weight": (2, 1, 32),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (98, 32),
    }
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.5_2.6" in objects
    assert "decoder.layers.mlp.shared_experts.linear_fc2._extra_state/shard_1_2" in objects
    assert "decoder.layers.pre_mlp_layernorm._extra_state/shard_0_2" in objects
    assert len(objects) == 1 + 1 + 5 * 2 + 2 * 2 * 6


def test_layers_of_two_kinds_have_keys_of_their_own(tmp_path: Path) -> None:
    """And latent attention's norms lie in the linear layers behind them."""
    hf_to_megatron.convert(save("deepseek_v3_dense_first", tmp_path / "hf"), tmp_path / "megatron")
    sizes, objects = entries(tmp_path / "megatron")
    in_layer = {
        i: {key.removeprefix(f"decoder.layers.{i}."): size for key, size in sizes.items()}
        for i in range(3)
    }
    dense = {key: size for key, size in in_layer[0].items() if not key.startswith("decoder")}
    assert dense.pop("embedding.word_embeddings.weight") == (98, 32)
    assert dense.pop("output_layer.weight") == (98, 32)
    assert dense == {
        "input_layernorm.weight": (32,),
        "self_attention.linear_q_down_proj.weight": (24, 32),
        "self_attention.linear_q_up_proj.layer_norm_weight": (24,),
        "self_attention.linear_q_up_proj.weight": (96, 24),
        "self_attention.linear_kv_down_proj.weight": (24, 32),
        "self_attention.linear_kv_up_proj.layer_norm_weight": (16,),
        "self_attention.linear_kv_up_proj.weight": (112, 16),
        "self_attention.linear_proj.weight": (32, 48),
        "mlp.linear_fc1.layer_norm_weight": (32,),
        "mlp.linear_fc1.weight": (96, 32),
        "mlp.linear_fc2.weight": (32, 48),
    }
    assert in_layer[2]["mlp.router.expert_bias"] == (12,)
    assert in_layer[2]["mlp.experts.experts.linear_fc1.weight"] == (12, 48, 32)
    assert in_layer[2]["pre_mlp_layernorm.weight"] == (32,)
    assert "mlp.linear_fc1.weight" not in in_layer[2]
    assert "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1" in objects
    assert "decoder.layers.2.mlp.experts.experts.linear_fc1._extra_state/shard_11_12" in objects
    assert not any(key.startswith("decoder.layers.0.mlp.experts") for key in objects)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_dense_first"])
def test_experts_that_a_folder_holds_as_one_tensor_come_back_one_by_one(
    tmp_path: Path, name: str
) -> None:
    hf = save(name, tmp_path / "hf")
    apart = weights(hf)
    in_memory = {key: t.clone() for key, t in make(name).state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in in_memory)
    rewrite(hf, in_memory)
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    after = weights(tmp_path / "back")
    assert after.keys() == apart.keys()
    assert all(same_bits(after[key], apart[key]) for key in apart)


def test_experts_that_are_there_in_both_forms_are_refused(tmp_path: Path) -> None:
    hf = save("qwen3_moe", tmp_path / "hf")
    one = {"model.layers.0.mlp.experts.down_proj": torch.zeros(6, 32, 24)}
    rewrite(hf, weights(hf) | one)
    with pytest.raises(ConversionError, match=r"experts\.0\.down_proj\.weight is there twice"):
        hf_to_megatron.convert(hf, tmp_path / "megatron")


def test_a_lost_router_bias_is_named(tmp_path: Path) -> None:
    hf = save("deepseek_v3", tmp_path / "hf")
    tensors = weights(hf)
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    rewrite(hf, tensors)
    with pytest.raises(
        ConversionError, match=r"lacks 1 tensors \(model\.layers\.1\.mlp\.gate\.e_sc"
    ):
        hf_to_megatron.convert(hf, tmp_path / "megatron")


def test_multi_token_prediction_layers_are_left_out_only_when_asked(tmp_path: Path) -> None:
    hf = save("deepseek_v3", tmp_path / "hf")
    config = orjson.loads((hf / "config.json").read_bytes())
    (hf / "config.json").write_bytes(orjson.dumps(config | {"num_nextn_predict_layers": 1}))
    tensors = weights(hf)
    names = [f"model.layers.2.{part}.weight" for part in ("enorm", "eh_proj", "mlp.down_proj")]
    rewrite(hf, tensors | {name: torch.ones(3) for name in names})
    with pytest.raises(ConversionError, match=r"3 tensors of multi-token prediction layers \(mod"):
        hf_to_megatron.convert(hf, tmp_path / "megatron")
    hf_to_megatron.convert(hf, tmp_path / "megatron", drop_mtp=True)
    model = orjson.loads((tmp_path / "megatron" / "megasft_model.json").read_bytes())
    assert sorted(model["left_out"]) == sorted(names)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert weights(tmp_path / "back").keys() == tensors.keys()


def test_a_float32_router_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    """As the published models have it; the router's choice hangs on its last bits."""
    hf = save("deepseek_v3_dense_first", tmp_path / "hf", dtype=torch.bfloat16)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    before = weights(hf) | {name: torch.linspace(1, 2, 12)}
    rewrite(hf, before)
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    for dtype in (None, torch.float16):
        megatron_to_hf.convert(
            tmp_path / "megatron", tmp_path / "back", dtype=dtype, overwrite=True
        )
        after = weights(tmp_path / "back")
        assert same_bits(after[name], before[name])
        assert after["model.norm.weight"].dtype == (dtype or torch.bfloat16)


def test_gradients_convert_like_weights(tmp_path: Path) -> None:
    """A gradient has the keys and shapes of its weight, in float32, whatever the model's dtype."""
    for name in ("qwen2_moe", "deepseek_v3_dense_first"):
        hf = save(name, tmp_path / name, dtype=torch.bfloat16)
        model = read_model(hf)
        placed = to_megatron(weights(hf), model, verify=True)
        pieces: dict[str, list[torch.Tensor]] = {}
        axes = {piece.key: piece.axes for piece, _ in placed}
        for piece, data in placed:
            pieces.setdefault(piece.key, []).append(data.float())
        stacked = {k: torch.stack(v).view(*axes[k], *v[0].shape) for k, v in pieces.items()}
        found = to_hf(stacked, model, verify=False)
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert all(torch.equal(found[key], t.float()) for key, t in weights(hf).items())


def test_the_model_file_holds_flags_and_everything_but_weights_is_copied(tmp_path: Path) -> None:
    hf = save("qwen3", tmp_path / "hf")
    (hf / "pytorch_model.bin").write_bytes(b"")
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    model = orjson.loads((tmp_path / "megatron" / "megasft_model.json").read_bytes())
    assert model["family"] == "qwen3" and model["vocab_size"] == 98
    assert model["tokenizer_files"] == ["chat_template.jinja", "tokenizer.json"]
    assert model["hf_config"] == orjson.loads((hf / "config.json").read_bytes())
    assert model["flags"][:2] == ["--num-layers", "2"]
    copied = {path.name for path in (tmp_path / "megatron" / "hf").iterdir()}
    assert copied == {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")
    }


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path: Path) -> None:
    hf = save("llama", tmp_path / "hf")
    tensors = weights(hf)
    tensors["model.layers.1.self_attn.sinks"] = tensors.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )
    rewrite(hf, tensors)
    with pytest.raises(ConversionError) as error:
        hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert "lacks 1 tensors (model.layers.1.self_attn.q_proj.weight)" in str(error.value)
    assert "1 that no rule takes (model.layers.1.self_attn.sinks)" in str(error.value)
    assert list(tmp_path.iterdir()) == [hf]


def test_tensors_computed_from_the_configuration_are_left_out(tmp_path: Path) -> None:
    hf = save("llama", tmp_path / "hf")
    tensors = weights(hf)
    rewrite(hf, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert weights(tmp_path / "back").keys() == tensors.keys()


def test_a_tied_model_may_bring_its_output_layer_only_when_it_is_the_embedding(
    tmp_path: Path,
) -> None:
    hf = save("qwen3_tied", tmp_path / "hf")
    tensors = weights(hf)
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(hf, tensors | {"lm_head.weight": embedding.clone()})
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    rewrite(hf, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ConversionError, match=r"lm_head\.weight is not model\."):
        hf_to_megatron.convert(hf, tmp_path / "megatron", overwrite=True)


def test_the_vocabulary_of_the_configuration_must_be_that_of_the_weights(tmp_path: Path) -> None:
    hf = save("llama", tmp_path / "hf")
    config = orjson.loads((hf / "config.json").read_bytes()) | {"vocab_size": 100}
    (hf / "config.json").write_bytes(orjson.dumps(config))
    with pytest.raises(ConversionError, match=r"is \(98, 32\).*vocabulary of 100"):
        hf_to_megatron.convert(hf, tmp_path / "megatron")


def test_an_output_is_replaced_only_when_asked_and_only_when_it_is_a_conversion(
    tmp_path: Path,
) -> None:
    hf, output = save("llama", tmp_path / "hf"), tmp_path / "megatron"
    hf_to_megatron.convert(hf, output)
    with pytest.raises(ConversionError, match="exists; choose another"):
        hf_to_megatron.convert(hf, output)
    hf_to_megatron.convert(hf, output, overwrite=True)
    with pytest.raises(ConversionError, match="are both"):
        hf_to_megatron.convert(hf, hf, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(ConversionError, match="was not written by this command"):
        megatron_to_hf.convert(output, mine, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron", "mine"]


def test_a_dtype_asked_for_is_written_to_the_configuration_too(tmp_path: Path) -> None:
    hf_to_megatron.convert(save("llama", tmp_path / "hf"), tmp_path / "megatron")
    report = megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    assert report.dtypes == "bfloat16, rounded from float32"
    assert {t.dtype for t in weights(tmp_path / "back").values()} == {torch.bfloat16}
    assert orjson.loads((tmp_path / "back" / "config.json").read_bytes())["dtype"] == "bfloat16"


def test_command_lines_report_and_turn_faults_into_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the comparison that follows by default, but for the logits, which take Megatron."""
    hf, megatron = save("qwen3", tmp_path / "hf"), tmp_path / "megatron"
    assert hf_to_megatron.main(["--hf", str(hf), "--output", str(megatron)], worker=None) == 0
    printed = capsys.readouterr().out
    assert "25 Hugging Face, 11 Megatron" in printed and "bitwise equal" in printed
    assert "--qk-layernorm" in printed and "verified: " in printed
    assert json.loads((megatron / "verification.json").read_bytes())["checkpoint"] == str(megatron)
    back = ["--checkpoint", str(megatron), "--output", str(tmp_path / "back")]
    assert megatron_to_hf.main([*back, "--no-verify"], worker=None) == 0
    printed = capsys.readouterr().out
    assert "not checked" in printed and "verified" not in printed
    assert megatron_to_hf.main(back, worker=None) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'back'} exists")
    assert megatron_to_hf.main([*back, "--overwrite"], worker=None) == 0
    assert "verified: " in capsys.readouterr().out
    assert (tmp_path / "back" / "verification.json").is_file()


@pytest.mark.parametrize("direction", ["there", "back"])
def test_what_turns_out_wrong_does_not_get_its_name_until_it_is_taken_as_it_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
) -> None:
    """A file that is lost on the way stands for any fault."""
    hf = save("qwen3", tmp_path / "hf")
    main, flags, module = hf_to_megatron.main, ["--hf", str(hf)], hf_to_megatron
    if direction == "back":
        hf_to_megatron.convert(hf, tmp_path / "megatron")
        main, flags = megatron_to_hf.main, ["--checkpoint", str(tmp_path / "megatron")]
    copy = module.hf_folder.copy_side_files

    def lose(source: Path, target: Path) -> list[str]:
        names = copy(source, target)
        (target / "tokenizer.json").unlink()
        return names

    flags += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(module.hf_folder, "copy_side_files", lose)
    assert main(flags, worker=None) == 1
    error = capsys.readouterr().err
    assert "is not the same model (files); nothing is at" in error
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    assert main([*flags, "--no-verify"], worker=None) == 0
    assert (tmp_path / "out").is_dir() and not (tmp_path / ".out.partial").exists()


def test_the_megasft_command_does_the_same(tmp_path: Path) -> None:
    hf, megatron = save("qwen2", tmp_path / "hf"), tmp_path / "megatron"
    there = ["hf-to-megatron", "--hf", str(hf), "--output", str(megatron)]
    back = ["megatron-to-hf", "--checkpoint", str(megatron), "--output", str(tmp_path / "back")]
    for arguments in (there, back):
        result = CliRunner().invoke(
            convert_app, [*arguments, "--no-verify"], catch_exceptions=False
        )
        assert result.exit_code == 0 and "round trip  not checked" in result.output
    compared = ["--hf", str(hf), "--checkpoint", str(megatron), "--no-logits"]
    result = CliRunner().invoke(convert_app, ["verify", *compared], catch_exceptions=False)
    assert result.exit_code == 0 and "verified: " in result.output
    assert (hf / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()
