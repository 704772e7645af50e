from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megasft.errors import AuditError
from megasft.megatron.global_batch import GlobalBatch
from megasft.training.audit import audit, audit_evaluation

BATCH = GlobalBatch(rows=(4, 0, 7), units=120, labels=900, positions=1152)


def test_the_right_count_passes() -> None:
    audit(step=1, reduced=120, batch=BATCH, objective="turn")


def test_a_wrong_count_names_the_step_both_numbers_and_the_rows() -> None:
    with pytest.raises(AuditError) as caught:
        audit(step=17, reduced=121, batch=BATCH, objective="turn")

    message = str(caught.value)
    for fact in ("step 17", "121 turns", "hold 120", "rows 4, 0, 7 of the plan"):
        assert fact in message


def test_a_large_batch_names_some_of_its_rows_and_counts_the_others() -> None:
    batch = BATCH._replace(rows=tuple(range(1000)))

    with pytest.raises(AuditError, match="14, 15 and 984 more"):
        audit(step=1, reduced=0, batch=batch, objective="token")


PLAN: Any = SimpleNamespace(
    turns=np.array([3, 2]), labelled_samples=np.array([1, 1]), labels=np.array([30, 20])
)
WHOLE = {"turns": 5.0, "samples": 2.0, "labels": 50.0, "ce": 71.5}


def test_an_evaluation_of_each_row_once_passes() -> None:
    audit_evaluation(step=3, name="valid", found=WHOLE, plan=PLAN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": 30.0}, "evaluation of valid read 30 labels, and its rows hold 50; its losses"),
        ({"turns": 10.0}, "step 3: the evaluation of valid read 10 turns, and its rows hold 5"),
        ({"samples": 1.0}, "read 1 samples, and its rows hold 2"),
    ],
)
def test_an_evaluation_of_other_rows_names_the_store_and_both_numbers(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(AuditError, match=message):
        audit_evaluation(step=3, name="valid", found=WHOLE | changes, plan=PLAN)
