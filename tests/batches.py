"""Assembled rows as the batch that the loss is given."""

from collections.abc import Sequence

import numpy as np
import torch

from megasft.batch.assemble import Columns
from megasft.schema import SFTBatch


def batch_of(columns: Columns, *, set_ids: Sequence[int] = (0,)) -> SFTBatch:
    """Return the batch of these columns, whose rows are the first of their plans.

    Args:
        columns: As ``assemble`` or ``shard`` returns them.
        set_ids: Validation set of each row; there is one row when not given.
    """
    ids = {"row_ids": np.arange(len(set_ids)), "set_ids": np.array(set_ids)}
    fields = columns | ids
    return SFTBatch(
        **{n: torch.from_numpy(np.ascontiguousarray(fields[n])) for n in SFTBatch._fields}
    )
