"""From sliding-window attention in a configuration to Megatron's flags.

Hugging Face counts the query's own position in ``sliding_window``: a query at ``i`` sees keys
``i - sliding_window + 1 .. i``. Megatron's ``--window-size`` counts the keys before it, one less.
"""

from pathlib import Path
from typing import Literal

from checkpoint_convert.families.config import Config, not_expressible

WindowedLayers = Literal["none", "all", "listed"]
"""The layers that a family's class gives its window to: none, so that it must be absent; all; or
those that ``layer_types`` lists as ``sliding_attention``."""


def window_flags(config: Config, layers: WindowedLayers, path: Path) -> list[str]:
    """Return Megatron's flags for the window.

    Raises:
        ConversionError: The configuration has a window, or layers, that the class does not read.
    """
    window = config.get("sliding_window") or None  # Qwen2-MoE writes 0 when it has none
    kinds = list(config.get("layer_types") or ())
    known = {"full_attention", "sliding_attention"} if layers == "listed" else {"full_attention"}
    if not known.issuperset(kinds):
        raise not_expressible(
            path,
            "layer_types",
            sorted(set(kinds) - known),
            f"only {' and '.join(sorted(known))} converts",
        )
    if layers == "none" and window is not None:
        raise not_expressible(
            path, "sliding_window", window, "attention of this family sees the whole context"
        )
    has_window = [window is not None] * int(config["num_hidden_layers"])
    if layers == "listed":
        has_window = [kind == "sliding_attention" for kind in kinds]
    if not any(has_window):
        return []
    if window is None or window < 1:
        raise not_expressible(
            path, "sliding_window", window, "layer_types lists layers with a window"
        )
    flags = ["--window-size", f"{window - 1},0"]
    if not all(has_window):
        pattern = ",".join(str(int(is_there)) for is_there in has_window)
        flags += ["--window-attn-skip-freq", f"[{pattern}]"]
    return flags
