"""Attention over packed rows: one function type, several backends, Megatron's adapter."""
