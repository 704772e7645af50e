import argparse

import pytest

from megasft.errors import FlagError
from megasft.training.unknown_flags import clear_errors


def parser() -> argparse.ArgumentParser:
    def add(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("--seq-length", type=int)
        made.add_argument("--global-batch-size", type=int)
        made.add_argument("--megasft-data", nargs="+")
        made.add_argument("--megasft-loss", choices=("turn", "token"))
        return made

    return clear_errors(add)(argparse.ArgumentParser(allow_abbrev=False))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seq-lenght 512", "^--seq-lenght is no flag of .*; the nearest is --seq-length$"),
        ("--seq-lenght=512", "^--seq-lenght is no flag"),
        ("--global_batch_size 8", "the nearest is --global-batch-size$"),
        ("--megasft-data a b --zzz", "^--zzz is no flag of Megatron or megasft; --help lists all$"),
        ("--seq-lenght 5 --global-batch 8", "--seq-length. --global-batch is no flag"),
        ("--learning-rate 1e-5", "^--learning-rate is no flag of .*; here it is --lr$"),
        ("--output_dir x", "^--output_dir is no flag of .*; here it is --save$"),
        (
            "--gradient-accumulation-steps 4",
            r"here it is --global-batch-size \(the micro-batch size x data-parallel ranks x these",
        ),
        ("512", "^512 belongs to no flag"),
        ("--seq-length 5k", "argument --seq-length: invalid int value: '5k'; see"),
        ("--seq-length", "argument --seq-length: expected one argument"),
        ("--megasft-loss row", "invalid choice: 'row'"),
    ],
)
def test_flags_that_do_not_parse_are_one_message(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FlagError, match=message):
        parser().parse_args(argv.split())
    assert capsys.readouterr() == ("", "")


def test_good_flags_parse_as_before() -> None:
    assert parser().parse_args(["--seq-length", "512"]).seq_length == 512
