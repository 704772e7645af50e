"""Which differences of rows a resumed run is told of; loading itself is tested with Megatron."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import resume

PLAN = "plan version 1, balanced, store abc, 9 samples, row_tokens 64, align_tokens 8, seed 1"
WINDOW = "cost window 2 batches of 4 rows"
OTHER_PACKER = PLAN.replace("balanced", "best_fit")


def flags(**more: Any) -> Any:
    given = {"load": "ckpt", "finetune": False, "use_distributed_optimizer": False}
    given |= {"no_load_optim": None}
    return SimpleNamespace(**(given | more))


def save(monkeypatch: pytest.MonkeyPatch, identity: str, **more: Any) -> None:
    """Let a checkpoint hold this identity."""
    given = {"use_distributed_optimizer": False, "no_save_optim": None, "megasft_plan": identity}
    state = {"args": SimpleNamespace(**(given | more))}
    monkeypatch.setattr(resume, "_saved_state", lambda _: state)


@pytest.mark.parametrize(
    ("saved", "ours", "difference"),
    [
        (PLAN, f"{PLAN}, mixture mixed 12ab", "checkpoint: no mixture, this run: mixture mixed 12"),
        (f"{PLAN}, mixture mixed 12ab", PLAN, "mixture mixed 12ab, this run: no mixture"),
        (OTHER_PACKER, PLAN, "checkpoint: best_fit, this run: balanced.*use .* --megasft-packer"),
        (f"{PLAN}, mixture mixed 1", f"{PLAN}, mixture sequential 1", "mixed 1, this run: mixture"),
        (f"{PLAN}, 2 packings", PLAN, "checkpoint: 2 packings, this run: no packings"),
        (
            f"{PLAN}, mixture mixed 1, {WINDOW}",
            f"{PLAN}, {WINDOW}",
            r"\(checkpoint: mixture mixed 1, this run: no mixture\)",
        ),
        (
            f"{PLAN}, {WINDOW}",
            f"{PLAN}, mixture mixed 1",
            "checkpoint: cost window 2 batches of 4 rows, this run: no cost window; checkpoint: no "
            "mixture, this run: mixture mixed 1",
        ),
        (
            PLAN.replace("9 samples", "8 samples").replace("abc", "abd"),
            PLAN,
            "store abd, this run: store abc; checkpoint: 8 samples, this run: 9 samples",
        ),
    ],
)
def test_each_part_of_other_rows_is_named_beside_its_like(
    monkeypatch: pytest.MonkeyPatch, saved: str, ours: str, difference: str
) -> None:
    save(monkeypatch, saved)
    with pytest.raises(FlagError, match=f"other rows .*{difference}"):
        resume.check(flags(), ours)
    resume.check(flags(), saved)


def test_a_run_that_starts_anew_from_weights_is_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(monkeypatch, OTHER_PACKER)
    given = flags(finetune=True)
    resume.check(given, PLAN)
    assert given.megasft_plan == PLAN


def test_moments_of_the_distributed_optimizer_are_not_loaded_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(monkeypatch, PLAN, use_distributed_optimizer=True)
    with pytest.raises(FlagError, match="add the flag, or pass --no-load-optim"):
        resume.check(flags(), PLAN)
    resume.check(flags(no_load_optim=True), PLAN)
    save(monkeypatch, PLAN, use_distributed_optimizer=True, no_save_optim=True)
    resume.check(flags(), PLAN)


def test_moments_that_cannot_be_loaded_again_are_warned_of_while_they_can_be_saved_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resume, "has", lambda _: False)
    given = flags(load=None, use_distributed_optimizer=True, ckpt_step=None)
    (warning,) = resume.check(SimpleNamespace(**vars(given), save="out"), PLAN)
    assert "a run saved to out will not resume with its moments" in warning
    assert resume.check(SimpleNamespace(**vars(given), save=None), PLAN) == []
    (tmp_path / resume.TRACKER).write_text("12")
    with pytest.raises(FlagError, match="drop the flag, or pass --no-load-optim"):
        resume.check(SimpleNamespace(**(vars(given) | {"load": tmp_path}), save="out"), PLAN)


def test_the_checkpoint_is_that_of_the_tracker_or_of_the_step_given(tmp_path: Path) -> None:
    def found(**more: Any) -> Path | None:
        return resume.find(SimpleNamespace(**({"load": tmp_path, "ckpt_step": None} | more)))

    assert found() is None and found(load=None) is None
    (tmp_path / resume.TRACKER).write_text("12\n")
    assert found() == tmp_path / "iter_0000012"
    assert found(ckpt_step=3) == tmp_path / "iter_0000003"
    (tmp_path / resume.TRACKER).write_text("release")
    assert found() == tmp_path / "release"


def test_an_empty_tracker_is_named_with_the_checkpoints_there(tmp_path: Path) -> None:
    """Megatron opens it for writing and then writes; a kill in between leaves nothing in it."""
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / resume.TRACKER).touch()
    with pytest.raises(FlagError, match=r"is empty: .*there: iter_0000003"):
        resume.find(flags(load=str(tmp_path), ckpt_step=None))


FILLED_IN = {"lr_decay_iters": 6, "start_weight_decay": 0.1, "end_weight_decay": 0.1}
"""What Megatron saves of a run that did not give them."""


def lengths(**more: Any) -> Any:
    """Flags of a run of six steps, before Megatron has filled in what is not given."""
    given: dict[str, Any] = dict.fromkeys(resume.SCHEDULE)
    given |= {"lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "cosine", "weight_decay": 0.1}
    given |= {"train_iters": 6, "train_samples": None, "override_opt_param_scheduler": False}
    given |= {"use_checkpoint_opt_param_scheduler": False, "skip_train": False}
    return flags(**(given | more))


@pytest.mark.parametrize(
    ("ours", "follows"),
    [
        ({}, False),
        ({"train_iters": 9}, True),
        ({"train_iters": 9, "lr_decay_iters": 6}, True),
        ({"train_iters": 9, "lr_decay_iters": 9}, False),
        ({"train_iters": 9, "lr": 2e-3}, False),
        ({"train_iters": 9, "lr_decay_style": "constant"}, False),
        ({"train_iters": 9, "finetune": True}, False),
        ({"train_iters": 9, "skip_train": True}, False),
        ({"train_iters": 9, "weight_decay": 0.2}, False),
        ({"train_iters": 9, "no_load_optim": True}, False),
        ({"train_iters": 9, "use_checkpoint_opt_param_scheduler": True}, False),
        ({"train_iters": None, "train_samples": 48}, True),
    ],
)
def test_a_run_that_only_gets_longer_follows_the_schedule_of_its_new_length(
    monkeypatch: pytest.MonkeyPatch, ours: dict[str, Any], follows: bool
) -> None:
    save(monkeypatch, PLAN, **vars(lengths(**FILLED_IN)))
    args = lengths(**ours)
    resume.follow_new_length(args)
    assert args.override_opt_param_scheduler is follows


@pytest.mark.parametrize("dropped", [{"lr_decay_iters": 4}, {"lr_warmup_fraction": 0.1}])
def test_a_run_that_drops_a_flag_of_its_schedule_is_left_to_megatron(
    monkeypatch: pytest.MonkeyPatch, dropped: dict[str, Any]
) -> None:
    """Its schedule would change by more than its length."""
    decay = {"start_weight_decay": 0.1, "end_weight_decay": 0.1}
    save(monkeypatch, PLAN, **vars(lengths(**decay | {"lr_decay_iters": 6} | dropped)))
    args = lengths(train_iters=9)
    resume.follow_new_length(args)
    assert not args.override_opt_param_scheduler


def test_the_length_of_a_run_counted_in_rows_is_that_in_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Megatron fills --train-iters in and saves it; ours is not known before."""
    save(monkeypatch, PLAN, **vars(lengths(train_samples=48, **FILLED_IN)))
    args = lengths(train_iters=None, train_samples=48)
    resume.follow_new_length(args)
    assert not args.override_opt_param_scheduler
    args.train_samples = 4_800
    with caplog.at_level("INFO"):
        resume.follow_new_length(args)
    assert args.override_opt_param_scheduler
    assert "the run was 48 rows long and is 4,800 rows now" in caplog.text
