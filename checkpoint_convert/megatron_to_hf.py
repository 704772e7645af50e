"""Convert a checkpoint that training saved into a Hugging Face folder.

``python -m checkpoint_convert.megatron_to_hf --checkpoint CKPT --like FOLDER --output DIR``.
Only the model's tensors are read; the optimizer's, many times as large, stay on disk. Configuration
and tokenizer come from ``--like``: the converted checkpoint training started from, or the Hugging
Face folder itself. A checkpoint made by ``hf_to_megatron`` brings its own.

Under ``torchrun --nproc-per-node N`` the shards are shared out over N processes; an interrupted
conversion keeps the shards that are whole.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from checkpoint_convert import hf_folder, hf_shards, megatron_checkpoint, origin
from checkpoint_convert.cli import OWN, Report, add_shared_arguments, exit_code
from checkpoint_convert.config_map import Model, parse_dtype, read_model
from checkpoint_convert.engines.convert import to_hf
from checkpoint_convert.files import FORMAT
from checkpoint_convert.megatron_checkpoint import PieceReader
from checkpoint_convert.output_folder import (
    describe_files,
    require_free,
    require_space,
    resumable_folder,
)
from checkpoint_convert.pieces import Piece, pieces
from checkpoint_convert.progress import progress_bar
from checkpoint_convert.team import ALONE, Team, joined
from checkpoint_convert.tensor_map import require_axes, require_keys, split_piece
from checkpoint_convert.verify.after import same_folder
from megasft.errors import ConversionError


def convert(
    checkpoint: Path,
    output: Path,
    *,
    like: Path | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = hf_shards.MAX_SHARD_BYTES,
    verify: bool = True,
    overwrite: bool = False,
    update: bool = False,
    check: Callable[[Path], None] | None = None,
    team: Team = ALONE,
) -> Report:
    """Convert one iteration of a checkpoint.

    Args:
        checkpoint: What ``--save`` named, or a converted checkpoint.
        output: Hugging Face folder; appears whole or not at all.
        like: Where configuration and tokenizer come from; default: the checkpoint itself.
        iteration: Default: the latest.
        dtype: Default: what the configuration says, or the checkpoint's own where it says nothing.
        max_shard_bytes: Of one safetensors file.
        verify: Map every tensor back and compare bitwise, before the dtype changes.
        overwrite: Replace an earlier conversion.
        update: Replace an earlier conversion of this checkpoint, and leave one of the same step.
        check: Told the folder under its temporary name, in one process; raises when it is wrong,
            and then it does not get its own.
        team: The processes that share the work; all of them call this.

    Raises:
        ConversionError: The checkpoint is not whole, or is not the model of the configuration.
    """
    side = hf_folder.side_folder(like, checkpoint=checkpoint)
    if output.resolve() in (checkpoint.resolve(), side.resolve()):
        raise ConversionError(f"--output {output} is where the input lies; choose another")
    if update:
        origin.require_own(output, checkpoint)
    else:
        require_free(output, overwrite=overwrite, marker="config.json")
    model = read_model(side)
    source = megatron_checkpoint.find_iteration(checkpoint, iteration=iteration)
    reader = PieceReader(source)
    require_keys(reader.keys, model)
    target_dtype = dtype or model.dtype
    plan = _Plan.make(reader, model, target_dtype, max_shard_bytes)
    made_from = plan.source(source, side)
    digest = origin.digest(made_from | {"is_checked": check is not None})
    report = _report(reader, plan, model, source=source, output=output, is_verified=verify)
    if update and origin.is_of(output, digest):
        return replace(report, is_kept=True)
    with resumable_folder(output, made_from, team) as folder:
        names = hf_shards.shard_names(len(plan.shards))
        left = [i for i, name in enumerate(names) if not (folder / name).is_file()]
        require_space(output, sum(map(plan.shard_bytes, left)))
        team.wait()  # until all have looked at what is left
        mine = team.share(left)
        with progress_bar("converting", sum(map(plan.shard_bytes, mine)), team) as advance:
            for shard in mine:
                with hf_shards.ShardWriter(folder / names[shard], plan.shard_metas(shard)) as file:
                    for i in plan.shards[shard]:
                        piece, metas = plan.pieces[i]
                        parts = split_piece(piece, reader.read(piece), model, verify=verify)
                        for name, tensor in parts.items():
                            file.write(name, tensor.to(metas[name].dtype))
                            advance(metas[name].nbytes)
        team.wait()
        if team.leads:
            _write_small_files(folder, side, plan, dtype)
            if check is not None:
                check(folder)
            origin.write(folder, output=output, checkpoint=checkpoint, source=digest)
    return report


def _write_small_files(folder: Path, side: Path, plan: "_Plan", dtype: torch.dtype | None) -> None:
    hf_shards.write_index(folder, [plan.shard_metas(i) for i in range(len(plan.shards))])
    hf_folder.copy_side_files(side, folder)
    if dtype is not None:
        hf_folder.set_dtype(folder, dtype)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What goes where, known before anything is read.

    Attributes:
        pieces: And the tensors without content that each becomes, by Hugging Face name.
        shards: Indices of ``pieces``.
    """

    pieces: list[tuple[Piece, dict[str, torch.Tensor]]]
    shards: list[list[int]]

    @classmethod
    def make(
        cls, reader: PieceReader, model: Model, dtype: torch.dtype | None, max_shard_bytes: int
    ) -> "_Plan":
        found = []
        for piece in pieces(model):
            require_axes(piece, reader.shape(piece.key), model)
            parts = _split_meta(piece, reader, model)
            # What steers routing is float32 in a bfloat16 model, too.
            wanted = None if piece.rule.is_buffer else dtype
            found.append((piece, {n: t.to(wanted or t.dtype) for n, t in parts.items()}))
        groups = [[(name, meta.nbytes) for name, meta in metas.items()] for _, metas in found]
        return cls(found, hf_shards.plan_shards(groups, max_bytes=max_shard_bytes))

    def shard_metas(self, shard: int) -> dict[str, torch.Tensor]:
        return {n: meta for i in self.shards[shard] for n, meta in self.pieces[i][1].items()}

    def shard_bytes(self, shard: int) -> int:
        return sum(meta.nbytes for meta in self.shard_metas(shard).values())

    def source(self, iteration: Path, side: Path) -> dict[str, object]:
        """Return what a half-written conversion must have been made from to be gone on with."""
        side_files = [side / name for name in hf_folder.side_files(side)]
        metas = {n: str(meta.dtype) for _, parts in self.pieces for n, meta in parts.items()}
        return {
            "format": FORMAT,
            "files": describe_files([*iteration.iterdir(), *side_files]),
            "dtypes": metas,
            "shards": self.shards,
            "versions": {name: version(name) for name in ("torch", "megatron-core", "megasft")},
        }


def _split_meta(piece: Piece, reader: PieceReader, model: Model) -> dict[str, torch.Tensor]:
    """Return what a piece becomes, without content, after its rule has been tried on the shape."""
    try:
        return split_piece(piece, reader.meta(piece), model, verify=False)
    except RuntimeError as error:
        raise ConversionError(
            f"{piece.name} of shape {tuple(reader.meta(piece).shape)} does not come apart "
            f"({error}); give the configuration of this checkpoint (--like)"
        ) from error


def _report(
    reader: PieceReader,
    plan: _Plan,
    model: Model,
    *,
    source: Path,
    output: Path,
    is_verified: bool,
) -> Report:
    written = {n: meta for _, metas in plan.pieces for n, meta in metas.items()}
    return Report(
        source=source,
        output=output,
        family_name=model.family_name,
        dtypes=_dtypes([reader.dtype(key) for key in reader.keys], written),
        num_hf_tensors=len(written),
        num_megatron_tensors=len(reader.keys),
        num_parameters=sum(tensor.numel() for tensor in written.values()),
        num_bytes=sum(tensor.nbytes for tensor in written.values()),
        is_verified=is_verified,
    )


def _dtypes(stored: Sequence[torch.dtype], written: Mapping[str, torch.Tensor]) -> str:
    before, after = (
        " ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        for dtypes in (stored, [tensor.dtype for tensor in written.values()])
    )
    return after if before == after else f"{after}, rounded from {before}"


def main(argv: Sequence[str] | None = None, *, worker: str | None, prog: str | None = None) -> int:
    """Parse, convert, verify, print; return the exit code.

    Args:
        argv: Default: of this process.
        worker: Module that runs Megatron's model for the verification; None: it runs no model.
        prog: How the program is called.
    """
    parser = _parser(prog)
    args = parser.parse_args(argv)
    check = None
    if not args.no_verify:
        check = same_folder(args.checkpoint, args.output, worker=worker, iteration=args.iteration)
    if args.engine != OWN:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.error(f"--engine {args.engine} works in one process; start it without torchrun")
        if args.update:
            parser.error(f"--update works with --engine {OWN}; use --overwrite")
        return exit_code(
            lambda: to_hf(
                args.engine,
                args.checkpoint,
                args.output,
                like=args.like,
                iteration=args.iteration,
                overwrite=args.overwrite,
                check=check,
            )
        )
    with joined() as team:
        return exit_code(
            lambda: convert(
                args.checkpoint,
                args.output,
                like=args.like,
                iteration=args.iteration,
                dtype=parse_dtype(args.dtype, source="--dtype") if args.dtype else None,
                max_shard_bytes=int(args.max_shard_size * 1e9),
                verify=not args.no_verify,
                overwrite=args.overwrite,
                update=args.update,
                check=check,
                team=team,
            ),
            team,
        )


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m checkpoint_convert.megatron_to_hf",
        description="Convert a Megatron checkpoint into a Hugging Face folder, and verify it.",
        epilog="Large models: torchrun --nproc-per-node N -m checkpoint_convert.megatron_to_hf ... "
        "shares the work out. The same command goes on after an interruption.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="what --save named"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="converted checkpoint or Hugging Face folder with configuration and tokenizer "
        "(default: the checkpoint itself)",
    )
    parser.add_argument("--dtype", help="default: what config.json says")
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=hf_shards.MAX_SHARD_BYTES / 1e9,
        metavar="GB",
        help="of one safetensors file (default: %(default)g)",
    )
    add_shared_arguments(parser)
    parser.add_argument(
        "--update",
        action="store_true",
        help="replace an earlier conversion of this checkpoint when the new one is whole and "
        "verified; leave one of the same step as it is",
    )
    return parser


if __name__ == "__main__":
    # The program chooses whose model is run, the package does not.
    from megasft.run import forward_worker

    sys.exit(main(worker=forward_worker.__name__))
