"""Convert a Hugging Face folder into a checkpoint that any parallel layout loads.

``python -m checkpoint_convert.hf_to_megatron --hf DIR --output CKPT`` writes::

    CKPT/release/            Megatron torch_dist checkpoint
    CKPT/latest_checkpointed_iteration.txt
    CKPT/megasft_model.json  Megatron's flags for this model, and its configuration
    CKPT/hf/                 everything of DIR that is not weights, for the way back

Under ``torchrun --nproc-per-node N`` the pieces are shared out over N processes. Everything that
can be known from the headers (names, shapes, dtypes, disk space) is checked before anything is
written, and an interrupted conversion goes on where it ended.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import orjson
import torch

from checkpoint_convert import hf_folder
from checkpoint_convert.cli import OWN, Report, add_shared_arguments, exit_code
from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.engines.convert import to_megatron
from checkpoint_convert.files import FORMAT
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.megatron_writer import CheckpointWriter
from checkpoint_convert.output_folder import (
    describe_files,
    require_free,
    require_space,
    resumable_folder,
)
from checkpoint_convert.pieces import Piece, pieces
from checkpoint_convert.progress import progress_bar
from checkpoint_convert.team import ALONE, Team, joined
from checkpoint_convert.tensor_map import (
    EMBEDDING,
    OUTPUT,
    merge_piece,
    mtp_names,
    require_hf_names,
    require_tied,
)
from checkpoint_convert.verify.after import same_checkpoint
from megasft.errors import ConversionError
from megasft.files import MODEL_FILE, SIDE_FOLDER


def convert(
    hf: Path,
    output: Path,
    *,
    verify: bool = True,
    overwrite: bool = False,
    drop_mtp: bool = False,
    check: Callable[[Path], None] | None = None,
    team: Team = ALONE,
) -> Report:
    """Convert a Hugging Face folder.

    Args:
        hf: Folder with ``config.json`` and safetensors.
        output: Checkpoint folder; appears whole or not at all.
        verify: Map every tensor back and compare bitwise before it is written.
        overwrite: Replace an earlier conversion.
        drop_mtp: Leave out multi-token prediction layers, which do not convert.
        check: Told the checkpoint under its temporary name, in one process; raises when it is
            wrong, and then it does not get its own.
        team: The processes that share the work; all of them call this.

    Raises:
        ConversionError: The model cannot be expressed, the output is in the way, or the disk full.
    """
    if hf.resolve() == output.resolve():
        raise ConversionError(f"--hf and --output are both {hf}; choose another --output")
    require_free(output, overwrite=overwrite, marker=MODEL_FILE)
    model = read_model(hf)
    tensors = HFTensors(hf)
    left_out = _left_out(tensors, model, drop_mtp=drop_mtp)
    if require_hf_names(tensors.names, model):
        require_tied(tensors[EMBEDDING], tensors[OUTPUT])
    metas = [(piece, _meta(piece, tensors, model)) for piece in pieces(model)]
    num_bytes = sum(meta.nbytes for _, meta in metas)

    def make(piece: Piece) -> torch.Tensor:
        parts = [tensors[name] for name in piece.hf]
        return merge_piece(piece, parts, model, verify=verify)

    with resumable_folder(output, _source(hf, tensors), team) as folder:
        writer = CheckpointWriter(folder, metas, model)
        if team.leads:
            writer.prepare()
        team.wait()
        left = [unit for unit in range(writer.num_units) if not writer.is_written(unit)]
        require_space(output, sum(map(writer.unit_bytes, left)))
        team.wait()  # until all have looked at what is left
        mine = team.share(left)
        with progress_bar("converting", sum(map(writer.unit_bytes, mine)), team) as advance:
            for unit in mine:
                writer.write(unit, make)
                advance(writer.unit_bytes(unit))
        tensors.close()
        team.wait()
        if team.leads:
            writer.finish()
            names = hf_folder.copy_side_files(hf, folder / SIDE_FOLDER)
            _write_model_file(folder, model, names, left_out)
            if check is not None:
                check(folder)
            writer.forget_receipts()
    return Report(
        source=hf,
        output=output,
        family_name=model.family_name,
        dtypes=" ".join(sorted({str(meta.dtype).removeprefix("torch.") for _, meta in metas})),
        num_hf_tensors=len(tensors),
        num_megatron_tensors=len(model.rules),
        num_parameters=sum(meta.numel() for _, meta in metas),
        num_bytes=num_bytes,
        is_verified=verify,
        flags=model.flags,
    )


def _left_out(tensors: HFTensors, model: Model, *, drop_mtp: bool) -> list[str]:
    names = mtp_names(tensors.names, model)
    if names and not drop_mtp:
        raise ConversionError(
            f"{tensors.folder} holds {len(names)} tensors of multi-token prediction layers "
            f"({names[0]}, ...), which transformers does not build and this release does not "
            "convert; --drop-mtp leaves them out, there and on the way back"
        )
    tensors.leave_out(names)
    return names


def _meta(piece: Piece, tensors: HFTensors, model: Model) -> torch.Tensor:
    """Return a piece without content, after its rule has been tried on the shapes."""
    parts = [tensors.meta(name) for name in piece.hf]
    try:
        return merge_piece(piece, parts, model, verify=False)
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(tensors.shape(name))}" for name in piece.hf)
        raise ConversionError(
            f"{shapes} do not make {piece.name} ({error}); the sizes in config.json are not those "
            "of the tensors"
        ) from error


def _source(hf: Path, tensors: HFTensors) -> dict[str, object]:
    """Return what a half-written conversion must have been made from to be gone on with."""
    side_files = [hf / name for name in hf_folder.side_files(hf)]
    return {
        "format": FORMAT,
        "files": describe_files([*tensors.files, *side_files]),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "megasft")},
    }


def _write_model_file(
    folder: Path, model: Model, side_files: Sequence[str], left_out: Sequence[str]
) -> None:
    content = {
        "family": model.family_name,
        "flags": list(model.flags),
        "vocab_size": model.vocab_size,
        "tokenizer_files": [name for name in side_files if name in hf_folder.TOKENIZER_FILES],
        "hf_config": model.hf_config,
        "left_out": list(left_out),
    }
    (folder / MODEL_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def main(argv: Sequence[str] | None = None, *, worker: str | None, prog: str | None = None) -> int:
    """Parse, convert, verify, print; return the exit code.

    Args:
        argv: Default: of this process.
        worker: Module that runs Megatron's model for the verification; None: it runs no model.
        prog: How the program is called.
    """
    parser = argparse.ArgumentParser(
        prog=prog or "python -m checkpoint_convert.hf_to_megatron",
        description="Convert a Hugging Face folder into a Megatron checkpoint for any layout, and "
        "verify it.",
        epilog="Large models: torchrun --nproc-per-node N -m checkpoint_convert.hf_to_megatron ... "
        "shares the work out. The same command goes on after an interruption.",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--output", type=Path, required=True, metavar="CKPT", help="checkpoint")
    parser.add_argument(
        "--drop-mtp",
        action="store_true",
        help="leave out multi-token prediction layers (released DeepSeek-V3 folders hold one)",
    )
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    check = None if args.no_verify else same_checkpoint(args.hf, args.output, worker=worker)
    if args.engine != OWN:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.error(f"--engine {args.engine} works in one process; start it without torchrun")
        return exit_code(
            lambda: to_megatron(
                args.engine, args.hf, args.output, overwrite=args.overwrite, check=check
            )
        )
    with joined() as team:
        return exit_code(
            lambda: convert(
                args.hf,
                args.output,
                verify=not args.no_verify,
                overwrite=args.overwrite,
                drop_mtp=args.drop_mtp,
                check=check,
                team=team,
            ),
            team,
        )


if __name__ == "__main__":
    # The program chooses whose model is run, the package does not.
    from megasft.run import forward_worker

    sys.exit(main(worker=forward_worker.__name__))
