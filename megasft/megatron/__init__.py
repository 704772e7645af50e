"""The one folder that imports Megatron: flags, model, loop and CPU stand-ins."""
