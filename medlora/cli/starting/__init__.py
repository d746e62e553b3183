"""Commands for before a run: write a config, look at its plan."""
