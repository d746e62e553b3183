"""Everything that a YAML file may hold, as frozen pydantic models."""
