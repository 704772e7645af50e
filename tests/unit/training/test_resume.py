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


def state(identity: str, **more: Any) -> dict[str, Any]:
    """Return what a checkpoint with this identity holds."""
    given = {"use_distributed_optimizer": False, "no_save_optim": None, "megasft_plan": identity}
    return {"args": SimpleNamespace(**(given | more))}


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
    saved: str, ours: str, difference: str
) -> None:
    with pytest.raises(FlagError, match=f"other rows .*{difference}"):
        resume.check(flags(), state(saved), ours)
    resume.check(flags(), state(saved), saved)


def test_a_run_that_starts_again_from_weights_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / resume.TRACKER).write_text("12")
    given = flags(finetune=True, load=str(tmp_path))
    assert resume.state_to_resume(given) is None
    resume.check(given, None, PLAN)
    assert given.megasft_plan == PLAN


def test_moments_of_the_distributed_optimizer_are_not_loaded_without_it() -> None:
    saved = state(PLAN, use_distributed_optimizer=True)
    with pytest.raises(FlagError, match="add the flag, or pass --no-load-optim"):
        resume.check(flags(), saved, PLAN)
    resume.check(flags(no_load_optim=True), saved, PLAN)
    without_moments = state(PLAN, use_distributed_optimizer=True, no_save_optim=True)
    resume.check(flags(), without_moments, PLAN)


def test_moments_that_cannot_be_loaded_again_are_warned_of_while_they_can_be_saved_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resume, "has", lambda _: False)
    given = flags(load=None, use_distributed_optimizer=True, ckpt_step=None)
    (warning,) = resume.check(SimpleNamespace(**vars(given), save="out"), None, PLAN)
    assert "a run saved to out will not resume with its moments" in warning
    assert resume.check(SimpleNamespace(**vars(given), save=None), None, PLAN) == []
    (tmp_path / resume.TRACKER).write_text("12")
    with pytest.raises(FlagError, match="drop the flag, or pass --no-load-optim"):
        resume.check(SimpleNamespace(**(vars(given) | {"load": tmp_path}), save="out"), None, PLAN)


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
    given |= {"decoupled_lr": None, "decoupled_min_lr": None}
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
        ({"train_iters": 9, "skip_train": True}, False),
        ({"train_iters": 9, "weight_decay": 0.2}, False),
        ({"train_iters": 9, "no_load_optim": True}, False),
        ({"train_iters": 9, "use_checkpoint_opt_param_scheduler": True}, False),
        ({"train_iters": None, "train_samples": 48}, True),
    ],
)
def test_a_run_that_only_gets_longer_follows_the_schedule_of_its_new_length(
    ours: dict[str, Any], follows: bool
) -> None:
    args = lengths(**ours)
    said = resume.follow_schedule(args, state(PLAN, **vars(lengths(**FILLED_IN))))
    assert args.override_opt_param_scheduler is follows
    assert (said is not None) is follows


def test_the_rates_of_the_checkpoint_are_kept_with_its_schedule() -> None:
    args = lengths(use_checkpoint_opt_param_scheduler=True, lr=2e-3, min_lr=0.0)
    said = resume.follow_schedule(args, state(PLAN, **vars(lengths(lr=1e-3, min_lr=1e-5))))
    assert (args.lr, args.min_lr) == (1e-3, 1e-5)
    assert said is not None and said.endswith("--lr 0.001, not 0.002, --min-lr 1e-05, not 0.0")
    assert resume.follow_schedule(args, state(PLAN, **vars(args))) is None
    override = lengths(override_opt_param_scheduler=True, lr=2e-3)
    assert resume.follow_schedule(override, state(PLAN, **vars(lengths()))) is None
    assert override.lr == 2e-3


@pytest.mark.parametrize("dropped", [{"lr_decay_iters": 4}, {"lr_warmup_fraction": 0.1}])
def test_a_run_that_drops_a_flag_of_its_schedule_is_left_to_megatron(
    dropped: dict[str, Any],
) -> None:
    """Its schedule would change by more than its length."""
    decay = {"start_weight_decay": 0.1, "end_weight_decay": 0.1}
    saved = state(PLAN, **vars(lengths(**decay | {"lr_decay_iters": 6} | dropped)))
    args = lengths(train_iters=9)
    assert resume.follow_schedule(args, saved) is None
    assert not args.override_opt_param_scheduler


def test_the_length_of_a_run_counted_in_rows_is_that_in_rows() -> None:
    """Megatron fills --train-iters in and saves it; ours is not known before."""
    saved = state(PLAN, **vars(lengths(train_samples=48, **FILLED_IN)))
    args = lengths(train_iters=None, train_samples=48)
    assert resume.follow_schedule(args, saved) is None
    args.train_samples = 4_800
    said = resume.follow_schedule(args, saved)
    assert args.override_opt_param_scheduler
    assert said is not None and "the run was 48 rows long and is 4,800 rows now" in said


SAVED = ["--lr", "1", "--train-iters", "3", "--load=a", "--swiglu", "--finetune", "--x", "-1", "2"]


@pytest.mark.parametrize(
    ("given", "without", "flags"),
    [
        ([], [], ["--lr", "1", "--train-iters", "3", "--swiglu", "--x", "-1", "2"]),
        ([], ["x", "--swiglu"], ["--lr", "1", "--train-iters", "3"]),
        (["--lr", "2"], ["x"], ["--lr", "1", "--train-iters", "3", "--swiglu", "--lr", "2"]),
        (["--megasft-epochs=2"], ["x"], ["--lr", "1", "--swiglu", "--megasft-epochs=2"]),
    ],
)
def test_flags_of_a_run_are_those_saved_but_what_is_replaced_or_left_out(
    given: list[str], without: list[str], flags: list[str]
) -> None:
    assert resume.flags_to_come(SAVED, given, without=without) == flags


def test_a_flag_to_leave_out_that_was_not_given_is_an_error() -> None:
    with pytest.raises(FlagError, match="--without --bf16: the run was started without it"):
        resume.flags_to_come(SAVED, [], without=["bf16", "x"])


def test_a_checkpoint_of_no_run_has_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FlagError, match="holds no checkpoint; give the --save folder of a run"):
        resume.open_checkpoint(tmp_path)
    for name in (resume.RELEASE, "iter_0000012"):
        (tmp_path / name).mkdir()
    (tmp_path / resume.TRACKER).write_text(resume.RELEASE)
    with pytest.raises(FlagError, match="is a converted model; there is no run to resume"):
        resume.open_checkpoint(tmp_path)
    monkeypatch.setattr(resume, "read_state", lambda _: state(PLAN))
    with pytest.raises(FlagError, match="does not hold the flags its run was started with"):
        resume.open_checkpoint(tmp_path / "iter_0000012")
    monkeypatch.setattr(resume, "read_state", lambda _: state(PLAN, megasft_flags=["--lr", "1"]))
    load, saved = resume.open_checkpoint(tmp_path / "iter_0000012")
    assert load == ["--load", str(tmp_path), "--ckpt-step", "12"]
    assert saved.megasft_flags == ["--lr", "1"]
