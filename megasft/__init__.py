"""Supervised fine-tuning on Megatron-Core, as a plugin, with a loss no layout can change."""

from megasft.compat import require_megatron

__version__ = "0.1.0"

require_megatron()
