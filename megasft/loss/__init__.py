"""Per-token losses to a weighted sum, its units and the reported metrics. No Megatron."""
