import pytest

from megasft.errors import AuditError
from megasft.training.audit import audit
from megasft.training.global_batch import GlobalBatch

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
