"""What can be wrong with training data although it builds: rules, and findings with file:line."""
