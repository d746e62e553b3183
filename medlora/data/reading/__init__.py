"""Files, archives, stores and the hub -> rows with their place."""
