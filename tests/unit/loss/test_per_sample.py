import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from megasft.batch.assemble import assemble
from megasft.batch.context_parallel import shard
from megasft.loss.per_sample import SAMPLE_COLUMNS, add_by_sample
from tests.batches import batch_of
from tests.stores import random_samples
from tests.unit.loss.test_breakdown import some_losses


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_each_sample_gets_the_losses_of_its_own_labels_from_all_shares(cp_size: int) -> None:
    samples = random_samples(6, seed=2, longest=30)
    row = assemble(samples, row_tokens=128, align_tokens=8, pad_token=0, samples_per_row=[4, 2])
    losses = some_losses(row)
    num_documents = len(row["cu_seqlens"]) - 1
    assert num_documents == 8, "each row has a tail pad"
    rows_of_table = [5, 0, 1, 2, -1, 3, 4, -1]  # in any order
    sums = torch.zeros((6 + 1, len(SAMPLE_COLUMNS)), dtype=torch.float64)
    for rank in range(cp_size):
        here = shard({**row, "labels": np.arange(256)}, cp_rank=rank, cp_size=cp_size)["labels"]
        share = shard(row, cp_rank=rank, cp_size=cp_size)
        mine = torch.from_numpy(losses[here])
        add_by_sample(sums, mine, batch_of(share), samples=rows_of_table)

    for n, (start, end) in zip(rows_of_table, pairwise(row["cu_seqlens"]), strict=True):
        places = [t for t in range(start, end) if row["turn_tokens"][t]]
        total = math.fsum(float(losses[t]) for t in places)
        assert sums[n].tolist() == pytest.approx([total, len(places)], rel=1e-12)
    assert sums[:-1, 1].min() > 0
