"""Names and meaning of what a step reports.

Megatron takes a dict of two-element tensors per micro-batch, sums each over micro-batches and over
data- and context-parallel ranks, and prints first / second. So a mean is ``[sum, count]``, and a
total is ``[value, this part's share of 1]``: the shares of all parts add up to 1. Every rank and
micro-batch reports the same names in the same order, or the all-reduce would hang.
"""

from typing import Final

LOSS: Final = "lm loss"
"""What is optimised: weighted cross entropy per unit. Megatron's own name for it."""

TOKEN_LOSS: Final = "token loss"
"""Plain cross entropy per label token, comparable between objectives and with other frameworks."""

P_CORRECT: Final = "p correct"
"""Mean probability of the right token; reported when DFT uses it."""

TURNS: Final = "turns"
SAMPLES: Final = "samples"
TOKENS: Final = "label tokens"
"""Totals of the global batch."""
