"""Flags, datasets, model and forward step for Megatron's own training loop."""
