import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.attention.backend import BACKENDS
from megasft.errors import FlagError
from megasft.files import MODEL_FILE
from megasft.megatron.flags import attention_backend
from megasft.training import arguments


def flags(**changes: Any) -> SimpleNamespace:
    good = {
        "megasft_data": ["store"],
        "seq_length": 128,
        "calculate_per_token_loss": True,
        "megasft_loss": "turn",
        "megasft_dft_alpha": 0.0,
        "megasft_align_tokens": 8,
        "megasft_packer": "balanced",
        "megasft_packings": 1,
        "megasft_cost_window": 0,
        "rampup_batch_size": None,
        "phase_transition_iterations": None,
        "megasft_best": None,
        "megasft_early_stop": None,
        "megasft_valid_data": None,
        "async_save": False,
        "megasft_freeze": None,
        "megasft_train_only": None,
        "megasft_keep_last": None,
        "save": None,
        "save_retain_interval": None,
        "megasft_attention": "auto",
        "megasft_console_interval": 1,
        "megasft_table_interval": 100,
        "megasft_spikes": 1.5,
        "megasft_peak_tflops": None,
        "megasft_track": [],
        "wandb_project": "",
        "sft": False,
        "data_path": None,
        "mock_data": False,
        "train_data_path": None,
        "valid_data_path": None,
        "full_validation": False,
        "multiple_validation_sets": False,
        "validation_set_names": None,
        "eval_iters": 0,
        "dataloader_type": "single",
        "transformer_impl": "local",
        "num_experts": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_expert_capacity_factor": None,
        "megasft_rope_scaling": None,
    }
    return SimpleNamespace(**(good | changes))


def test_good_flags_pass() -> None:
    arguments.check(flags())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megasft_data": None}, "--megasft-data STORE is missing"),
        ({"seq_length": None}, "--seq-length N is missing"),
        ({"calculate_per_token_loss": False}, "the turn mean would not be global; add the flag"),
        ({"megasft_dft_alpha": 1.5}, r"1.5; it must lie in \[0, 1\]"),
        ({"megasft_align_tokens": 0}, "the least is 1"),
        ({"megasft_packings": 0}, "--megasft-packings is 0; the least is 1"),
        ({"megasft_packings": 2, "megasft_packer": "none"}, "makes the same rows each time"),
        ({"megasft_keep_last": 0, "save": "x"}, "--megasft-keep-last is 0; a run resumes from 1"),
        ({"rampup_batch_size": ["2"]}, "ignored by Megatron 0.19; give --step-batch-size-schedule"),
        ({"phase_transition_iterations": "3"}, "would begin its first epoch anew"),
        ({"megasft_early_stop": 2}, "has no effect without --megasft-best"),
        (
            {"megasft_best": "b", "megasft_valid_data": ["a=x"], "save": "x"},
            "--megasft-best b is no validation store; there are a",
        ),
        ({"save": "x", "async_save": True}, "waits for ever without one; drop it here"),
        ({"megasft_keep_last": 2}, "has no effect without --save"),
        ({"megasft_freeze": ["("]}, "no regular expression"),
        ({"megasft_freeze": ["a"], "megasft_train_only": ["b"]}, "exclude each other; drop one"),
        ({"megasft_cost_window": 1}, "takes two global batches at least"),
        ({"sft": True}, "--sft and megasft's data exclude each other"),
        ({"data_path": ["x"], "mock_data": True}, "--data-path, --mock-data and"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets and megasft's data"),
        ({"eval_iters": 10}, "--eval-iters 10 would have no effect"),
        ({"dataloader_type": "cyclic"}, "would shuffle the row plan once more"),
        ({"transformer_impl": "transformer_engine"}, "Transformer Engine is not installed"),
        ({"megasft_rope_scaling": "{"}, "--megasft-rope-scaling { is not JSON"),
        ({"megasft_attention": "te"}, "needs --transformer-impl transformer_engine"),
    ],
)
def test_a_flag_that_would_change_the_loss_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        arguments.check(flags(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_load_balancing_type": ["global_aux_loss"]}, "depends on data parallelism"),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, "depends on data parallelism"),
        ({"moe_expert_capacity_factor": 1.5}, "1.5 drops tokens by what else is on their rank"),
        ({}, None),
    ],
)
def test_what_makes_a_loss_depend_on_the_layout_is_said(
    changes: dict[str, Any], message: str | None
) -> None:
    warnings = arguments.check(flags(num_experts=8, **changes))

    assert [message is not None and message in line for line in warnings] == [True] * bool(message)


def test_auto_attention_is_the_ring_unless_the_layers_are_transformer_engines() -> None:
    def chosen(**changes: Any) -> str | None:
        return attention_backend(flags(**changes))

    assert chosen() == "ring"
    assert chosen(transformer_impl="transformer_engine") is None
    assert chosen(transformer_impl="transformer_engine", megasft_attention="ring") == "ring"
    assert set(arguments.ATTENTION_CHOICES) == {"auto", "te", *BACKENDS}


def test_the_user_has_the_last_word_and_the_model_comes_before(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_text(json.dumps({"flags": ["--num-layers", "4"]}))

    argv = arguments.assemble_argv(["--megasft-hf", str(tmp_path), "--num-layers", "2"])

    assert argv.index("--ckpt-format") < argv.index("4") < argv.index("2") == len(argv) - 1
    assert argv[argv.index("--pretrained-checkpoint") + 1] == str(tmp_path)
    own = arguments.assemble_argv(["--megasft-hf", str(tmp_path), "--pretrained-checkpoint", "x"])
    assert own.count("--pretrained-checkpoint") == 1


def test_a_folder_that_no_conversion_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="megasft convert hf-to-megatron"):
        arguments.assemble_argv(["--megasft-hf", str(tmp_path)])


def test_ids_the_model_has_no_row_for_are_refused() -> None:
    store: Any = SimpleNamespace(name="store", meta={"vocab_size": 300})

    def flags(vocab_size: int | None, padded: int | None = None, tp: int = 1) -> SimpleNamespace:
        return SimpleNamespace(
            vocab_size=vocab_size, padded_vocab_size=padded, tensor_model_parallel_size=tp
        )

    args = flags(None)
    arguments.set_vocabulary(args, store)
    assert args.vocab_size == args.padded_vocab_size == 300, "padded rows would have logits, too"
    with pytest.raises(FlagError, match="tokenized with 300 ids, the model has 256"):
        arguments.set_vocabulary(flags(256), store)
    with pytest.raises(FlagError, match="-size 8 does not divide the vocabulary of 300"):
        arguments.set_vocabulary(flags(300, tp=8), store)


def test_the_help_shows_our_flags_first_and_all_of_megatrons() -> None:
    text = arguments.help_text()

    assert text.index("--megasft-data STORE") < text.index("--tensor-model-parallel-size")
    assert "--calculate-per-token-loss" in text and "%(default)s" not in text
