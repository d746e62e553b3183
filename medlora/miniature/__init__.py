"""The embedded default: a tiny base model and a small Korean medical corpus, both made here in a few minutes."""
