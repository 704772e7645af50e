"""A row of the plan to an aligned, shifted SFTBatch, and one rank's share of it. No Megatron."""
