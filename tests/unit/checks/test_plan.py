import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasft.checks.engine import Finding
from megasft.checks.plan import RULES, cautions
from megasft.draw import Draw, Stage
from megasft.packing.balance import LLAMA_8B, BatchShape, Cost
from megasft.packing.cost_window import CostWindow
from megasft.packing.forecast import Run, forecast
from megasft.packing.plan import plan_rows
from tests.stores import sample, write_store

ROW = 64
FULL = [ROW // 4] * 480
"""Four samples fill a row: 120 rows with nothing to warn of."""


def told(
    tmp_path: Path,
    sizes: list[int],
    *,
    labels: int | None = None,
    batch: tuple[int, int, int] = (8, 2, 1),
    row: int = ROW,
    align: int = 1,
    draw: Draw | None = None,
    cost: Cost = LLAMA_8B,
    **run: Any,
) -> dict[str, Finding]:
    samples = [
        sample([1] * n, *[(1, k)] if (k := n - 1 if labels is None else min(labels, n - 1)) else [])
        for n in sizes
    ]
    store = write_store(tmp_path / "store", samples)
    run = {"packer": "balanced"} | run
    plan = plan_rows(
        store, row_tokens=row, align_tokens=align, seed=1, draw=draw, packer=run["packer"]
    )
    found = cautions(forecast(store, plan, Run(BatchShape(*batch), seed=1, **run), cost))
    assert len({one.rule for one in found}) == len(found)
    return {one.rule: one for one in found}


def test_a_run_with_nothing_to_mend_is_told_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, FULL) == {}
    assert told(tmp_path, FULL, cp_size=4, tp_size=2, pp_size=2, align=8) == {}


@pytest.mark.parametrize(
    ("what", "fact", "remedy"),
    [
        ({"batch": (9, 2, 2)}, "9 rows is not a multiple of 4 = 2 data-p", "size to 8 or 12"),
        ({"batch": (3, 2, 2)}, "3 rows is not a multiple of 4", "--global-batch-size to 4"),
        ({"sizes": [*FULL, 65, 90]}, "2 samples .* 155 tokens, 2.0 % .* 90", "ns 64"),
        ({"batch": (480, 2, 1)}, "480 rows is 4.0 epochs of 120 rows", "a smaller"),
        ({"batch": (40, 2, 1)}, "an epoch is 3.00 iterations", "a smaller"),
        ({"row": 256, "batch": (16, 2, 1)}, "longest .* 16 tokens, a row 256", "32 makes some 8"),
        ({"labels": 0}, "120 of 120 rows hold no label, and 15 steps train nothing", "lint"),
        ({"sizes": [64] * 120}, "fewest turns of a step are 8, at step 1", "a larger"),
        ({"sizes": [*FULL, 64], "labels": 60, "batch": (2, 2, 1)}, "60 labels, a mean", "rger"),
        ({"sizes": [64] * 120, "batch": (12, 2, 1)}, r"120 of 120 rows \(100.0 %\)", "raise --seq"),
        ({"packer": "none"}, "fills 25 %", "--packer balanced"),
        ({"align": 32}, "50.0 % .* pad .* of 32; a sample has 16", "1 would leave 0.0 %"),
        ({"align": 32, "cp_size": 16}, "50.0 % of all tokens", "less context parallelism"),
        ({"packer": "sequential", "sizes": [24, 48] * 60}, "43.8 % of all", "balanced or best"),
        ({"sizes": [40] * 120}, "37.5 % of all tokens are room left", "more than half a row"),
        ({"sizes": FULL[:41]}, "6.8 % of all tokens are room .* of 11 rows", "so few rows"),
        ({"cp_size": 16, "align": 32}, "100 % of samples .* CP 16 x TP 1", "a smaller CP"),
        ({"batch": (8, 2, 1), "pp_size": 4}, "4 micro-batches a rank .* waits 43 %", "size 24 or"),
    ],
)  # fmt: skip
def test_what_will_bite_is_told_with_its_numbers_and_a_remedy(
    tmp_path: Path, what: dict[str, Any], fact: str, remedy: str
) -> None:
    found = told(tmp_path, **({"sizes": FULL} | what))
    assert any(
        re.search(fact, one.fact) and re.search(remedy, one.remedy) for one in found.values()
    ), found


def test_stages_that_add_rows_are_told_and_others_are_not(tmp_path: Path) -> None:
    sizes = [16] * 200

    def staged(*ends: int) -> Draw:
        stages = np.split(np.arange(200), ends)
        return Draw("sequential", tuple(Stage("s", some) for some in stages), (), ())

    found = told(tmp_path, sizes, draw=staged(41, 82, 123))
    assert "4 stages are packed apart" in found["stage-rows"].fact
    assert "53 rows at least, where 50 could" in found["stage-rows"].fact
    assert "stage-rows" not in told(tmp_path, sizes, draw=staged(40, 80, 120))
    # Two of 22 tokens fill a row as well as they go: not the stages' fault.
    assert "stage-rows" not in told(tmp_path, [22] * 200, draw=staged(96))


def test_ranks_that_wait_are_told_of_the_packer_and_the_window(tmp_path: Path) -> None:
    sizes = [64] * 30 + [4] * 1440
    attention = Cost(per_token=0, per_square=1)
    uneven = told(tmp_path, sizes, batch=(4, 2, 1), cost=attention)["uneven-ranks"]
    assert "2 micro-batches each, dealt as evenly as they go; the dearest row" in uneven.fact
    assert uneven.remedy.startswith("more micro-batches to deal, --global-batch-size 8 say")
    assert uneven.remedy.endswith("--megasft-cost-window 4")
    window = CostWindow(2, 2)
    one_each = told(
        tmp_path, sizes, batch=(2, 2, 1), cost=attention, packer="best_fit", window=window
    )["uneven-ranks"]
    assert "a micro-batch each, so none to deal" in one_each.fact
    assert one_each.remedy.startswith("--packer balanced; ")
    assert one_each.remedy.endswith("--megasft-cost-window 4")
    even = told(tmp_path, sizes, batch=(4, 2, 1), cost=Cost(per_token=1, per_square=0))
    assert "uneven-ranks" not in even


def test_what_megatron_refuses_comes_first_and_is_the_only_error(tmp_path: Path) -> None:
    found = list(told(tmp_path, [*FULL, 65], batch=(9, 2, 1)).values())
    assert [one.severity for one in found] == ["error", *["warning"] * (len(found) - 1)]
    assert len(found) > 1


def test_a_rule_says_in_its_docstring_what_it_finds() -> None:
    assert len(RULES) == 14
    assert all(rule.meaning and rule.meaning[-1] != "." for rule in RULES.values())
