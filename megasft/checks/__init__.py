"""What can be wrong with data, a plan or a run: rules, and what asks them."""
