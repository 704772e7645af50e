"""Names of what a converted checkpoint holds beside Megatron's own files."""

from typing import Final

FORMAT: Final = 1
"""Of a half-written conversion; one of another number is not gone on with."""

MANIFEST: Final = "verification.json"
"""What a verification writes; of itself it says nothing."""
