"""Names of what a converted checkpoint holds beside Megatron's own files."""

from typing import Final

MODEL_FILE: Final = "megasft_model.json"
"""Megatron's flags for the model, and its configuration."""

SIDE_FOLDER: Final = "hf"
"""Everything of the Hugging Face folder that is not weights, for the way back."""

FORMAT: Final = 1
"""Of a half-written conversion; one of another number is not gone on with."""

MANIFEST: Final = "verification.json"
"""What a verification writes; of itself it says nothing."""
