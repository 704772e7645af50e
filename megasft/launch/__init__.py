"""From one file, ``run.yaml``, to running ranks: keys become flags, a backend starts them."""
