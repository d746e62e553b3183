"""A model answers questions."""
