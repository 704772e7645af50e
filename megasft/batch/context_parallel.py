"""One rank's share of a flat micro-batch under context parallelism. No communication.

Every rank reads the whole row from the memory map and keeps its own tokens: reading is cheap, a
broadcast is not, and the document borders stay global because attention needs them.
"""

from megasft.batch.assemble import Columns
from megasft.cp_layout import zigzag_positions
from megasft.schema import PER_TOKEN_FIELDS


def shard(batch: Columns, *, cp_rank: int, cp_size: int) -> Columns:
    """Keep the tokens this rank owns; borders stay those of the whole micro-batch.

    Args:
        batch: Fields of an ``SFTBatch``, shifted already.
        cp_rank: This rank, in ``[0, cp_size)``.
        cp_size: Ranks that share one row.

    Raises:
        AlignmentError: A document's length is not a multiple of ``2 * cp_size``.
    """
    if cp_size == 1:
        return batch
    mine = zigzag_positions(batch["cu_seqlens"], cp_rank=cp_rank, cp_size=cp_size)
    return batch | {name: batch[name][mine] for name in PER_TOKEN_FIELDS}
