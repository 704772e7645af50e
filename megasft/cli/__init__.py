"""One file per `megasft` command: arguments, one call, exit code."""
