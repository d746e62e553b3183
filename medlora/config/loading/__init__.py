"""A YAML file -> a config: overrides, places, errors in plain words."""
