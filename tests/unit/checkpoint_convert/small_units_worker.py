"""Runs a conversion in units so small that a tiny model has many; started by torchrun.

Usage: torchrun --nproc-per-node N -m tests.unit.checkpoint_convert.small_units_worker DIRECTION ...
"""

import sys

from checkpoint_convert import hf_to_megatron, megatron_to_hf, megatron_writer

if __name__ == "__main__":
    megatron_writer.UNIT_BYTES = 4096  # type: ignore[misc]
    main = {"there": hf_to_megatron.main, "back": megatron_to_hf.main}[sys.argv[1]]
    sys.exit(main(sys.argv[2:], worker=None))
