"""Does a converted checkpoint hold the same model? Tensors, configuration, files and logits.

A wrong conversion is silent: it trains, and to a worse model. Equal tensors are not enough, because
a rope table off by a constant, a norm that is left out or heads in another order are all in what
the tensors mean; equal logits are not enough, because a bit in a rare expert moves none of them. So
both are compared, and Megatron's side is what a training run builds and loads.
"""

from checkpoint_convert.verify.checks import verify
from checkpoint_convert.verify.logits import TOLERANCE
from checkpoint_convert.verify.verification import Verification, show

__all__ = ["TOLERANCE", "Verification", "show", "verify"]
