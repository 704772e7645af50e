from dataclasses import replace
from pathlib import Path

from megasft.proof.prove import Settings
from megasft.proof.report import conclusion, markdown, summarized
from megasft.proof.verdict import Verdict

GOOD = Verdict("qwen3", "CP 2", 2, "turn", 1e-8, 1e-6, "model.norm.weight", 1e-8, 1e-6)
SETTINGS = Settings(("qwen3",), ("turn",), (), 2, "cpu", None, Path("x"))


def test_objectives_of_a_layout_share_a_line_with_the_worst_of_each_error() -> None:
    worse = replace(GOOD, objective="token", loss_error=5e-7, gradient_error=1e-7)

    (line,) = summarized([GOOD, worse])

    assert (line.objective, line.loss_error, line.gradient_error) == ("all 2", 5e-7, 1e-6)
    assert line.is_exact


def test_a_wrong_run_keeps_its_own_line() -> None:
    wrong = replace(GOOD, objective="token", gradient_error=0.5)

    assert summarized([GOOD, wrong]) == [wrong]
    assert conclusion([GOOD, wrong]).startswith("1 of 2 runs are not exact")


def test_the_report_has_every_run_the_versions_and_the_command() -> None:
    refused = replace(GOOD, layout="EP 2", failure="FlagError: a | b")
    many = replace(GOOD, layout="TP 2", threads=81)
    text = markdown([GOOD, many, refused], SETTINGS, command="megasft prove --max-ranks 2")

    assert "| qwen3 | CP 2 | turn | 1.0e-08 | 1.0e-06 | model.norm.weight" in text
    assert "FlagError: a / b" in text and "**wrong**" in text
    assert "`megasft prove --max-ranks 2`" in text and "megatron-core 0.19" in text
    assert "most threads of a rank's process: 81" in text


def test_an_injected_defect_is_the_first_thing_a_report_says() -> None:
    text = markdown([GOOD], replace(SETTINGS, defect="cp-seam"), command="megasft prove")

    assert "A defect was injected" in text and "lost at each seam" in text
