"""Which differences of rows a resumed run is told of; loading itself is tested with Megatron."""

from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import resume

PLAN = "plan version 1, balanced, store abc, 9 samples, row_tokens 64, align_tokens 8, seed 1"
OTHER_PACKER = PLAN.replace("balanced", "best_fit")


def flags() -> Any:
    return SimpleNamespace(load="ckpt", finetune=False, use_distributed_optimizer=False)


@pytest.mark.parametrize(
    ("saved", "ours", "difference"),
    [
        (PLAN, f"{PLAN}, mixture mixed 12ab", "checkpoint: no mixture, this run: mixture mixed 12"),
        (f"{PLAN}, mixture mixed 12ab", PLAN, "mixture mixed 12ab, this run: no mixture"),
        (OTHER_PACKER, PLAN, "checkpoint: best_fit, this run: balanced.*use .* --megasft-packer"),
        (f"{PLAN}, mixture mixed 1", f"{PLAN}, mixture sequential 1", "mixed 1, this run: mixture"),
    ],
)
def test_another_mixture_or_packer_is_other_rows(
    monkeypatch: pytest.MonkeyPatch, saved: str, ours: str, difference: str
) -> None:
    monkeypatch.setattr(resume, "_saved_identity", lambda _: saved)
    with pytest.raises(FlagError, match=f"other rows \\(.*{difference}"):
        resume.check(flags(), ours)
    resume.check(flags(), saved)
