"""Runs a small model on every layout and compares it with plain Hugging Face in float64."""
