"""Everything a verification compares without running a model, and that it fails where it should."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.config_map import read_model
from checkpoint_convert.verify import show, verify
from checkpoint_convert.verify.__main__ import main
from checkpoint_convert.verify.layouts import combined, flags_of, parse_layout
from checkpoint_convert.verify.text import LEAST_TOKENS, make_row
from megasft.errors import ConversionError
from megasft.ranks.layout import Layout
from megasft.run import forward_worker
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.checkpoint_convert.tiny_models import save

WORKER = forward_worker.__name__


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    hf_to_megatron.convert(save("qwen3", folder / "hf"), folder / "megatron")
    megatron_to_hf.convert(folder / "megatron", folder / "back")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A model, its conversion and the way back, to break."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def run(folder: Path, **more: Any) -> Any:
    return verify(folder / "hf", folder / "megatron", hf_out=folder / "back", worker=None, **more)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = orjson.loads(path.read_bytes())
    edit(content)
    path.write_bytes(orjson.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def the_failure(folder: Path) -> tuple[str, str]:
    """Return name and detail of the one check that fails."""
    verification = run(folder)
    assert not verification.is_ok
    assert len(verification.failures) == 1, verification.failures
    return verification.failures[0].rule, verification.failures[0].fact


def test_a_right_conversion_passes_every_check_and_leaves_a_record(folder: Path) -> None:
    verification = run(folder)
    assert verification.is_ok, verification.failures
    names = [check.rule for check in verification.checks]
    assert names == [
        *("flags", "files", "tensors", "returned config", "returned files", "returned tensors")
    ]
    records = [folder / name / "verification.json" for name in ("megatron", "back")]
    record = orjson.loads(records[0].read_bytes())
    assert records[0].read_bytes() == records[1].read_bytes()
    assert record["is_ok"] and record["packages"]["torch"] == torch.__version__.split("+")[0]
    tensors = load_file(folder / "hf" / "model.safetensors")
    assert record["tensors"].keys() == tensors.keys()
    assert record["tensors"]["model.norm.weight"]["shape"] == [32]
    assert len(record["tensors"]["model.norm.weight"]["sha256"]) == 64
    assert record["files"].keys() >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert run(folder).is_ok, "its own record must not be a difference"


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)[3, 5] ^= 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 of 25 are wrong: model.norm.weight is missing"),
        (lambda t: t.update(more=torch.ones(2)), "1 of 25 are wrong: more is not in"),
        (flip_a_bit, "model.layers.1.mlp.down_proj.weight differs in 1 of 1,536 elements, by up"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
            "model.norm.weight has the dtype torch.float16 and not torch.float32",
        ),
    ],
)
def test_a_returned_folder_with_another_tensor_fails(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_tensors(folder / "back", edit)
    name, detail = the_failure(folder)
    assert name == "returned tensors" and message in detail


def test_a_returned_folder_with_another_tokenizer_or_configuration_fails(folder: Path) -> None:
    (folder / "back" / "chat_template.jinja").write_text("{{ other }}")
    name, detail = the_failure(folder)
    assert name == "returned files" and "chat_template.jinja differs" in detail
    shutil.copy(folder / "hf" / "chat_template.jinja", folder / "back")
    edit_json(folder / "back" / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
    name, detail = the_failure(folder)
    assert name == "returned config" and "rms_norm_eps is 1e-05 and not 1e-06" in detail


def test_a_checkpoint_with_another_side_file_fails(folder: Path) -> None:
    (folder / "megatron" / "hf" / "generation_config.json").unlink()
    (folder / "megatron" / "hf" / "added_tokens.json").write_text("{}")
    name, detail = the_failure(folder)
    assert name == "files"
    assert "generation_config.json is missing" in detail and "added_tokens.json is not in" in detail


def drop(flag: str, *, values: int = 0) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        at = content["flags"].index(flag)
        del content["flags"][at : at + 1 + values]

    return edit


def put(flag: str, value: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content["flags"][content["flags"].index(flag) + 1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("--rotary-base", "10000"), "--rotary-base is '10000' and not '1000000'"),
        (drop("--qk-layernorm"), "--qk-layernorm is not set"),
        (put("--padded-vocab-size", "97"), "--padded-vocab-size is '97' and not '98'"),
        (lambda c: c["flags"].append("--squared-relu"), "--squared-relu = 'set' is extra"),
        (lambda c: c["hf_config"].pop("rms_norm_eps"), "hf_config: rms_norm_eps is missing"),
    ],
)
def test_another_flag_than_the_configuration_gives_is_named(
    folder: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_json(folder / "megatron" / "megasft_model.json", edit)
    name, detail = the_failure(folder)
    assert name == "flags" and message in detail


def test_a_checkpoint_of_other_weights_fails_and_names_the_piece(folder: Path) -> None:
    edit_tensors(folder / "hf", flip_a_bit)
    verification = run(folder)
    assert "decoder.layers.mlp.linear_fc2.weight[1] differs in 1 of 1,536" in (
        verification.check("tensors").fact
    )
    assert not verification.check("returned tensors").is_ok


def test_a_vocabulary_that_is_off_by_one_fails(folder: Path) -> None:
    edit_json(folder / "hf" / "config.json", lambda c: c.update(vocab_size=99))
    verification = run(folder)
    assert "the configuration says a vocabulary of 99" in verification.check("tensors").fact
    assert "--padded-vocab-size is '98' and not '99'" in verification.check("flags").fact
    assert "vocab_size is 98 and not 99" in verification.check("returned config").fact


def test_a_folder_that_transformers_cannot_load_is_a_check_that_failed(folder: Path) -> None:
    edit_json(folder / "hf" / "config.json", lambda c: c.update(vocab_size=99))
    one = verify(folder / "hf", folder / "megatron", worker=WORKER, by_layer=False).check("logits")
    assert "transformers cannot run" in one.fact and "AutoModelForCausalLM" in one.fact


def test_a_tensor_that_another_family_has_is_named(folder: Path, tmp_path: Path) -> None:
    hf = save("qwen2", tmp_path / "qwen2")
    verification = verify(hf, folder / "megatron", worker=None)
    assert (
        "lacks 1 tensors (decoder.layers.self_attention.linear_qkv.bias)"
        in verification.check("tensors").fact
    )


def test_a_trained_checkpoint_is_compared_as_it_was_exported(folder: Path, tmp_path: Path) -> None:
    """Its tensors are rounded to the folder's dtype, and its folder has neither flags nor files."""
    trained = tmp_path / "run"
    shutil.copytree(folder / "megatron" / "release", trained / "iter_0000007")
    (trained / "latest_checkpointed_iteration.txt").write_text("7")
    like = folder / "megatron"
    megatron_to_hf.convert(trained, tmp_path / "b", like=like, dtype=torch.bfloat16)
    verification = verify(tmp_path / "b", trained, worker=None)
    assert verification.is_ok, verification.failures
    assert verification.iteration == "iter_0000007"
    assert "19 of them rounded to the folder's dtype" in verification.check("tensors").fact
    edit_tensors(
        tmp_path / "b", lambda t: t["model.norm.weight"].view(torch.int16)[0].bitwise_xor_(1)
    )
    assert not verify(tmp_path / "b", trained, worker=None).is_ok


def test_the_command_line_says_the_verdict_by_its_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--hf", str(folder / "hf"), "--checkpoint", str(folder / "megatron"), "--no-logits"]
    assert main(argv, worker=WORKER) == 0
    assert "verified:" in capsys.readouterr().out
    record = folder / "record.json"
    edit_tensors(folder / "back", flip_a_bit)
    more = ["--hf-out", str(folder / "back"), "--manifest", str(record)]
    assert main([*argv, *more], worker=WORKER) == 1
    assert "NOT the same model" in capsys.readouterr().out
    assert not orjson.loads(record.read_bytes())["is_ok"]
    assert main([*argv[:2], "--checkpoint", str(folder / "hf")], worker=WORKER) == 1
    assert "give the folder that --save named" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([*argv, "--by-layer", "--whole"], worker=WORKER)
    assert usage.value.code == 2


def test_a_record_that_cannot_be_written_is_an_error(folder: Path) -> None:
    with pytest.raises(ConversionError, match="name another place with --manifest"):
        run(folder, manifest=folder / "nowhere" / "record.json")


def test_a_folder_without_its_name_yet_is_recorded_under_it(folder: Path) -> None:
    final = folder / "final"
    verification = verify(
        folder / "hf", folder / "megatron", worker=None, called={folder / "megatron": final}
    )
    assert verification.is_ok and verification.checkpoint == str(final) and not final.exists()
    record = orjson.loads((folder / "megatron" / "verification.json").read_bytes())
    assert record["checkpoint"] == str(final) and record["hf"] == str(folder / "hf")


def test_show_prints_every_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verification = run(folder)
    show(verification)
    out = capsys.readouterr().out
    assert all(check.rule in out for check in verification.checks)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", Layout(4, tp=2, pp=2)),
        ("qwen3_moe", Layout(4, tp=2, pp=2, ep=2)),
        ("deepseek_v3", Layout(4, pp=2, ep=2)),
        ("deepseek_v3_dense_first", Layout(2, ep=2)),  # three layers
    ],
)
def test_the_combined_layout_cuts_what_divides(tmp_path: Path, name: str, layout: Layout) -> None:
    assert combined(read_model(save(name, tmp_path))) == layout


def test_experts_are_whole_on_a_rank_and_have_sequence_parallelism_beside_tp(
    tmp_path: Path,
) -> None:
    layout = Layout(4, tp=2, pp=2, ep=2)
    of_experts, dense = (
        " ".join(flags_of(layout, read_model(save(name, tmp_path / name))))
        for name in ("qwen3_moe", "qwen3")
    )
    assert "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1" in of_experts
    assert "--sequence-parallel" in of_experts and "--sequence-parallel" not in dense
    assert "--expert" not in dense and "--pipeline-model-parallel-size 2" in dense


def test_layouts_are_read_as_they_are_written() -> None:
    assert parse_layout("tp2,pp2,ep4") == Layout(8, tp=2, pp=2, ep=4)
    for wrong in ("tp2,cp2", "tp0", "", "tp2,tp2", "tp2,ep3"):
        with pytest.raises(ConversionError, match="--layout"):
            parse_layout(wrong)


def test_the_row_is_text_in_several_documents(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hf = make_tokenizer(save("llama", tmp_path))
    edit_json(hf / "config.json", lambda c: c.update(vocab_size=512))
    row = make_row(hf, read_model(hf), AutoConfig.from_pretrained(hf))
    assert row.source == "text" and len(row.documents) > 3
    assert row.num_tokens >= LEAST_TOKENS and row.num_tokens % 8 == 0
    assert [len(document) for document in row.documents] == [64, 56, 48, 40]
    edit_json(hf / "config.json", lambda c: c.update(vocab_size=300))
    row = make_row(hf, read_model(hf), AutoConfig.from_pretrained(hf))
    assert "gives id" in row.source and max(map(max, row.documents)) < 300
    assert row.place(row.longest) == "token 0 of document 1"


def test_a_document_is_longer_than_where_rope_or_window_change(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hf = save("mistral_window", tmp_path)
    edit_json(hf / "config.json", lambda c: c.update(max_position_embeddings=9999))
    for window, longest in ((None, 192), (300, 316), (4096, 192)):
        edit_json(hf / "config.json", lambda c, w=window: c.update(sliding_window=w))
        row = make_row(hf, read_model(hf), AutoConfig.from_pretrained(hf))
        assert row.longest == longest
