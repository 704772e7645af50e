"""Hugging Face folders to Megatron checkpoints and back, as tables of rules."""
