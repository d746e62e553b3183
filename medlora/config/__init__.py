"""Everything that a YAML file may say, as frozen pydantic models."""
