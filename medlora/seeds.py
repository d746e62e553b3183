"""One seed a purpose, derived from the run's seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str) -> int:
    """A seed of its own for everything that has a name, below 2**31, from the run's one seed."""
    return int.from_bytes(hashlib.sha256("/".join([str(seed), *names]).encode()).digest()[:4], "big") >> 1
