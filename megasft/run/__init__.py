"""How a run starts."""
