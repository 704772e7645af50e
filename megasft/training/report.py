"""What a run reports of each step and evaluation: gathers it, reduces it once, hands it to sinks.

The path of a step: micro-batches add their losses to a table on the device (last pipeline stage,
one rank of each tensor-parallel group); ``finalize_model_grads`` is where all ranks meet, and one
all-reduce over all of them sums the table, so that rank 0 has it on any layout; the record is made
when the optimizer has stepped, which is the last that is known of a step, and written at once. So
nothing waits for a next step that a signal, ``--exit-interval`` or a crash may prevent.

Rank 0 prints and writes; the last rank, where Megatron keeps its TensorBoard writer, adds to that.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Self

import numpy as np
import psutil
import torch

from megasft.loss.breakdown import WHOLE, Breakdown, named
from megasft.loss.per_sample import SAMPLE_COLUMNS
from megasft.megatron import cpu, loop
from megasft.megatron.global_batch import GlobalBatches
from megasft.megatron.optimizer_watch import OptimizerStep, watch
from megasft.report.devices import peak_tflops
from megasft.report.jsonl import has_evaluation
from megasft.report.record import Speed, StepRecord, ValidationRecord, losses_of
from megasft.report.sink import Setup, Sink
from megasft.report.sinks import SINKS
from megasft.schema import SFTBatch
from megasft.store import TokenStore
from megasft.training.audit import audit, audit_evaluation
from megasft.training.best import loss_of_each
from megasft.training.datasets import RunData
from megasft.training.report_arguments import log_folder
from megasft.training.saving import Keeper
from megasft.training.spikes import Spikes
from megasft.training.turn_weights import evaluation_scales
from megasft.training.validation import reported_names

logger = logging.getLogger(__name__)

GIB: Final = 2**30


class Report:
    """Gathers what is reported of a run; one per rank. An ``Observer`` of Megatron's loop.

    Args:
        args: Megatron's flags.
        data: Stores and plans of the run.
        batches: What the row plan knows of each global batch.
        keeper: Follows each evaluation.

    Attributes:
        scales: What the losses of an evaluation are multiplied by.
    """

    def __init__(self, args: Any, data: RunData, batches: GlobalBatches, keeper: Keeper) -> None:
        self.args, self.batches, self.keeper = args, batches, keeper
        self.store, self.plan = data.train.store, data.train.plan
        self.valid = data.valid
        self.scales = evaluation_scales(args, [planned.plan for planned in self.valid.values()])
        self._losses = partial(
            losses_of, objective=args.megasft_loss, dft_alpha=args.megasft_dft_alpha
        )
        self._last_step: int | None = None
        self._tables: dict[str, Breakdown] = {}
        self._sinks: list[Sink] = []
        self._reduced: tuple[torch.Tensor, torch.Tensor] | None = None
        self._began: float | None = None
        keeps_spikes = args.megasft_spikes and log_folder(args) is not None
        self._spikes = Spikes(args, data.train, batches) if keeps_spikes else None
        self._is_watching: bool | None = None

    def begin_step(self) -> None:
        """Note when the first micro-batch of a step begins."""
        if self._began is None:
            self._began = time.perf_counter()

    def add(self, losses: torch.Tensor, batch: SFTBatch, *, is_training: bool) -> None:
        """Add the losses of a micro-batch; called where there are any, on the last stage."""
        self._table("train" if is_training else "valid").add(losses, batch)
        if is_training and self._spikes is not None:
            self._spikes.add(losses, batch)

    def finalize(self, config: Any, num_units: torch.Tensor) -> None:
        """Sum the table of the step over all ranks; called on each, after its last micro-batch.

        Args:
            config: Megatron's ``TransformerConfig``.
            num_units: int []. What Megatron summed over all ranks and divided by.

        Raises:
            AuditError: Those are not the units of the step's rows.
        """
        if self._is_watching is None:
            self._is_watching = watch(config, self._stepped)
            if not self._is_watching:
                logger.warning("Megatron's config holds no optimizer; steps are not reported")
        # A step that Megatron runs again, to check a result, counts once: the last run of it.
        self._reduced = self._sum_of_ranks("train")
        self.keeper.end_step()
        if not self.args.megasft_no_audit:
            audit(
                step=self.args.curr_iteration + 1,
                reduced=int(num_units.item()),
                batch=self.batches.now(self.args),
                objective=self.args.megasft_loss,
            )

    def evaluated(self, _model: Any) -> None:
        """Report an evaluation; Megatron calls it on all ranks at the end (``non_loss_data_func``).

        Its sums are reduced here, because gradients are finalized in training alone. When the last
        step was evaluated, Megatron would do so once more at the end: the flag it goes by is taken
        back, since the weights and so all numbers would be the same.
        """
        sums, _ = self._sum_of_ranks("valid")
        # Without a step, as when a finished run is started again, it is that of the checkpoint.
        step = int(self.args.iteration if self._last_step is None else self._last_step)
        sets, table, categories = {}, sums.tolist(), self._tables["valid"].names
        for n, (name, planned) in enumerate(self.valid.items()):
            if not self.args.megasft_no_audit:
                found = named(table[n][WHOLE])
                audit_evaluation(step=step, name=name, found=found, plan=planned.plan)
            scale = self.scales.each[n]
            sets[name] = self._losses(table[n], categories[n], weight_scale=scale)
        if self._last_step is not None and step == self.args.train_iters:
            self.args.do_valid = False
        self.keeper.evaluated(step, loss_of_each(sets))
        if self._is_reported(step):
            return
        record = ValidationRecord(step, sets, time.time())
        self._write(lambda sink: sink.write(record))

    def _is_reported(self, step: int) -> bool:
        """Say whether an earlier process reported the evaluation of a checkpoint's step."""
        folder = log_folder(self.args)
        if self._last_step is not None or self.args.skip_train or folder is None:
            return False
        return has_evaluation(folder, step=step, names=tuple(self.valid))

    def __enter__(self) -> Self:
        """Open what is written to: a rank that cannot must not leave others in a collective."""
        self._sinks = _sinks(self.args)
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close what is written to, however the run ends."""
        self._write(lambda sink: sink.close())

    def _stepped(self, optimizer: OptimizerStep) -> None:
        """Write the record of the step."""
        self._last_step = int(self.args.curr_iteration) + 1
        assert self._began is not None and self._reduced is not None, "a step has micro-batches"
        seconds = time.perf_counter() - self._began
        self._began = None
        if not self._sinks:
            return
        batch = self.batches.now(self.args)
        lengths = self._lengths(batch.rows)
        by_set, by_sample = self._reduced
        (slots,), (names,) = by_set.tolist(), self._tables["train"].names
        tokens = int(lengths.sum())
        record = StepRecord(
            step=self._last_step,
            num_steps=int(self.args.train_iters),
            epoch=(self.args.consumed_train_samples + len(batch.rows)) / self.plan.epoch_rows,
            losses=self._losses(slots, names, weight_scale=batch.weight_scale),
            padding=1.0 - tokens / batch.positions,
            speed=self._speed(seconds, lengths, labels=batch.labels),
            grad_norm=optimizer.grad_norm,
            learning_rate=optimizer.learning_rate,
            memory_gib=_memory_bytes() / GIB,
            is_skipped=optimizer.is_skipped,
            time=time.time(),
        )
        self._write(lambda sink: sink.write(record))
        if self._spikes is not None and record.losses is not None:
            self._spikes.stepped(record.step, record.losses.loss, by_sample)

    def _write(self, write: Callable[[Sink], None]) -> None:
        """Hand a record to each sink; one that fails is left out from then on, training goes on."""
        for sink in tuple(self._sinks):
            try:
                write(sink)
            except Exception as error:  # whatever a disk or somebody's server may raise
                self._sinks.remove(sink)
                logger.warning(
                    "%s: %s: %s; nothing more is written there, training goes on",
                    *(type(sink).__name__, type(error).__name__, error),
                )

    def _table(self, which: str) -> Breakdown:
        if which not in self._tables:
            valid = [planned.store for planned in self.valid.values()]
            stores = [self.store] if which == "train" else valid
            self._tables[which] = Breakdown(
                [_categories(store) for store in stores],
                objective=self.args.megasft_loss,
                has_weights=any(store.has_weights for store in stores),
                device=torch.device("cuda", torch.cuda.current_device()),
            )
        return self._tables[which]

    def _sum_of_ranks(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of all ranks, by set and slot and by sample, and start again.

        All ranks take part: those of other pipeline stages bring zeros, and rank 0 is on the first.
        """
        table = self._table(which).sums
        parts = [table.flatten()]
        if which == "train" and self._spikes is not None:
            parts.append(self._spikes.sums().flatten())
        sums = torch.cat(parts)
        table.zero_()
        torch.distributed.all_reduce(sums)
        by_set, by_sample = sums.tensor_split([table.numel()])
        return by_set.view_as(table), by_sample.view(-1, len(SAMPLE_COLUMNS))

    def _lengths(self, rows: Sequence[int]) -> Any:
        """Return the true lengths of the documents of these rows."""
        samples = np.concatenate([self.plan.rows[row] for row in rows])
        return self.store.tokens.lengths[samples].astype(np.int64)

    def _speed(self, seconds: float, lengths: Any, *, labels: int) -> Speed:
        per_rank = seconds * self.args.world_size
        tflops = loop.operations(self.args, lengths) / per_rank / 1e12
        peak = _peak(self.args)
        return Speed(
            seconds=seconds,
            tokens=float(lengths.sum()) / per_rank,
            labels=labels / per_rank,
            tflops=tflops,
            mfu=None if peak is None else tflops / peak,
        )


def _categories(store: TokenStore) -> dict[int, str]:
    return {int(i): str(name) for i, name in store.meta.get("categories", {}).items()}


def _sinks(args: Any) -> list[Sink]:
    """Make the sinks of this rank."""
    writer, wandb = loop.writers()
    setup = Setup(
        folder=log_folder(args),
        flags={k: v for k, v in vars(args).items() if isinstance(v, str | int | float | bool)},
        writer=writer,
        wandb=wandb,
        valid_names=reported_names(args.megasft_valid_data),
        console_interval=args.megasft_console_interval,
        table_interval=args.megasft_table_interval,
        trains=not args.skip_train,
    )
    names = []
    if args.rank == 0:
        names = ["console", *(["jsonl"] if setup.folder else []), *args.megasft_track]
    if setup.writer is not None:
        names.append("tensorboard")
    return [SINKS[name](setup) for name in names]


def _peak(args: Any) -> float | None:
    if args.megasft_peak_tflops is not None:
        return float(args.megasft_peak_tflops)
    return None if cpu.is_needed() else peak_tflops(torch.cuda.get_device_name())


def _memory_bytes() -> int:
    if cpu.is_needed():
        return int(psutil.Process().memory_info().rss)
    return torch.cuda.max_memory_allocated()
