"""The comparison that ends every conversion, before what was written gets its name.

A conversion that is wrong leaves nothing under the name that was asked for. What it wrote stays
beside it, so that after a look at the table ``--no-verify`` can take it as it is, at once.
"""

from collections.abc import Callable
from pathlib import Path

from checkpoint_convert.output_folder import left_at
from checkpoint_convert.verify.checks import verify
from checkpoint_convert.verify.verification import Verification, show
from megasft.errors import ConversionError


def same_checkpoint(hf: Path, output: Path, *, worker: str | None) -> Callable[[Path], None]:
    """Return the check of a checkpoint made from a Hugging Face folder.

    Args:
        hf: The folder.
        output: The name that the checkpoint will get.
        worker: As of ``verify``.
    """

    def check(folder: Path) -> None:
        _require_same(verify(hf, folder, worker=worker, called={folder: output}), folder, output)

    return check


def same_folder(
    checkpoint: Path, output: Path, *, worker: str | None, iteration: int | None
) -> Callable[[Path], None]:
    """Return the check of a Hugging Face folder made from a checkpoint.

    Args:
        checkpoint: What ``--save`` named.
        output: The name that the folder will get.
        worker: As of ``verify``.
        iteration: Of the checkpoint; default: the latest.
    """

    def check(folder: Path) -> None:
        found = verify(
            folder,
            checkpoint,
            worker=worker,
            iteration=iteration,
            manifest=folder / "verification.json",
            called={folder: output},
        )
        _require_same(found, folder, output)

    return check


def _require_same(verification: Verification, folder: Path, output: Path) -> None:
    show(verification)
    if not verification.is_ok:
        names = ", ".join(check.rule for check in verification.failures)
        raise ConversionError(
            f"the conversion is not the same model ({names}); {left_at(output)}. What was written "
            f"stays in {folder}: look at the table above, and fix the source; the same command "
            "with --no-verify takes it as it is"
        )
