"""What a question has cost; a module of its own, since the driver's mailbox, which keeps it, needs nothing else."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts how often each batch or question has killed an actor, outside of the actors so that it survives them.

    Failed loads of the model are limited to `actors + retries`. A successful load does not count against that limit, so
    a growing pool or a restarted actor can always load again.
    """

    def __init__(self, actors: int, retries: int) -> None:
        self.unended: Counter[str] = Counter()
        self.loads_left = actors + retries

    def begin(self, key: str) -> int:
        """How many actors have died at `key` so far."""
        self.unended[key] += 1
        return self.unended[key] - 1

    def end(self, key: str) -> None:
        """What was begun has ended, well or with an exception."""
        self.unended[key] -= 1

    def begin_load(self) -> bool:
        """Whether one more actor may load the model."""
        self.loads_left -= 1
        return self.loads_left >= 0

    def end_load(self) -> None:
        """The model is loaded."""
        self.loads_left += 1
