"""Stores and row plans of a run, and the datasets Megatron's loop asks for.

Plans are made before Megatron starts: what cannot be packed should fail before a model is built.
"""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from megasft.batch.dataset import PackedRows, RowAtPosition, RowShape, WholeSet
from megasft.cp_layout import require_alignment
from megasft.draw import Draw, draw
from megasft.errors import FlagError
from megasft.megatron import loop
from megasft.mixture import read_mixture
from megasft.packing.plan import RowPlan, plan_rows
from megasft.store import TokenStore
from megasft.store_group import open_stores, population_of
from megasft.training import row_order, turn_weights, validation
from megasft.training.arguments import set_vocabulary

logger = logging.getLogger(__name__)

ENDLESS: Final = 2**48
"""Length of a dataset: epochs and passes follow each other until Megatron's loop stops."""


class PlannedStore(NamedTuple):
    """A store, its rows at this run's sequence length and layout, and what a mixture drew."""

    store: TokenStore
    plan: RowPlan
    draw: Draw | None = None


class RunData(NamedTuple):
    """What a run trains and validates on."""

    train: PlannedStore
    valid: dict[str, PlannedStore]


def open_data(args: Any) -> RunData:
    """Open the stores of a run and plan their rows.

    Raises:
        StoreError: A store is missing or damaged.
        DataError: The mixture file does not fit the stores.
        PlanError: Rows cannot be made with these sizes.
        FlagError: The stores' tokenizer does not fit the model, or a flag about them does nothing.
    """
    train = _plan(
        args,
        args.megasft_data,
        mixture=args.megasft_mixture,
        num_packings=args.megasft_packings,
    )
    stores = validation.named_stores(args.megasft_valid_data)
    data = RunData(train, {name: _plan(args, [path]) for name, path in stores.items()})
    turn_weights.require_effect(args, [p.store for p in (data.train, *data.valid.values())])
    return data


def _plan(
    args: Any, paths: Sequence[str], *, mixture: str | None = None, num_packings: int = 1
) -> PlannedStore:
    store = turn_weights.as_asked(args, open_stores(paths))
    set_vocabulary(args, store)
    drawn = None
    if mixture is not None:
        drawn = draw(read_mixture(mixture), population_of(store), seed=args.seed)
    align_tokens = require_alignment(
        args.seq_length,
        cp_size=args.context_parallel_size,
        tp_size=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        asked=args.megasft_align_tokens,
    )
    plan = plan_rows(
        store,
        row_tokens=args.seq_length,
        align_tokens=align_tokens,
        seed=args.seed,
        cache=Path(args.megasft_plan_cache) if args.megasft_plan_cache else None,
        draw=drawn,
        packer=args.megasft_packer,
        num_packings=num_packings,
    )
    return PlannedStore(store, plan, drawn)


def announce(args: Any, data: RunData) -> None:
    """Say what an epoch holds before the first step, and what was left out."""
    apart = validation.reported_names(args.megasft_valid_data)
    valid = {f"validation {name}" if apart else "validation": p for name, p in data.valid.items()}
    named = {"train": data.train} | valid
    for name, planned in named.items():
        size = args.global_batch_size if name == "train" else args.eval_global_batch_size
        logger.info("%s: %s", name, planned.plan.summary(global_batch_size=size))
        if planned.draw is not None:
            _announce_draw(planned.draw, planned.plan, global_batch_size=size)
        if name == "train":
            row_order.announce(args, planned.plan)
        too_long = planned.plan.too_long
        if len(too_long):
            lost = int(planned.store.tokens.lengths[too_long].sum())
            logger.warning(
                "%s: %d of %d samples are longer than --seq-length %d and are left out "
                "(%d tokens, the longest sample has %d; first: %s)",
                *(name, len(too_long), len(planned.store), planned.plan.row_tokens, lost),
                int(planned.store.tokens.lengths[too_long].max()),
                planned.store.source_line(int(too_long[0])),
            )
    turn_weights.announce(args, {name: planned.store for name, planned in named.items()})


def _announce_draw(drawn: Draw, plan: RowPlan, *, global_batch_size: int) -> None:
    for warning in drawn.warnings:
        logger.warning("%s", warning)
    for part in drawn.parts:
        logger.info("mixture: %s: %d samples drawn of %d", part.name, part.drawn, part.found)
    if len(drawn.stages) == 1:
        return
    first_packing = plan.stages[: len(drawn.stages) + 1]
    for stage, (start, end) in zip(drawn.stages, pairwise(first_packing), strict=True):
        logger.info(
            "stage %s: iterations %.2f to %.2f of each epoch",
            *(stage.name, start / global_batch_size, end / global_batch_size),
        )


def check_length(args: Any, data: RunData) -> None:
    """Refuse a run that does not say how long it is, and say how long an epoch is.

    Raises:
        FlagError: Neither --train-iters nor --train-samples is given.
    """
    if args.skip_train or args.train_iters is not None or args.train_samples is not None:
        return
    rows, batch = data.train.plan.epoch_rows, args.global_batch_size
    raise FlagError(
        f"--train-iters is missing; an epoch of {rows:,.0f} rows is {math.ceil(rows / batch):,} "
        f"iterations of {batch:,} rows"
    )


def set_eval_iters(args: Any, data: RunData) -> None:
    """Make every evaluation cover all validation stores, whatever their sizes."""
    num_rows = sum(len(planned.plan) for planned in data.valid.values())
    args.eval_iters = -(-num_rows // args.eval_global_batch_size)


def datasets_provider(
    args: Any, data: RunData
) -> Callable[[Any], tuple[PackedRows, PackedRows | None, None]]:
    """Return what Megatron calls for its train, validation and test datasets."""

    def provide(
        _num_samples: Any, vp_stage: int | None = None
    ) -> tuple[PackedRows, PackedRows | None, None]:
        cp_rank, cp_size = loop.context_parallel()
        shape = RowShape(
            row_tokens=data.train.plan.row_tokens,
            align_tokens=data.train.plan.align_tokens,
            pad_token=_pad_token(data.train.store),
            cp_rank=cp_rank,
            cp_size=cp_size,
        )

        def rows_of(sets: Sequence[PlannedStore], order: RowAtPosition) -> PackedRows:
            rows = [(planned.store, planned.plan.rows) for planned in sets]
            return PackedRows(rows, order, length=ENDLESS, shape=shape)

        order = row_order.training_order(args, data.train.plan, loop.batch_shape(args))
        train = rows_of([data.train], order)
        if not data.valid:
            return train, None, None
        sets = tuple(data.valid.values())
        period = args.eval_iters * args.eval_global_batch_size
        whole = WholeSet(num_rows=sum(len(planned.plan) for planned in sets), period=period)
        valid = rows_of(sets, whole)
        valid.split = loop.validation_split()
        return train, valid, None

    # Every rank builds its dataset: nothing is broadcast over tensor-parallel ranks.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _pad_token(store: TokenStore) -> int:
    """Return the id gaps are filled with: any valid id will do, masks go by position."""
    pad = store.meta.get("special_tokens", {}).get("pad")
    return int(pad) if pad is not None else 0
