"""A bridge's conversion in the form of our own: the same folders, checked before they get a name.

A bridge holds the model in memory and keeps no track of how far it came, so an interrupted
conversion starts over.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson

from checkpoint_convert import engines, hf_folder, megatron_checkpoint
from checkpoint_convert.files import FORMAT
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.output_folder import (
    SOURCE_FILE,
    describe_files,
    require_free,
    resumable_folder,
)
from checkpoint_convert.team import ALONE
from megasft.errors import ConversionError
from megasft.files import MODEL_FILE, SIDE_FOLDER


def to_megatron(
    engine: str,
    hf: Path,
    output: Path,
    *,
    overwrite: bool,
    check: Callable[[Path], None] | None,
) -> None:
    """Convert a Hugging Face folder.

    Args:
        engine: A name of ``engines.ENGINES``.
        hf: Model folder.
        output: Checkpoint; appears whole or not at all.
        overwrite: Replace an earlier conversion.
        check: Told the folder under its temporary name; raises when the checkpoint is wrong.

    Raises:
        ConversionError: The bridge is not there or fails, or ``check`` does.
    """
    engines.require(engine)
    require_free(output, overwrite=overwrite, marker=MODEL_FILE)
    tensors = HFTensors(hf)
    side_files = hf_folder.side_files(hf)
    files = describe_files([*tensors.files, *(hf / name for name in side_files)])
    with resumable_folder(output, {"format": FORMAT, "engine": engine, "files": files}, ALONE) as f:
        _clear(f)
        engines.run(engine, "to-megatron", [hf, f])
        flags: list[str] = orjson.loads((f / "flags.json").read_bytes())
        (f / "flags.json").unlink()
        names = hf_folder.copy_side_files(hf, f / SIDE_FOLDER)
        config = orjson.loads((hf / "config.json").read_bytes())
        content = {
            "family": config.get("model_type"),
            "engine": engine,
            "flags": flags,
            "vocab_size": config.get("vocab_size"),
            "tokenizer_files": [name for name in names if name in hf_folder.TOKENIZER_FILES],
            "hf_config": config,
            "left_out": [],
        }
        (f / MODEL_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        if check is not None:
            check(f)


def to_hf(
    engine: str,
    checkpoint: Path,
    output: Path,
    *,
    like: Path | None,
    iteration: int | None,
    overwrite: bool,
    check: Callable[[Path], None] | None,
) -> None:
    """Convert one iteration of a checkpoint.

    Args:
        engine: A name of ``engines.ENGINES``.
        checkpoint: What ``--save`` named, or a converted checkpoint.
        output: Hugging Face folder; appears whole or not at all.
        like: Where configuration, tokenizer and the bridge's idea of the model come from: it needs
            the original folder, weights included.
        iteration: Default: the latest.
        overwrite: Replace an earlier conversion.
        check: Told the folder under its temporary name; raises when it is wrong.

    Raises:
        ConversionError: The bridge is not there or fails, or ``check`` does.
    """
    engines.require(engine)
    side = hf_folder.side_folder(like, checkpoint=checkpoint)
    if not list(side.glob("*.safetensors")):
        raise ConversionError(
            f"{side} has no weights, and --engine {engine} builds its model from the original "
            "folder; give that with --like"
        )
    require_free(output, overwrite=overwrite, marker="config.json")
    source = megatron_checkpoint.find_iteration(checkpoint, iteration=iteration)
    files = describe_files(source.iterdir())
    with resumable_folder(output, {"format": FORMAT, "engine": engine, "files": files}, ALONE) as f:
        _clear(f)
        engines.run(engine, "to-hf", [source, side, f])
        hf_folder.copy_side_files(side, f)
        if check is not None:
            check(f)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != SOURCE_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
