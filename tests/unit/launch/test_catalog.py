"""Keys become the flags they are named after: every flag of Megatron, and none that it has not."""

import argparse
import re
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.launch.catalog import Catalog, Spelling
from megasft.training.unknown_flags import NOTES, OTHER_NAMES


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(["--swiglu", "--tokenizer-type", "NullTokenizer"])


def flags(catalog: Catalog, name: str, value: Any) -> list[str]:
    section, _, key = name.partition(".")
    return catalog.flags(catalog.find(section, key), value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim.lr", 0.005, ["--lr", "0.005"]),
        ("optim.lr", "5e-3", ["--lr", "5e-3"]),
        ("model.lr", -1.5, ["--lr=-1.5"]),
        ("data.seq_length", 4096, ["--seq-length", "4096"]),
        ("data.store", "a", ["--megasft-data", "a"]),
        ("data.store", ["a", "b"], ["--megasft-data", "a", "b"]),
        ("data.megasft_data", ["a"], ["--megasft-data", "a"]),
        ("data.valid", "maths=v", ["--megasft-valid-data", "maths=v"]),
        ("loss.objective", "sample", ["--megasft-loss", "sample"]),
        ("loss.dft_alpha", 1, ["--megasft-dft-alpha", "1"]),
        ("data.no_balance", True, ["--megasft-no-balance"]),
        ("model.bf16", True, ["--bf16"]),
        ("model.bf16", False, []),
        ("parallel.sequence_parallel", True, ["--sequence-parallel"]),
        ("model.rope_fusion", False, ["--no-rope-fusion"]),
        ("model.rope_fusion", True, []),
        ("model.no_rope_fusion", True, ["--no-rope-fusion"]),
        ("model.no_rope_fusion", False, []),
        ("model.bias_linear", False, ["--disable-bias-linear"]),
        ("model.rl_skip_bos_token", False, ["--no-rl-skip-bos-token"]),
        ("model.rl_skip_bos_token", True, ["--rl-skip-bos-token"]),
        (
            "model.yarn_correction_range_round_to_int",
            False,
            ["--no-yarn-correction-range-round-to-int"],
        ),
        ("model.window_size", "(4, 0)", ["--window-size", "(4, 0)"]),
        ("checkpoint.persistent_save_interval", 5, ["--persistent-save-interval", "5"]),
    ],
)
def test_a_key_is_its_flags_own_name(
    catalog: Catalog, name: str, value: Any, expected: list[str]
) -> None:
    assert flags(catalog, name, value) == expected


def test_every_switch_of_megatron_says_what_its_key_says(catalog: Catalog) -> None:
    """Against argparse itself: what a key is set to is what the parsed flag holds."""
    parser = catalog._parser
    num_switches = num_opposites = 0
    for key, spelling in catalog._spellings.items():
        if not spelling.is_switch or key == "swiglu":
            continue
        for value in (True, False):
            parsed = parser.parse_args(catalog.flags(spelling, value))
            held = getattr(parsed, spelling.action.dest)
            is_said_off = isinstance(spelling.action, argparse._StoreFalseAction)
            says = value != (is_said_off and not spelling.is_negated)
            assert bool(held) == says, (key, value)
        num_switches += 1
        num_opposites += spelling.is_negated
    assert num_switches > 250 and num_opposites > 30


def test_every_flag_of_the_parser_has_a_key(catalog: Catalog) -> None:
    options = {o for a in catalog._parser._actions for o in a.option_strings}
    pairs = {
        option
        for action in catalog._parser._actions
        if isinstance(action, argparse.BooleanOptionalAction)
        for option in action.option_strings
        if option.startswith("--no-")
    }
    reachable = {spelling.option for spelling in catalog._spellings.values()}
    reachable |= {o for s in catalog._spellings.values() for o in s.action.option_strings}
    assert options - pairs - reachable == {"--megasft-hf"}  # model.hf
    assert len(options) > 800


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optim.learning_rat", r"unknown key learning_rat"),
        ("optim.lr_decay_stile", r"unknown key lr_decay_stile; did you mean optim\.lr_decay_style"),
        ("data.stores", r"did you mean data\.store\?"),
        ("model.export_hff", r"did you mean checkpoint\.export_hf\?"),
        ("optim.max_restart", r"did you mean launch\.max_restarts\?"),
        ("launch.nproc", r"did you mean launch\.nproc_per_node\?"),
        ("optim.store", r"store belongs in the section data, not in optim"),
        ("data.hf", r"hf belongs in the section model, not in data"),
        ("optim.nproc_per_node", r"nproc_per_node belongs in the section launch, not in optim"),
        ("launch.seq_length", r"seq_length is a flag of the training, and launch is about"),
        ("model.megasft_hf", r"megasft_hf is model\.hf here"),
        ("optim.learning_rate", r"unknown key learning_rate; here it is optim\.lr$"),
        ("launch.max_steps", r"unknown key max_steps; here it is optim\.train_iters$"),
        ("optim.num_train_epochs", r"unknown key num_train_epochs; here it is optim\.epochs$"),
        ("data.model_name_or_path", r"unknown key model_name_or_path; here it is model\.hf$"),
        ("model.dataset_name", r"here it is data\.store \(a store made by `megasft build`\)$"),
        ("log.zzzzqqqq", r"unknown key zzzzqqqq; `megasft train --keys PART` lists"),
    ],
)
def test_an_unknown_or_misplaced_key_is_told_where_to_go(
    catalog: Catalog, name: str, message: str
) -> None:
    section, _, key = name.partition(".")
    with pytest.raises(FlagError, match=message):
        catalog.find(section, key)


def test_names_of_other_tools_are_none_of_ours_and_lead_to_flags_there_are(
    catalog: Catalog,
) -> None:
    for other, flag in OTHER_NAMES.items():
        assert other not in catalog._spellings
        with pytest.raises(FlagError) as refused:
            catalog.find("data", other)
        said = re.search(r"here it is (\w+)\.(\w+)", str(refused.value))
        assert said is not None, other
        if flag == "--megasft-hf":
            assert said.groups() == ("model", "hf")
        else:
            assert catalog.find(*said.groups()).option == flag
    assert NOTES.keys() < OTHER_NAMES.keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.lr", "fast", r"invalid float value: 'fast' \(--lr\)"),
        ("optim.lr", True, r"true is not a value of --lr float"),
        ("optim.lr", {"a": 1}, r"\{'a': 1\} is not a value of --lr"),
        ("optim.lr", [1, 2], "--lr takes one value, not a list of 2"),
        ("data.seq_length", 4.5, r"invalid int value: '4.5' \(--seq-length\)"),
        ("data.store", [], r"expected at least one argument \(--megasft-data\)"),
        ("data.store", [["a"]], r"\['a'\] inside a list is not a value of a flag"),
        ("optim.lr_decay_style", "cosin", r"invalid choice: 'cosin'"),
        ("model.window_size", "four", "four"),
        ("model.bf16", "yes", r"'yes'; --bf16 is a switch: true or false"),
        ("model.bf16", 1, r"1; --bf16 is a switch"),
        (
            "model.swiglu",
            False,
            r"--swiglu is set for this model or by megasft, and Megatron has no",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    catalog: Catalog, name: str, value: Any, message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        flags(catalog, name, value)


def test_a_listing_says_what_a_key_takes(catalog: Catalog) -> None:
    listed = {key: (kind, text) for key, kind, text in catalog.listing("")}

    assert listed["data.store"][0] == "list of str"
    assert listed["lr_decay_style"][0].startswith("constant|")
    assert listed["rope_fusion"] == ("true|false", listed["rope_fusion"][1])
    assert "--no-rope-fusion" in listed["rope_fusion"][1]
    assert "on first use" in listed["model.hf"][1] and "launch.max_restarts" in listed
    assert [key for key, _, _ in catalog.listing("per-token")] == ["calculate_per_token_loss"]


def test_a_spelling_holds_still(catalog: Catalog) -> None:
    spelling = catalog.find("optim", "lr")
    assert isinstance(spelling, Spelling) and spelling.kind == "float"
