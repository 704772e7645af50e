"""What is wrong with a run before it starts: rules over flags, stores, model and machine."""
