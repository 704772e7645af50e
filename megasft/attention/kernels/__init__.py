"""Attention of one block of queries and keys, forward and backward: one file per implementation."""
