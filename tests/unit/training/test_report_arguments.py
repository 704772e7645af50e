import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError, MegasftError
from megasft.training import report_arguments
from megasft.training.report_arguments import add_report_arguments, check_report, log_folder


def parsed(*argv: str, save: str | None = None, wandb_project: str = "") -> Any:
    parser = argparse.ArgumentParser()
    add_report_arguments(parser.add_argument_group("ours"))
    args = parser.parse_args(argv)
    return SimpleNamespace(**vars(args), save=save, wandb_project=wandb_project)


def test_the_log_lies_in_save_unless_a_folder_is_given() -> None:
    assert log_folder(parsed()) is None
    assert log_folder(parsed(save="run")) == Path("run/log")
    assert log_folder(parsed("--megasft-log-dir", "logs", save="run")) == Path("logs")


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (("--megasft-console-interval", "-1"), "--megasft-console-interval is -1"),
        (("--megasft-table-interval", "-5"), "--megasft-table-interval is -5"),
        (("--megasft-spikes", "-0.5"), "--megasft-spikes is -0.5"),
        (("--megasft-peak-tflops", "0"), "--megasft-peak-tflops is 0"),
        (("--megasft-track", "no_such", "wandb"), "no_such"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    argv: tuple[str, ...], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_report(parsed())
    with pytest.raises((FlagError, SystemExit)) as caught:
        check_report(parsed(*argv))
    assert fact in f"{caught.value} {capsys.readouterr().err}"


def test_a_tracker_must_be_installed_and_be_the_only_run_of_wandb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_arguments, "has", lambda name: name == "wandb")
    check_report(parsed("--megasft-track", "wandb"))
    with pytest.raises(MegasftError, match=r"track mlflow: not installed; pip install megasft\["):
        check_report(parsed("--megasft-track", "wandb", "mlflow"))
    with pytest.raises(FlagError, match="two runs in W&B"):
        check_report(parsed("--megasft-track", "wandb", wandb_project="sft"))
