"""Runs that are killed and resumed, and the rows they really trained, told by their tokens."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from megasft.batch.dataset import PackedRows, RowShape
from megasft.packing.plan import plan_rows
from tests.megatron.conftest import ROW_TOKENS, SEED, World
from tests.megatron.runs import scalars, torchrun

TRACKER = "latest_checkpointed_iteration.txt"
NUM_ROWS = 62
DIES_IN = 4
"""Step in which runs are killed: the third is saved and the fourth has begun."""


class Runs:
    """Runs of the worker that notes rows, in a folder of their own."""

    def __init__(self, world: World) -> None:
        self.world, self.folder = world, world.folder / "resumed"
        self.folder.mkdir(exist_ok=True)
        plan = plan_rows(world.store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
        assert len(plan) == NUM_ROWS
        shape = RowShape(row_tokens=ROW_TOKENS, align_tokens=8, pad_token=0)
        rows = [(world.store, plan.rows)]
        whole = PackedRows(rows, range(NUM_ROWS), length=NUM_ROWS, shape=shape)
        ids = [tuple(sorted(whole[row]["tokens"].tolist())) for row in range(NUM_ROWS)]
        self.row_of_tokens = {tokens: row for row, tokens in enumerate(ids)}
        assert len(self.row_of_tokens) == NUM_ROWS, "tokens must tell rows apart"
        self.order = plan.order(seed=SEED)

    def entry(self, name: str, *more: object, dies_in: int | None = None) -> dict[str, object]:
        """Describe a run of a length and batch size to be given."""
        flags = self.world.flags(name, "--eval-interval", 100)
        for flag in ("--train-iters", "--global-batch-size"):
            at = flags.index(flag)
            del flags[at : at + 2]
        record = str(self.folder / f"{name}.rows")
        return {"flags": [*flags, *map(str, more)], "record": record, "dies_in": dies_in}

    def resume(self, killed: str, name: str, *more: object) -> dict[str, object]:
        """Describe a run that continues one that was killed, and saves nothing."""
        return self.entry(name, "--load", self.folder / killed, *more)

    def start(self, world_size: int, entries: Sequence[dict[str, object]]) -> str:
        listing = self.folder / f"{Path(str(entries[0]['record'])).stem}.json"
        listing.write_text(json.dumps(entries))
        return torchrun(world_size, "-m", "tests.megatron.resume_worker", str(listing))

    def start_and_die(self, world_size: int, name: str, *more: object) -> None:
        place = self.folder / name
        saves = ("--save", place, "--save-interval", DIES_IN - 1)
        entry = self.entry(name, *saves, *more, dies_in=DIES_IN)
        with pytest.raises(AssertionError, match="Signal 9"):
            self.start(world_size, [entry])
        assert int((place / TRACKER).read_text()) == DIES_IN - 1

    def losses(self, name: str) -> dict[int, float]:
        return scalars(self.world.folder / name)["lm loss"]

    def rows(self, name: str) -> dict[int, list[int]]:
        """Put shares of context-parallel ranks together; tensor and pipeline ranks must agree."""
        shares: dict[tuple[int, int, int], dict[int, list[int]]] = defaultdict(dict)
        for path in (self.folder / f"{name}.rows").iterdir():
            seen: dict[int, int] = defaultdict(int)
            for line in path.read_text().splitlines():
                noted = json.loads(line)
                step, cp_rank = noted["step"], noted["cp_rank"]
                for tokens in noted["tokens"]:
                    share = shares[step, noted["dp_rank"], seen[step]]
                    assert share.setdefault(cp_rank, tokens) == tokens
                    seen[step] += 1
        rows = defaultdict(list)
        for (step, _, _), parts in shares.items():
            tokens = tuple(sorted(token for part in parts.values() for token in part))
            rows[step].append(self.row_of_tokens[tokens])
        return {step: sorted(found) for step, found in sorted(rows.items())}
