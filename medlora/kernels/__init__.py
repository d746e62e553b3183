"""Faster forward and backward passes; they import nothing of medlora."""
