"""What several commands need: the configs that come with medlora."""

from __future__ import annotations

from pathlib import Path

import medlora


def find_config(name: str) -> Path:
    """A config that comes with medlora: in a wheel inside the package, in a checkout beside it."""
    package = Path(medlora.__file__).resolve().parent
    inside = package / "configs" / name
    return inside if inside.is_file() else package.parent / "configs" / name
