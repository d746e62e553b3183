"""A row -> a record: which columns mean what, options, the right answer."""
