import io
from dataclasses import replace

from rich.console import Console as Screen

from megasft.report.console import Console, line_of
from megasft.report.sink import Setup

from .records import STEP, VALIDATION, step


def printed(*, interval: int = 1, table_interval: int = 0) -> str:
    screen = Screen(file=io.StringIO(), width=200, highlight=False)
    sink = Console(Setup(console_interval=interval, table_interval=table_interval), screen)
    for number in range(1, 5):
        sink.write(step(number))
    sink.write(VALIDATION)
    file = screen.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_line_holds_what_one_watches_and_its_columns_do_not_move() -> None:
    line = line_of(STEP)
    assert line == (
        "step 2/4  loss 1.2500  token 1.5000 sample 1.3750 turn 1.1250 p 0.375 | "
        "norm  0.750 lr 1.00e-05 |     40 turns     30 samples     1,200 labels |  3.1% pad | "
        "  2,000 tok/s     600 lab/s     3.5 TFLOP/s |   0.20 s   2.5 GiB"
    )
    quick = replace(STEP, step=3, speed=STEP.speed._replace(tokens=123.0, seconds=12.5))
    bars = [n for n, c in enumerate(line) if c == "|"]
    assert [n for n, c in enumerate(line_of(quick)) if c == "|"] == bars
    known = replace(STEP, speed=STEP.speed._replace(mfu=0.416))
    assert "TFLOP/s 41.6% MFU |" in line_of(known)


def test_a_step_without_labels_or_update_says_so() -> None:
    empty = replace(STEP, losses=None, grad_norm=None, learning_rate=None, is_skipped=True)
    line = line_of(empty)
    assert "no label in this step" in line and "skipped: the gradient is not finite" in line


def test_lines_and_tables_come_at_their_intervals() -> None:
    assert printed().count("[megasft] step ") == 4
    assert printed(interval=2).count("[megasft] step ") == 2
    assert printed(interval=0) == ""
    assert "maths" not in printed()
    # Steps 2 and 4, and the evaluation.
    assert printed(table_interval=2).count("stem_zh/phy") == 3


def test_the_dearest_category_is_on_top_and_a_set_without_labels_is_left_out() -> None:
    text = printed(interval=1, table_interval=4)
    assert text.index("stem_zh/phy") < text.index("maths")
    assert (
        "[megasft] validation talk after step 2  loss 1.2500  token 1.5000 sample 1.3750 " in text
    )
    assert "turn 1.1250 p 0.375  perplexity 4.482" in text and "validation none" not in text
    lines = [line.replace("│", " ").split() for line in text.splitlines() if "│" in line]
    of_the_step, of_the_evaluation = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert (
        of_the_step
        == of_the_evaluation
        == [
            ["stem_zh/phy", "2.5000", "2.0000", "0.250", "400", "10"],
            ["maths", "1.0000", "0.7500", "0.500", "800", "30"],
            ["turn", "1", "1.7500", "1.6250", "0.625", "700", "28"],
            ["labels", "16-63", "1.8750", "1.0625", "0.875", "900", "35"],
        ]
    )
    titles = next(line for line in text.splitlines() if "p correct" in line)
    names = [name.strip() for name in titles.split("┃")[2:-1]]
    assert names == ["loss", "turn mean", "p correct", "labels", "turns"]
