from pathlib import Path

import pytest

from megasft.training.retention import KEEP, Retention, superfluous, whole_checkpoints


def saved(folder: Path, *iterations: int, newest: int | str) -> Path:
    for iteration in iterations:
        checkpoint = folder / f"iter_{iteration:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_bytes(b"weights")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(newest))
    return folder


def test_the_newest_stay_and_what_is_being_written_is_not_counted(tmp_path: Path) -> None:
    folder = saved(tmp_path, 10, 20, 30, 40, newest=30)
    assert whole_checkpoints(folder) == [10, 20, 30]
    assert superfluous(folder, keep_last=2) == [10]

    retention = Retention(folder, keep_last=2)
    retention.look()
    retention.wait()

    assert sorted(p.name for p in folder.glob("iter_*")) == [
        "iter_0000020",
        "iter_0000030",
        "iter_0000040",
    ]
    assert not list(folder.glob(".deleted*"))


def test_a_keep_file_and_a_named_iteration_are_kept_besides(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3, 4, 5, newest=5)
    (folder / "iter_0000002" / KEEP).touch()

    retention = Retention(folder, keep_last=1)
    retention.look(keep=[3])
    retention.wait()

    assert whole_checkpoints(folder) == [2, 3, 5]


def test_a_folder_is_looked_at_again_only_when_something_was_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, newest=2)
    retention = Retention(folder, keep_last=1)
    retention.look()
    (folder / "iter_0000001").mkdir()  # a user puts it back
    retention.look()
    assert whole_checkpoints(folder) == [1, 2]

    tracker = folder / "latest_checkpointed_iteration.txt"
    (folder / "iter_0000003").mkdir()
    tracker.write_text("3")
    retention.look()
    retention.wait()
    assert whole_checkpoints(folder) == [3]


def test_what_a_killed_process_left_half_deleted_is_deleted(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, newest=1)
    (folder / ".deleted.iter_0000000.17" / "deep").mkdir(parents=True)
    retention = Retention(folder, keep_last=3)
    retention.look()
    retention.wait()
    assert sorted(p.name for p in folder.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize("newest", ["release", ""])
def test_a_converted_checkpoint_is_never_deleted(tmp_path: Path, newest: str) -> None:
    folder = saved(tmp_path, 1, 2, newest=newest)
    Retention(folder, keep_last=1).look()
    assert len(list(folder.glob("iter_*"))) == 2


def test_a_folder_that_does_not_exist_yet_is_no_error(tmp_path: Path) -> None:
    Retention(tmp_path / "later", keep_last=1).look()
