"""A model's text -> the letter that it answers, or none."""
