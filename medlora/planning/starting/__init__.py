"""A starting config from a folder of data."""
