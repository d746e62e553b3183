"""A search over hyperparameters, without Ray: space, ledger, suggestions, results."""
